"""A disk, or a memory, that is full: the system refuses, and the reader has one line, and all that was there before."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import ROOT
from tests.helpers import PREPARE, SAMPLE, contents, error_of, records, rows_of, tells, weights

pytestmark = pytest.mark.slow  # trainings of some seconds each

LIMITED = f"python {ROOT}/tests/limited.py"
TRAIN = "tutorial/train_llama3.py --batch-size 8 --max-train-steps 6 --log-interval 3 --save-steps 2"
SAVED = "llama3_summarization"


def test_a_disk_that_has_no_room_for_two_checkpoints(ready, warm):
    """One is 3.8 MB. Asked for, they are refused before the training; else it is one line."""
    words = TRAIN.replace(" --save-steps 2", "")
    before = contents(ready)
    for more in ("--save-steps 2", "--keep-best --eval-step 2"):
        done = warm(f"{LIMITED} room 5000000 {words} {more}", cwd=ready, ok=None)
        tells(done, "no room for", "checkpoints of 0.0 GB", "GB are missing", "--save-dir", "--save-steps")
        assert "Loss" not in done.stdout and contents(ready) == before
    done = warm(f"{LIMITED} room 5000000 {words}", cwd=ready)
    (line,) = [line for line in done.stdout.splitlines() if "no room" in line]
    assert "No checkpoints will be written" in line and weights(ready / SAVED)
    stopped = f"{ROOT}/tests/killed.py 15 +common.trainer:Trainer.train_step 3 {words}"
    done = warm(f"{LIMITED} room 5000000 {stopped}", cwd=ready, ok=None)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "Stopped; nothing was saved."
    done = warm(f"{LIMITED} room 9000000 {words} --save-steps 2", cwd=ready)
    assert "no room" not in done.stdout


def test_without_room_for_a_checkpoint_the_training_goes_on_and_says_so_once(ready, warm):
    """The model, of 0.6 MB, has room, a checkpoint has not."""
    done = warm(f"{LIMITED} files 1000000 {TRAIN}", cwd=ready)
    (line,) = [line for line in done.stdout.splitlines() if "Could not write" in line]
    assert "checkpoint-2 (" in line
    assert "(File too large)" in line or "(No space left on device)" in line  # torch.save does not tell
    assert line.endswith("). Training continues without it.")
    cut = weights(ready / SAVED)
    assert not [path for path in (ready / SAVED).iterdir() if "checkpoint" in path.name]
    warm(f"python {TRAIN}", cwd=ready)
    assert weights(ready / SAVED) == cut


def test_a_checkpoint_that_has_no_room_leaves_the_one_before_it(ready, warm):
    warm(f"python {ROOT}/tests/killed.py 9 +common.trainer:Trainer.train_step 3 {TRAIN}", cwd=ready, ok=None)
    before = contents(ready / SAVED / "checkpoint-2")
    command = f"{ROOT}/tests/killed.py 9 +common.trainer:Trainer.train_step 3 {TRAIN}"  # after step 5
    done = warm(f"{LIMITED} files 1000000 {command}", cwd=ready, ok=None)
    assert "Could not write llama3_summarization/checkpoint-4 (" in done.stdout
    assert contents(ready / SAVED / "checkpoint-2") == before
    warm(f"python {TRAIN}", cwd=ready)
    assert [record["step"] for record in records(ready / SAVED) if "loss" in record] == [3, 6]


def test_without_room_for_the_model_the_checkpoint_stays_and_the_same_command_only_saves(ready, warm):
    warm(f"python {ROOT}/tests/killed.py 9 -model.save:_check_headers 1 {TRAIN}", cwd=ready, ok=None)
    done = warm(f"{LIMITED} files 100000 {TRAIN}", cwd=ready, ok=None)
    tells(done, SAVED, "File too large", "Free disk space", "run the same command again.")
    assert [path.name for path in (ready / SAVED).glob("checkpoint-*")] == ["checkpoint-6"]
    done = warm(f"python {TRAIN}", cwd=ready)
    assert "Resuming from step 6 of 6" in done.stdout and "Loss:" not in done.stdout
    again = weights(ready / SAVED)
    warm(f"python {TRAIN}", cwd=ready)
    assert weights(ready / SAVED) == again


def test_a_dataset_file_without_room_leaves_the_old_one(ready, warm):
    before = contents(ready)
    script = PREPARE.replace("python ", "")
    done = warm(f"{LIMITED} files 10000 {script} --dataset-name-or-path {SAMPLE}", cwd=ready, ok=None)
    tells(done, "File too large", "Free disk space")
    assert contents(ready) == before


@pytest.mark.parametrize("adapter", ["", "--use-lora --lora-dropout 0.1"])
def test_a_full_memory_halves_the_micro_batches_and_nothing_of_the_result(adapter, ready, warm):
    warm(f"{PREPARE} --dataset-name-or-path {SAMPLE} --block-size 2000", cwd=ready)
    words = f"--block-size 2000 --batch-size 16 --max-train-steps 2 --log-interval 1 --eval-rows 0 {adapter}"
    command = f"tutorial/train_llama3.py {words} --micro-batch-tokens 32000"
    full, tokens = r"Out of memory: micro-batches reduced to (\d+) tokens\.", []
    for megabytes in range(40, 400, 40):  # how much it takes depends on the machine
        done = warm(f"{LIMITED} memory {megabytes}000000 {command}", cwd=ready, ok=None)
        tokens = re.findall(full, done.stdout.split("[Step 1/")[0])
        if done.returncode == 0 and tokens == re.findall(full, done.stdout):
            break
        assert done.returncode == 0 or "Out of memory" in error_of(done)
    assert tokens and int(tokens[-1]) < 32000
    run = json.loads((ready / SAVED / "run.json").read_text(encoding="utf-8"))
    assert run["options"]["micro_batch_tokens"] == int(tokens[-1])
    cut = [record["loss"] for record in records(ready / SAVED)]
    # the random states are those of the step's begin again: dropout drops the same as where all went well at once
    warm(f"{LIMITED} memory 9000000000 tutorial/train_llama3.py {words} --micro-batch-tokens {tokens[-1]}", cwd=ready)
    assert [record["loss"] for record in records(ready / SAVED)] == cut


def test_a_memory_too_small_for_one_row_ends_with_the_options_that_help(ready, warm):
    article = " ".join(row["article"] for row in rows_of("train")[:8])
    rows = [{"article": article, "highlights": "many articles"}] * 8
    (ready / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    warm(f"{PREPARE} --dataset-name-or-path long.jsonl --block-size 8000", cwd=ready)
    words = "--block-size 8000 --batch-size 2 --max-train-steps 3 --eval-rows 0 --micro-batch-tokens 16000"
    done = warm(f"{LIMITED} memory 1000000 tutorial/train_llama3.py {words}", cwd=ready, ok=None)
    assert "Out of memory: micro-batches reduced to " in done.stdout
    tells(done, "Out of memory", "--use-lora", "--gradient-checkpointing")
    assert "--micro-batch-tokens" not in error_of(done)
