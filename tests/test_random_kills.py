"""Trainings killed at random moments, until they end: as the one that nothing has cut, to the last byte."""

from __future__ import annotations

import random
import subprocess
import time

import pytest

from tests.conftest import start
from tests.cuts import KINDS, SAVED, TRAIN, checkpoints, same_result, went_on
from tests.helpers import needs_bitsandbytes

pytestmark = pytest.mark.slow

KILLS = 4  # of one training at most, then it may end
WORDS = {kind: f"{words} --save-steps 1 --save-total-limit 2" for kind, words in KINDS.items()}


def killed_after(folder, words, first, seconds):
    """Start the training in a process of its own, kill it `seconds` after its first line of output (a line that begins
    with `first`) and return (whether it was killed, what it printed)."""
    process = start(f"python {TRAIN} {words}", cwd=folder)
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if line.startswith(first):
                break
        time.sleep(seconds)
        process.kill()
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    done = subprocess.CompletedProcess(words, process.returncode, "".join(printed) + out, err)
    assert done.returncode in (0, -9), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments(seed, small, warm, never_cut):
    """Kills from the first line of a run on: while it loads, trains, writes checkpoints, draws and saves."""
    chance = random.Random(seed)
    kind = ("full", "lora", "full", "8-bit-states")[seed % 4]
    if kind == "8-bit-states" and needs_bitsandbytes.args[0]:
        kind = "lora"
    longest, steps = 2.5, []
    for _ in range(KILLS):
        seconds = chance.uniform(0, longest)
        done = killed_after(small, WORDS[kind], "Device", seconds)
        steps.append((round(seconds, 3), went_on(done), checkpoints(small)))
        print(f"seed {seed}, {kind}: killed {seconds:.3f} s after its begin, status {done.returncode}, {steps[-1]}")
        if done.returncode == 0:
            break
    while done.returncode:  # the last time nobody kills it
        done = warm(f"python {TRAIN} {WORDS[kind]}", cwd=small)
        print(f"seed {seed}: the last one went on from step {went_on(done)}")
    assert (small / SAVED / "run.json").is_file()
    same_result(small, never_cut(KINDS[kind]))
