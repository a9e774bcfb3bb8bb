"""Answers a second: our batches of like length beside batches of plain transformers in the order of the rows.

    make bench-answers

The held-out rows of the page's dataset file, asked of the page's model (./smollm2_korean_numbers; train it first) or
of the untrained one. Each measurement is a process of its own, and the two take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import List

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as common/support/exit.py, before torch is imported

KINDS = ("transformers", "ours")


def load(args):
    """Model, tokenizer, prompts and the ids that end an answer: the same for both."""
    from common.dataset_file import held_out_prompts, load_dataset
    from common.device import start_device
    from common.tokenization import load_tokenizer
    from model.load import load_model

    device = start_device(seed=0)
    tokenizer = load_tokenizer(args.model)
    dataset = load_dataset(args.dataset, tokenizer)
    prompts = [prompt for prompt, _ in held_out_prompts(dataset, args.dataset, tokenizer, args.rows)]
    model = load_model(args.model, device.torch_device, device.dtype, 0)
    return model, tokenizer, prompts, dataset["meta"]["end_tokens"]


def with_transformers(model, tokenizer, prompts, ends, args) -> List[str]:
    """As its documentation shows it: batches in the order of the rows, padded on the left."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    answers: List[str] = []
    for start in range(0, len(prompts), args.batch_rows):
        batch = tokenizer.pad({"input_ids": prompts[start : start + args.batch_rows]}, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False, eos_token_id=ends)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def ours(model, tokenizer, prompts, ends, args) -> List[str]:
    from model.generate import generate_in_batches

    options = SimpleNamespace(batch_rows=args.batch_rows, max_new_tokens=args.max_new_tokens)
    parts = generate_in_batches(model, tokenizer, prompts, options, ends)
    return [answer.text for part in parts for answer in part.answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="./smollm2_korean_numbers")
    parser.add_argument("--dataset", default="./smollm2_dataset.pt")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        given = load(args)
        begin = time.perf_counter()
        answers = (ours if args.measure == "ours" else with_transformers)(*given, args)
        print(json.dumps({"seconds": time.perf_counter() - begin, "answers": [answer.strip() for answer in answers]}))
        return
    seconds = {kind: [] for kind in KINDS}
    answers = {}
    for _ in range(args.rounds):
        for kind in KINDS:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            seconds[kind].append(found["seconds"])
            answers[kind] = found["answers"]
            print(f"{kind:14} {args.rows / found['seconds']:6.2f} rows/s", flush=True)
    for kind in KINDS:
        rates = [args.rows / one for one in seconds[kind]]
        print(f"{kind:14} median {median(rates):6.2f} rows/s ({min(rates):.2f} to {max(rates):.2f})")
    same = sum(one == other for one, other in zip(*answers.values()))
    print(f"{same} of {args.rows} answers are the same (in 16 bit the rounding of a batch changes some)")


if __name__ == "__main__":
    main()
