"""Outputs of real runs, which the tests can't repeat: `make record NAME=smollm2_train` runs one of them again.

tests/recorded/NAME.json holds the command, as the page has it, its output, and where it ran. A page shows the output
under the marker `<!-- recorded: NAME -->`, and tests/page_runner.py compares the two by the letter. Run the records of
a page in the page's order, because each command needs the files of those before it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RECORDED = ROOT / "tests" / "recorded"


def read_record(name: str) -> dict:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def write_record(name: str, record: dict) -> None:
    text = json.dumps(record, ensure_ascii=False, indent=1)
    (RECORDED / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def run_again(record: dict) -> dict:
    """The record of the same command, run now, in the repository's root. What it prints is shown as it comes."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}
    command = ["bash", "-ec", record["command"]]
    output: List[str] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line.rstrip())
    if process.returncode:
        sys.exit(f"error: exit status {process.returncode}; nothing was written.")
    return {**record, **circumstances(), "output": output}


def circumstances() -> Dict[str, str]:
    """Where and when it runs."""
    from tutorial.check_accelerator import installed_versions

    # check_accelerator leaves out tokenizers, on which the token ids depend.
    versions = {**installed_versions(), "tokenizers": version("tokenizers")}
    return {
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "packages": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def machine() -> str:
    """ "2 cores, AMD EPYC, with avx512_bf16": what decides a CPU's speed and its rounding."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    model = next((line.split(": ")[1] for line in facts.splitlines() if line.startswith("model name")), "CPU")
    widest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in facts), "no avx2")
    return f"{os.cpu_count()} cores, {model}, with {widest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(path.stem for path in RECORDED.glob("*.json")))
    chosen = parser.parse_args().name
    write_record(chosen, run_again(read_record(chosen)))
    print(f"Written: tests/recorded/{chosen}.json. Copy the output into its page.")
