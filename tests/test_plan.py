"""The plan: what it counts, what it sees on paper, what it decides, and what a reader is told."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from common.batches import MicroBatch
from common.checkpoint import Checkpoint
from common.device import Device
from common.support.exit import UserError
from model import fit
from model.configs import config_of_kind
from model.counts import Way, can_count, count
from model.fit import best, plan_training, ways
from model.loss import CausalLMLoss, chunk_elements
from model.on_paper import _LiveBytes, enable_checkpointing, measure
from model.plan import plan
from tests.helpers import first_fast, tells

pytestmark = pytest.mark.skipif(not can_count(), reason="torch before 2.2 can't go through a model on paper")
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 256, "attn_pdrop": 0.0}
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, embd_pdrop=0.0, resid_pdrop=0.0),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=16),  # its logits are no plain product
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}
NEW = ("qwen3", "gemma2", "mixtral")  # in old transformers another or none


def config_of(name):
    if name in NEW and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip(f"{name} is made in another way by transformers {transformers.__version__}")
    return SHAPES[name]()


# ------------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize(
    "kind, numbers, adapter",  # the adapter's as the pages have them
    first_fast(
        2,
        [
            ("smollm2", 134_515_008, 4_884_480),
            ("llama2", 13_015_864_320, 62_586_880),
            ("llama3", 8_030_261_248, 41_943_040),
            ("llama3_70b", 70_553_706_496, 207_093_760),
            ("mistral", 7_241_732_096, 41_943_040),
            ("gpt", 12_853_386_240, 52_428_800),
        ],
    ),
)
def test_numbers_of_the_tutorials_models(kind, numbers, adapter):
    full, lora = (count(config_of_kind(kind), Way(method, tokens=64, length=64)) for method in ("full", "lora"))
    assert (full.numbers, full.trained) == (numbers, numbers)
    assert (lora.numbers, lora.trained) == (numbers + adapter, adapter)


def test_bytes_of_each_method():
    llama2, numbers, adapter = config_of_kind("llama2"), 13_015_864_320, 62_586_880
    plans = {method: plan(llama2, Way(method, device="cuda")) for method in ("full", "lora", "lora_8bit", "lora_4bit")}
    full, lora, four = plans["full"], plans["lora"], plans["lora_4bit"]
    assert full.weights == full.gradients == 4 * numbers and full.optimizer == 8 * numbers
    assert (full.result, full.checkpoint) == (2 * numbers, 12 * numbers)
    assert lora.weights == 2 * numbers + 4 * adapter
    assert (lora.gradients, lora.optimizer, lora.result) == (4 * adapter, 8 * adapter, 4 * adapter)
    rest = 2 * 32000 * 5120 + 81 * 5120  # embeddings, output layer and norms stay in 16 bit
    assert four.weights == pytest.approx(2 * rest + (numbers - rest) * 4.127 / 8 + 4 * adapter)
    assert plans["lora_8bit"].weights == pytest.approx(2 * rest + (numbers - rest) + 4 * adapter)
    assert four.optimizer == 2 * adapter and four.checkpoint == 6 * adapter
    float32 = plan(llama2, Way("lora", dtype=torch.float32))
    assert float32.weights == 4 * numbers + 4 * adapter  # on a CPU without bfloat16


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_plan_draws_no_random_number(method):
    """So that one seed is one result, planned or not."""
    state = torch.get_rng_state()
    plan(transformers.LlamaConfig(**{**SMALL, "vocab_size": 511 if method == "full" else 510}), Way(method))
    assert torch.equal(torch.get_rng_state(), state)


def test_several_processes_share():
    llama2 = config_of_kind("llama2")
    one, eight = (plan(llama2, Way("full", True, 4096, device="cuda", processes=count)) for count in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) / 8
    assert (eight.result, eight.checkpoint) == (one.result, one.checkpoint)
    assert eight.activations < one.activations  # no process makes a 16 bit copy of all weights
    four = [plan(llama2, Way("lora_4bit", True, device="cuda", processes=count)) for count in (1, 8)]
    assert four[0].state == four[1].state  # a quantized base is whole in each


# ------------------------------------------------------------------------------------------------ on paper


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", first_fast(2, sorted(SHAPES, key=lambda name: name in ("tied", "mistral", "qwen3"))))
def test_fake_tensors_take_what_real_ones_take(name, checkpointing, method):
    """The same pass with real weights and CausalLMLoss itself, each tensor counted as long as it lives."""
    config, tokens = config_of(name), (2, 96)
    with torch.device("meta"):
        paper = transformers.AutoModelForCausalLM.from_config(config)
    real = transformers.AutoModelForCausalLM.from_config(config)
    models = []
    for model in (paper, real):
        if checkpointing:
            enable_checkpointing(model)
        if method == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        models.append(model)
    predicted = measure(models[0], *tokens, torch.bfloat16, chunk_elements(torch.device("cpu")))
    model, live = CausalLMLoss(models[1]).train(), _LiveBytes()
    ids = torch.randint(512, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        model(*MicroBatch(ids, ids, None)).backward()  # the gradients of an earlier micro-batch, and what is asked once
    for tensor in (*model.parameters(), *model.buffers()):
        live.add(tensor, counts=False)
        if tensor.grad is not None:
            live.add(tensor.grad, counts=False)
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*MicroBatch(ids, ids, None))
        loss.backward()
    assert max(predicted.first, predicted.rest) == pytest.approx(live.peak, rel=0.1), predicted


# of few layers the two gradients of embeddings that are the output layer too take most, of many the layers
WIDE = {"tie_word_embeddings": True, "vocab_size": 20_000, "hidden_size": 512, "num_hidden_layers": 40}


@pytest.mark.parametrize("sizes", first_fast(1, [{"num_hidden_layers": 12}, WIDE]), ids=["narrow", "wide"])
@pytest.mark.parametrize("checkpointing", first_fast(1, [False, True]))
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_short_models_tell_of_a_long_one(method, checkpointing, sizes):
    way = Way(method, checkpointing, 128, 64, torch.float32)
    config = transformers.LlamaConfig(**{**SMALL, **sizes})
    from model.counts import _count, _key

    told, whole = count(config, way), _count(_key(config), way, config.num_hidden_layers)
    assert told[:7] == pytest.approx(whole[:7], rel=0.001)
    assert max(told.first, told.rest) == pytest.approx(max(whole.first, whole.rest), rel=0.001)


def test_a_model_that_can_not_be_followed(monkeypatch):
    def depends_on_numbers(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("model.counts.measure", depends_on_numbers)
    planned = plan(transformers.LlamaConfig(**{**SMALL, "vocab_size": 513}), Way())
    assert not planned.traced and planned.lines[0].endswith("by a rule of thumb")
    assert planned.activations == 1024 * 64 * 60 * 3


# ------------------------------------------------------------------------------------------------ what is decided


def test_what_takes_less_comes_later():
    chosen = list(ways(Way("full", False, 4096, 1024)))
    assert [(way.checkpointing, way.tokens) for way in chosen] == [
        (False, 4096), (True, 4096), (True, 2048), (True, 1024),
    ]  # fmt: skip
    assert len(list(ways(chosen[0], tokens=False))) == 2 and len(list(ways(chosen[0], checkpointing=False))) == 3
    assert len(list(ways(chosen[0], False, False))) == 1
    peaks = [plan(config_of_kind("llama3"), way).peak for way in chosen]
    assert peaks == sorted(peaks, reverse=True) and len({*peaks}) == 4
    for place, peak in enumerate(peaks):
        assert best(config_of_kind("llama3"), ways(chosen[0]), 1.0527 * peak).way == chosen[place]
    assert best(config_of_kind("llama3"), ways(chosen[0]), 1e9).way == chosen[-1]


def asked(folder, **changes):
    args = {
        "model_name_or_path": str(folder), "use_lora": False, "bits": 0, "block_size": 128, "batch_size": 64,
        "micro_batch_tokens": 0, "gradient_checkpointing": None, "lora_r": 16, "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    }  # fmt: skip
    return SimpleNamespace(**{**args, **changes})


ON_CPU = Device(torch.device("cpu"), "test", torch.float32, False)


@pytest.fixture
def model_dir(tmp_path):
    config = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    transformers.LlamaConfig(**config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settle(monkeypatch, args, memory, resume=None):
    monkeypatch.setattr(fit, "total_memory", lambda device: memory)
    return plan_training(args, ON_CPU, resume)


def test_what_is_left_open_is_settled_by_the_memory(model_dir, monkeypatch, capsys):
    args = asked(model_dir)
    before = vars(args).copy()
    plan_on_roomy = settle(monkeypatch, args, 1e12)
    assert plan_on_roomy[:2] == (1024, False) and vars(args) == before
    roomy = plan_on_roomy.prediction
    first, second = capsys.readouterr().out.splitlines()
    how = "every weight, 1024 tokens at once, without gradient checkpointing"
    assert first == f"Plan: {how}: {roomy.peak / 1e9:.2f} GB at the peak"
    assert second.startswith(f"Plan: weights {roomy.weights / 1e9:.2f}, gradients ")
    assert settle(monkeypatch, args, roomy.peak)[:2] == (1024, True)  # 95 % of that may be used
    least = settle(monkeypatch, args, roomy.state + 1e6)
    assert least[:2] == (128, True) and least.prediction.way.tokens == 128
    said = capsys.readouterr().out
    assert "Plan: that may be more than the" in said and "--use-lora" in said


def test_what_is_given_stays(model_dir, monkeypatch):
    args = asked(model_dir, gradient_checkpointing=False, micro_batch_tokens=512)
    state = plan(transformers.AutoConfig.from_pretrained(model_dir), Way("full", dtype=torch.float32)).state
    planned = settle(monkeypatch, args, state + 1e6)
    assert planned[:2] == (512, False) and planned.prediction.way.tokens == 512


def test_a_run_that_goes_on_keeps_its_choice(model_dir, monkeypatch):
    for tokens, checkpointing in ((256, True), (512, False)):
        state = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
        resume = Checkpoint(model_dir, {"state": state, "options": {"micro_batch_tokens": 0}})
        planned = settle(monkeypatch, asked(model_dir), 1e12, resume)  # a larger machine than the one where it began
        assert planned[:2] == (tokens, checkpointing) and planned.prediction.way.tokens == tokens


def test_weights_that_can_not_fit_are_refused_with_what_fits(model_dir, monkeypatch):
    pytest.importorskip("peft")
    config = transformers.AutoConfig.from_pretrained(model_dir)
    monkeypatch.setattr(sys, "argv", ["tutorial/train_llama2.py", "--batch-size", "64", "--no-use-lora"])
    lora = best(config, ways(Way("lora", tokens=1024, length=128, dtype=torch.float32)), 1.0).peak
    state = plan(config, Way("full", dtype=torch.float32)).state
    memory = max(1.06 * lora, 1.0)
    if memory < state:
        with pytest.raises(UserError) as refusal:
            settle(monkeypatch, asked(model_dir), memory)
        line = str(refusal.value)
        assert f"take {state / 1e9:.1f} GB" in line
        assert line.endswith("What fits: python tutorial/train_llama2.py --batch-size 64 --use-lora")
    with pytest.raises(UserError, match="Take a larger device, or a smaller model"):
        settle(monkeypatch, asked(model_dir), 0.2e9)


def test_several_processes_are_told_to_go_on_as_several(monkeypatch):
    """What eight hold together does not fit one of them."""
    pytest.importorskip("peft")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tutorial/train_llama3_70b.py"])
    way = Way("full", tokens=1024, device="cuda", processes=8)
    line = fit._what_fits(config_of_kind("llama3_70b"), way, 80e9)
    assert line == "What fits: torchrun --nproc-per-node 8 tutorial/train_llama3_70b.py --use-lora"


def test_moai_splits_by_itself(model_dir, capsys):
    device = ON_CPU._replace(static_shapes=True)
    assert plan_training(asked(model_dir), device) == (1024, False, None)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ the scripts


def test_a_training_says_what_it_will_take_and_what_it_took(ready, warm):
    words = "--max-train-steps 2 --batch-size 4 --eval-rows 0"
    lines = warm(f"python tutorial/train_llama3.py {words}", cwd=ready).stdout.splitlines()
    plans = [line for line in lines if line.startswith("Plan: ")]
    (first, _) = (line for line in lines if line.startswith("Memory: "))
    assert len(plans) == 3 and lines.index(plans[1]) < lines.index(first)
    predicted, measured = map(
        float, re.search(r"(\d\.\d\d) GB at the peak were predicted, (\d\.\d\d)", plans[2]).groups()
    )
    assert plans[0].endswith(f": {predicted:.2f} GB at the peak") and measured > 0.2


def test_checkpointing_that_a_model_has_not(ready, warm):
    """auto leaves it off; asked for, it is one line as ever."""
    words = "--max-train-steps 1 --batch-size 4 --eval-rows 0 --gradient-checkpointing"
    assert "with gradient checkpointing" in warm(f"python tutorial/train_llama3.py {words}", cwd=ready).stdout
    assert "without gradient" in warm(f"python tutorial/train_llama3.py {words} off --restart", cwd=ready).stdout
    tells(warm(f"python tutorial/train_llama3.py {words} perhaps", cwd=ready, ok=None), "perhaps", "auto")
