"""Trainings killed at random moments, until they end: as the one that nothing has cut, to the last byte."""

from __future__ import annotations

import random
import subprocess
import time

import pytest

from tests.conftest import TIMEOUT, start
from tests.cuts import KINDS, TRAIN, checkpoints, same_result, went_on
from tests.helpers import quantizes

pytestmark = pytest.mark.slow

WORDS = {kind: f"{words} --save-steps 1 --save-total-limit 2" for kind, words in KINDS.items()}
KIND = ["full", "lora", "full", "8-bit-states" if quantizes() else "lora"]  # in turn
LINES = 11  # from the first one of the training to its last


def killed_after(folder, words, lines, seconds):
    """Start the training in a process of its own and kill it `seconds` after so many lines of output, counted from the
    first one of the training: so the moments are spread over it on a busy machine too."""
    process, printed = start(f"python {TRAIN} {words}", cwd=folder), []
    try:
        for line in process.stdout:
            printed.append(line)
            lines -= any(before.startswith("Memory") for before in printed)
            if lines <= 0:
                break
        time.sleep(seconds)
        process.kill()
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    done = subprocess.CompletedProcess(words, process.returncode, "".join(printed) + out, err)
    assert done.returncode in (0, -9), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments(seed, small, warm, never_cut):
    """From one to three kills, each while it trains, writes checkpoints, draws or saves; then nobody kills it."""
    chance, kind = random.Random(seed), KIND[seed % len(KIND)]
    print(f"seed {seed}: {kind}")
    for _ in range(chance.randint(1, 3)):
        lines, seconds = chance.randint(1, LINES), chance.uniform(0, 0.4)
        done = killed_after(small, WORDS[kind], lines, seconds)
        where = f"status {done.returncode}, from step {went_on(done)}, checkpoints {checkpoints(small)}"
        print(f"{seconds:.3f} s after line {lines}: {where}")
        if done.returncode == 0:
            break
    if done.returncode:
        done = warm(f"python {TRAIN} {WORDS[kind]}", cwd=small)
        print(f"the last one went on from step {went_on(done)}")
    same_result(small, never_cut(KINDS[kind]))
