"""Seconds from the command to the first step of a training, beside those of the imports that every trainer needs.

    python tests/benchmarks/startup.py

The stand-in of Llama3, one step of one short row, no held-out loss; in turn with a process that imports torch and
transformers' classes and nothing else. The first round reads the files into memory and does not count.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM; print('Step 1')"
)
SAMPLE = ROOT / "dataset" / "samples" / "cnn_dailymail"
ROUNDS = 5


def seconds_to(words: str, command: list, cwd: str) -> float:
    """From the start of the command until it prints `words`; then it is ended."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-u", *command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if words in line:
                found = time.perf_counter() - begin
                process.kill()
                return found
    raise RuntimeError(f"{command} has not printed {words}")


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for words in (
            "tutorial/download_llama3_8b.py --tiny",
            f"dataset/prepare_llama3_dataset.py --dataset-name-or-path {SAMPLE} --block-size 48",
        ):
            script, *options = words.split()
            subprocess.run([sys.executable, ROOT / script, *options], cwd=place, check=True, capture_output=True)
        train = [str(ROOT / "tutorial/train_llama3.py"), "--block-size", "48", "--batch-size", "1", "--eval-rows", "0"]
        train += ["--max-train-steps", "1", "--log-interval", "1", "--restart"]
        runs = []
        for _ in range(ROUNDS + 1):
            runs.append((seconds_to("Step 1", ["-c", IMPORTS], place), seconds_to("[Step 1/1]", train, place)))
    imports, first_step = zip(*runs[1:])
    ratio = median(step / plain for plain, step in runs[1:])
    print(
        f"imports {median(imports):.2f} s, first step {median(first_step):.2f} s: {ratio:.2f} times (median of pairs)"
    )


if __name__ == "__main__":
    main()
