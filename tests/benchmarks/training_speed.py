"""Training speed and peak memory: our batches and loss beside the loop of the earlier pages.

    python tests/benchmarks/training_speed.py

The earlier loop: every row padded to 1024 tokens, the whole batch at once, the loss that transformers gives, float32.
Ours: common.batching and model.loss; in float32 too, so that only the work differs, and as the scripts run on this CPU.
The model: a Llama of 4 layers and width 256 with SmolLM2's vocabulary of 49,152; the rows: the functions of the
standard library, batch 16, a loss on every token. Needs the tokenizer in ./smollm2-135m
(tutorial/download_smollm2.py).
Each measurement is a process of its own, so that its peak memory is its own, and the kinds take turns, because a shared
machine has slower and faster minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from common.accelerator import start_accelerator
from common.batching import Batches
from common.dataset_cache import prepare_dataset
from common.optimizer import make_optimizer
from common.tokenization import load_tokenizer
from dataset.sources import load_splits
from dataset.templates import alpaca
from model.loss import CausalLMLoss

KINDS = ("earlier loop", "ours, float32", "ours")
BATCH = 16


def measure(kind: str, dataset_file: str, steps: int) -> None:
    """Train `steps` steps after one to warm up; print seconds, tokens (no padding) and peak memory in MB as JSON."""
    accelerator = start_accelerator(0)
    if kind == "ours, float32":
        accelerator = accelerator._replace(dtype=torch.float32)
    split = torch.load(dataset_file)["train"]
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    args = Namespace(lr=1e-4, weight_decay=0.01, bits=0)
    earlier = kind == "earlier loop"
    static_length = 1024 if earlier else 0
    batches = Batches(split, BATCH, accelerator.micro_batch_tokens, static_length, train_on_prompt=True)
    module = CausalLMLoss(model)
    if earlier:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    else:
        optimizer = make_optimizer(module, args, accelerator)
    tokens, start = 0, 0.0
    for step in range(1, steps + 2):
        if step == 2:
            tokens, start = 0, time.perf_counter()
        rows = batches.rows_of(step, seed=0)
        for batch in batches.of(rows):
            if earlier:
                ids, labels, mask = batch
                model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
                continue
            with accelerator.autocast():
                loss = module(*batch)
            (loss / int(batches.label_counts[rows].sum())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batches.lengths[rows].sum())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    print(json.dumps({"tokens_per_second": tokens / seconds, "peak_mb": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name-or-path", default="./smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "DATASET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure, args.steps)

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, Python {platform.python_version()}")
    tokenizer = load_tokenizer(args.model_name_or_path)
    results = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/dataset.pt"
        options = Namespace(
            block_size=1024, save_path=file, model_name_or_path=args.model_name_or_path, show=0, columns={}
        )
        start = time.perf_counter()
        prepare_dataset(*load_splits("standard-library"), alpaca, tokenizer, options)
        print(f"prepared in {time.perf_counter() - start:.2f} s, the tokenizer's loading not counted")
        for _ in range(args.rounds):
            for kind in KINDS:
                command = [sys.executable, __file__, "--measure", kind, file, "--steps", str(args.steps)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    base = {key: median(run[key] for run in results[KINDS[0]]) for key in ("tokens_per_second", "peak_mb")}
    print(f"{'':14} | tokens/s | (lowest-highest) | ratio | peak MB | ratio")
    for kind, runs in results.items():
        speeds = sorted(run["tokens_per_second"] for run in runs)
        speed, peak = median(speeds), median(run["peak_mb"] for run in runs)
        spread = f"{speeds[0]:.0f}-{speeds[-1]:.0f}"
        print(f"{kind:14} | {speed:8.0f} | {spread:>16} | {speed / base['tokens_per_second']:5.2f} ", end="")
        print(f"| {peak:7.0f} | {peak / base['peak_mb']:5.2f}")


if __name__ == "__main__":
    main()
