"""Threads that wait for each other, spinning or asleep: the rate of a training alone and beside a busy program.

    make bench-threads
    make bench-threads BENCH="--rounds 1 --busy 2"

Forward and backward of SmolLM2-135M's shape (random weights, 256 tokens), in bfloat16 where the CPU has it. Each
measurement is a process of its own, and the settings take turns. A busy program is a Python loop on one core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# libgomp's variables (https://gcc.gnu.org/onlinedocs/libgomp/Environment-Variables.html)
SETTINGS: Dict[str, Dict[str, str]] = {
    "spinning (libgomp's default)": {},
    "asleep (ours)": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"{count} turns, then asleep": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1000, 10_000, 50_000)},
}
TOKENS = 256
SECONDS = 6.0
BUSY = [sys.executable, "-c", "while True: pass"]


def train() -> None:
    """Print tokens a second, and the loss of the first step, whose bits must not depend on the setting."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.device import _cpu_has_bf16

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes, **heads))
    ids = torch.randint(49152, (1, TOKENS))
    first_loss = None
    steps = 0
    begin = time.perf_counter()
    while steps < 2 or time.perf_counter() - begin < SECONDS:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_cpu_has_bf16()):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        first_loss = first_loss or loss.item()
        steps += 1
        if steps == 1:  # it warms up
            begin = time.perf_counter()
    print(TOKENS * (steps - 1) / (time.perf_counter() - begin), first_loss)


def measure(setting: Dict[str, str], busy: int) -> List[float]:
    """[tokens a second, first loss] beside `busy` busy programs."""
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    beside = [subprocess.Popen(BUSY) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--train"]
        output = subprocess.run(command, env={**environment, **setting}, check=True, capture_output=True, text=True)
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return [float(word) for word in output.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="busy programs beside it")
    parser.add_argument("--settings", type=int, nargs="+", default=list(range(len(SETTINGS))), help="by number, from 0")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train()
        return
    chosen = [list(SETTINGS)[number] for number in args.settings]
    rates = defaultdict(list)
    losses = set()
    for _ in range(args.rounds):
        for busy in (0, args.busy):
            for name in chosen:
                rate, loss = measure(SETTINGS[name], busy)
                rates[name, busy].append(rate)
                losses.add(loss)
                print(f"{name:32} busy {busy}: {rate:6.0f} tokens/s", flush=True)
    print(f"\n{'tokens/s, median (least to most)':32} {'alone':>20} {f'beside {args.busy} busy':>20}")
    for name in chosen:
        cells = [rates[name, busy] for busy in (0, args.busy)]
        print(f"{name:32}", *[f"{median(cell):8.0f} ({min(cell):.0f} to {max(cell):.0f})".rjust(20) for cell in cells])
    print(f"first losses: {sorted(losses)}")


if __name__ == "__main__":
    main()
