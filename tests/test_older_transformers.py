"""What is saved opens in every transformers from 4.40 on: older keys in config.json, the base's own tokenizer files.

Whether the older releases compute the same is `make test-stack`'s part: tests/opened_by_older.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from common.tokenization import load_tokenizer
from model.load import load_model
from model.lora import add_lora
from model.save import TOKENIZER_FILES, add_old_config_keys, save_model, save_tokenizer
from tests.helpers import KINDS

CPU = torch.device("cpu")
# whose tokenizer is of another class with their config.json than without
BY_CONFIG = {"mistral"} if int(transformers.__version__.split(".")[0]) >= 5 else set()


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def saved(base, to, how):
    """A result of `base` in the directory `to`: all weights, an adapter, or the two merged."""
    model, tokenizer = load_model(str(base), CPU, None, bits=0), load_tokenizer(str(base))
    if how != "full":
        model = add_lora(model, str(base), 4, 8, 0.0, ["all-linear"])
    if how == "merged":
        model = model.merge_and_unload()
    save_model(model, tokenizer, str(to), base=str(base))
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_each_key_of_the_base_with_its_value(kind, stand_ins, tmp_path):
    base, result = (
        read(place / "config.json") for place in (stand_ins[kind], saved(stand_ins[kind], tmp_path / "r", "full"))
    )
    base.pop("transformers_version", None)
    base.pop("_name_or_path", None)
    assert base["torch_dtype"]  # as the hub's files have it
    assert {key: result.get(key) for key in base} == base
    assert result["dtype"] == result["torch_dtype"]


@pytest.mark.parametrize("how", ["full", "adapter", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_files_are_the_stand_ins_byte_for_byte(kind, how, stand_ins, tmp_path):
    result = saved(stand_ins[kind], tmp_path / "r", how)
    for name in TOKENIZER_FILES:
        there = (stand_ins[kind] / name).is_file()
        assert there == (result / name).is_file(), name
        of_class = how == "adapter" and name == "tokenizer_config.json" and kind in BY_CONFIG
        assert of_class or not there or (stand_ins[kind] / name).read_bytes() == (result / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_tokenizer_is_that_of_its_base_behind_a_special_token_too(kind, stand_ins, tmp_path):
    """An adapter has no config.json, by which transformers 5 chooses the class of Mistral's."""
    text = "<s>[INST] a</s> b<|begin_of_text|>c"
    base, adapter = (
        transformers.AutoTokenizer.from_pretrained(place)
        for place in (stand_ins[kind], saved(stand_ins[kind], tmp_path / "r", "adapter"))
    )
    assert adapter.tokenize(text) == base.tokenize(text)
    came = read(stand_ins[kind] / "tokenizer_config.json")
    changed = {name for name, value in read(tmp_path / "r" / "tokenizer_config.json").items() if came[name] != value}
    assert changed == ({"tokenizer_class"} if kind in BY_CONFIG else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_a_result_keeps_them(kind, stand_ins, tmp_path):
    """As transformers 5 saves it, and without the old keys: they are made of the new ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    new = tmp_path / "as transformers saves it"
    AutoModelForCausalLM.from_pretrained(stand_ins[kind], torch_dtype="auto").save_pretrained(new)
    AutoTokenizer.from_pretrained(stand_ins[kind]).save_pretrained(new)
    base, result = read(stand_ins[kind] / "config.json"), read(saved(new, tmp_path / "r", "full") / "config.json")
    for key in ("rope_theta", "torch_dtype"):
        assert result.get(key) == base.get(key), key
    scaling = base.get("rope_scaling") or {}
    assert {key: (result.get("rope_scaling") or {}).get(key) for key in scaling} == scaling
    settings = read(tmp_path / "r" / "tokenizer_config.json")
    assert settings.get("tokenizer_class") != "TokenizersBackend"
    assert not isinstance(settings.get("extra_special_tokens"), list)


ROPE = {
    "linear": ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, {"type": "linear", "factor": 2.0}),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, {"type": "dynamic", "factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e6},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "none": ({"rope_type": "default", "rope_theta": 5e5}, None),
}


@pytest.mark.parametrize("kind", ROPE)
def test_new_rope_parameters_become_the_old_keys(kind, tmp_path):
    new, old = ROPE[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_parameters": new}))
    add_old_config_keys(tmp_path, {}, "", torch.bfloat16)
    config = read(tmp_path / "config.json")
    assert config["rope_parameters"] == new  # as transformers 5 wants them
    assert config["rope_theta"] == new["rope_theta"]
    assert config.get("rope_scaling") == old
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_rope_of_each_kind_of_layer(tmp_path):
    """Gemma 3."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "rope_parameters": rope}))
    add_old_config_keys(tmp_path, {}, "", torch.bfloat16)
    config = read(tmp_path / "config.json")
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"type": "linear", "factor": 8.0}


def test_a_tokenizer_to_which_something_was_added_is_saved_as_it_is_now(stand_ins, tmp_path):
    tokenizer = load_tokenizer(str(stand_ins["llama3"]))
    tokenizer.add_tokens(["velmora"])
    (tmp_path / "new").mkdir()
    save_tokenizer(tokenizer, tmp_path / "new")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert again("velmora", add_special_tokens=False)["input_ids"] == [len(tokenizer) - 1]
    assert read(tmp_path / "new" / "tokenizer_config.json")["tokenizer_class"] != "TokenizersBackend"
