"""One measurement of tests/gpu_check.py, in a process of its own.

    python tests/gpu_measurement.py qwen3-4b-qlora [--small]

It works in the current directory, and writes its figures to result.json there. A model has its real shape and random
weights, which are made on the GPU, in 4 bit layer by layer; rows are as long as those of a tutorial's sample. All else
is what the scripts run: the memory plan, the adapter, the loss, the optimizer and the loop.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import List, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common import distributed, trainer
from common.dataset_file import label_counts
from common.device import Device, memory_used, start_device, total_memory
from common.optim import make_optimizer
from common.support.cli import train_arguments
from common.support.exit import UserError, run
from common.support.files import require_disk_space
from common.support.model_dir import ModelSource
from model import fsdp, load, packing
from model.configs import CONFIGS
from model.generate import TokenBar, generate_answers
from model.lora import disable_cpu_weight_packing, linear_layers, quantization_config
from model.memory_plan import ModelShape, adapter_size, num_weights, plan_memory, read_config
from model.tiny import write_tiny
from model.weight_format import DTYPE
from tests.gpu_check import MACHINE, MEASUREMENTS, Measurement, reason_in
from tutorial.check_accelerator import installed_versions, matrix_rate, platform_of

ROOT = Path(__file__).resolve().parents[1]


class Shape(NamedTuple):
    """A model's real sizes, with rows and batches as in the tutorial that trains it, or one like it."""

    config: dict
    sample: str
    characters: float  # of a line of the sample for each token; a row then has as many tokens as on the tutorial's page
    batch_size: int = 8
    block_size: int = 2048
    steps: int = 9


_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
_XL = {"n_embd": 1600, "n_inner": 6400, "n_layer": 48, "n_head": 25, "n_positions": 1024}
_STORED = {"num_hidden_layers": 4, "vocab_size": 32000}  # 2.3 GB in 16 bit
_KOREAN = ("korean_safe_conversation", 1.05)
SHAPES = {
    "qwen3-4b": Shape(CONFIGS["qwen3"], "korean_conversations", 1.43),
    "llama3.1-8b": Shape(CONFIGS["llama3_1"], *_KOREAN),
    "llama3.2-1b": Shape({**CONFIGS["llama3_1"], **_1B}, *_KOREAN, steps=21),
    "gpt2-xl": Shape({**CONFIGS["gpt"], **_XL}, "Evol-Instruct-Python-26k", 2.56, batch_size=32, block_size=1024),
    "4-layers-of-8b": Shape({**CONFIGS["llama3_1"], **_STORED}, *_KOREAN),
}
SMALL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "n_embd": 256, "n_inner": 1024, "n_layer": 2, "n_head": 4,
}  # fmt: skip


class NotRun(Exception):
    """Why a measurement has no meaning on this machine."""


def main() -> None:
    name, small = sys.argv[1], "--small" in sys.argv
    measurement = {"machine": MACHINE, **MEASUREMENTS}[name]
    shape = SHAPES.get(measurement.shape)
    if shape and small:
        config = {key: SMALL.get(key, value) for key, value in shape.config.items()}
        shape = shape._replace(config=config, batch_size=4, block_size=64, steps=3)
    measure = {
        "machine": measure_machine,
        "training": measure_training,
        "resume": measure_resume,
        "loading": measure_loading,
        "generation": measure_generation,
    }[measurement.kind]
    try:
        result = {"status": "measured", **measure(measurement, shape, small)}
    except NotRun as reason:
        result = {"status": "not run", "note": str(reason)}
    if distributed.is_main_process():
        Path("result.json").write_text(json.dumps(result), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the machine


def measure_machine(measurement: Measurement, shape, small: bool) -> dict:
    """What the device is, and the rate of its matrix products."""
    device = start_device(seed=0)
    is_gpu = device.torch_device.type == "cuda"
    return {
        "platform": platform_of(device),
        "name": torch.cuda.get_device_name() if is_gpu else device.name,
        "memory": total_memory(device.torch_device),
        "devices": torch.cuda.device_count() if is_gpu else 1,
        "driver": driver_version() if is_gpu else None,
        "runtime": torch.version.cuda or torch.version.hip,
        "dtype": str(device.dtype).replace("torch.", ""),
        "matrix_rate": matrix_rate(device, 8192 if is_gpu and not small else 256, times=10),
        "versions": installed_versions(),
    }


def driver_version() -> str:
    """The version of the GPU's driver, by the driver's own tool."""
    nvidia = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    for command, version in ((nvidia, r"^([\d.]+)"), (["rocm-smi", "--showdriverversion"], r"Driver version:\s*(\S+)")):
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
            if re.search(version, said):
                return re.search(version, said)[1]
    return "not known"


# ------------------------------------------------------------------------------------------------ a model on the device


def write_directory(shape: Shape, directory: Path) -> str:
    """A model's directory, whose file of weights, which the scripts look for, has none. Its name."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config), encoding="utf-8")
    save_file({}, directory / "model.safetensors")
    return str(directory)


def random_base(base: str, weight_format, device: torch.device, dtype: torch.dtype, bits: int) -> nn.Module:
    """In place of `_load_base` of model.load, which reads files: random weights, made one by one on the device."""
    with fsdp.without_weights(dtype):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), **{DTYPE: dtype})
    if bits:
        quantize_layers(model, device, dtype)
    made: dict = {}  # an output layer can share its weight with the embeddings
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter not in made:
                made[parameter] = nn.Parameter(random_weight(parameter.shape, name, device, dtype))
            if parameter.is_meta:
                setattr(module, name, made[parameter])
    return model.to(device)  # its buffers


def random_weight(size, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """As a model is initialized: matrices from a normal distribution, norms 1, biases 0."""
    weight = torch.empty(size, dtype=dtype, device=device)
    if len(size) > 1:
        return weight.normal_(0.0, 0.02)
    return weight.fill_(0.0 if name.endswith("bias") else 1.0)


def quantize_layers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give the linear layers random weights in 4 bit. Only one layer at a time exists in 16 bit."""
    settings = quantization_config(4, device, dtype)  # UserError without a bitsandbytes that works
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"compress_statistics": settings.bnb_4bit_use_double_quant, "quant_type": settings.bnb_4bit_quant_type}
    for name, layer in list(linear_layers(model)):
        weight = random_weight(layer.weight.shape, name, device, dtype)
        quantized = Linear4bit(layer.in_features, layer.out_features, False, dtype, device="meta", **how)
        quantized.weight = Params4bit(weight, requires_grad=False, module=quantized, **how).to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized)
    model.is_loaded_in_4bit = True  # peft asks for it
    disable_cpu_weight_packing(model)


def random_shards(model: nn.Module, _) -> None:
    """In place of `_read_shards` of model.fsdp."""
    for name, parameter in model.named_parameters():
        shard = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
        shard.copy_(random_weight(shard.shape, name, shard.device, shard.dtype))


def random_rows(shape: Shape) -> dict:
    """A split of a dataset file: random tokens in rows as long as those of the sample, a loss on each second half.

    The lengths are the same each time: on average 230 tokens for Qwen3, 290 for Llama, 630 for GPT-2.
    """
    file = ROOT / "dataset" / "samples" / shape.sample / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lengths = torch.tensor([min(shape.block_size, math.ceil(len(line) / shape.characters)) for line in lines])
    offsets = torch.tensor([0, *accumulate(lengths.tolist())])
    positions = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
    mask = positions >= (lengths // 2).repeat_interleave(lengths)
    return {
        "input_ids": torch.randint(shape.config["vocab_size"], positions.shape, dtype=torch.int32),
        "loss_mask": mask,
        "offsets": offsets,
        "lengths": lengths.int(),
        "label_counts": label_counts(mask, offsets),
    }


# ------------------------------------------------------------------------------------------------ a training


def measure_training(measurement: Measurement, shape: Shape, small: bool) -> dict:
    """The steps of a train script, which reads no model and saves none."""
    place = Path(f"rank-{distributed.rank()}")
    model_dir = write_directory(shape, place / "model")
    steps = f"--max-train-steps {shape.steps} --log-interval 1 --eval-rows 0"
    sys.argv = ["train", *steps.split(), *measurement.options.split()]
    paths = {"model_name_or_path": model_dir, "dataset_name_or_path": "", "save_dir": str(place / "trained")}
    args = train_arguments("", lr=2e-5, batch_size=shape.batch_size, block_size=shape.block_size, **paths)
    device = start_device(args.seed, args.deterministic)
    rows = random_rows(shape)
    dataset = {"train": rows, "validation": rows, "meta": {}, "sha256": ""}
    if measurement.packed is not None:
        Device.packs = measurement.packed
    plan = plan_memory(args, device, dataset)
    if measurement.change == "float16":
        if device.dtype == torch.float16:
            raise NotRun("this GPU computes in float16 anyway")
        device = device._replace(dtype=torch.float16)
    if measurement.change == "varlen attention":
        use_varlen_attention(device)
    rate = matrix_rate(device, 256 if small else 8192, times=10)
    device.release_memory()
    idle = memory_used(device.torch_device)[0]

    load._load_base = random_base
    fsdp.find_tensors = lambda model, directory: {}
    fsdp._read_shards = random_shards
    model = load.load_for_training(args, plan, device)
    if measurement.change == "all logits":
        model.own_head = True  # the model's own forward, which computes all of them
    optimizer = make_optimizer(model, args, device)
    summary = trainer.train(model, optimizer, dataset, args, plan, device)

    peak = memory_used(device.torch_device)[1]
    if measurement.packed and model.network.config._attn_implementation != packing.PACKED:
        raise UserError("The model cannot take packed rows with this attention.")
    if not distributed.is_main_process():
        return {}
    records = [json.loads(line) for line in open(f"{args.save_dir}/training_log.jsonl", encoding="utf-8")]
    seconds = sum(record["duration"] for record in records[1:])
    tokens = sum(record["duration"] * record["tokens_per_second"] for record in records[1:])
    operations = tokens * operations_of_a_token(model_dir, plan.prediction.setup, rows)
    is_gpu = device.torch_device.type == "cuda"
    checkpointing = "on" if plan.gradient_checkpointing else "off"
    return {
        "tokens_per_second": tokens / seconds,
        "of_matrix_rate": operations / seconds / rate / measurement.processes,
        "matrix_rate": rate,
        "peak": peak if is_gpu else peak - idle,  # PyTorch does not count a GPU's kernels
        "allocated": torch.cuda.max_memory_allocated() if is_gpu else None,
        "plan": plan.prediction.peak - plan.prediction.program,
        "losses": [record["loss"] for record in records],
        "step_seconds": [record["duration"] for record in records],
        "note": f"{summary['options']['micro_batch_tokens']} tokens at once, gradient checkpointing {checkpointing}",
    }


def operations_of_a_token(model_dir: str, setup, rows: dict) -> float:
    """Operations of the matrix products of a token, attention's own not counted: each weight twice in the forward pass,
    twice for the gradient of its input and, where it is trained, twice for its own. Only tokens with a loss go through
    the output layer."""
    shape = ModelShape(read_config(model_dir))
    with_loss = int(rows["label_counts"].sum()) / int(rows["lengths"].sum())
    weights = num_weights(shape.matrices) + with_loss * shape.vocabulary * shape.hidden
    if setup.full:
        return 6 * weights
    return 4 * weights + 6 * adapter_size(shape, setup)


def use_varlen_attention(device: Device) -> None:
    """Replace `packed_attention` of model.packing by PyTorch's flash attention for rows of different lengths."""
    if device.torch_device.type == "cpu":
        raise NotRun("PyTorch has this attention for GPUs alone")
    packing.packed_attention = varlen_attention
    heads = torch.zeros((1, 4, 16, 64), dtype=device.dtype, device=device.torch_device)
    cu_seq_lens = torch.tensor([0, 8, 16], dtype=torch.int32, device=device.torch_device)
    # enable_packing takes any error for a "no". Here it is the reason why this GPU cannot do it.
    varlen_attention(None, heads, heads[:, :2], heads[:, :2], None, cu_seq_lens)


def varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, scaling=None, **options):
    """As model.packing.packed_attention, but one kernel computes all rows."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if not hasattr(cu_seq_lens_q, "longest"):  # once for all layers, because to read it is to wait for the GPU
        cu_seq_lens_q.longest = int(cu_seq_lens_q.diff().max())
    bounds = (cu_seq_lens_q, cu_seq_lens_q, cu_seq_lens_q.longest, cu_seq_lens_q.longest)
    parts = [part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value)]  # [tokens, heads, width]
    causal = (-1, 0)
    output = varlen_attn(*parts, *bounds, scale=scaling, window_size=causal, enable_gqa=True)
    return output[None], None


# ------------------------------------------------------------------------------------------------ the other kinds


def measure_resume(measurement: Measurement, shape, small: bool) -> dict:
    """Train by the script, stop it after step 4 and resume: are the weights those of a training that ran straight?"""
    write_tiny("llama3", "model")
    # In float32, so that no difference is rounded away; on a GPU with a width that uses the kernels of real models.
    width = {} if small else {"hidden_size": 512, "num_hidden_layers": 4, "head_dim": 128}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained("model", **width)
    AutoModelForCausalLM.from_config(config).float().save_pretrained("model")
    sample = f"--dataset-name-or-path {ROOT}/dataset/samples/cnn_dailymail --save-path data.pt"
    run_script(f"dataset/prepare_llama3_dataset.py --model-name-or-path model {sample}")
    train = f"{ROOT}/tutorial/train_llama3.py --model-name-or-path model --dataset-name-or-path data.pt "
    train += "--batch-size 8 --max-train-steps 8 --log-interval 1 --eval-rows 0 --save-dir"
    run_script(f"{train} straight")
    run_script(f"{ROOT}/tests/killed.py 15 +common.trainer:Trainer.train_step 4 {train} resumed", exit_status=143)
    if "Resuming from step 4 of 8" not in run_script(f"{train} resumed"):
        raise UserError("The training was not resumed.")
    different = differences("straight", "resumed")
    if not different:
        return {"same": True, "note": "8 steps, and 4 that were resumed to 8: the same weights, bit for bit"}
    run_script(f"{train} again")
    again = "are not the same either" if differences("straight", "again") else "are the same"
    note = (
        f"{len(different)} tensors differ by {max(different):.1e} at most; two trainings that nothing stopped {again}"
    )
    return {"same": False, "note": note}


def run_script(words: str, exit_status: int = 0) -> str:
    """What a script printed. UserError where it ended with another exit status."""
    script, *options = words.split()
    done = subprocess.run([sys.executable, str(ROOT / script), *options], capture_output=True, text=True)
    if done.returncode != exit_status:
        raise UserError(f"{Path(script).name} ended with {done.returncode}: {reason_in(done.stderr)}")
    return done.stdout


def differences(one: str, other: str) -> List[float]:
    """The largest difference of each tensor that is not the same in two saved models."""
    tensors, others = load_file(f"{one}/model.safetensors"), load_file(f"{other}/model.safetensors")
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    return [float((tensors[name] - others[name]).abs().max()) for name in different]


def measure_loading(measurement: Measurement, shape: Shape, small: bool) -> dict:
    """Load a stored model in 4 bit. It was written right before, so the main memory has it."""
    device = start_device(seed=0)
    require_disk_space(0 if small else 3 * 10**9, ".", "The stored model")
    config = write_directory(shape, Path("config"))
    random_base(config, None, device.torch_device, device.dtype, 0).save_pretrained("stored")
    for _ in range(2):  # the first time, kernels are loaded too
        device.release_memory()
        device.synchronize()
        begin = time.perf_counter()
        load.load_model("./stored", device.torch_device, device.dtype, 4)
        device.synchronize()
        seconds = time.perf_counter() - begin
    size = ModelSource("./stored").bytes_of_weights
    note = f"{size / 1e9:.2f} GB of 16 bit in {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, not from the disk"
    return {"seconds": seconds, "bytes": size, "note": note}


def measure_generation(measurement: Measurement, shape: Shape, small: bool) -> dict:
    """Greedy answers, as the inference scripts make them, to prompts as long as the rows."""
    device = start_device(seed=0)
    load._load_base = random_base
    model = load.load_model(write_directory(shape, Path("model")), device.torch_device, device.dtype, 0)
    rows = random_rows(shape)
    prompts = [ids.tolist() for ids in rows["input_ids"].split(rows["lengths"].tolist())][: measurement.answers]
    # No answer ends early: that random weights prefer this one token is not likely.
    tokenizer = SimpleNamespace(eos_token_id=shape.config["vocab_size"] - 1, decode=lambda ids, **options: "")
    for new_tokens in (2, 8 if small else 64):  # the first is a warm-up
        device.synchronize()
        begin = time.perf_counter()
        with TokenBar(SimpleNamespace(max_new_tokens=new_tokens)) as bar:
            generate_answers(model, tokenizer, prompts, new_tokens, streamer=bar)
        device.synchronize()
        seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": len(prompts) * new_tokens / seconds,
        "seconds": seconds,
        "peak": memory_used(device.torch_device)[1],
        "note": f"{new_tokens} tokens each, after prompts of up to {max(map(len, prompts))}",
    }


if __name__ == "__main__":
    run(main)
