"""Peak memory of each process, from loading to the saved model: one process alone, and four under torchrun.

    python tests/benchmarks/sharded_memory.py

The tutorial's own commands train every weight of a model of 1.2 GB in float32 (Llama's architecture, random weights,
the stand-in's tokenizer) for three steps, and save it. Counted is anonymous memory (RssAnon of /proc/PID/status, looked
at 50 times a second): what a process has made itself. Files that are mapped, as weights and data are while they are
read, are shared by all processes, and the system drops them when it needs the room. It fails where one of the four
reaches half of what one alone takes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
import transformers

from model.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 20, "num_attention_heads": 16}
TRAIN = "tutorial/train_llama3.py --model-name-or-path weights --dataset-name-or-path data.pt --batch-size 8"
OPTIONS = (
    "--block-size 48 --micro-batch-tokens 96 --max-train-steps 3 --eval-rows 4 --log-interval 1 --no-deterministic"
)


def write_model(directory: Path) -> float:
    """The stand-in's files with weights of a larger shape; their GB."""
    write_tiny("llama3", directory)
    before = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = {**before, **SHAPE, "num_key_value_heads": 16, "torch_dtype": "float32", "dtype": "float32"}
    config = transformers.LlamaConfig(**settings)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e9


def anonymous(process: int) -> int:
    """Bytes of anonymous memory; 0 of a process that has ended."""
    try:
        return int(re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 0


def peaks_of(command: list, place: Path, processes: int) -> Dict[int, float]:
    """{process: GB at its peak} of those that run the script."""
    with open(place / f"log-{processes}", "w") as log:
        started = subprocess.Popen(command, cwd=place, stdout=log, stderr=subprocess.STDOUT)
        peaks: Dict[int, int] = {}
        workers: list = []
        while started.poll() is None:
            if len(workers) < processes:
                workers = [started.pid] if processes == 1 else [p.pid for p in psutil.Process(started.pid).children()]
            for worker in workers:
                peaks[worker] = max(peaks.get(worker, 0), anonymous(worker))
            time.sleep(0.02)
    text = (place / f"log-{processes}").read_text()
    if started.returncode or "Model saved in" not in text:
        sys.exit(text)
    return {number: peak / 1e9 for number, peak in enumerate(peaks.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--options", default="", help="further options of the train script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name in ("tutorial", "dataset", "common", "model", "requirements"):
            (place / name).symlink_to(ROOT / name)
        size = write_model(place / "weights")
        train = [*TRAIN.split(), *OPTIONS.split(), *args.options.split()]
        prepare = "dataset/prepare_llama3_dataset.py --model-name-or-path weights --save-path data.pt --block-size 48"
        sample = ["--dataset-name-or-path", "dataset/samples/cnn_dailymail"]
        subprocess.run([sys.executable, *prepare.split(), *sample], cwd=place, check=True, capture_output=True)
        alone = peaks_of([sys.executable, *train, "--save-dir", "one"], place, 1)[0]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        each = peaks_of([*torchrun, *train, "--save-dir", "several"], place, args.processes)
        saved = [
            sum(path.stat().st_size for path in (place / name).glob("*.safetensors")) for name in ("one", "several")
        ]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; a model of {size:.2f} GB")
    print(f"one process: {alone:.2f} GB at its peak; saved {saved[0] / 1e9:.2f} GB")
    print(
        f"{len(each)} processes: {', '.join(f'{peak:.2f}' for peak in each.values())} GB; saved {saved[1] / 1e9:.2f} GB"
    )
    most = max(each.values())
    print(f"the largest takes {most / alone:.0%} of what one alone takes")
    sys.exit(most >= alone / 2)


if __name__ == "__main__":
    main()
