"""A base in whatever form it is stored: what is saved is what was trained, with the names and the types of the base."""

from __future__ import annotations

import json
import math
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.support.exit import UserError
from common.tokenization import load_tokenizer
from model.load import load_model
from model.lora import add_lora
from model.save import save_model
from model.weight_format import detect_format
from tests import stored_forms as forms
from tests.helpers import INFERENCE, TRAIN, first_fast, needs_bitsandbytes, needs_float16, records, tells

CPU = torch.device("cpu")
IDS = torch.arange(48).view(2, 24) + 300
QUIET = ("--lr", "0")
DEQUANTIZES = "dequantize" in signature(getattr(transformers, "FineGrainedFP8Config", object)).parameters
FP8 = pytest.mark.skipif(not DEQUANTIZES, reason="transformers before 4.57 turns no FP8 back")
FP16 = pytest.param(torch.float16, marks=needs_float16)
MERGE = "python tutorial/merge_adapter.py --save-dir ./merged --model-name-or-path"
EVALUATE = "python tutorial/evaluate.py --rows 4 --max-new-tokens 2 --dataset-name-or-path ./llama3_dataset.pt"


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def opened(directory):
    """The result as plain transformers opens it, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)


def same_tensors(one, other):
    one, other = load_file(f"{one}/model.safetensors"), load_file(f"{other}/model.safetensors")
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------------------------------- a. quantized bases


@FP8
def test_a_base_in_fp8_is_trained_and_saved_as_its_16_bit_twin(ready, warm):
    """Full training, held-out loss, saved weights, perplexity: all as of the same numbers in bfloat16."""
    forms.fp8(ready / "llama3-8b", ready / "fp8")
    forms.fp8_as_plain(ready / "llama3-8b", ready / "twin")
    for kind in ("fp8", "twin"):
        words = ["--model-name-or-path", f"./{kind}", "--save-dir", f"./{kind}-trained", "--eval-rows", "4"]
        done = warm(TRAIN, *words, cwd=ready)
        assert ("stored in 8 bit (fp8)" in done.stdout) == (kind == "fp8")
    same_tensors(ready / "fp8-trained", ready / "twin-trained")
    assert "quantization_config" not in json.loads((ready / "fp8-trained" / "config.json").read_text())
    # the perplexity of what was saved is that of what was trained
    last = [line["held_out_loss"] for line in records(ready / "fp8-trained") if "held_out_loss" in line][-1]
    warm(EVALUATE, "--model-name-or-path", "./fp8-trained", cwd=ready)
    table = json.loads((ready / "fp8-trained" / "evaluation.json").read_text())["measures"]
    assert table["Perplexity (lower is better)"]["after"] == pytest.approx(math.exp(last), rel=0.01)


@FP8
def test_an_adapter_on_fp8_is_that_of_its_16_bit_twin_and_can_be_asked_and_merged(ready, warm, monkeypatch):
    monkeypatch.chdir(ready)  # its base stands in it as ./fp8
    forms.fp8(ready / "llama3-8b", ready / "fp8")
    forms.fp8_as_plain(ready / "llama3-8b", ready / "twin")
    for kind in ("fp8", "twin"):
        warm(TRAIN, "--use-lora", "--model-name-or-path", f"./{kind}", "--save-dir", f"./{kind}-lora", cwd=ready)
    one, other = (load_file(ready / f"{kind}-lora" / "adapter_model.safetensors") for kind in ("fp8", "twin"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert warm(INFERENCE, "--model-name-or-path", "./fp8-lora", cwd=ready)
    warm(MERGE, "./fp8-lora", cwd=ready)
    tied = load_model(str(ready / "fp8-lora"), CPU, bits=0)
    merged = opened(ready / "merged")
    assert torch.allclose(logits(merged), logits(tied), atol=2e-3)
    assert {str(weight.dtype) for weight in load_file(ready / "merged" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


@needs_bitsandbytes
@pytest.mark.parametrize("bits", first_fast(1, [4, 8]))
def test_a_base_stored_by_bitsandbytes_does_all_that_another_does(bits, ready, warm):
    """Full training, LoRA, a question, evaluation, merging; an adapter as that on the plain base with --load-in-*."""
    forms.bitsandbytes(ready / "llama3-8b", ready / "packed", bits)
    base = ["--model-name-or-path", "./packed"]
    done = warm(TRAIN, "--use-lora", *base, "--save-dir", "./lora", cwd=ready)
    assert f"is loaded in {bits} bit." in done.stdout
    warm(TRAIN, "--use-lora", f"--load-in-{bits}bit", "--save-dir", "./other", cwd=ready)
    one, other = (load_file(ready / name / "adapter_model.safetensors") for name in ("lora", "other"))
    assert all(torch.equal(one[name], other[name]) for name in other)

    warm(INFERENCE, *base, cwd=ready)
    warm(INFERENCE, "--model-name-or-path", "./lora", cwd=ready)
    warm(EVALUATE, "--model-name-or-path", "./lora", cwd=ready)
    warm(MERGE, "./lora", cwd=ready)
    warm(TRAIN, *base, "--save-dir", "./full", cwd=ready)
    for result in ("merged", "full"):
        assert "quantization_config" not in json.loads((ready / result / "config.json").read_text())
        plain, packed = (load_file(ready / name / "model.safetensors") for name in ("llama3-8b", result))
        assert {name: (w.shape, w.dtype) for name, w in plain.items()} == {
            name: (w.shape, w.dtype) for name, w in packed.items()
        }
    # what was trained: the dequantized base, nearer to the plain one than 4 bit's rounding
    assert torch.allclose(logits(opened(ready / "full")), logits(opened(ready / "llama3-8b")), atol=0.2)
    wrong = 12 - bits
    done = warm(INFERENCE, *base, f"--load-in-{wrong}bit", cwd=ready, ok=None)
    tells(done, "./packed", f"stored in {bits} bit", f"--load-in-{bits}bit")


@pytest.mark.parametrize("method", first_fast(2, ["gptq", "awq", "hqq", "compressed-tensors", "quanto"]))
@pytest.mark.parametrize("script", ["train", "lora", "inference"])
def test_other_quantizations_are_one_line_that_names_what_to_take(method, script, ready, warm):
    config = {"quant_method": method, "bits": 4}
    forms.rewritten(ready / "llama3-8b", ready / "packed", quantization_config=config)
    command = {"train": TRAIN, "lora": f"{TRAIN} --use-lora", "inference": INFERENCE}[script]
    done = warm(command, "--model-name-or-path", "./packed", cwd=ready, ok=None)
    tells(done, "./packed", method, "16 bit", "--load-in-4bit")


def test_weights_for_which_the_model_has_no_place_are_an_error_with_three_of_them(ready, warm):
    extra = {"model.layers.7.more.weight": torch.zeros(2), "spare.bias": torch.zeros(2), "spare.weight": torch.zeros(2)}
    forms.rewritten(
        ready / "llama3-8b", ready / "more", lambda name, w: {name: w, **extra} if "embed" in name else None
    )
    done = warm(TRAIN, "--model-name-or-path", "./more", cwd=ready, ok=None)
    tells(done, "./more", *extra, "3 in all")


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_named(lost, ready, warm):
    forms.rewritten(ready / "llama3-8b", ready / "less", lambda name, w: {} if name == lost else None)
    tells(warm(TRAIN, "--model-name-or-path", "./less", cwd=ready, ok=None), "./less", lost, "download")


def test_what_old_releases_stored_and_every_model_computes_is_passed_over(ready, warm):
    """Llama2's files hold the frequencies of RoPE."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    forms.rewritten(
        ready / "llama3-8b", ready / "old", lambda n, w: {n: w, name: torch.ones(8)} if "embed" in n else None
    )
    warm(TRAIN, *QUIET, "--model-name-or-path", "./old", "--save-dir", "./same", cwd=ready)
    same_tensors(ready / "same", ready / "llama3-8b")


# ---------------------------------------------------------------------------------------- b. compared after the save


@pytest.mark.parametrize("fault", ["lost", "value", "type", "shape", "stranger"])
def test_a_save_that_differs_is_an_error_and_the_old_result_stays(fault, base, tmp_path, monkeypatch):
    directory = str(base / "llama3-8b")
    tokenizer, model = load_tokenizer(directory), load_model(directory, CPU)
    save_model(model, tokenizer, str(tmp_path / "result"), base=directory)
    before = {file.name: file.read_bytes() for file in (tmp_path / "result").iterdir()}

    def faulty(tensors, file, metadata):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        first = sorted(tensors)[0]  # that of every hundred which is compared by value
        if fault == "lost":
            del tensors[first]
        elif fault == "value":
            tensors[first][0, 0] += 1
        elif fault == "type":
            tensors[first] = tensors[first].half()
        elif fault == "shape":
            tensors[first] = tensors[first][:-1].contiguous()
        else:
            tensors[first + "_scale_inv"] = torch.ones(2)
        save_file(tensors, file, metadata)

    monkeypatch.setattr("model.save.save_file", faulty)
    with pytest.raises(UserError, match="not the trained model.*Nothing was replaced"):
        save_model(model, tokenizer, str(tmp_path / "result"), base=directory)
    assert {file.name: file.read_bytes() for file in (tmp_path / "result").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("setting, value", [("num_hidden_layers", 1), ("rms_norm_eps", 1.0), ("model_type", "velmora")])
def test_what_opens_as_another_model_or_not_at_all_is_an_error_and_the_old_result_stays(setting, value, base, tmp_path):
    """The weights in the files are right, but the config is not that of the model in memory."""
    directory = str(base / "llama3-8b")
    tokenizer, model = load_tokenizer(directory), load_model(directory, CPU)
    save_model(model, tokenizer, str(tmp_path / "result"), base=directory)
    before = {file.name: file.read_bytes() for file in (tmp_path / "result").iterdir()}
    model.config.__dict__[setting] = value
    if setting == "model_type":
        model.config.__class__ = type("Velmora", (type(model.config),), {"model_type": value})
    with pytest.raises(UserError, match="not the trained model.*(cannot open|logits differ).*Nothing was replaced"):
        save_model(model, tokenizer, str(tmp_path / "result"), base=directory)
    assert {file.name: file.read_bytes() for file in (tmp_path / "result").iterdir()} == before


# ---------------------------------------------------------------------------------------- c. each tensor its own type

SOME_FLOAT32 = {
    "norms": lambda name: "norm" in name,
    "one matrix": lambda name: name == "model.layers.1.mlp.down_proj.weight",
    "embeddings": lambda name: "embed" in name,
    "output layer": lambda name: "lm_head" in name,
}


@pytest.mark.parametrize("which", first_fast(1, SOME_FLOAT32))
def test_float32_among_16_bit_comes_back_bit_for_bit(which, ready, warm):
    """--lr 0: the result's file is the base's, tensor by tensor; and merging an adapter that learned nothing too."""
    forms.with_float32(ready / "llama3-8b", ready / "mixed", SOME_FLOAT32[which])
    assert detect_format(str(ready / "mixed")).mixed
    base = ["--model-name-or-path", "./mixed"]
    warm(TRAIN, *QUIET, *base, "--save-dir", "./same", cwd=ready)
    same_tensors(ready / "same", ready / "mixed")
    warm(TRAIN, *QUIET, "--use-lora", *base, "--save-dir", "./lora", cwd=ready)
    warm(MERGE, "./lora", cwd=ready)
    same_tensors(ready / "merged", ready / "mixed")
    warm(INFERENCE, *base, cwd=ready)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16, torch.float32, None])
def test_a_frozen_base_keeps_float32_in_float32(dtype, ready):
    directory = forms.with_float32(ready / "llama3-8b", ready / "mixed", SOME_FLOAT32["norms"])
    stored = load_file(directory / "model.safetensors")
    model = load_model(str(directory), CPU, dtype, bits=0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, stored[name])
        else:
            assert weight.dtype == (dtype or torch.bfloat16)
    assert logits(model).isfinite().all()  # its products are in one type


@needs_bitsandbytes
def test_a_base_in_4_bit_keeps_float32_in_float32(ready):
    directory = forms.with_float32(ready / "llama3-8b", ready / "mixed", SOME_FLOAT32["norms"])
    model = load_model(str(directory), CPU, torch.bfloat16, bits=4)
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if "norm" in name)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    model = add_lora(model, str(directory), 4, 8, 0.0, ["all-linear"])
    assert logits(model).isfinite().all()


def test_buffers_get_their_type_back_too(ready):
    """The router's bias of GLM-4 MoE is a buffer."""
    if not hasattr(transformers, "Glm4MoeConfig"):
        pytest.skip("transformers before 4.54 has no GLM-4 MoE")
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    config = transformers.Glm4MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(ready / "glm")
    tokenizer.save_pretrained(ready / "glm")
    router = "model.layers.1.mlp.gate.e_score_correction_bias"
    forms.with_float32(ready / "glm", ready / "mixed", lambda name: name == router, noise=0.01)
    for dtype in (torch.float32, torch.bfloat16, None):
        model = load_model(str(ready / "mixed"), CPU, dtype, bits=0)
        assert model.state_dict()[router].dtype == torch.float32
        save_model(model, tokenizer, str(ready / "same"), base=str(ready / "mixed"))
        same_tensors(ready / "same", ready / "mixed")


def test_tied_weights_stay_tied_and_bin_files_tell_their_types(base, tmp_path):
    from model.tiny import write_tiny

    write_tiny("gpt", tmp_path / "gpt")
    forms.as_bin(tmp_path / "gpt", tmp_path / "bin")
    assert detect_format(str(tmp_path / "bin")).main_dtype == detect_format(str(tmp_path / "gpt")).main_dtype
    model, tokenizer = load_model(str(tmp_path / "bin"), CPU), load_tokenizer(str(tmp_path / "bin"))
    save_model(model, tokenizer, str(tmp_path / "same"), base=str(tmp_path / "bin"))
    same_tensors(tmp_path / "same", tmp_path / "gpt")
    assert Path(tmp_path / "same" / "model.safetensors").stat().st_size <= (
        Path(tmp_path / "gpt" / "model.safetensors").stat().st_size + 1000
    )
