"""Rows per second from text to the dataset file, of several ways in turn, each in a process of its own.

    python tests/benchmarks/preparing_speed.py --model-name-or-path ./smollm2-135m --rows 10000 --rounds 3

The rows are as long as CNN/DailyMail's (58 % of them longer than a block of 1024 tokens). Their text is real:
paragraphs of the docstrings of the installed packages, in random order (29 MB, 300,000 different words). `map` is the
per-row map of the earlier documentation with 2 processes, `batched` the same in batches, `now` is prepare_dataset, and
`earlier` that of commit 3ad9fbc, which must be in the clone: it kept the ids of words that it had seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
EARLIER = "3ad9fbc"
FIGURES = "{:7.0f} rows/s {:7.1f} s {:7.1f} s of CPU {:7.0f} MB {:7.0f} MB without files"

MAP = """
import sys, datasets
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.pad_token = tokenizer.eos_token
rows = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])

def one(row):
    prompt = "[SUMMARIZE] " + row["article"] + " [/SUMMARIZE]\\n"
    return tokenizer(prompt + row["highlights"] + tokenizer.eos_token, truncation=True, max_length=1024)

def many(rows):
    pairs = zip(rows["article"], rows["highlights"])
    texts = ["[SUMMARIZE] " + a + " [/SUMMARIZE]\\n" + h + tokenizer.eos_token for a, h in pairs]
    return tokenizer(texts, truncation=True, max_length=1024)

rows.map(*[many if BATCHED else one], num_proc=2, batched=BATCHED, remove_columns=rows.column_names)
"""
PREPARE = """
import sys
from argparse import Namespace
sys.path.insert(0, sys.argv[4])
try:
    from dataset.prepare import prepare_dataset
except ImportError:  # the earlier commit
    from common.dataset_cache import prepare_dataset
from common.tokenization import load_tokenizer
from dataset.sources import load_splits
from dataset.templates import summarization
args = Namespace(model_name_or_path=sys.argv[1], block_size=1024, save_path=sys.argv[3] + "/d.pt", show=0, columns={})
splits, source = load_splits(sys.argv[2])
splits = {"train": splits["train"].rows, "validation": []}
prepare_dataset(splits, source, summarization, load_tokenizer(sys.argv[1]), args)
"""


def paragraphs() -> list:
    """The paragraphs of all docstrings of the installed packages, each once, in a fixed order."""
    found = {}
    packages = Path(psutil.__file__).parents[1]
    for path in sorted(packages.rglob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for docstring in re.findall(r'(?s)"""(.*?)"""', source):
            for paragraph in re.split(r"\n\s*\n", docstring):
                if len(paragraph) > 80:
                    found[" ".join(paragraph.split())] = True
    return list(found)


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    pool = paragraphs()
    rng.shuffle(pool)
    next_paragraph = itertools.cycle(pool)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            letters = int(rng.lognormvariate(8.2, 0.45))
            article = next(next_paragraph)
            while len(article) < letters:
                article += "\n" + next(next_paragraph)
            row = {"article": article[:letters], "highlights": next(next_paragraph)[:300]}
            file.write(json.dumps(row) + "\n")


def peak_of(process: subprocess.Popen, found: list) -> None:
    """The most memory of a process and all below it at once, bytes, shared pages counted once; `found` gets it with
    the pages of mapped files, which the system may drop at any time, and without them."""
    while process.poll() is None:
        total = [0, 0]
        with suppress(psutil.Error, OSError):
            root = psutil.Process(process.pid)
            for one in [root, *root.children(recursive=True)]:
                text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                sizes = {name: 1024 * int(size) for name, size in re.findall(r"(?m)^(\w+): +(\d+) kB", text)}
                total = [total[0] + sizes["Pss"], total[1] + sizes["Pss"] - sizes["Pss_File"]]
        found[:] = map(max, found, total)
        time.sleep(0.2)


def measure(way: str, model: str, rows: Path, count: int, code: Path) -> tuple:
    """(rows a second, seconds, seconds of all cores, peak MB, that without files) of a way, start included."""
    script = PREPARE if way in ("now", "earlier") else MAP.replace("BATCHED", str(way == "batched"))
    with tempfile.TemporaryDirectory() as scratch:
        words = [sys.executable, "-c", script, model, str(rows), scratch, str(code)]
        env = {**os.environ, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1"}
        start, used, peak = time.perf_counter(), cpu_seconds(), [0, 0]
        # not in the clone, whose folders would stand in for those of an earlier commit
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, cwd=scratch
        )
        watch = threading.Thread(target=peak_of, args=(process, peak))
        watch.start()
        error = process.communicate()[1]
        watch.join()
        seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{way}: {error[-2000:]}")
    return count / seconds, seconds, cpu_seconds() - used, peak[0] / 1e6, peak[1] / 1e6


def cpu_seconds() -> float:
    """Of all processes that have ended: beside other work they tell more than the clock."""
    ended = os.times()
    return ended.children_user + ended.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name-or-path", default="./smollm2-135m")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["map", "batched", "earlier", "now"])
    args = parser.parse_args()
    model = str(Path(args.model_name_or_path).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        rows, earlier = Path(scratch) / "rows.jsonl", Path(scratch) / "earlier"
        write_rows(rows, args.rows)
        if "earlier" in args.ways:
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "-f", "--detach", earlier, EARLIER], check=True)
        results = {way: [] for way in args.ways}
        try:
            for turn in range(args.rounds):
                for way in args.ways:
                    one = measure(way, model, rows, args.rows, earlier if way == "earlier" else ROOT)
                    results[way].append(one)
                    print(f"round {turn + 1} {way:8} {FIGURES.format(*one)}", flush=True)
        finally:
            if "earlier" in args.ways:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", earlier], check=False)
    print(f"\n{args.rows} rows, whole processes, start included: medians of {args.rounds}, the most memory, all rates")
    for way, measured in results.items():
        *figures, peaks, without = zip(*measured)
        spread = f"({min(figures[0]):.0f} to {max(figures[0]):.0f})"
        print(f"{way:8} {FIGURES.format(*map(statistics.median, figures), max(peaks), max(without))} {spread}")


if __name__ == "__main__":
    main()
