"""A model that is not what the scripts train is one line before the training; one that only looks so works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.support.model_dir import ModelSource
from common.tokenization import load_tokenizer
from model.load import load_model
from tests import stored_forms as forms
from tests.helpers import INFERENCE, PREPARE, SAMPLE, TRAIN, first_fast, tells
from tests.test_targets import FUSED

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EVALUATE = "python tutorial/evaluate.py --rows 2 --max-new-tokens 2 --dataset-name-or-path ./llama3_dataset.pt"


def model_of(config_class, ready, to="./other", dtype=torch.float32, **settings):
    """Its directory, with the tokenizer of Llama3's stand-in."""
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_class}Config")(vocab_size=len(tokenizer), **{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(ready / to, safe_serialization=True)
    tokenizer.save_pretrained(ready / to)
    return to


# ------------------------------------------------------------------------------------ f. later tokens in sight


@pytest.mark.parametrize("dtype", first_fast(1, [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("encoder", first_fast(1, ["Bert", "Roberta", "Electra", "XLMRoberta", "MegatronBert"]))
@pytest.mark.parametrize("how", ["train", "lora", "evaluate"])
def test_an_encoder_is_refused(how, encoder, dtype, ready, warm):
    directory = model_of(encoder, ready, dtype=dtype, max_position_embeddings=2048)
    command = {"train": TRAIN, "lora": f"{TRAIN} --use-lora", "evaluate": EVALUATE}[how]
    more = ["--base-model-name-or-path", directory] if how == "evaluate" else []
    tells(warm(command, "--model-name-or-path", directory, *more, cwd=ready, ok=None), directory, "causal", "later")


@pytest.mark.parametrize("encoder", first_fast(1, ["Bert", "Roberta"]))
def test_the_same_with_causal_attention_is_trained(encoder, ready, warm):
    directory = model_of(encoder, ready, max_position_embeddings=2048, is_decoder=True)
    warm(TRAIN, "--model-name-or-path", directory, "--save-dir", "./result", cwd=ready)


@pytest.mark.parametrize("kind", first_fast(1, ["T5", "Bart", "Pegasus", "MBart", "MT5"]))
@pytest.mark.parametrize("script", ["train", "lora", "inference"])
def test_an_encoder_decoder_is_refused_by_its_name(kind, script, ready, warm):
    shutil.copytree(ready / "llama3-8b", ready / "other")
    getattr(transformers, f"{kind}Config")().save_pretrained(ready / "other")
    command = {"train": TRAIN, "lora": f"{TRAIN} --use-lora", "inference": INFERENCE}[script]
    done = warm(command, "--model-name-or-path", "./other", cwd=ready, ok=None)
    tells(done, "./other", kind.lower(), "encoder-decoder")


# ------------------------------------------------------------------------------------ h. heads, ids and embeddings


@pytest.mark.parametrize("words", first_fast(1, [[], ["--use-lora"]]), ids=["full", "lora"])
def test_opt_whose_forward_goes_past_its_base_model(words, ready, warm):
    directory = model_of(
        "OPT", ready, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=2048, intermediate_size=64
    )
    warm(TRAIN, *words, "--model-name-or-path", directory, "--save-dir", "./result", cwd=ready)
    warm(INFERENCE, "--model-name-or-path", "./result", cwd=ready)


def larger_tokenizer(ready, how):
    """A copy of the stand-in to whose tokenizer something was added, and not to its embeddings; its first new id."""
    shutil.copytree(ready / "llama3-8b", ready / "other")
    tokenizer = AutoTokenizer.from_pretrained(ready / "other")
    first = len(tokenizer)
    if how == "tokens":
        tokenizer.add_tokens([f"velmora{number}" for number in range(3)])
    elif how == "end token":
        tokenizer.add_special_tokens({"eos_token": "<|the_end|>"})
    elif how == "pad token":
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif how == "chat tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(ready / "other")
    return first, len(tokenizer) - 1


@pytest.mark.parametrize("how", first_fast(2, ["tokens", "end token", "pad token", "chat tokens"]))
def test_ids_beyond_the_embeddings_are_one_line_with_both_sizes(how, ready, warm):
    embeddings, largest = larger_tokenizer(ready, how)
    sample = ["--dataset-name-or-path", SAMPLE]
    for command, more in ((PREPARE, sample), (TRAIN, []), (INFERENCE, [])):
        done = warm(command, *more, "--model-name-or-path", "./other", cwd=ready, ok=None)
        tells(done, "./other", str(largest), str(embeddings), "resize_token_embeddings")


def test_resized_embeddings_are_trained_and_saved(ready, warm):
    larger_tokenizer(ready, "end token")
    model = AutoModelForCausalLM.from_pretrained(ready / "other")
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(ready / "other")))
    model.save_pretrained(ready / "other")
    words = ["--model-name-or-path", "./other"]
    warm(PREPARE, "--dataset-name-or-path", SAMPLE, *words, "--save-path", "./more.pt", cwd=ready)
    warm(TRAIN, *words, "--dataset-name-or-path", "./more.pt", "--save-dir", "./result", cwd=ready)
    warm(INFERENCE, "--model-name-or-path", "./result", cwd=ready)


# ------------------------------------------------------------------------------------ j. advice by cause


@pytest.mark.parametrize(
    "prefix, inside", first_fast(1, [("_orig_mod.", "model._orig_mod"), ("module.", "model.module")])
)
@pytest.mark.parametrize("script", ["train", "lora", "inference"])
def test_names_with_a_prefix(prefix, inside, script, ready, warm):
    forms.renamed(ready / "llama3-8b", ready / "other", prefix)
    command = {"train": TRAIN, "lora": f"{TRAIN} --use-lora", "inference": INFERENCE}[script]
    done = warm(command, "--model-name-or-path", "./other", cwd=ready, ok=None)
    tells(done, "./other", prefix, inside)
    assert "download" not in done.stderr.lower()


def config_of(ready, **changed):
    shutil.copytree(ready / "llama3-8b", ready / "other")
    path = ready / "other" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


CAUSES = {
    "an architecture that transformers does not know": ({"model_type": "velmora"}, "pip install -U transformers"),
    "code of its own": ({"model_type": "velmora", "auto_map": {"AutoConfig": "c.C"}}, "requires trust_remote_code"),
    "sizes of another model": ({"hidden_size": 32, "head_dim": 8}, "different models"),
    "more layers than the weights have": ({"num_hidden_layers": 3}, "lack"),
    "fewer layers than the weights have": ({"num_hidden_layers": 1}, "no place for"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_advice_by_cause(cause, ready, warm):
    changed, advice = CAUSES[cause]
    config_of(ready, **changed)
    for command in (TRAIN, INFERENCE):
        tells(warm(command, "--model-name-or-path", "./other", cwd=ready, ok=None), "./other", advice)


@pytest.mark.parametrize("kind", first_fast(1, ["Vit", "Whisper", "Clip"]))
def test_a_model_of_another_kind(kind, ready, warm):
    shutil.copytree(ready / "llama3-8b", ready / "other")
    name = {"Vit": "ViT", "Clip": "CLIP"}.get(kind, kind)
    getattr(transformers, f"{name}Config")().save_pretrained(ready / "other")
    done = warm(INFERENCE, "--model-name-or-path", "./other", cwd=ready, ok=None)
    tells(done, "./other", "model")
    assert "download it again" not in done.stderr.lower()


# --------------------------------------------------------------------------------- experts made one tensor of


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", first_fast(1, ["Mixtral", "Qwen3Moe", "Olmoe"]))
def test_files_of_experts_are_not_kept_in_memory_beside_the_model(kind, ready):
    more = {"num_local_experts" if kind == "Mixtral" else "num_experts": 4, "num_experts_per_tok": 2}
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("not in this transformers")
    directory = str((ready / model_of(kind, ready, dtype=torch.bfloat16, **more)).resolve())
    model = load_model(directory, torch.device("cpu"), torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    # transformers 4 makes no one tensor of them: there the files are the weights, and not beside them
    made = dict(model.named_parameters()).keys() - ModelSource(directory).tensors.keys()
    assert made or not FUSED
    assert not made or directory not in Path("/proc/self/maps").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------ k. more than text


@pytest.mark.parametrize("kind", first_fast(0, ["qwen3_5", "qwen3_5_moe"]))
def test_the_language_model_of_one_that_reads_images_is_saved_as_what_plain_transformers_opens(kind, ready, warm):
    """Its config on the hub has a text_config and a vision_config; without a step its logits are the base's."""
    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {kind}")
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    # One token more, because transformers gives Qwen's tokenizers a padding token.
    text = {**SMALL, "vocab_size": len(tokenizer) + 1, "num_key_value_heads": 2, "head_dim": 8}
    text.update(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=8)
    text.update(linear_num_key_heads=2, linear_num_value_heads=4, tie_word_embeddings=kind == "qwen3_5")
    text.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.to(torch.bfloat16).save_pretrained(ready / "other")
    tokenizer.save_pretrained(ready / "other")
    words = ["--model-name-or-path", "./other"]
    warm(PREPARE, "--dataset-name-or-path", SAMPLE, *words, "--save-path", "./more.pt", cwd=ready)
    more = [*words, "--dataset-name-or-path", "./more.pt", "--lr", "1e-30"]
    said = warm(TRAIN, *more, "--save-dir", "./full", cwd=ready).stdout
    assert said.count("also reads images") == 1
    warm(TRAIN, *more, "--use-lora", "--save-dir", "./adapter", cwd=ready)
    warm("python tutorial/merge_adapter.py --model-name-or-path ./adapter --save-dir ./merged", cwd=ready)
    plain = AutoModelForCausalLM.from_pretrained(ready / "other")
    assert f"for the class {type(plain).__name__}." in (ready / "adapter" / "README.md").read_text()
    ids = torch.arange(20)[None] + 300
    for result in ("full", "merged"):
        saved = AutoModelForCausalLM.from_pretrained(ready / result)
        assert type(saved) is type(plain) and torch.equal(saved(ids).logits, plain(ids).logits)
