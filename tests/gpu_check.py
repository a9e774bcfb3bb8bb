"""Measure these trainings on this machine's GPU: their speed, their memory against the plan, and whether they repeat.

    make gpu-check
    make gpu-check BENCH="--minutes 5 --only qwen3-4b-qlora resume"

Nothing is downloaded. Each measurement is a process of its own (tests/gpu_measurement.py), in the order of
MEASUREMENTS. What --minutes has no room for is a row `not run`, and an error is a row as well. The results are in
gpu_check.json, which is written after each measurement, and as a table in gpu_check.md:

    tokens/s              of a training without its first step, padding not counted; of a generation, new tokens
    ratio                 these divided by the tokens/s of another row
    of the matrix rate    operations a second of the matrix products that a step needs, not of those that gradient
                          checkpointing repeats, divided by those of one large product in the same type right before
    peak GB, plan GB      what PyTorch reserved at most, and what the memory plan predicted
    first loss            of random weights; those of the rows 1b-lora-* are the same, so their losses nearly are, too

A CPU, and --small, get models of some MB. That tests this script; the figures say nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from common.support.cli import Parser, positive_float
from common.support.exit import UserError, run
from common.support.files import atomic_write

# ------------------------------------------------------------------------------------------------ what is measured


class Measurement(NamedTuple):
    """A row of the table, which `measure_<kind>` of tests/gpu_measurement.py fills."""

    kind: str
    shape: str = ""  # a key of its SHAPES
    options: str = ""  # of a train script
    base: str = ""  # the row to divide its tokens/s by
    packed: Optional[bool] = None  # None: as the train scripts do it on this device
    change: str = ""  # one that no option makes
    answers: int = 0  # at once
    processes: int = 1


def training(shape: str, options: str, **more) -> Measurement:
    return Measurement("training", shape, options, **more)


def compared(options: str = "", packed: bool = False, change: str = "") -> Measurement:
    """A training that differs in one thing from the row 1b-lora. The model is small, so that each fits a small GPU."""
    options = f"--use-lora --gradient-checkpointing off {options}"
    return training("llama3.2-1b", options, base="1b-lora", packed=packed, change=change)


# In the order of their worth, because the time may be over before the last ones.
MEASUREMENTS = {
    "qwen3-4b-qlora": training("qwen3-4b", "--use-lora --load-in-4bit"),
    "llama3.1-8b-qlora": training("llama3.1-8b", "--use-lora --load-in-4bit"),
    "qwen3-4b-lora": training("qwen3-4b", "--use-lora"),
    "llama3.1-8b-lora": training("llama3.1-8b", "--use-lora"),
    "1b-full": training("llama3.2-1b", ""),
    "qwen3-4b-full": training("qwen3-4b", ""),
    "gpt2-xl-full": training("gpt2-xl", ""),
    "1b-lora": compared(),
    "1b-lora-packed": compared(packed=True),
    "1b-lora-packed-varlen": compared(packed=True, change="varlen attention"),
    "1b-lora-all-logits": compared(change="all logits"),
    "1b-lora-no-deterministic": compared("--no-deterministic"),
    "1b-lora-checkpointing": compared("--gradient-checkpointing on"),
    "resume": Measurement("resume"),
    "1b-lora-float16": compared(change="float16"),
    "load-4bit": Measurement("loading", "4-layers-of-8b"),
    "generate-1": Measurement("generation", "qwen3-4b", answers=1),
    "generate-32": Measurement("generation", "qwen3-4b", answers=32),
    "1b-full-2-processes": training("llama3.2-1b", "", base="1b-full", processes=2),
}
MACHINE = Measurement("machine")
LIMIT = 180.0  # seconds of a measurement
LEAST = 20.0  # seconds that must be left to begin one


# ------------------------------------------------------------------------------------------------ one after the other


def main() -> None:
    parser = Parser(__doc__)
    names = list(MEASUREMENTS)
    add = parser.add_argument
    add("--minutes", type=positive_float, default=10.0, help="for all measurements together")
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help="measurements (default: all)")
    add("--small", action="store_true", help="models of some MB, to test this script")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    machine = measure("machine", MACHINE, args.small, LIMIT)
    if machine["status"] != "measured":
        raise UserError(f"Nothing can be measured here: {machine['note']}")
    on_cpu = machine["platform"] == "CPU"
    tool = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if on_cpu and tool and not args.small:
        advice = "Install one that does: https://pytorch.org/get-started/locally/"
        raise UserError(f"{tool} is here, but this torch sees no GPU. {advice}")

    over = {"status": "not run", "note": f"the {args.minutes:g} minutes were over"}
    rows = dict.fromkeys(args.only, over)
    report = {"date": time.strftime("%Y-%m-%d"), "small": args.small or on_cpu, "machine": machine, "rows": rows}
    try:
        for name in args.only:
            measurement = MEASUREMENTS[name]
            left = end - time.monotonic()
            if measurement.processes > machine["devices"] and not on_cpu:
                rows[name] = {"status": "not run", "note": "one card"}
            elif left >= LEAST:
                rows[name] = measure(name, measurement, report["small"], min(LIMIT, left))
            if rows[name]["status"] == "killed" and left < LIMIT:
                rows[name] = over
            write(report)
            print(" | ".join(cell for cell in row_of(name, report) if cell), flush=True)
    except KeyboardInterrupt:
        rows.update({name: {"status": "not run", "note": "interrupted"} for name in rows if rows[name] is over})
        write(report)
    print(f"\n{table(report)}\n\nSaved in gpu_check.json and gpu_check.md")


def measure(name: str, measurement: Measurement, small: bool, limit: float) -> dict:
    """The figures of a measurement. A new process takes them, and is killed after `limit` seconds."""
    command = [sys.executable]
    if measurement.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={measurement.processes}"]
    command += [str(Path(__file__).resolve().with_name("gpu_measurement.py")), name, *["--small"] * small]
    with tempfile.TemporaryDirectory() as place, open(f"{place}/log", "w+", encoding="utf-8", errors="replace") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        settings = {"cwd": place, "env": environment, "stdout": log, "stderr": log}
        begin = time.monotonic()
        # In a session of its own it does not get a Ctrl-C, which is for this process to answer.
        process = subprocess.Popen(command, start_new_session=True, **settings)
        try:
            exit_status = process.wait(limit)
        except subprocess.TimeoutExpired:
            exit_status = None
        finally:
            kill_tree(process)
        seconds = time.monotonic() - begin
        log.seek(0)
        said = log.read()
        result = Path(place, "result.json")
        if exit_status == 0 and result.exists():
            return {**json.loads(result.read_text(encoding="utf-8")), "process_seconds": seconds}
    failure = {"process_seconds": seconds, "said": said.splitlines()[-40:]}
    if exit_status is None:
        return {"status": "killed", "note": f"it took longer than {limit:.0f} s", **failure}
    if exit_status < 0:
        return {"status": "failed", "note": f"signal {-exit_status} ended it (9: no main memory left)", **failure}
    return {"status": "failed", "note": reason_in(said), **failure}


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process that still runs, and all that it started: torchrun gives each of its processes a session.

    They hold the GPU's memory until they have ended. (In a container, some stay as zombies, which hold nothing.)
    """
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    started = [*parent.children(recursive=True), parent]
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(started, timeout=10)


def reason_in(said: str) -> str:
    """The line of a process's output that says why it failed."""
    errors = re.findall(r"(?m)^(?:error: |[\w.]*(?:Error|Exception): )(.+)$", said)
    lines = errors or said.strip().splitlines() or ["it printed nothing"]
    return lines[-1][:300]


# ------------------------------------------------------------------------------------------------ the report

HEADER = ["", "tokens/s", "ratio", "of the matrix rate", "peak GB", "plan GB", "plan is off by", "first loss", ""]


def write(report: dict) -> None:
    """Write both files, each completely or not at all."""
    for path, text in (("gpu_check.json", json.dumps(report, indent=1)), ("gpu_check.md", table(report))):
        with atomic_write(path) as new:
            new.write_text(f"{text}\n", encoding="utf-8")


def table(report: dict) -> str:
    """The machine, and all rows in Markdown."""
    machine = report["machine"]
    facts = [f"{machine['devices']} x {machine['name']} ({machine['memory'] / 1e9:.1f} GB)"]
    if machine["driver"]:
        facts.append(f"driver {machine['driver']}, {machine['platform']} {machine['runtime']}")
    facts.append(f"{machine['dtype']}, matrix products {machine['matrix_rate'] / 1e12:.3g} TFLOP/s")
    facts.append(", ".join(f"{package} {version}" for package, version in machine["versions"].items()))
    facts.append(report["date"])
    if report["small"]:
        facts.append("models of some MB, whose figures say nothing")
    lines = ["; ".join(facts), ""]
    for cells in (HEADER, ["---"] * len(HEADER), *(row_of(name, report) for name in report["rows"])):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def row_of(name: str, report: dict) -> List[str]:
    """The cells of a row."""
    row: Dict = report["rows"][name]
    base = MEASUREMENTS[name].base
    speed, peak, plan = (row.get(figure) for figure in ("tokens_per_second", "peak", "plan"))
    base_speed = report["rows"].get(base, {}).get("tokens_per_second")
    status = "" if row["status"] == "measured" else f"{row['status']}: "
    return [
        name,
        f"{speed:,.1f}" if speed else "",
        f"{speed / base_speed:.2f} of {base}" if speed and base_speed else "",
        f"{row['of_matrix_rate']:.1%}" if "of_matrix_rate" in row else "",
        f"{peak / 1e9:.2f}" if peak else "",
        f"{plan / 1e9:.2f}" if plan else "",
        f"{plan / peak - 1:+.0%}" if peak and plan else "",
        f"{row['losses'][0]:.4f}" if "losses" in row else "",
        status + row["note"].replace("|", "/"),
    ]


if __name__ == "__main__":
    run(main)
