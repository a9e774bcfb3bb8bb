"""Adapters, and their bases, that are missing, damaged or another's: one line, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.support.exit import UserError
from common.support.model_dir import require_adapter, require_model
from model.load import load_model
from model.tiny import write_tiny
from tests.helpers import INFERENCE, TRAIN, change_dataset, no_rows, refusal


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


LORA = f"{TRAIN} --use-lora"
ADAPTER = "--model-name-or-path ./adapter"
MERGE, COMPARE = f"python tutorial/merge_adapter.py {ADAPTER}", f"python tutorial/compare_adapter.py {ADAPTER}"
COMPARE += " --max-new-tokens 2 --dataset-name-or-path ./llama3_dataset.pt"
LOADERS = {"inference": f"{INFERENCE} {ADAPTER}", "merge": MERGE, "compare": COMPARE, "train": f"{LORA} {ADAPTER}"}


@pytest.fixture(scope="module")
def trained(base, warm, tmp_path_factory):
    """An adapter on `./llama3-8b`."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    warm(LORA, "--save-dir", directory, cwd=base)
    return directory


@pytest.fixture
def adapter(ready, trained):
    """The adapter as ./adapter beside its base."""
    return shutil.copytree(trained, ready / "adapter")


def configure(adapter, **changed):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, **changed}), encoding="utf-8")


def raises(words, function, *arguments):
    """The function refuses in one line that holds each of `words`. In this process: a command takes half a second."""
    with pytest.raises(UserError) as error:
        function(*map(str, arguments))
    line = str(error.value)
    assert not [word for word in words if word not in line], line
    assert "\n" not in line and not re.search(r"[:,(]\.|[:,(]$", line), line


def test_target_modules_that_the_model_lacks(refused):
    have = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    words = ("--lora-target-modules", "q_proj", "c_attn")
    refused(LORA, *words, tells_of=["--lora-target-modules c_attn", "./llama3-8b", have, "all-linear"])


def test_training_all_weights_of_an_adapter(adapter, refused):
    words = ["./adapter is an adapter", "python tutorial/merge_adapter.py --model-name-or-path ./adapter", "--use-lora"]
    refused(f"{TRAIN} {ADAPTER}", tells_of=words)


@pytest.mark.parametrize("script", ["merge", "compare"])
def test_a_whole_model_in_place_of_an_adapter(script, refused):
    words = ["./llama3-8b is not an adapter", "--use-lora"]
    refused(LOADERS[script].replace("./adapter", "./llama3-8b"), tells_of=words)


def test_adapter_whose_base_is_missing(adapter, ready, refused):
    (ready / "llama3-8b").rename(ready / "moved")
    words = ["./llama3-8b does not exist", "base model of the adapter ./adapter", "./adapter/adapter_config.json"]
    for command in LOADERS.values():
        refused(command, tells_of=words)
    configure(adapter, base_model_name_or_path=str(ready / "moved"))
    (ready / "moved" / "model.safetensors").unlink()
    for function in (require_model, require_adapter):
        raises(
            ["moved has no weights", f"base model of the adapter {adapter}", "adapter_config.json"], function, adapter
        )


def test_adapter_whose_base_is_another_model(adapter, ready, refused):
    """Of the same shape, it would be taken without a word."""
    write_tiny("llama3", ready / "llama3-8b", seed=1)
    for command in LOADERS.values():
        refused(command, tells_of=["./adapter", "other weights than those in ./llama3-8b", "adapter_config.json"])


def test_adapter_weights_cut_short(adapter, refused):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    configure(adapter, base_model_name_or_path=str(adapter.parent / "llama3-8b"))
    for keep in (0, 5, 1000, -1):
        file.write_bytes(whole[:keep])
        raises([f"{file} is truncated", "train the adapter again"], require_model, adapter)
    refused(LOADERS["inference"], tells_of=["adapter/adapter_model.safetensors", "truncated", "train the adapter"])


@pytest.mark.parametrize("script", LOADERS)
def test_adapter_without_weights(script, adapter, refused):
    (adapter / "adapter_model.safetensors").unlink()
    refused(LOADERS[script], tells_of=["adapter/adapter_model.safetensors is missing", "train the adapter again"])


def test_adapter_config_that_is_damaged(adapter, refused):
    file = adapter / "adapter_config.json"
    for text in (b"", b"no", b"[1]", b'"text"', b"{}", b'{"base_model_name_or_path": null}', b"\xff", b"{"):
        file.write_bytes(text)
        raises([f"{file} is damaged: train the adapter again"], require_model, adapter)
    for command in (LOADERS["inference"], f"{LORA} {ADAPTER}"):
        refused(command, tells_of=["adapter/adapter_config.json is damaged", "train the adapter again"])


def test_adapter_that_does_not_fit_its_base(adapter, ready, trained, refused):
    weights = load_file(adapter / "adapter_model.safetensors")  # with no facts in the metadata, as of another tool
    save_file({name: weight[:3] for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    words = ["./adapter can't be loaded on ./llama3-8b", "size mismatch", "Train it again"]
    refused(LOADERS["inference"], tells_of=words)
    for changed in ({"peft_type": "none"}, {"r": "many"}, {"target_modules": ["none"]}, {"r": 3}):
        shutil.copy(trained / "adapter_config.json", adapter)
        configure(adapter, base_model_name_or_path=str(ready / "llama3-8b"), **changed)
        words = [f"The adapter {adapter} can't be loaded on {ready / 'llama3-8b'}", "Train it again"]
        raises(words, lambda path: load_model(path, torch.device("cpu")), adapter)


def test_adapter_that_learned_another_template(adapter, refused):
    """The adapter's own file tells, with no run.json beside it."""
    (adapter / "run.json").unlink()
    words = ["./adapter was trained with the prompt template summarization", "korean_alpaca"]
    words += ["Use the inference script of its tutorial."]
    refused(f"python tutorial/inference_llama3_1.py {ADAPTER}", tells_of=words)


def test_adapter_without_tokenizer(adapter, refused):
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    refused(LOADERS["inference"], tells_of=["./adapter has no tokenizer"])


@pytest.mark.parametrize("place", ["./adapter", "./llama3-8b"])
def test_a_merged_model_never_takes_the_place_of_what_it_is_made_of(place, adapter, refused):
    refused(MERGE, "--save-dir", place, tells_of=[f"--save-dir {place}", "another"])


def test_comparison_without_a_dataset_file(adapter, ready, refused):
    (ready / "llama3_dataset.pt").unlink()
    refused(COMPARE, tells_of=["./llama3_dataset.pt", "--dataset-name-or-path"])


def test_comparison_by_a_dataset_of_another_tokenizer(adapter, refused):
    change_dataset(
        adapter.parent / "llama3_dataset.pt",
        lambda document: document["meta"].update(tokenizer="0" * 16, model="./smollm2-135m"),
    )
    refused(COMPARE, tells_of=["llama3_dataset.pt", "another tokenizer", "./smollm2-135m"])


def test_comparison_without_held_out_rows(adapter, refused):
    change_dataset(adapter.parent / "llama3_dataset.pt", lambda document: document.update(validation=no_rows()))
    refused(COMPARE, tells_of=["llama3_dataset.pt has no held-out rows", "20 rows or more"])


def test_comparison_beyond_the_models_positions(adapter, refused):
    refused(COMPARE, "--max-new-tokens", 8192, tells_of=["--max-new-tokens 8192", "8192 positions"])
