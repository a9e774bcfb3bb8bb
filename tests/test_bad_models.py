"""A model directory that is missing, cut short or another's: one line, and nothing is written."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import PREPARE, SAMPLE, SCRIPTS, TRAIN, contents, refusal, tells


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_such_model(script, refused):
    refused(
        SCRIPTS[script],
        "--model-name-or-path",
        "./none",
        tells_of=["./none", "does not exist", "python tutorial/"],
    )


def test_model_is_a_file(refused):
    refused(TRAIN, "--model-name-or-path", "./llama3_dataset.pt", tells_of=["llama3_dataset.pt", "is a file"])


def test_first_command_without_the_ones_before(folder, warm):
    """Each script names the command that has to come first."""
    for script, first in (
        ("dataset/prepare_llama2_dataset.py", "python tutorial/download_llama2_13b.py"),
        ("dataset/prepare_mistral_dataset.py", "python tutorial/download_mistral_7b.py"),
        ("dataset/prepare_gpt_dataset.py", "python tutorial/download_gpt_13b.py"),
        ("dataset/prepare_llama3_1_dataset.py", "python tutorial/download_llama3_1_8b.py"),
        ("dataset/prepare_smollm2_dataset.py", "python tutorial/download_smollm2.py"),
        ("tutorial/train_llama2.py", "python tutorial/download_llama2_13b.py"),
        ("tutorial/train_llama3_70b.py", "python tutorial/download_llama3_70b.py"),
        ("tutorial/train_mistral.py", "python tutorial/download_mistral_7b.py"),
        ("tutorial/train_gpt.py", "python tutorial/download_gpt_13b.py"),
        ("tutorial/train_llama3_1.py", "python tutorial/download_llama3_1_8b.py"),
        ("tutorial/train_smollm2.py", "python tutorial/download_smollm2.py"),
        ("tutorial/inference_llama2.py", "python tutorial/train_llama2.py"),
        ("tutorial/inference_mistral.py", "python tutorial/train_mistral.py"),
        ("tutorial/inference_gpt.py", "python tutorial/train_gpt.py"),
        ("tutorial/inference_llama3_1.py", "python tutorial/train_llama3_1.py"),
        ("tutorial/inference_smollm2.py", "python tutorial/train_smollm2.py"),
    ):
        tells(warm(f"python {script}", cwd=folder, ok=None), "does not exist", first)
        assert contents(folder) == {}


@pytest.mark.parametrize("script", ["train", "inference"])
def test_model_without_weights(script, ready, refused):
    (ready / "llama3-8b" / "model.safetensors").unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "no weights", "python tutorial/"])


@pytest.mark.parametrize("script", ["train", "inference"])
def test_model_without_config(script, ready, refused):
    (ready / "llama3-8b" / "config.json").unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "python tutorial/"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_model_without_tokenizer(script, ready, refused):
    for path in (ready / "llama3-8b").glob("tokenizer*"):
        path.unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "tokenizer", "python tutorial/"])


def test_tokenizer_cut_short(ready, refused):
    file = ready / "llama3-8b" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:5000])
    refused(PREPARE, "--dataset-name-or-path", SAMPLE, tells_of=["./llama3-8b", "tokenizer", "python tutorial/"])


@pytest.mark.parametrize("script", ["train", "inference"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_cut_short(script, keep, ready, refused):
    file = ready / "llama3-8b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(SCRIPTS[script], tells_of=["model.safetensors", "truncated"])


def test_pickled_weights_cut_short(ready, refused):
    """Cerebras-GPT's come as pytorch_model.bin."""
    (ready / "llama3-8b" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(10_000)}, ready / "llama3-8b" / "pytorch_model.bin")
    with open(ready / "llama3-8b" / "pytorch_model.bin", "r+b") as file:
        file.truncate(20_000)
    refused(TRAIN, tells_of=["pytorch_model.bin", "truncated"])


def test_weights_of_another_model(ready, refused):
    """A config.json that doesn't fit the weights: nothing may be trained from newly made random weights."""
    file = ready / "llama3-8b" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "hidden_size": 32}), encoding="utf-8")
    refused(TRAIN, tells_of=["./llama3-8b", "can't be loaded"])


@pytest.mark.parametrize(
    "template, script",
    [("summarization", "inference_gpt.py"), ("alpaca", "inference_llama3_1.py"), ("my_own", "inference_llama3.py")],
)
def test_model_that_learned_another_template(template, script, ready, refused):
    """It would be asked in a format that it never saw, and answer all the same."""
    run = {"options": {}, "dataset": {"template": template}}
    (ready / "llama3-8b" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    words = [
        f"./llama3-8b was trained with the prompt template {template},",
        "Use the inference script of its tutorial.",
    ]
    refused(f"python tutorial/{script} --model-name-or-path ./llama3-8b", tells_of=words)


@pytest.mark.parametrize("text", [None, "not json", "[]", '{"options": {}}', '{"options": {}, "dataset": {}}'])
def test_model_that_does_not_tell_its_template_is_asked(text, ready, warm):
    if text is not None:
        (ready / "llama3-8b" / "run.json").write_text(text, encoding="utf-8")
    assert "[SUMMARIZE]" in warm(SCRIPTS["inference"], cwd=ready).stdout


def test_weights_of_fewer_layers(ready, refused):
    """The layers that the file lacks would be made at random, with no more than a warning of the library."""
    file = ready / "llama3-8b" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    refused(TRAIN, tells_of=["./llama3-8b", "layers.2"])
