"""A memory that is full: one line that says what was needed, what there is, and which options of this script help."""

from __future__ import annotations

import re
import shutil

import pytest

from common.support.exit import is_out_of_memory
from tests.helpers import INFERENCE, TRAIN, contents, error_of

# A script on a machine whose memory gives out at one call; in torch's own words.
WITH = """
import runpy, shutil, sys
import torch, transformers


def full(*_, **__):
    raise RuntimeError(MESSAGE)


MESSAGE = "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: error 12"
place, *sys.argv = sys.argv[1:]
if place == "loading":
    transformers.AutoModelForCausalLM.from_pretrained = full
    shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**15, 0, 10**15)
elif place == "training":
    torch.Tensor.backward = full
elif place == "onednn":
    MESSAGE = "could not create a primitive"
    torch.Tensor.backward = full
elif place == "merging":
    sys.path.insert(0, ".")
    import common.device

    common.device.total_memory = lambda _: 100_000
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
    assert re.search(r"the training does not fit into the device's \d+\.\d GB\. ", line)
    assert "oneDNN" not in line
    line, named = full("onednn", f"{TRAIN} --use-lora --gradient-checkpointing")
    assert named == {"--load-in-4bit"}
    assert line.endswith("If memory was free, oneDNN fails on this CPU: set ONEDNN_MAX_CPU_ISA=AVX2.")
    assert contents(ready / "llama3-8b") == before and not (ready / "llama3_summarization" / "run.json").exists()


@pytest.mark.parametrize("command", [f"{INFERENCE} --model-name-or-path ./llama3-8b", TRAIN])
def test_a_model_that_does_not_fit_is_named(command, full):
    line, named = full("loading", command)
    assert re.search(r"the model \./llama3-8b does not fit into the device's \d+\.\d GB\. ", line)
    assert "--load-in-4bit" in named


def test_a_merge_that_does_not_fit_is_refused_before_it_loads_the_model(ready, warm):
    """The 12.7 GB of a free notebook would not do for Llama 3.1, and the system would end the notebook."""
    (ready / "with.py").write_text(WITH)
    warm(f"{TRAIN} --use-lora --max-train-steps 1 --save-dir adapter", cwd=ready)
    words = "tutorial/merge_adapter.py --model-name-or-path adapter --save-dir merged"
    line = error_of(warm(f"python with.py merging {words}", cwd=ready, ok=None))
    assert re.search(r"Merging takes \d\.\d GB of main memory, and this machine has \d\.\d GB\. ", line)
    assert not (ready / "merged").exists()


def test_in_an_answer(full):
    _, named = full("answering", f"{INFERENCE} --model-name-or-path ./llama3-8b")
    assert named == {"--load-in-4bit", "--max-new-tokens"}


def test_in_an_evaluation(full, ready):
    pytest.importorskip("rouge_score")
    shutil.copytree(ready / "llama3-8b", ready / "base")
    _, named = full("answering", f"{EVALUATE} --base-model-name-or-path ./base")
    assert named == {"--load-in-4bit", "--batch-rows", "--max-new-tokens"}


@pytest.mark.parametrize(
    "message, full",
    [
        ("could not create a primitive", True),
        ("could not create a primitive descriptor for a matmul primitive", False),  # unslothai/unsloth, issue 3292
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_which_errors_are_a_full_memory(message, full):
    assert is_out_of_memory(RuntimeError(message)) == full
