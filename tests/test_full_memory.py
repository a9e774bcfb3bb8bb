"""A memory that is full: one line that says what was needed, what there is, and which options of this script help."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.helpers import INFERENCE, TRAIN, contents, error_of

# A script on a machine whose memory gives out at one call; in torch's own words.
WITH = """
import runpy, shutil, sys
import torch, transformers


def full(*_, **__):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: error 12")


place, *sys.argv = sys.argv[1:]
if place == "loading":
    transformers.AutoModelForCausalLM.from_pretrained = full
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**15, 0, 10**15)
elif place == "training":
    torch.Tensor.backward = full
else:
    transformers.GenerationMixin.generate = full
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DATA = "--dataset-name-or-path ./llama3_dataset.pt"
EVALUATE = f"python tutorial/evaluate.py --rows 2 {DATA} --model-name-or-path ./llama3-8b --max-new-tokens 2"
OF_TRAINING = {"--use-lora", "--load-in-4bit", "--gradient-checkpointing", "--micro-batch-tokens"}


@pytest.fixture
def full(ready, warm):
    """A function that runs a command whose memory gives out; the reader's line, and the options that it names."""
    (ready / "with.py").write_text(WITH)

    def full(place, command):
        line = error_of(warm(command.replace("python ", f"python with.py {place} "), cwd=ready, ok=None))
        named = set(re.findall(r"--[\w-]+", line.partition("To save memory, use ")[2]))
        script = command.split()[1]
        assert named <= set(re.findall(r"--[\w-]+", warm(f"python {script} --help", cwd=ready).stdout)), line
        assert "Out of memory" in line and len(line) < 500
        return line, named

    return full


def test_in_a_training_each_option_that_is_not_taken_yet_helps(full, ready):
    before = contents(ready / "llama3-8b")
    line, named = full("training", TRAIN)
    assert named == OF_TRAINING - {"--micro-batch-tokens"}  # each row was alone in the end
    assert re.search(r"weights, gradients and optimizer states take \d+\.\d GB, the device has \d+\.\d GB\. ", line)
    _, named = full("training", f"{TRAIN} --use-lora --gradient-checkpointing")
    assert named == {"--load-in-4bit"}
    assert contents(ready / "llama3-8b") == before and not (ready / "llama3_summarization" / "run.json").exists()


@pytest.mark.parametrize("command", [f"{INFERENCE} --model-name-or-path ./llama3-8b", TRAIN])
def test_weights_that_do_not_fit_are_said_with_their_size(command, full):
    line, named = full("loading", command)
    assert re.search(r"the weights of \./llama3-8b take \d+\.\d GB, the device has \d+\.\d GB\. ", line)
    assert "--load-in-4bit" in named


def test_where_the_weights_alone_are_too_large_no_smaller_piece_of_the_data_is_advised(full, ready):
    """A file with a tensor of holes, larger than any main memory; in float32 it is twice as large as on the disk."""
    path = ready / "llama3-8b" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start = len(content) - 8 - length
    header["hole"] = {"dtype": "BF16", "shape": [5 * 10**12], "data_offsets": [start, start + 10**13]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + start + 10**13)
    line, named = full("loading", TRAIN)
    assert "take 20000.0 GB" in line and named == {"--use-lora", "--load-in-4bit"}
    line, named = full("loading", f"{INFERENCE} --model-name-or-path ./llama3-8b")
    assert "take 10000.0 GB" in line or "take 20000.0 GB" in line  # by whether this CPU has bfloat16
    assert named == {"--load-in-4bit"}


def test_in_an_answer(full):
    _, named = full("answering", f"{INFERENCE} --model-name-or-path ./llama3-8b")
    assert named == {"--load-in-4bit", "--max-new-tokens"}


def test_in_an_evaluation(full, ready):
    pytest.importorskip("rouge_score")
    shutil.copytree(ready / "llama3-8b", ready / "base")
    _, named = full("answering", f"{EVALUATE} --base-model-name-or-path ./base")
    assert named == {"--load-in-4bit", "--batch-rows", "--max-new-tokens"}
