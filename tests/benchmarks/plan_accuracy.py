"""What the plan predicts of a training's peak memory, and what the training then takes: the table of the README.

    python tests/benchmarks/plan_accuracy.py
    python tests/benchmarks/plan_accuracy.py --only gpt2 --methods full

Six shapes with random weights, whose weights, gradients and optimizer states take 1 to 4 GB, and SmolLM2-135M
(./smollm2-135m, of tutorial/download_smollm2.py); every weight, LoRA, 4 bit + LoRA, each without and with gradient
checkpointing. Each measurement is a process of its own: load_to_train, make_optimizer and train, two steps of two
micro-batches of full rows, every token with a loss. Both figures are above what the process holds when it has imported
everything; the measured one counts from the moment when the model is loaded.
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
# a quantized base has to be larger, to take 1 GB: {method: (layers, width)}
SIZES = {"full": (8, 1024), "lora": (10, 1792), "lora_4bit": (8, 3072)}


def config_of(shape: str, method: str):
    """A config of the shape, of a size that suits the method."""
    layers, width = SIZES[method]
    of_llama = {
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": 7 * width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": width // 128,
        "dtype": torch.float32 if method == "full" else torch.bfloat16,
    }
    grouped = {**of_llama, "num_key_value_heads": 2 if width == 1792 else 4}
    if shape == "llama":
        return transformers.LlamaConfig(**of_llama)
    if shape == "llama, tied":
        return transformers.LlamaConfig(**of_llama, tie_word_embeddings=True)
    if shape == "mistral":
        return transformers.MistralConfig(**grouped)
    if shape == "gpt2":
        heads = {"n_embd": width, "n_layer": layers, "n_head": width // 128, "vocab_size": 50257, "n_positions": 1024}
        return transformers.GPT2Config(**heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, dtype=of_llama["dtype"])
    if shape == "qwen3, tied":
        return transformers.Qwen3Config(**{**grouped, "vocab_size": 151936}, head_dim=128, tie_word_embeddings=True)
    if shape == "moe":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": width}
        return transformers.MixtralConfig(**{**grouped, **experts})
    raise ValueError(shape)


SHAPES = ("llama", "llama, tied", "mistral", "gpt2", "qwen3, tied", "moe")


def write_model(shape: str, method: str, directory: Path) -> None:
    config = config_of(shape, method)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", torch.bfloat16))
    model.save_pretrained(directory)


def measure(model_dir: str, method: str, checkpointing: bool) -> None:
    """Train; print what was predicted and measured as JSON. The process is at its end then."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    from common.checkpoint import Checkpoints
    from common.device import memory_used, start_device
    from common.optim import make_optimizer
    from common.support.cli import train_arguments
    from common.trainer import train
    from model.counts import Way, config_of
    from model.load import load_to_train
    from model.plan import plan

    with tempfile.TemporaryDirectory() as place:
        steps, rows = 2, 2
        sys.argv = ["train", *METHODS[method], "--max-train-steps", str(steps), "--micro-batch-tokens", str(TOKENS)]
        sys.argv += ["--eval-rows", "0", "--gradient-checkpointing"][: 3 if checkpointing else 2]
        names = {"model_name_or_path": model_dir, "dataset_name_or_path": "", "save_dir": place, "log_interval": 1}
        args = train_arguments("", lr=1e-5, batch_size=rows, block_size=TOKENS, **names)
        device = start_device(0, True)
        idle = memory_used(device.torch_device)[0]
        way = Way(method, checkpointing, TOKENS, TOKENS, device.dtype, device.torch_device.type)
        planned = plan(config_of(model_dir), way)
        model = load_to_train(args, device)
        optimizer = make_optimizer(model, args, device)
        count = steps * rows
        vocabulary = model.model.config.vocab_size
        split = {
            "input_ids": torch.randint(vocabulary, (count * TOKENS,), dtype=torch.int32),
            "offsets": torch.arange(0, count * TOKENS + 1, TOKENS),
            "lengths": torch.full((count,), TOKENS, dtype=torch.int32),
            "label_counts": torch.full((count,), TOKENS - 1, dtype=torch.int32),
            "loss_mask": torch.ones(count * TOKENS, dtype=torch.bool),
        }
        dataset = {"train": split, "validation": split, "meta": {}, "sha256": ""}
        train(model, optimizer, dataset, args, device, Checkpoints(args))
        measured = memory_used(device.torch_device)[1] - idle
        parts = [part / 1e9 for part in planned[3:9]]
        print(json.dumps({"predicted": (planned.peak - planned.program) / 1e9, "measured": measured / 1e9,
                          "state": (planned.state - planned.program) / 1e9, "parts": parts}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*SHAPES, "smollm2-135m"], help="shapes")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], args.measure[1], args.measure[2] == "on")
        return
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")][:1]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{' '.join(cpu)}; Python {platform.python_version()}, {versions}\n")
    print("| shape | method | checkpointing | state GB | predicted GB | measured GB | off |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in args.only:
        for method in args.methods:
            with tempfile.TemporaryDirectory() as place:
                directory = ROOT / "smollm2-135m"
                if shape in SHAPES:
                    directory = Path(place)
                    program = (
                        f"from tests.benchmarks.plan_accuracy import *; write_model({shape!r}, {method!r}, {place!r})"
                    )
                    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
                for switch in ("off", "on"):
                    command = [sys.executable, __file__, "--measure", str(directory), method, switch]
                    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                    if done.returncode:
                        print(f"| {shape} | {method} | {switch} | {done.stderr.splitlines()[-1]} |", flush=True)
                        continue
                    found = json.loads(done.stdout.splitlines()[-1])
                    off = found["predicted"] / found["measured"] - 1
                    figures = (
                        f"{found['state']:.2f} | {found['predicted']:.2f} | {found['measured']:.2f} | {off:+.0%} |"
                    )
                    print(
                        f"| {shape} | {method} | {switch} | {figures} {' '.join(f'{p:.2f}' for p in found['parts'])}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
