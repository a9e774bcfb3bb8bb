"""Predicted and measured peak memory of a training: a table of tests/benchmarks/README.md.

    python tests/benchmarks/plan_accuracy.py
    python tests/benchmarks/plan_accuracy.py --only gpt2 --methods full --dtype float32

Six shapes with random weights, whose weights, gradients and optimizer states take 1 to 4 GB, and SmolLM2-135M
(./smollm2-135m, from tutorial/download_smollm2.py); full fine-tuning, LoRA and LoRA on a 4-bit base, each without and
with gradient checkpointing. Each measurement is a process of its own: load_for_training, make_optimizer and train, two
steps of two micro-batches of full rows, every token with a loss. Both figures leave out what the process holds when it
has imported everything; the measured one counts from the moment when the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"full": [], "lora": ["--use-lora"], "lora_4bit": ["--use-lora", "--load-in-4bit"]}
TOKENS = 512  # of a micro-batch, one row
# A quantized base has to be larger, to take 1 GB: {method: (layers, hidden size)}.
SIZES = {"full": (8, 1024), "lora": (10, 1792), "lora_4bit": (8, 3072)}
SHAPES = ("llama", "llama, tied", "mistral", "gpt2", "qwen3, tied", "moe")


def config_of(shape: str, method: str):
    """A config of the shape, of a size that suits the method."""
    layers, width = SIZES[method]
    dtype = torch.float32 if method == "full" else torch.bfloat16
    llama = {
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": 7 * width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "dtype": dtype,
    }
    grouped = {**llama, "num_key_value_heads": 2 if width == 1792 else 4}
    if shape == "llama":
        return transformers.LlamaConfig(**llama)
    if shape == "llama, tied":
        return transformers.LlamaConfig(**llama, tie_word_embeddings=True)
    if shape == "mistral":
        return transformers.MistralConfig(**grouped)
    if shape == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": width // 128, "vocab_size": 50257, "n_positions": 1024}
        return transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, dtype=dtype)
    if shape == "qwen3, tied":
        return transformers.Qwen3Config(**{**grouped, "vocab_size": 151936}, head_dim=128, tie_word_embeddings=True)
    if shape == "moe":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width}
        return transformers.MixtralConfig(**{**grouped, **experts})
    raise ValueError(shape)


def write_model(shape: str, method: str, directory: str) -> None:
    """Write a model of the shape with random weights."""
    config = config_of(shape, method)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.save_pretrained(directory)


def full_rows(rows: int, vocabulary: int) -> dict:
    """A split of a dataset file: `rows` rows of TOKENS random tokens, all of them with a loss."""
    return {
        "input_ids": torch.randint(vocabulary, (rows * TOKENS,), dtype=torch.int32),
        "offsets": torch.arange(0, rows * TOKENS + 1, TOKENS),
        "lengths": torch.full((rows,), TOKENS, dtype=torch.int32),
        "label_counts": torch.full((rows,), TOKENS - 1, dtype=torch.int32),
        "loss_mask": torch.ones(rows * TOKENS, dtype=torch.bool),
    }


def measure(model_dir: str, method: str, checkpointing: str, dtype: str) -> None:
    """Train, and print what was predicted and measured as JSON, in bytes. The process is at its end then."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    from common.device import memory_used, start_device
    from common.optim import make_optimizer
    from common.support.cli import train_arguments
    from common.trainer import train
    from model.load import load_for_training
    from model.memory_plan import plan_memory

    with tempfile.TemporaryDirectory() as save_dir:
        sys.argv = ["train", *METHODS[method], "--gradient-checkpointing", checkpointing, "--max-train-steps", "2"]
        sys.argv += ["--micro-batch-tokens", str(TOKENS), "--eval-rows", "0"]
        paths = {"model_name_or_path": model_dir, "dataset_name_or_path": "", "save_dir": save_dir}
        args = train_arguments("", lr=1e-5, batch_size=2, block_size=TOKENS, log_interval=1, **paths)
        device = start_device(0, True)
        if dtype:
            device = device._replace(dtype=getattr(torch, dtype))
        vocabulary = json.loads((Path(model_dir) / "config.json").read_text())["vocab_size"]
        split = full_rows(4, vocabulary)
        dataset = {"train": split, "validation": split, "meta": {}, "sha256": ""}
        plan = plan_memory(args, device, dataset)
        idle = memory_used(device.torch_device)[0]
        model = load_for_training(args, plan, device)
        train(model, make_optimizer(model, args, device), dataset, args, plan, device)
        measured = memory_used(device.torch_device)[1] - idle
        predicted = plan.prediction
        found = {"state": predicted.state, "predicted": predicted.peak}
        found = {name: size - predicted.program for name, size in found.items()}
        print(json.dumps({**found, "measured": measured}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*SHAPES, "smollm2-135m"], help="shapes")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--dtype", default="", help="of matrix products (default: the device's)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")][:1]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{' '.join(cpu)}; Python {platform.python_version()}, {versions}\n")
    print("| shape | method | checkpointing | state GB | predicted GB | measured GB | off |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in args.only:
        for method in args.methods:
            with tempfile.TemporaryDirectory() as place:
                directory = str(ROOT / "smollm2-135m")
                if shape in SHAPES:
                    directory = place
                    write = (
                        f"from tests.benchmarks.plan_accuracy import *; write_model({shape!r}, {method!r}, {place!r})"
                    )
                    subprocess.run([sys.executable, "-c", write], cwd=ROOT, check=True, capture_output=True)
                for switch in ("off", "on"):
                    command = [sys.executable, __file__, "--measure", directory, method, switch, args.dtype]
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                    row = f"| {shape} | {method} | {switch} |"
                    if done.returncode:
                        print(f"{row} {done.stderr.splitlines()[-1]} |", flush=True)
                        continue
                    found = json.loads(done.stdout.splitlines()[-1])
                    sizes = " | ".join(f"{found[name] / 1e9:.2f}" for name in ("state", "predicted", "measured"))
                    print(f"{row} {sizes} | {found['predicted'] / found['measured'] - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
