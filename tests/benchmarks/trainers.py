"""Speed and memory of a training, beside the trainers that a reader would pick instead.

    make bench
    make bench BENCH="--models small --methods full --rounds 1"
    make bench BENCH="--bf16 --kinds 'TRL, packing' ours --methods full"

The same rows (functions of the standard library, at most 1024 tokens, a loss on every token), model, AdamW and float32
for all, or with --bf16 matrix products in bfloat16; each as its documentation shows it. One step on the first rows
shows by its loss that the work is the same; it warms up, and does not count. Each measurement is a process of its own,
and the trainers take turns, because a shared machine has slower and faster minutes; the rate of its matrix products is
measured before each one.

docs' loop       the loop of the earlier pages: every row padded to 1024 tokens
Trainer          transformers' own; rows of a batch padded to the longest; "grouped" puts rows of like length together
TRL              SFTTrainer as it comes; "packing" fills rows of 1024 tokens with several, as many a step as go to 16
commit 0131a7e   train_smollm2.py as it was at the beginning
ours             train_smollm2.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from common.batches import IGNORE_INDEX, Batches

ROOT = Path(__file__).resolve().parents[2]
FIRST = "0131a7e"
OURS = {f"commit {FIRST}", "ours"}
KINDS = ("docs' loop", "Trainer", "Trainer, grouped", "TRL", "TRL, packing", f"commit {FIRST}", "ours")
METHODS = {"full": [], "LoRA": ["--use-lora"], "4 bit + LoRA": ["--use-lora", "--load-in-4bit"]}
BLOCK = 1024
# rows of a step, and steps: a step of the real model takes a laptop some minutes in the slowest of the trainers
MODELS = {"small": (16, 2), "SmolLM2-135M": (4, 2)}
# a CPU with bfloat16 would train in it; the comparison is in the type that all CPUs have
bf16 = False
IN_FLOAT32 = (
    "import runpy, sys, torch; torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run_script(root: Path, script: str, *options: str) -> None:
    command = [sys.executable, *([] if bf16 else ["-c", IN_FLOAT32]), f"{root}/{script}", *options]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


# --- the trainings; each returns (loss of the first step, seconds of the others)


def ours(root: str, model_dir: str, data: str, method: str, rows: int, steps: int):
    with tempfile.TemporaryDirectory() as save_dir:
        places = ["--model-name-or-path", model_dir, "--dataset-name-or-path", data, "--save-dir", save_dir]
        work = ["--batch-size", str(rows), "--max-train-steps", str(steps + 1), "--block-size", str(BLOCK)]
        work += ["--eval-rows", "0", "--train-on-prompt", "--seed", "0", *METHODS[method]]
        run_script(Path(root), "tutorial/train_smollm2.py", *places, *work)
        log = [json.loads(line) for line in Path(save_dir, "training_log.jsonl").read_text().splitlines()]
    return log[0]["loss"], sum(record["duration"] for record in log[1 : steps + 1])


def load_model(model_dir: str, method: str):
    """As the documentation of transformers and peft shows it; LoRA's sizes are those of our scripts."""
    quantized = {}
    if method.startswith("4 bit"):
        quantized["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **quantized)


def lora(method: str):
    from peft import LoraConfig

    if method == "full":
        return None
    return LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def with_adapter(model, method: str):
    from peft import get_peft_model

    return model if method == "full" else get_peft_model(model, lora(method))


def docs_loop(model_dir: str, batches, method: str):
    model = with_adapter(load_model(model_dir, method), method).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
    first = begin = 0.0
    for number, texts in enumerate(batches):
        if number == 1:
            begin = time.perf_counter()
        ids = torch.zeros((len(texts), BLOCK), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE_INDEX)).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, time.perf_counter() - begin


def trainer(model_dir: str, batches, method: str, kind: str):
    from datasets import Dataset

    model, rows, packing = load_model(model_dir, method), len(batches[0]), kind.endswith("packing")
    if packing:
        tokens = sum(len(text) for texts in batches[1:] for text in texts) / (len(batches) - 1)
        rows = max(1, round(tokens / BLOCK))
    options = {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 1,
        "per_device_train_batch_size": rows,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": bf16,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    if kind.startswith("Trainer"):
        model = with_adapter(model, method)
        order = "group_by_length" if kind.endswith("grouped") else "random"
        settings = transformers.TrainingArguments(train_sampling_strategy=order, **options)
        collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    else:
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(packing=packing, max_length=BLOCK, **options)

    def of(texts):
        if kind.startswith("Trainer"):
            data = Dataset.from_dict({"input_ids": texts, "labels": texts})
            return transformers.Trainer(model, settings, data_collator=collator, train_dataset=data)
        data = Dataset.from_dict({"input_ids": texts})
        adapter = lora(method) if not hasattr(model, "peft_config") else None
        return SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)

    warm_up = of(batches[0])
    warm_up.train()
    model = warm_up.model
    records = [record for record in warm_up.state.log_history if "loss" in record]
    rest = of([text for texts in batches[1:] for text in texts])
    begin = time.perf_counter()
    rest.train()
    return records[0]["loss"], time.perf_counter() - begin


# --- the table


def texts_of(data: str, rows: int, steps: int) -> list:
    """The token ids of each row of each step, as our scripts take them."""
    split = torch.load(data)["train"]
    batches = Batches(split, rows, 1024)
    return [
        [
            split["input_ids"][split["offsets"][row] : split["offsets"][row + 1]].tolist()
            for row in batches.rows_for_step(s, 0)
        ]
        for s in range(1, steps + 2)
    ]


def measure(kind: str, root: str, model_dir: str, data: str, method: str, rows: int, steps: int) -> dict:
    if kind in OURS:
        loss, seconds = ours(root, model_dir, data, method, rows, steps)
    else:
        batches = texts_of(data, rows, steps)
        train = docs_loop if kind == "docs' loop" else lambda *given: trainer(*given, kind)
        loss, seconds = train(model_dir, batches, method)
    return {"loss": loss, "seconds": seconds}


def peak_of(command: list) -> tuple:
    """What it printed last, and the GB of its largest process."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_memory(process.pid))
            time.sleep(0.5)  # its highest until now; to ask more often takes a part of a core
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        raise RuntimeError("\n".join(lines[-30:]))
    return json.loads(lines[-1]), peak / 1e9


def peak_memory(process: int) -> int:
    """Bytes that this process, or the one that it waits for, has had at most until now."""
    import psutil

    peak = 0
    try:
        parent = psutil.Process(process)
        for one in [parent, *parent.children(recursive=True)]:
            status = Path(f"/proc/{one.pid}/status").read_text()
            peak = max(peak, *[int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line])
    except (psutil.Error, OSError, TypeError):  # it has ended meanwhile
        pass
    return peak


def matrix_rate() -> float:
    """Operations a second of matrix products, the best of eight."""
    one, best = torch.ones((2048, 2048), dtype=torch.bfloat16 if bf16 else torch.float32), 0.0
    for _ in range(8):
        begin = time.perf_counter()
        one @ one
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begin))
    return best


def operations_of(model_dir: str, method: str) -> float:
    """Operations of the matrix products of a token, attention's own not counted: each weight twice in the forward pass,
    twice for the gradient of its input and, where it is trained, twice for its own."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(model_dir)
        model = transformers.AutoModelForCausalLM.from_config(config)
    base = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    if method == "full":
        return 6.0 * base
    of_lora = sum(
        16 * (layer.in_features + layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    )
    return 4.0 * base + 6.0 * of_lora


def write_small(real: str, place: Path) -> None:
    """A Llama of 4 layers and width 256 with SmolLM2's tokenizer and its vocabulary of 49,152; random weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=49152, **sizes)).save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(real).save_pretrained(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-model", default="smollm2-135m", help="directory of tutorial/download_smollm2.py")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--save-path", default="bench_trainers.md", help="the tables, in Markdown")
    parser.add_argument("--measure", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    global bf16
    bf16 = args.bf16
    if args.measure:
        *texts, rows, steps = args.measure
        print(json.dumps(measure(*texts, int(rows), int(steps))))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    names = (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "accelerate"))
    lines = [f"{next(names, platform.machine())}, {torch.get_num_threads()} threads; Python "
             f"{platform.python_version()}, {versions}; {'bfloat16' if bf16 else 'float32'}"]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        roots = {kind: str(ROOT) for kind in KINDS}
        roots[f"commit {FIRST}"] = f"{place}/first"
        subprocess.run(["git", "worktree", "add", "--quiet", f"{place}/first", FIRST], cwd=ROOT, check=True)
        try:
            compare(args, Path(place), roots, lines)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", f"{place}/first"], cwd=ROOT, check=True)


def compare(args, place: Path, roots: dict, lines: list) -> None:
    real = str(Path(args.real_model).resolve())
    write_small(real, place / "small")
    model_dirs = {"small": str(place / "small"), "SmolLM2-135M": real}
    datasets = {}
    for kind, root in roots.items():
        datasets[kind] = str(place / f"{Path(root).name}.pt")
        if not Path(datasets[kind]).exists():
            options = ["--model-name-or-path", real, "--save-path", datasets[kind], "--block-size", str(BLOCK)]
            options += [] if FIRST in kind else ["--dataset-name-or-path", "standard-library"]
            run_script(Path(root), "dataset/prepare_smollm2_dataset.py", *options)
    for model in args.models:
        rows, steps = MODELS[model]
        tokens = sum(len(text) for texts in texts_of(datasets["ours"], rows, steps)[1:] for text in texts)
        for method in args.methods:
            runs: dict = {kind: [] for kind in args.kinds}
            for _ in range(args.rounds):
                for kind in args.kinds:
                    rate = matrix_rate()
                    given = [kind, roots[kind], model_dirs[model], datasets[kind], method, str(rows), str(steps)]
                    found, peak = peak_of([sys.executable, __file__, "--measure", *given, *["--bf16"] * bf16])
                    runs[kind].append((tokens / found["seconds"], rate, peak, found["loss"]))
                    print(model, method, kind, *(f"{figure:.4g}" for figure in runs[kind][-1]), flush=True)
            lines += table(f"{model}, {method}, {rows} rows a step", runs, operations_of(model_dirs[model], method))
            Path(args.save_path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def table(title: str, runs: dict, operations: float) -> list:
    """Markdown: medians of the rounds; the share is of the matrix rate measured right before."""
    lines = [
        "",
        f"{title}:",
        "",
        "| | tokens/s | lowest - highest | ours is | share of matrix rate | peak GB | first loss |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    our_speed = median(run[0] for run in runs["ours"]) if "ours" in runs else 0.0
    for kind, of_kind in runs.items():
        speeds = [run[0] for run in of_kind]
        speed, peak = median(speeds), median(run[2] for run in of_kind)
        share = median(one * operations / rate for one, rate, _, _ in of_kind)
        figures = f"{speed:.0f} | {min(speeds):.0f} - {max(speeds):.0f} | {our_speed / speed:.1f}x | {share:.0%}"
        lines.append(f"| {kind} | {figures} | {peak:.2f} | {of_kind[0][3]:.4f} |")
    return lines


if __name__ == "__main__":
    main()
