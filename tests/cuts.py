"""What the tests of cut trainings share: the trainings, how one is cut and goes on, and when two ended alike."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers import adapter_weights, records, weights

SAVED = "llama3_summarization"
# 64 rows in batches of 20: 3 steps an epoch, and 4 rows are left; a step is 3 micro-batches, the held-out rows are 2
SHORT = "--batch-size 20 --max-train-steps 7 --log-interval 3 --eval-step 2 --eval-rows 9 --micro-batch-tokens 384"
LORA = f"{SHORT} --use-lora --lora-r 8 --lora-dropout 0.1"
KINDS = {
    "full": SHORT,
    "lora": f"{LORA} --lr-scheduler cosine --warmup-steps 2",
    "4-bit": f"{LORA} --load-in-4bit",
    "8-bit-states": f"{LORA} --load-in-4bit --lora-r 64",  # bitsandbytes keeps tensors below 4,096 numbers in 32 bit
}
TRAIN = "tutorial/train_llama3.py"
KILLED = f"{ROOT}/tests/killed.py"
GOES_ON = re.compile(r"^Resuming from step (\d+) of (\d+): (\S+)$", re.M)


def train(warm, folder, words, cut="", ok=True):
    """Run the training; cut: `SIGNAL PLACE COUNT` of tests/killed.py."""
    before = f"{KILLED} {cut} " if cut else ""
    return warm(f"python {before}{TRAIN} {words}", cwd=folder, ok=None if cut else ok)


def killed(done):
    """Assert that the process was killed, and not ended by itself."""
    assert done.returncode == -9, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def went_on(done):
    """The step from which a run went on; 0 where it began anew."""
    found = GOES_ON.search(done.stdout)
    return int(found[1]) if found else 0


def checkpoints(folder):
    """The steps of the checkpoints in the training's directory, in order."""
    return sorted(int(path.name[len("checkpoint-") :]) for path in (folder / SAVED).glob("checkpoint-*"))


def scratch(folder):
    """What lies hidden in and beside the training's directory, the libraries' folders apart."""
    hidden = [path.name for place in (folder, folder / SAVED) for path in place.glob(".*")]
    return sorted(name for name in hidden if name != ".hf_home")


def losses(folder):
    """What of a training's log must repeat: all but the times."""
    times = ("duration", "tokens_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records(folder / SAVED)]


def tokens(folder):
    """How many tokens each log line tells of."""
    lines = [record for record in records(folder / SAVED) if "loss" in record]
    return [line["duration"] * line["tokens_per_second"] for line in lines]


def same_weights(folder, other):
    if (other / SAVED / "model.safetensors").is_file():
        assert weights(folder / SAVED) == weights(other / SAVED)
    else:  # the order of the header's metadata is another one in each process
        one, two = adapter_weights(folder / SAVED), adapter_weights(other / SAVED)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same_result(folder, other):
    """Assert that the training in `folder` has ended as that in `other`, which was never cut, and has left no more."""
    same_weights(folder, other)
    assert losses(folder) == losses(other)
    assert tokens(folder) == pytest.approx(tokens(other), rel=1e-4)  # the log has six digits
    picture = "training_loss.png"  # of the same records the same to the last byte
    assert (folder / SAVED / picture).read_bytes() == (other / SAVED / picture).read_bytes()
    names = [sorted(path.name for path in (place / SAVED).iterdir()) for place in (folder, other)]
    assert names[0] == names[1]
    assert not scratch(folder) and not checkpoints(folder)


def copy_of(folder, target):
    """A copy of a working directory, its links to the repository kept."""
    shutil.copytree(folder, target, symlinks=True, ignore=shutil.ignore_patterns(".training.*"))
    return target
