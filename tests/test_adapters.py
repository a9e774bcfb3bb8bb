"""Adapters: the base stays as it is, in 4 and 8 bit too, and what is saved, loaded and merged is what was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from argparse import Namespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.batches import Batches
from common.dataset_file import load_dataset
from common.device import start_device
from common.optim import make_optimizer
from common.support.exit import UserError
from common.support.model_dir import ModelSource, require_adapter, require_model
from common.tokenization import load_tokenizer
from common.trainer import train
from dataset.prepare import prepare_dataset
from dataset.sources import load_splits
from dataset.templates import korean_alpaca
from model.generate import generate_answers
from model.load import load_for_training, load_model
from model.loss import CausalLMLoss
from model.memory_plan import TrainingPlan
from model.save import save_model
from model.tiny import write_tiny
from tests.conftest import ROOT
from tests.helpers import answer_start, needs_bitsandbytes, needs_float16, quantizes
from tests.test_loss import a_split
from tests.test_training import CPU, options

FOUR = pytest.param(4, id="4 bit", marks=needs_bitsandbytes)
EIGHT = pytest.param(8, id="8 bit", marks=[needs_bitsandbytes, pytest.mark.slow])
WHOLE = pytest.param(0, id="whole")
BF16, FP16 = CPU._replace(dtype=torch.bfloat16), CPU._replace(dtype=torch.float16)  # a T4 has no bfloat16
IDS = torch.arange(48).view(2, 24) + 300
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A function: kind of stand-in -> its directory."""
    root = tmp_path_factory.mktemp("models")

    def directory(kind, seed=0):
        path = root / f"{kind}-{seed}"
        if not path.exists():
            write_tiny(kind, path, seed)
        return str(path)

    return directory


def lora(model_dir, tmp_path, **changed):
    """Options of a training of an adapter."""
    values = {
        "model_name_or_path": str(model_dir), "use_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"], "lr": 1e-2,
    }  # fmt: skip
    return options(tmp_path, **{**values, **changed})


def plan_of(args):
    return TrainingPlan(args.micro_batch_tokens, args.gradient_checkpointing)


def load(args, device=CPU):
    return load_for_training(args, plan_of(args), device)


def trained(model, args, device=CPU, dataset=None):
    """Train `model`; what run.json is to say of it."""
    optimizer = make_optimizer(model, args, device)
    return train(model, optimizer, dataset or dataset_of(), args, plan_of(args), device)


def adapted(args, device=CPU):
    """The model of `args` with its adapter and its loss, as if it had learned: a new one's B is zero, and so is all it
    adds."""
    torch.manual_seed(args.seed)
    module = load(args, device)
    generator = torch.Generator().manual_seed(1)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return module


OF_ALPACA = {"dataset": {"template": "alpaca"}}  # what of a run is written into an adapter's file


@pytest.fixture
def saved(directory, tmp_path, capsys):
    """A function: the directory in which an adapter on a stand-in was saved."""

    def saved(kind, name="adapter", run=OF_ALPACA, **changed):
        args = lora(directory(kind), tmp_path, **changed)
        save_model(adapted(args), load_tokenizer(args.model_name_or_path), str(tmp_path / name), run=run)
        capsys.readouterr()
        return tmp_path / name

    return saved


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def base_weights(model):
    """All that the base is made of, quantization constants and buffers too."""
    everything = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: tensor.clone() for name, tensor in everything.items() if "lora_" not in name}


def adapter_weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


def gradients(model, device=CPU):
    """Of the trainable weights, by the model's own forward."""
    model.train()
    with device.autocast():
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return {path.name for path in folder.iterdir()} - {"special_tokens_map.json"}  # of older transformers


def dataset_of(**splits):
    parts = {"train": a_split(1, rows=16), "validation": a_split(2, rows=6), "meta": {"template": "alpaca"}}
    return {**parts, "sha256": "", **splits}


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("kind", ["llama3", "gpt"])
@pytest.mark.parametrize("bits", [WHOLE, FOUR, EIGHT])
def test_only_the_adapters_weights_change_and_the_base_stays_bit_for_bit(bits, kind, directory, tmp_path):
    args = lora(directory(kind), tmp_path, bits=bits, eval_step=2, gradient_checkpointing=True)
    model = adapted(args, BF16)
    base, adapter = base_weights(model), adapter_weights(model)
    assert {tensor.dtype for tensor in base.values()} >= {{0: torch.bfloat16, 4: torch.uint8, 8: torch.int8}[bits]}
    trained(model, args, BF16)
    assert same(base_weights(model), base)
    changed = adapter_weights(model)
    assert len(changed) == len(adapter) and not [name for name in adapter if torch.equal(adapter[name], changed[name])]


@pytest.mark.parametrize("device", [CPU, BF16, pytest.param(FP16, marks=needs_float16)], ids=lambda a: str(a.dtype)[6:])
@pytest.mark.parametrize("bits", [WHOLE, FOUR, EIGHT])
def test_an_adapters_weights_are_float32_on_a_base_in_any_type(bits, device, directory, tmp_path):
    model = adapted(lora(directory("llama3"), tmp_path, bits=bits), device)
    assert {weight.dtype for weight in adapter_weights(model).values()} == {torch.float32}
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    assert {weight.dtype for weight in norms} == {device.dtype}
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad != ("lora_" in name)]


@pytest.mark.parametrize("kind, layers", [("llama3", LINEAR), ("gpt", {"c_attn", "c_proj", "c_fc"})])
@pytest.mark.parametrize("bits", [WHOLE, FOUR])
def test_every_linear_layer_but_the_output_layer_gets_an_adapter(bits, kind, layers, directory, tmp_path, capsys):
    model = load(lora(directory(kind), tmp_path, bits=bits), CPU)
    places = {name.split(".lora_")[0] for name in adapter_weights(model)}
    assert {place.split(".")[-1] for place in places} == layers
    config = model.model.config
    # GPT-2 has a c_proj in its attention and one more behind it
    assert len(places) == config.num_hidden_layers * (len(layers) + (kind == "gpt"))
    count = sum(weight.numel() for weight in adapter_weights(model).values())
    line = f"LoRA: {count:,} trainable parameters, r=4, on {', '.join(sorted(layers))}"
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_only_the_target_modules_that_are_asked_for_get_an_adapter(saved):
    folder = saved("llama3", lora_target_modules=["q_proj", "v_proj"])
    assert {name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")} == {"q_proj", "v_proj"}
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}


def test_target_modules_that_the_model_lacks_are_answered_with_those_it_has(directory, tmp_path):
    for kind, have in (("llama3", sorted(LINEAR)), ("gpt", ["c_attn", "c_fc", "c_proj"])):
        args = lora(directory(kind), tmp_path, lora_target_modules=["c_attn" if kind == "llama3" else "q_proj"])
        with pytest.raises(UserError, match=f"It has {', '.join(have)}; all-linear selects all of them"):
            load(args, CPU)


def test_an_adapter_starts_from_the_base_itself(directory, tmp_path):
    model = load(lora(directory("llama3"), tmp_path), CPU)
    assert torch.equal(logits(model.model), logits(load_model(directory("llama3"), CPU.torch_device, CPU.dtype)))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["llama3", "gpt"])
def test_a_quantized_base_answers_nearly_as_the_whole_one(kind, directory):
    whole, four, eight = (logits(load_model(directory(kind), CPU.torch_device, CPU.dtype, bits)) for bits in (0, 4, 8))
    spread = (whole - whole.mean(-1, keepdim=True)).norm()
    assert 1e-4 < (eight - whole).norm() / spread < 0.05
    assert (eight - whole).norm() < (four - whole).norm() < 0.3 * spread


@needs_bitsandbytes
def test_a_4_bit_base_is_nf4_with_double_quantization_and_products_in_the_devices_type(directory):
    for device in (CPU, BF16):
        model = load_model(directory("llama3"), device.torch_device, device.dtype, 4)
        layer = model.model.layers[0].self_attn.q_proj
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, device.dtype)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(directory, tmp_path):
    made = []
    for seed in (0, 0, 1):
        args = lora(directory("llama3"), tmp_path, seed=seed, max_train_steps=2, eval_rows=0, lora_dropout=0.1)
        torch.manual_seed(seed)
        model = load(args, CPU)
        trained(model, args)
        made.append(adapter_weights(model))
    assert same(made[0], made[1])
    assert not [name for name in made[0] if torch.equal(made[0][name], made[2][name])]


@pytest.fixture(scope="module")
def korean(directory, tmp_path_factory):
    """A dataset file of the Korean samples, in rows of 96 tokens."""
    tokenizer, path = load_tokenizer(directory("llama3")), str(tmp_path_factory.mktemp("data") / "korean.pt")
    splits, source = load_splits(str(ROOT / "dataset" / "samples" / "korean_safe_conversation"))
    args = Namespace(block_size=96, save_path=path, model_name_or_path=directory("llama3"), show=0, columns={})
    prepare_dataset(splits, source, korean_alpaca, tokenizer, args)
    return path


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("device", [BF16, FP16], ids=lambda a: str(a.dtype)[6:])
def test_the_loss_of_an_adapter_on_a_4_bit_base_falls_on_the_korean_samples(device, directory, korean, tmp_path):
    changed = {"max_train_steps": 24, "lora_r": 16, "lora_alpha": 16, "log_interval": 8}
    args = lora(directory("llama3"), tmp_path, bits=4, **changed)
    dataset = load_dataset(korean, load_tokenizer(directory("llama3")), 96)
    torch.manual_seed(0)
    model = load(args, device)
    model.model.get_output_embeddings().weight.data.mul_(10)  # the stand-in's logits are too small for much of a fall
    trained(model, args, device, dataset)
    log = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    before, after = (record["held_out_loss"] for record in log if "held_out_loss" in record)
    first, *_, last = (record["loss"] for record in log if "loss" in record)
    assert after < before - 0.7 and last < first - 0.3


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["llama3", "gpt"])
@pytest.mark.parametrize("bits", [pytest.param(None, id="all weights"), WHOLE, FOUR, EIGHT])
def test_gradient_checkpointing_computes_again_and_gives_the_same_gradients(bits, kind, directory, tmp_path):
    found, passes = [], []
    for checkpointing in (False, True):
        changed = {"use_lora": bits is not None, "bits": bits or 0, "gradient_checkpointing": checkpointing}
        model = (load if bits is None else adapted)(lora(directory(kind), tmp_path, **changed), CPU).model
        norm = next(module for name, module in model.named_modules() if name.endswith(("0.input_layernorm", "0.ln_1")))
        passes.append(0)
        norm.register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
        found.append(gradients(model))
    assert passes == [1, 2]
    assert found[0].keys() == found[1].keys() and all(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bits", [FOUR, EIGHT])
def test_the_gradient_through_a_quantized_base_is_the_same_after_an_evaluation(bits, directory, tmp_path):
    """bitsandbytes packs 4-bit weights in an evaluation, on a CPU with AVX512_BF16 and where widths are multiples of
    64: a gradient no longer flows back through them, and nothing says so."""
    shutil.copytree(directory("llama3"), tmp_path / "wide")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "wide")
    config.intermediate_size = 256
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    model = adapted(lora(tmp_path / "wide", tmp_path, bits=bits), BF16).model
    before = gradients(model, BF16)
    with BF16.autocast():
        logits(model)
    after = gradients(model, BF16)
    assert all(gradient.any() for gradient in before.values())
    assert same(before, after)


# ------------------------------------------------------------------------------------------------ the optimizer


@pytest.mark.parametrize("bits", [FOUR, EIGHT])
def test_states_of_the_optimizer_are_in_8_bit_on_a_quantized_base(bits, directory, tmp_path):
    from bitsandbytes.optim import AdamW8bit

    args = lora(directory("llama3"), tmp_path, bits=bits, lora_r=64, max_train_steps=1, eval_rows=0)
    model = adapted(args)
    optimizer = make_optimizer(model, args, CPU)
    assert isinstance(optimizer, AdamW8bit)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]  # an adapter is matrices alone
    train(model, optimizer, dataset_of(), args, plan_of(args), CPU)
    assert len(optimizer.state) == len(adapter_weights(model))
    for weight, state in optimizer.state.items():
        expected = torch.uint8 if weight.numel() >= 4096 else torch.float32  # bitsandbytes leaves small ones alone
        assert state["state1"].dtype == state["state2"].dtype == expected
    assert sum(weight.numel() >= 4096 for weight in optimizer.state) > 20


@pytest.mark.parametrize("bits", [WHOLE, FOUR])
def test_the_optimizer_is_torchs_own_where_there_is_nothing_in_8_bit(bits, directory, tmp_path, monkeypatch):
    if bits:
        import bitsandbytes.optim

        def no_kernel(*_, **__):
            raise NotImplementedError

        monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", no_kernel)
    args = lora(directory("llama3"), tmp_path, bits=bits)
    model = adapted(args)
    optimizer = make_optimizer(model, args, CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert {id(weight) for group in optimizer.param_groups for weight in group["params"]} == {
        id(weight) for weight in model.parameters() if weight.requires_grad
    }


# ------------------------------------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize("kind", ["llama3", "gpt"])
@pytest.mark.parametrize("bits", [WHOLE, FOUR, EIGHT])
def test_a_saved_and_reloaded_adapter_gives_the_same_loss(bits, kind, directory, tmp_path, capsys):
    args = lora(directory(kind), tmp_path, bits=bits, eval_step=2)
    module, folder = adapted(args), tmp_path / "adapter"
    run = trained(module, args)
    save_model(module, load_tokenizer(directory(kind)), str(folder), run=run)
    batch = Batches(dataset_of()["validation"], 4, 200).micro_batches(list(range(6)))[0]
    capsys.readouterr()
    reloaded = load_model(str(folder), CPU.torch_device, CPU.dtype)  # in the bits of the training
    how = f" in {bits} bit" if bits else ""
    said = f"Loading adapter {folder} on base model {directory(kind)}{how} (prompt template: alpaca)"
    assert capsys.readouterr().out.splitlines() == [said]
    assert same(adapter_weights(reloaded), adapter_weights(module.model))
    with torch.no_grad():
        expected = module.eval()(*batch)
        assert torch.equal(CausalLMLoss(reloaded).eval()(*batch), expected)
        base = load_model(directory(kind), CPU.torch_device, CPU.dtype, bits)
        assert abs(CausalLMLoss(base).eval()(*batch) - expected) > 0.1


@pytest.mark.parametrize("trained", [WHOLE, FOUR])
def test_the_base_of_an_adapter_is_loaded_in_the_bits_that_are_asked_for(trained, saved, capsys):
    folder = str(saved("llama3", bits=trained))
    for bits, dtype in ((0, torch.float32), (4, torch.uint8), (8, torch.int8)):
        if bits and not quantizes():
            continue
        model = load_model(folder, CPU.torch_device, CPU.dtype, bits=bits)
        assert (f" in {bits} bit" in capsys.readouterr().out) == bool(bits)
        assert {weight.dtype for name, weight in model.named_parameters() if "base_layer" in name} == {dtype}


def test_only_the_adapter_and_the_tokenizer_are_saved_and_others_may_read_them(saved):
    folder = saved("llama3")
    made = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files(folder) == made | {"run.json"}  # the card needs all of a real run.json
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}
    weights = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 2 * len(LINEAR) and all(".lora_" in name for name in weights)


def test_the_weight_file_says_what_it_belongs_to(saved, directory):
    for bits in (0, 4) if quantizes() else (0,):
        folder = saved("llama3", bits=bits)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            facts = file.metadata()
        fingerprint = facts.pop("base_fingerprint")
        expected = {"format": "pt", "base": directory("llama3"), "base_bits": str(bits), "template": "alpaca"}
        assert facts == expected and len(fingerprint) == 16
    assert ModelSource(saved("gpt", "other")).adapter_facts["base_fingerprint"] != fingerprint
    assert ModelSource(directory("gpt")).adapter_facts == {}


def test_an_adapter_goes_with_its_own_base_alone(saved, directory):
    """Weights of the same shapes would be taken without a word."""
    folder = saved("llama3")
    point_to(folder, directory("llama3", seed=1))
    require_adapter(str(folder))
    with pytest.raises(UserError, match="was trained on other weights than those in .*llama3-1"):
        load_model(str(folder), CPU.torch_device, CPU.dtype)


def point_to(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_adapter_and_base_may_be_moved_and_adapter_config_json_says_where_the_base_is(saved, directory, tmp_path):
    folder = saved("llama3")
    expected = logits(load_model(str(folder), CPU.torch_device, CPU.dtype))
    shutil.copytree(directory("llama3"), tmp_path / "elsewhere" / "base")
    shutil.copytree(folder, tmp_path / "elsewhere" / "adapter")
    moved = tmp_path / "elsewhere" / "adapter"
    point_to(moved, tmp_path / "none")
    with pytest.raises(UserError, match=f"it is the base model of the adapter {moved}.* base_model_name_or_path"):
        require_model(str(moved))
    point_to(moved, tmp_path / "elsewhere" / "base")
    require_adapter(str(moved))
    assert ModelSource(moved).base == str(tmp_path / "elsewhere" / "base")
    assert torch.equal(logits(load_model(str(moved), CPU.torch_device, CPU.dtype)), expected)


@pytest.mark.parametrize("bits", [WHOLE, FOUR])
def test_plain_peft_and_plain_transformers_load_a_saved_adapter(bits, saved):
    from peft import AutoPeftModelForCausalLM

    folder = saved("llama3", bits=bits)
    expected = logits(load_model(str(folder), CPU.torch_device, CPU.dtype, bits=0))
    for plain in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        model = plain.from_pretrained(folder, torch_dtype=torch.float32)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_an_adapter_of_plain_peft_is_loaded(directory, tmp_path):
    """It has no facts in its metadata."""
    pytest.importorskip("jinja2")  # for the card that it writes
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(directory("llama3"), torch_dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "plain")
    require_adapter(str(tmp_path / "plain"))
    ours = load_model(str(tmp_path / "plain"), CPU.torch_device, CPU.dtype)
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)


def test_an_adapter_saved_over_a_whole_model_and_the_other_way_round_leave_nothing_of_each_other(
    saved, directory, tmp_path
):
    tokenizer, folder = load_tokenizer(directory("llama3")), tmp_path / "adapter"

    def whole():
        save_model(load_model(directory("llama3", 1), CPU.torch_device, CPU.dtype), tokenizer, str(folder))

    expected = logits(load_model(directory("llama3", 1), CPU.torch_device, CPU.dtype))
    whole()
    (folder / "training_log.jsonl").write_text("of the training")
    saved("llama3")
    assert not list(folder.glob("model*")) and not (folder / "config.json").exists()
    adapter = logits(load_model(str(folder), CPU.torch_device, CPU.dtype))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)), adapter)
    whole()
    assert not list(folder.glob("adapter_*"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)), expected)
    assert ModelSource(folder).base == str(folder)
    assert (folder / "training_log.jsonl").read_text() == "of the training"


def test_a_readers_own_folder_beside_the_saved_files_is_left_alone(saved, tmp_path):
    mine = tmp_path / "adapter" / "adapter_experiments"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("my own words")
    (mine.parent / "adapter_notes.txt").write_text("mine too")
    assert files(saved("llama3")) >= {"adapter_model.safetensors", "adapter_experiments", "adapter_notes.txt"}
    assert (mine / "notes.txt").read_text() == "my own words"


def test_a_disk_must_have_room_for_the_adapter_alone(saved, directory, tmp_path, monkeypatch):
    size = (saved("llama3") / "adapter_model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    args = lora(directory("llama3"), tmp_path)
    load(args, CPU)
    with pytest.raises(UserError, match=f"The trained model takes .* GB in {args.save_dir}, and that disk has"):
        load(lora(directory("llama3"), tmp_path, use_lora=False), CPU)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(UserError, match=f"The adapter takes .* GB in {args.save_dir}, and that disk has"):
        load(args, CPU)


# ------------------------------------------------------------------------------------------------ compared


@pytest.mark.parametrize("kind", ["llama3", "gpt"])
def test_answers_to_several_prompts_at_once_are_those_to_each_alone(kind, directory):
    model, tokenizer = load_model(directory(kind), CPU.torch_device, CPU.dtype), load_tokenizer(directory(kind))
    prompts = [list(range(300, 300 + length)) for length in (5, 23, 1, 12)]
    alone = [generate_answers(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert len(set(alone)) == 4 and generate_answers(model, tokenizer, prompts, 8) == alone


def test_compare_adapter_shows_the_answers_of_base_and_adapter_beside_those_of_the_data(
    saved, directory, korean, tmp_path, warm, capsys
):
    folder, tokenizer = saved("llama3"), load_tokenizer(directory("llama3"))
    words = f"--model-name-or-path {folder} --dataset-name-or-path {korean} --rows 2 --max-new-tokens 12"
    said = warm(f"python {ROOT}/tutorial/compare_adapter.py {words}", cwd=tmp_path, env={"COLUMNS": "120"}).stdout
    rows, dtype = load_dataset(korean, tokenizer)["validation"], start_device(0).dtype
    prompts, found = [], {"Base": [], "Adapter": [], "Answer in the data": []}
    for row in range(2):
        ids, start = rows["input_ids"][row * 96 : row * 96 + 96].tolist(), answer_start(rows, row)
        prompts.append(ids[:start])
        found["Answer in the data"].append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    for name, where in (("Base", directory("llama3")), ("Adapter", str(folder))):
        answers = generate_answers(load_model(where, CPU.torch_device, dtype), tokenizer, prompts, 12)
        found[name] = [answer.text for answer in answers]
    assert found["Base"] != found["Adapter"]
    for number in range(2):
        question = tokenizer.decode(prompts[number], skip_special_tokens=True).strip()
        answers = "".join(f"--- {name} ---\n{found[name][number].strip()}\n" for name in found)
        assert f"{question}\n{answers}" in said
    assert re.search("[가-힣]{3}", said) and "### instruction:" in said


# ------------------------------------------------------------------------------------------------ merged


@pytest.mark.parametrize("kind", ["llama2", "llama3", "gpt", "smollm2"])
def test_the_merged_model_gives_the_logits_of_base_and_adapter(kind, saved, directory):
    folder = str(saved(kind))
    both = load_model(folder, CPU.torch_device, torch.float32)
    expected = logits(both)
    assert (expected - logits(load_model(directory(kind), CPU.torch_device, torch.float32))).abs().max() > 0.01
    merged = both.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", ["lm_head", pytest.param("embed_tokens", marks=pytest.mark.slow)])
def test_a_foreign_adapter_on_an_output_layer_that_shares_the_embeddings_is_merged(layer, directory, tmp_path, warm):
    """The two get weights of their own, in the config as well: plain transformers has the logits of plain peft."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base, adapter, merged = directory("smollm2"), tmp_path / "adapter", tmp_path / "merged"
    config = LoraConfig(r=4, target_modules=["q_proj", layer], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(adapter)
    load_tokenizer(base).save_pretrained(adapter)
    untouched = AutoModelForCausalLM.from_pretrained(base).eval()
    assert untouched.config.tie_word_embeddings
    expected = logits(PeftModel.from_pretrained(untouched, adapter).eval())
    warm(f"python {ROOT}/tutorial/merge_adapter.py --model-name-or-path {adapter} --save-dir {merged}", cwd=tmp_path)
    found = logits(AutoModelForCausalLM.from_pretrained(merged).eval())
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind, bits", [("llama3", 0), ("gpt", 0)] + [("llama3", 4), ("llama3", 8), ("gpt", 4)])
def test_merge_adapter_adds_the_product_to_the_unquantized_weights_in_their_stored_type(
    kind, bits, saved, directory, tmp_path, warm
):
    if bits and not quantizes():
        pytest.skip("needs a bitsandbytes that quantizes on a CPU")
    folder, target = saved(kind, bits=bits), tmp_path / "merged"
    words = ("--model-name-or-path", folder, "--save-dir", target)
    done = warm(f"python {ROOT}/tutorial/merge_adapter.py", *words, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"Model saved in {target}"
    assert "Warning" not in done.stderr, done.stderr
    base, merged = (load_file(f"{where}/model.safetensors") for where in (directory(kind), target))
    adapter = load_file(folder / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    stored = {"llama3": torch.bfloat16, "gpt": torch.float32}[kind]
    touched = 0
    for name, weight in base.items():
        place = f"base_model.model.{name[: -len('.weight')]}.lora_%s.weight"
        assert merged[name].dtype == weight.dtype == stored
        if place % "A" not in adapter:
            assert torch.equal(merged[name], weight), name
            continue
        product = 8 / 4 * adapter[place % "B"] @ adapter[place % "A"]
        exact = weight.float() + (product.t() if kind == "gpt" else product)
        # the product and the sum are rounded to the stored type, each by half of its last digit at most
        digit = torch.finfo(stored).eps
        assert ((merged[name].float() - exact).abs() <= digit * (product.abs().max() + exact.abs().max())).all()
        assert (merged[name].float() - weight.float()).abs().max() > 0.02
        touched += 1
    assert touched == len(adapter) // 2
    assert files(target) >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not list(target.glob("adapter_*"))
    plain = AutoModelForCausalLM.from_pretrained(target, torch_dtype="auto")
    assert plain.dtype == stored and not hasattr(plain.config, "quantization_config")
    expected = logits(load_model(str(folder), CPU.torch_device, torch.float32, bits=0))
    if stored == torch.float32:
        torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=0)
    else:
        assert (logits(plain.float()) - expected).norm() < 0.02 * expected.norm()
