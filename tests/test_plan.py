"""The memory plan: what it predicts, what it chooses, and what a training prints of it."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from common.checkpoint import Checkpoint
from common.device import Device
from common.support.compat import has_fused_attention
from common.support.exit import UserError
from model import memory_plan
from model.configs import config_of_kind
from model.memory_plan import (
    CannotPlan,
    ModelShape,
    TrainingSetup,
    build_shape,
    cheaper_setups,
    first_that_fits,
    layer_bytes,
    plan_memory,
    predict,
    read_config,
)
from tests.benchmarks import plan_accuracy
from tests.conftest import ROOT
from tests.helpers import first_fast, tells

pytestmark = pytest.mark.skipif(not has_fused_attention(), reason="torch before 2.2 trains without a plan")
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA2_PARAMETERS, LLAMA2_ADAPTER = 13_015_864_320, 62_586_880
is_new = int(transformers.__version__.split(".")[0]) >= 5


# ------------------------------------------------------------------------------------------------ predictions


@pytest.mark.parametrize(
    "kind, parameters, adapter",  # as the pages have them
    [
        ("smollm2", 134_515_008, 4_884_480),
        ("llama2", LLAMA2_PARAMETERS, LLAMA2_ADAPTER),
        ("llama3", 8_030_261_248, 41_943_040),
        ("llama3_70b", 70_553_706_496, 207_093_760),
        ("mistral", 7_241_732_096, 41_943_040),
        ("gpt", 12_853_386_240, 52_428_800),
    ],
)
def test_parameters_of_the_tutorials_models(kind, parameters, adapter):
    """They follow from the config, and are those of the model itself."""
    config = config_of_kind(kind)
    for shape in (ModelShape(config), build_shape(config)):
        assert shape.num_parameters == parameters
        assert predict(shape, TrainingSetup("lora")).checkpoint == 12 * adapter


def test_bytes_of_each_method():
    shape = ModelShape(config_of_kind("llama2"))
    full, lora, eight, four = (
        predict(shape, TrainingSetup(method, device="cuda")) for method in ("full", "lora", "lora_8bit", "lora_4bit")
    )
    assert full.weights == full.gradients == 4 * LLAMA2_PARAMETERS and full.optimizer == 8 * LLAMA2_PARAMETERS
    assert (full.result, full.checkpoint) == (2 * LLAMA2_PARAMETERS, 12 * LLAMA2_PARAMETERS)
    assert lora.weights == 2 * LLAMA2_PARAMETERS + 4 * LLAMA2_ADAPTER
    assert (lora.gradients, lora.optimizer, lora.result) == tuple(n * LLAMA2_ADAPTER for n in (4, 8, 4))
    rest = 2 * 32000 * 5120 + 81 * 5120  # embeddings, output layer and norms stay in 16 bit
    quantized = LLAMA2_PARAMETERS - rest
    assert four.weights == pytest.approx(2 * rest + quantized * 4.127 / 8 + 4 * LLAMA2_ADAPTER)
    assert eight.weights == pytest.approx(2 * rest + quantized + 4 * LLAMA2_ADAPTER)
    assert four.optimizer == 2 * LLAMA2_ADAPTER and four.checkpoint == 6 * LLAMA2_ADAPTER
    float32 = predict(shape, TrainingSetup("lora", dtype=torch.float32))
    assert float32.weights == 4 * LLAMA2_PARAMETERS + 4 * LLAMA2_ADAPTER  # on a CPU without bfloat16


def test_several_processes_share():
    shape = ModelShape(config_of_kind("llama2"))
    one, eight = (predict(shape, TrainingSetup("full", True, 4096, device="cuda", world_size=n)) for n in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eight, part) == getattr(one, part) / 8
    assert (eight.result, eight.checkpoint) == (one.result, one.checkpoint)
    assert eight.activations < one.activations  # no process makes a 16-bit copy of all weights
    one, eight = (predict(shape, TrainingSetup("lora_4bit", True, device="cuda", world_size=n)) for n in (1, 8))
    assert one.state == eight.state  # each process holds all of a quantized base


GPT2 = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512, "attn_pdrop": 0,
    "embd_pdrop": 0, "resid_pdrop": 0,
}  # fmt: skip
FAMILIES = {"llama": SMALL, "gpt2": GPT2, "mistral": SMALL, "qwen3": {**SMALL, "head_dim": 16}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES if is_new else ["llama", "gpt2", "mistral"])
def test_a_layer_keeps_what_autograd_saves(name, method, dtype):
    """The tensors that autograd saves in a forward pass of four layers, less those of three layers."""
    peft = pytest.importorskip("peft")
    tokens, kept = 128, []
    for layers in (3, 4):
        config = transformers.AutoConfig.for_model(name, **{**FAMILIES[name], "num_hidden_layers": layers})
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32 if method == "full" else dtype)
        if method == "lora":
            options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            model = peft.get_peft_model(model, peft.LoraConfig(**options)).get_base_model()
        kept.append(saved_bytes(model.train(), torch.randint(512, (1, tokens)), dtype))
    formula = layer_bytes(ModelShape(config), TrainingSetup(method, dtype=dtype))
    assert formula == pytest.approx((kept[1] - kept[0]) / tokens, rel=0.15)


def saved_bytes(model, input_ids, dtype):
    """Bytes of the activations that autograd saves: neither weights nor 16-bit copies of weights."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def save(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in known and tensor.dim() > 0 and input_ids.numel() in tensor.shape:
            sizes[place] = (tensor, tensor.untyped_storage().nbytes())  # held, so that its place is not used again
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
        hidden = model.base_model(input_ids, use_cache=False)[0]
    assert hidden.requires_grad
    return sum(size for _, size in sizes.values())


ROW = re.compile(r"\| (.*?) \| (.*?) \| (끔|켬) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\S+) \|")
SHAPES = ["smollm2", *plan_accuracy.SHAPES]


@pytest.mark.skipif(not is_new, reason="measured with a newer transformers")
def test_predictions_are_near_what_was_measured():
    """tests/benchmarks/README.md: what was predicted is what the formula says, within 15 % of what was measured."""
    text = (ROOT / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = ROW.findall(text.split("<!-- plan accuracy -->")[1].split("<!-- /plan accuracy -->")[0])
    assert len(rows) == 42
    names = list(dict.fromkeys(row[0] for row in rows))
    methods = dict(zip(("전체", "LoRA", "4비트 + LoRA"), plan_accuracy.METHODS))
    for name, method, switch, state, predicted, measured, off in rows:
        shape, method = SHAPES[names.index(name)], methods[method]
        config = config_of_kind(shape) if shape == "smollm2" else plan_accuracy.config_of(shape, method)
        plan = predict(
            build_shape(config), TrainingSetup(method, switch == "켬", plan_accuracy.TOKENS, one_length=True)
        )
        assert [state, predicted] == [f"{(size - plan.program) / 1e9:.2f}" for size in (plan.state, plan.peak)]
        share = float(predicted) / float(measured) - 1
        assert abs(share) < 0.15 and off.replace("−", "-") == f"{share:+.0%}".replace("+0%", "0%").replace("-0%", "0%")
        assert plan.estimated == (shape == "moe")


def test_another_architecture_is_estimated():
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=512)
    model = transformers.AutoModelForCausalLM.from_config(config)
    plan = predict(build_shape(config), TrainingSetup())
    assert plan.estimated and plan.lines[0].endswith(" GB, estimated")
    assert plan.weights == 4 * model.num_parameters()


def test_a_plan_draws_no_random_number():
    """One seed gives one result, planned or not."""
    state = torch.get_rng_state()
    build_shape(transformers.LlamaConfig(**SMALL))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------ the choice


def test_cheaper_setups():
    shape = ModelShape(config_of_kind("llama3"))
    setups = list(cheaper_setups(TrainingSetup(tokens=4096), longest_row=1024))
    chosen = [(setup.checkpointing, setup.tokens) for setup in setups]
    assert chosen == [(False, 4096), (True, 4096), (True, 2048), (True, 1024)]
    assert len(list(cheaper_setups(setups[0], 1024, tokens=False))) == 2
    assert len(list(cheaper_setups(setups[0], 1024, checkpointing=False))) == 3
    assert len(list(cheaper_setups(setups[0], 1024, False, False))) == 1
    peaks = [predict(shape, setup).peak for setup in setups]
    assert peaks == sorted(peaks, reverse=True) and len({*peaks}) == 4
    for setup, peak in zip(setups, peaks):
        assert first_that_fits(shape, iter(setups), 1.0527 * peak).setup == setup
    assert first_that_fits(shape, iter(setups), 1e9).setup == setups[-1]


ON_CPU = Device(torch.device("cpu"), "test", torch.float32, False)


@pytest.fixture
def model_dir(tmp_path):
    config = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    transformers.LlamaConfig(**config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def asked(model_dir, **changes):
    args = {
        "model_name_or_path": str(model_dir), "use_lora": False, "bits": 0, "batch_size": 64, "micro_batch_tokens": 0,
        "gradient_checkpointing": None, "lora_r": 16, "lora_target_modules": ["all-linear"], "max_train_steps": 0,
        "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**args, **changes})


def planned(monkeypatch, args, memory=1e12, lengths=(128,) * 64, resume=None, device=ON_CPU):
    monkeypatch.setattr(memory_plan, "total_memory", lambda device: memory)
    rows = {"lengths": torch.tensor(lengths, dtype=torch.int32), "label_counts": None}
    return plan_memory(args, device, {"train": rows}, resume)


def test_what_is_left_open_is_chosen_by_the_memory(model_dir, monkeypatch, capsys):
    args = asked(model_dir)
    before = vars(args).copy()
    plan = planned(monkeypatch, args)
    assert plan[:2] == (1024, False) and vars(args) == before
    roomy = plan.prediction
    first, second = capsys.readouterr().out.splitlines()
    how = "full fine-tuning, micro-batches of 1024 tokens, gradient checkpointing off"
    assert first == f"Memory plan: {how}: peak {roomy.peak / 1e9:.2f} GB"
    assert second.startswith(f"Memory plan: weights {roomy.weights / 1e9:.2f}, gradients ")
    assert planned(monkeypatch, args, roomy.peak)[:2] == (1024, True)  # 95 % of that may be used
    least = planned(monkeypatch, args, roomy.state + 1e6)
    assert least[:2] == (128, True) and least.prediction.setup.tokens == 128
    said = capsys.readouterr().out
    assert "Memory plan: this may not fit into the device's " in said and "--use-lora" in said


def test_what_is_given_stays(model_dir, monkeypatch):
    args = asked(model_dir, gradient_checkpointing=False, micro_batch_tokens=512)
    state = predict(build_shape(read_config(str(model_dir))), TrainingSetup(dtype=torch.float32)).state
    plan = planned(monkeypatch, args, state + 1e6)
    assert plan[:2] == (512, False) and plan.prediction.setup.tokens == 512


@pytest.mark.parametrize(
    "lengths, batch_size, packs, tokens",
    [
        ((128,) * 64, 64, True, 1024),  # the data's rows fill a micro-batch
        ((40,) * 64, 4, True, 160),  # a whole batch is less than a micro-batch
        ((10, 10, 10, 40), 4, True, 70),  # packed
        ((10, 10, 10, 40), 4, False, 160),  # padded to the longest
        ((10,) * 63 + (1500,), 2, True, 1510),  # a row that is longer than a micro-batch gets one of its own
        ((10,) * 5, 64, True, 50),  # fewer rows than a batch
    ],
)
def test_micro_batches_are_as_large_as_the_datas_rows(lengths, batch_size, packs, tokens, model_dir, monkeypatch):
    device = ON_CPU if packs else ON_CPU._replace(torch_device=torch.device("cuda"), dtype=torch.bfloat16)
    args = asked(model_dir, batch_size=batch_size, micro_batch_tokens=1024)
    plan = planned(monkeypatch, args, lengths=lengths, device=device)
    assert plan.micro_batch_tokens == 1024
    assert plan.prediction.setup.tokens == (1500 if tokens == 1510 else tokens)


def test_a_resumed_run_keeps_its_choice(model_dir, monkeypatch):
    for tokens, checkpointing in ((256, True), (512, False)):
        state = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
        resume = Checkpoint(model_dir, {"state": state, "options": {"micro_batch_tokens": 0}})
        plan = planned(monkeypatch, asked(model_dir), resume=resume)  # a larger machine than the one where it began
        assert plan[:2] == (tokens, checkpointing) and plan.prediction.setup.tokens == tokens
        plan = planned(monkeypatch, asked(model_dir, micro_batch_tokens=128), resume=resume)
        assert plan[:2] == (128, checkpointing) and plan.prediction.setup.tokens == 128  # what is newly given


def test_weights_that_do_not_fit_are_refused_with_a_command_that_fits(model_dir, monkeypatch):
    shape = build_shape(read_config(str(model_dir)))
    monkeypatch.setattr(sys, "argv", ["tutorial/train_llama2.py", "--batch-size", "64", "--no-use-lora"])
    setups = cheaper_setups(TrainingSetup("lora", tokens=1024, dtype=torch.float32), 128)
    memory = 1.06 * first_that_fits(shape, setups, 1.0).peak
    state = predict(shape, TrainingSetup(dtype=torch.float32)).state
    assert memory < state
    with pytest.raises(UserError) as refusal:
        planned(monkeypatch, asked(model_dir), memory)
    assert f"take {state / 1e9:.1f} GB" in str(refusal.value)
    command = "This command fits: python tutorial/train_llama2.py --batch-size 64 --use-lora"
    assert str(refusal.value).endswith(command)
    with pytest.raises(UserError, match="Use a larger device"):
        planned(monkeypatch, asked(model_dir), 0.2e9)


def test_the_command_for_several_processes(model_dir, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    shape = build_shape(read_config(str(model_dir)))
    setup = TrainingSetup(tokens=128, dtype=torch.float32, world_size=2)
    monkeypatch.setattr(memory_plan, "device_memory", lambda device: predict(shape, setup).peak - 1e6)
    monkeypatch.setattr(sys, "argv", ["tutorial/train_llama3_70b.py"])
    planned(monkeypatch, asked(model_dir, gradient_checkpointing=False, micro_batch_tokens=128))
    said = capsys.readouterr().out
    assert "full fine-tuning, 2 processes, micro-batches of 128 tokens" in said
    assert said.endswith("This command fits: torchrun --nproc-per-node 2 tutorial/train_llama3_70b.py --use-lora\n")


def test_trainings_without_a_plan(model_dir, monkeypatch, capsys):
    """MoAI Platform splits a model by itself. Loading says what is wrong with a model that can't be built."""
    device = ON_CPU._replace(static_shapes=True)
    assert planned(monkeypatch, asked(model_dir), device=device) == (1024, False, None)
    (model_dir / "config.json").write_text('{"model_type": "llama", "hidden_size": 100, "vocab_size": -5}')
    assert planned(monkeypatch, asked(model_dir)) == (1024, False, None)
    with pytest.raises(CannotPlan, match="transformers"):
        build_shape(read_config(str(model_dir)))
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ the scripts


def test_a_training_prints_what_it_will_take_and_what_it_took(ready, warm):
    words = "--max-train-steps 2 --batch-size 4 --eval-rows 0"
    lines = warm(f"python tutorial/train_llama3.py {words}", cwd=ready).stdout.splitlines()
    plans = [line for line in lines if line.startswith("Memory plan: ")]
    (first, _) = (line for line in lines if line.startswith("Memory: "))
    assert len(plans) == 3 and lines.index(plans[1]) < lines.index(first)
    sizes = re.fullmatch(r"Memory plan: predicted peak (.*) GB, measured (.*) GB \([+-]\d+%\)", plans[2]).groups()
    predicted, measured = map(float, sizes)
    assert plans[0].endswith(f": peak {predicted:.2f} GB") and measured > 0.2
    size = sum(tensor.numel() for tensor in load_file(ready / "llama3_summarization" / "model.safetensors").values())
    weights = f"{4 * size / 1e6:.2f}"  # in MB: in GB it would be 0.00
    assert plans[1].startswith(f"Memory plan: weights {weights}, gradients {weights}, ") and plans[1].endswith(" MB")


@pytest.mark.parametrize("switch", first_fast(1, ["on", "off"]))
def test_gradient_checkpointing(switch, ready, warm):
    words = f"--max-train-steps 1 --batch-size 4 --eval-rows 0 --gradient-checkpointing {switch}"
    said = warm(f"python tutorial/train_llama3.py {words}", cwd=ready).stdout
    assert f"gradient checkpointing {switch}: peak" in said


def test_gradient_checkpointing_is_on_off_or_auto(ready, warm):
    command = "python tutorial/train_llama3.py --gradient-checkpointing perhaps"
    tells(warm(command, cwd=ready, ok=None), "perhaps", "auto")
