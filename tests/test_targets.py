"""Beside which layers an adapter is put: the experts of MoE, the language model alone, and none that would not work."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft.tuners import tuners_utils
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.support.exit import UserError
from common.tokenization import load_tokenizer
from model.load import load_model
from model.lora import adapted_matrices, add_lora, weight_matrices
from tests.helpers import INFERENCE, TRAIN, needs_bitsandbytes, tells

SMALL = {
    "vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MOE = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 8, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
MOE = {kind: more for kind, more in MOE.items() if hasattr(transformers, f"{kind}Config")}
REFUSES = hasattr(tuners_utils, "_check_lora_target_modules_mamba")
FUSED = int(transformers.__version__.split(".")[0]) >= 5  # before, each expert is a layer of its own


def built(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "kind", [kind for kind in MOE if FUSED or kind != "GraniteMoe"]
)  # whose were one tensor before
def test_the_experts_get_adapters_and_what_is_left_out_is_told(kind, capsys):
    model = built(kind, **MOE[kind])
    total = sum(weight_matrices(model).values())
    experts = sum(weight.numel() for name, weight in model.named_parameters() if "expert" in name)
    assert experts > total / 2  # nothing to be left out
    model = add_lora(model, "here", 4, 8, 0.0, ["all-linear"])
    with_one = sum(adapted_matrices(model).values())
    told = capsys.readouterr().out
    assert with_one > 0.97 * total
    left_out = f"{1 - with_one / total:.1%} of the layer weights have no adapter"
    assert (left_out in told) == FUSED  # the routers, which were layers before


@pytest.mark.skipif(not FUSED, reason="before transformers 5 experts are layers, which have dropout")
@pytest.mark.parametrize("kind", MOE)
def test_dropout_on_experts_is_one_line(kind):
    with pytest.raises(UserError, match="--lora-dropout 0.1: here is a mixture of experts.*--lora-dropout 0"):
        add_lora(built(kind, **MOE[kind]), "here", 4, 8, 0.1, ["all-linear"])
    add_lora(built(kind, **MOE[kind]), "here", 4, 8, 0.1, ["q_proj"])  # and by name, without experts, it goes


@needs_bitsandbytes
@pytest.mark.skipif(not FUSED, reason="before transformers 5 experts are layers, and in 4 bit like all")
@pytest.mark.parametrize("kind", MOE)
def test_experts_that_stay_in_16_bit_are_told(kind, base, tmp_path, capsys):
    built(kind, **MOE[kind]).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    model = load_model(str(tmp_path / "moe"), torch.device("cpu"), torch.bfloat16, bits=4)
    sizes = weight_matrices(model)
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    packed = sum(layer.in_features * layer.out_features for layer in layers)
    assert f"{1 - packed / sum(sizes.values()):.0%} of the layer weights" in capsys.readouterr().out


@pytest.mark.skipif(not REFUSES, reason="peft before 0.18 refuses none")
def test_layers_that_peft_refuses_are_left_out_with_one_line(capsys):
    model = add_lora(built("Mamba", state_size=8), "here", 4, 8, 0.0, ["all-linear"])
    names = {name.split(".")[-1] for name in adapted_matrices(model)}
    assert names and "out_proj" not in names
    assert "no adapter on out_proj, which peft does not support" in capsys.readouterr().out


@pytest.mark.skipif(not FUSED, reason="before transformers 5, Mamba calls dt_proj")
def test_an_adapter_without_gradient_is_an_error_after_the_first_step(ready, warm):
    """Mamba's code uses the weight of dt_proj without calling that layer."""
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    built("Mamba", state_size=8, vocab_size=len(tokenizer)).save_pretrained(ready / "mamba")
    tokenizer.save_pretrained(ready / "mamba")
    words = ["--use-lora", "--model-name-or-path", "./mamba", "--save-dir", "./lora", "--max-train-steps", "2"]
    done = warm(TRAIN, *words, cwd=ready, ok=None)
    tells(done, "The adapter on dt_proj got no gradient", "--lora-target-modules")
    others = done.stderr.strip().rpartition("--lora-target-modules ")[2].split()
    assert "in_proj" in others and "dt_proj" not in others
    warm(TRAIN, *words, "--lora-target-modules", *others, cwd=ready)
    assert (ready / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not REFUSES, reason="peft before 0.18 refuses none")
def test_a_layer_that_peft_refuses_by_name_is_one_line():
    with pytest.raises(UserError, match="peft has no adapter for these layers of here.*--lora-target-modules"):
        add_lora(built("Mamba", state_size=8), "here", 4, 8, 0.0, ["out_proj"])


def test_of_a_model_with_a_vision_part_the_language_model_alone(capsys):
    if not hasattr(transformers, "Gemma3Config"):
        pytest.skip("transformers before 4.50 has no Gemma 3")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**SMALL, "head_dim": 8},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = add_lora(transformers.Gemma3ForConditionalGeneration(config), "here", 4, 8, 0.0, ["all-linear"])
    assert adapted_matrices(model) and all("language_model" in name for name in adapted_matrices(model))
    assert "language model alone" in capsys.readouterr().out


def test_gradient_checkpointing_of_a_model_that_has_none(ready, warm):
    if not hasattr(transformers, "JetMoeConfig"):
        pytest.skip("transformers before 4.41 has no JetMoe")
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "kv_channels": 8}
    more = {"num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.JetMoeConfig(vocab_size=len(tokenizer), **sizes, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(ready / "jet")
    tokenizer.save_pretrained(ready / "jet")
    words = ["--gradient-checkpointing", "--model-name-or-path", "./jet"]
    tells(warm(TRAIN, *words, cwd=ready, ok=None), "--gradient-checkpointing", "jetmoe")


@pytest.mark.skipif(not FUSED, reason="before transformers 5 experts are layers")
@pytest.mark.parametrize("bits", ["--no-quantization", pytest.param("--load-in-4bit", marks=needs_bitsandbytes)])
def test_an_adapter_on_experts_is_trained_asked_and_merged(bits, ready, warm, monkeypatch):
    tokenizer = load_tokenizer(str(ready / "llama3-8b"))
    built("Mixtral", **{**MOE["Mixtral"], "vocab_size": len(tokenizer)}).to(torch.bfloat16).save_pretrained(
        ready / "moe"
    )
    tokenizer.save_pretrained(ready / "moe")
    words = ["--use-lora", bits, "--model-name-or-path", "./moe", "--save-dir", "./lora", "--lr", "1e-2"]
    warm(TRAIN, *words, cwd=ready)
    stored = load_file(ready / "lora" / "adapter_model.safetensors")
    of_experts = {name: weight for name, weight in stored.items() if "experts" in name}
    assert of_experts and all(weight.any() for weight in of_experts.values())  # B starts at zero
    warm(INFERENCE, "--model-name-or-path", "./lora", cwd=ready)
    warm("python tutorial/merge_adapter.py --model-name-or-path ./lora --save-dir ./merged", cwd=ready)
    monkeypatch.chdir(ready)
    ids = torch.arange(48).view(2, 24) + 300
    model = load_model("./lora", torch.device("cpu"), torch.float32, bits=0).eval()
    merged = AutoModelForCausalLM.from_pretrained("./merged", torch_dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=5e-3)  # saved in bf16
