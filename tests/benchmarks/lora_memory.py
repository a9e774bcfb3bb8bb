"""Peak memory, speed and trainable parameters of all weights, LoRA, 4 bit + LoRA, and plain peft + Trainer.

    python tests/benchmarks/lora_memory.py

SmolLM2-135M (./smollm2-135m, of tutorial/download_smollm2.py) on the Korean samples, 8 rows a step. The first three
kinds are tutorial/train_llama3_1.py itself, with other options; the fourth is the shortest program with which peft's
own guide trains a 4-bit base: prepare_model_for_kbit_training, get_peft_model, Trainer, 2 rows at once, 4 times a step,
with the same rank, layers, optimizer, precision and gradient checkpointing.
Each measurement is a process of its own, and the kinds take turns, because a shared machine has slower and faster
minutes. The first step of a run is not timed. Peak memory is the whole process's, libraries included.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from common.device import start_device

ROOT = Path(__file__).resolve().parents[2]
TRAINER = "4 bit + LoRA, peft + Trainer"
KINDS = {
    "all weights": ["--no-use-lora", "--no-quantization", "--no-gradient-checkpointing"],
    "LoRA": ["--no-quantization", "--no-gradient-checkpointing"],
    "4 bit + LoRA": ["--gradient-checkpointing", "on"],
    TRAINER: None,
}


def measure_trainer(model_dir: str, dataset_file: str, steps: int) -> None:
    """Train with transformers' Trainer; print tokens a second (no padding), peak memory and parameters as JSON."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    device = start_device(0)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=config, device_map=device.torch_device, dtype=device.dtype
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    split = torch.load(dataset_file)["train"]
    rows = []
    for start, stop in zip(split["offsets"][:-1], split["offsets"][1:]):
        ids = split["input_ids"][start:stop].long()
        rows.append({"input_ids": ids, "labels": torch.where(split["loss_mask"][start:stop], ids, -100)})
    tokens = []

    def collate(batch):
        tokens.append(sum(len(row["input_ids"]) for row in batch))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = [row["input_ids"] for row in batch]
        return {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad([row["labels"] for row in batch], batch_first=True, padding_value=-100),
        }

    class Clock(transformers.TrainerCallback):
        times = []

        def on_step_end(self, *args, **kwargs):
            self.times.append((time.perf_counter(), sum(tokens)))

    with tempfile.TemporaryDirectory() as scratch:
        options = transformers.TrainingArguments(
            scratch,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
            max_steps=steps + 1,
            learning_rate=2e-4,
            optim="adamw_bnb_8bit",
            bf16=device.dtype == torch.bfloat16,
            use_cpu=device.torch_device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
        )
        transformers.Trainer(model, options, train_dataset=rows, data_collator=collate, callbacks=[Clock()]).train()
    (first, before), (last, after) = Clock.times[0], Clock.times[-1]
    report(device, (after - before) / (last - first), sum(w.numel() for w in model.parameters() if w.requires_grad))


def report(device, speed, trained):
    print(device.memory_line())
    print(json.dumps({"tokens_per_second": speed, "trained": trained}))


def measure_script(model_dir: str, dataset_file: str, steps: int, words: list) -> dict:
    """Run tutorial/train_llama3_1.py; tokens a second after the first step, peak memory in GB, trained parameters."""
    with tempfile.TemporaryDirectory() as save_dir:
        options = f"--max-train-steps {steps + 1} --eval-rows 0 --model-name-or-path {model_dir}".split()
        options += ["--dataset-name-or-path", dataset_file, "--save-dir", save_dir, *words]
        said = run([str(ROOT / "tutorial" / "train_llama3_1.py"), *options])
        lines = [json.loads(line) for line in open(f"{save_dir}/training_log.jsonl", encoding="utf-8")][1:]
        trained = re.search(r"LoRA: ([\d,]+)", said)
        if trained:
            trained = int(trained[1].replace(",", ""))
        else:
            trained = sum(w.numel() for w in transformers.AutoModelForCausalLM.from_pretrained(save_dir).parameters())
    seconds = sum(line["duration"] for line in lines)
    tokens = sum(line["duration"] * line["tokens_per_second"] for line in lines)
    return {"tokens_per_second": tokens / seconds, "trained": trained, "peak_gb": peak(said)}


def run(words):
    return subprocess.run(
        [sys.executable, *words], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def peak(said):
    return float(re.findall(r"used, peak ([\d.]+) GB", said)[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name-or-path", default="./smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--trainer", metavar="DATASET", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer:
        return measure_trainer(args.model_name_or_path, args.trainer, args.steps)

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, Python {platform.python_version()}")
    results = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        file, samples = f"{scratch}/dataset.pt", ROOT / "dataset" / "samples" / "korean_safe_conversation"
        model = ["--model-name-or-path", args.model_name_or_path]
        prepare = [*model, "--dataset-name-or-path", str(samples), "--save-path", file]
        run([str(ROOT / "dataset" / "prepare_llama3_1_dataset.py"), *prepare])
        for _ in range(args.rounds):
            for kind, words in KINDS.items():
                if words is None:
                    said = run([__file__, *model, "--trainer", file, "--steps", str(args.steps)])
                    results[kind].append({**json.loads(said.splitlines()[-1]), "peak_gb": peak(said)})
                else:
                    results[kind].append(measure_script(args.model_name_or_path, file, args.steps, words))
    most = median(run["peak_gb"] for run in results["all weights"])
    print(f"{'':28} | trained     | peak GB | ratio | tokens/s (lowest-highest)")
    for kind, runs in results.items():
        speeds, memory = sorted(run["tokens_per_second"] for run in runs), median(run["peak_gb"] for run in runs)
        print(f"{kind:28} | {runs[0]['trained']:11,} | {memory:7.2f} | {memory / most:5.2f} ", end="")
        print(f"| {median(speeds):5.0f} ({speeds[0]:.0f}-{speeds[-1]:.0f})")


if __name__ == "__main__":
    main()
