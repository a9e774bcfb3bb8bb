"""Code that comes with a model or with data is never run: not with `y` on standard input either, and nobody is asked.

The code here writes a file when it runs.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import INFERENCE, PREPARE, SAMPLE, TRAIN, error_of, tells

CODE = "from pathlib import Path\n\nPath({!r}).touch()\n"
CLASSES = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class StrangeConfig(LlamaConfig):
    model_type = "strange"


class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig


class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""
OF_CONFIG = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
ASKS = "requires trust_remote_code"
MODEL, DATA = "--model-name-or-path ./llama3-8b", "--dataset-name-or-path ./llama3_dataset.pt"
SCRIPTS = {
    "train": TRAIN,
    "prepare": f"{PREPARE} {MODEL} --dataset-name-or-path {SAMPLE} --save-path new.pt",
    "inference": f"{INFERENCE} {MODEL}",
    "evaluate": f"python tutorial/evaluate.py {MODEL} --base-model-name-or-path ./llama3-8b {DATA}",
    "merge": "python tutorial/merge_adapter.py --model-name-or-path ./adapter --save-dir ./merged",
    "compare": f"python tutorial/compare_adapter.py --model-name-or-path ./adapter {DATA}",
}


def change(file, **more):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **more}), encoding="utf-8")


def config_needs_code(model):
    change(model / "config.json", model_type="strange", auto_map=OF_CONFIG)


def tokenizer_needs_code(model):
    mapped = {"AutoTokenizer": [None, "strange.StrangeTokenizer"]}
    change(model / "tokenizer_config.json", tokenizer_class="StrangeTokenizer", auto_map=mapped)


@pytest.fixture
def model(ready):
    """./llama3-8b with a strange.py in it, which nothing names yet; ./adapter is on it."""
    folder = ready / "llama3-8b"
    (folder / "strange.py").write_text(CODE.format(str(ready / "ran")) + CLASSES)
    (ready / "adapter").mkdir()
    base = {"base_model_name_or_path": "./llama3-8b", "peft_type": "LORA"}
    (ready / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    save_file({"a": torch.zeros(1)}, ready / "adapter" / "adapter_model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (ready / "adapter" / name).write_bytes((folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_that_needs_code(script, model, ready, warm):
    config_needs_code(model)
    done = warm(SCRIPTS[script], cwd=ready, ok=None, typed="y\n" * 9)
    assert not (ready / "ran").exists()
    tells(done, ASKS)
    assert "[y/N]" not in done.stdout + done.stderr


def test_a_tokenizer_that_needs_code(model, ready, warm):
    """Some releases of transformers take the tokenizer without its code, which is right as well."""
    tokenizer_needs_code(model)
    done = warm(SCRIPTS["inference"], cwd=ready, ok=None, typed="y\n" * 9)
    assert not (ready / "ran").exists() and "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0 or ASKS in error_of(done)


def test_a_model_that_names_code_and_needs_none(model, ready, warm):
    """As Falcon's and Phi's on the hub: transformers has the same by now."""
    change(model / "config.json", auto_map=OF_CONFIG)
    done = warm(SCRIPTS["inference"], cwd=ready, typed="y\n" * 9)
    assert not (ready / "ran").exists()
    assert "[SUMMARIZE]" in done.stdout and "[y/N]" not in done.stdout


class Runs:
    """In a pickle it is a call of open(), which makes the file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside safetensors"])
@pytest.mark.parametrize("script", ["train", "inference"])
def test_pickled_weights_that_run_something(script, whole, ready, warm):
    """They are unpickled as tensors only, and where there is a safetensors file not at all."""
    model = ready / "llama3-8b"
    weights = {"model.embed_tokens.weight": torch.zeros(2, 2), "more": Runs(str(ready / "ran"))}
    torch.save(weights, model / "pytorch_model.bin")
    if not whole:
        (model / "model.safetensors").unlink()
    done = warm(SCRIPTS[script], cwd=ready, ok=None)
    assert not (ready / "ran").exists()
    if whole:
        assert done.returncode == 0, done.stderr
    else:
        error_of(done)


def test_a_model_of_the_hub_that_needs_code(model, ready, warm, warm_hub):
    config_needs_code(model)
    warm_hub.repos["models"]["org/strange"] = {file.name: file.read_bytes() for file in model.iterdir()}
    words = f"--model-name-or-path org/strange --dataset-name-or-path {SAMPLE} --save-path new.pt"
    try:
        done = warm(f"{PREPARE} {words}", cwd=ready, ok=None, typed="y\n" * 9)
    finally:
        del warm_hub.repos["models"]["org/strange"]
    assert not (ready / "ran").exists() and not (ready / "new.pt").exists()
    tells(done, "org/strange", ASKS)


def test_data_of_the_hub_with_a_loading_script(ready, warm, warm_hub):
    script = CODE.format(str(ready / "ran")).encode()
    warm_hub.repos["datasets"]["org/scripted"] = {"scripted.py": script, "README.md": b"no data, but a script"}
    try:
        done = warm(f"{PREPARE} --dataset-name-or-path org/scripted", cwd=ready, ok=None, typed="y\n" * 9)
    finally:
        del warm_hub.repos["datasets"]["org/scripted"]
    assert not (ready / "ran").exists()
    tells(done, "org/scripted could not be loaded")


@pytest.mark.parametrize("name", ["scripted", "scripted/scripted.py"])
def test_a_folder_with_a_loading_script(name, ready, warm):
    (ready / "scripted").mkdir()
    (ready / "scripted" / "scripted.py").write_text(CODE.format(str(ready / "ran")))
    done = warm(f"{PREPARE} --dataset-name-or-path {name}", cwd=ready, ok=None, typed="y\n" * 9)
    assert not (ready / "ran").exists()
    tells(done, name)
