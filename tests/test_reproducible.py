"""The same command gives the same model, from any folder, by each spelling of an option, in as many steps as told."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.conftest import ROOT, run
from tests.helpers import adapter_weights, needs_bitsandbytes, records, steps_in, weights

SHORT = "--batch-size 8 --max-train-steps 1 --eval-rows 0"


def losses(directory):
    """What of a training's log must repeat: all but the times."""
    times = ("duration", "tokens_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records(directory)]


@pytest.mark.parametrize("spelling", ["--save-dir", "--save-model-dir", "--save-path", "--model-save-path"])
def test_spellings_of_the_save_directory(spelling, ready, warm):
    done = warm(f"python tutorial/train_llama3.py {SHORT} {spelling} ./mine/here", cwd=ready)
    assert done.stdout.splitlines()[-1] == "Model saved in ./mine/here"
    assert weights(ready / "mine" / "here")
    assert not (ready / "llama3_summarization").exists()


def test_steps_are_rows_by_batch_size_an_epoch(ready, warm):
    """64 rows in batches of 20 are 3 steps an epoch; the last step has its line, whatever the interval."""
    words = "--batch-size 20 --epochs 3 --log-interval 4 --eval-step 3 --eval-rows 3"
    done = warm(f"python tutorial/train_llama3.py {words}", cwd=ready)
    assert steps_in(done.stdout) == [(4, 9), (8, 9), (9, 9)]
    log = records(ready / "llama3_summarization")
    assert [record["step"] for record in log if "held_out_loss" in record] == [0, 3, 6, 9]
    lengths = torch.load(ready / "llama3_dataset.pt")["train"]["offsets"].diff()
    assert set(lengths.tolist()) == {128}
    tokens = [record["duration"] * record["tokens_per_second"] for record in log if "loss" in record]
    assert tokens == [pytest.approx(128 * 20 * steps, rel=1e-4) for steps in (4, 4, 1)]  # the log has six digits


def test_the_same_command_gives_the_same_model(ready, warm):
    """Byte by byte, in processes of their own; another seed gives another one."""
    command = "python tutorial/train_llama3.py --batch-size 8 --max-train-steps 4 --micro-batch-tokens 512"
    saved, made = ready / "llama3_summarization", []
    for _ in range(2):
        run(command, cwd=ready)
        made.append((weights(saved), losses(saved)))
    assert made[0] == made[1]
    warm(f"{command} --seed 1", cwd=ready)
    assert weights(saved) != made[0][0]
    again, first = ([record["loss"] for record in one if "loss" in record] for one in (losses(saved), made[0][1]))
    assert len(again) == len(first) and all(one != other for one, other in zip(again, first))


@pytest.mark.slow
@needs_bitsandbytes
def test_the_same_command_gives_the_same_adapter(ready, warm):
    """Whatever the order of names in a set, which is another one in each process of Python; another seed, another."""
    command = "python tutorial/train_llama3.py --use-lora --load-in-4bit --batch-size 8 --max-train-steps 2"
    saved, made = ready / "llama3_summarization", []
    for go, seed in ((run, 0), (warm, 0), (warm, 1)):
        go(f"{command} --seed {seed}", cwd=ready)
        made.append((adapter_weights(saved), losses(saved)))
    first, second, other = (weights for weights, _ in made)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert made[0][1] == made[1][1] != made[2][1]
    assert not [name for name in first if torch.equal(first[name], other[name])]


def test_runs_from_any_folder(base, tmp_path, warm):
    """The scripts find the repository by their own place; the default paths are those of the working directory."""
    shutil.copytree(base / "llama3-8b", tmp_path / "llama3-8b")
    sample = ROOT / "dataset" / "samples" / "cnn_dailymail"
    words = ("--dataset-name-or-path", sample, "--block-size", 64)
    warm(f"python {ROOT}/dataset/prepare_llama3_dataset.py", *words, cwd=tmp_path)
    warm(f"python {ROOT}/tutorial/train_llama3.py {SHORT}", cwd=tmp_path)
    warm(f"python {ROOT}/tutorial/inference_llama3.py --max-new-tokens 2", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"llama3-8b", "llama3_dataset.pt", "llama3_summarization"}
