"""Show what this machine has and which tutorials it can run: the `moreh-smi` step of the pages, on any machine.

    python tutorial/check_accelerator.py
    python tutorial/check_accelerator.py --json

No model, data or account has to be there. With --json one object is printed; sizes are bytes, and null is "not known":

    platform   "MoAI", "CUDA", "ROCm" or "CPU";   precision  of matrix products: "bfloat16", "float16" or "float32"
    devices    [{"name", "memory_used", "memory_total", "utilization": percent}]
    versions   {"python", "torch", ...}, null where not installed;   disk_free  in the working directory
    hub        {"endpoint", "reachable": true or false, "token": "none", "accepted", "refused" or "not verified"}
    tutorials  [{"name", "method": "full", "lora", "lora_4bit" or "rehearsal", "memory" and "disk" that it needs,
               "disk_enough": true or false, "commands": to download, prepare and train}]
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.parser import Parser
from model.plan import METHODS, TUTORIALS, memory_needed, way_to_run

PACKAGES = ("torch", "transformers", "datasets", "peft", "bitsandbytes")
MONITORS = {"MoAI": "moreh-smi", "CUDA": "nvidia-smi", "ROCm": "rocm-smi", "CPU": "top"}
TOKENS = {
    "none": "none; for Llama and Mistral: https://huggingface.co/settings/tokens",
    "accepted": "accepted by the hub",
    "refused": "refused by the hub; make another: https://huggingface.co/settings/tokens",
    "not verified": "found, not verified by the hub",
}
HUB_TIMEOUT = 3  # seconds


def main():
    parser = Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object for programs, in place of the tables")
    args = parser.parse_args()

    # imported below the arguments, so that --help and a mistyped option are answered at once
    from common.accelerator import start_accelerator

    with contextlib.redirect_stdout(io.StringIO()):  # what it says stands in the tables
        accelerator = start_accelerator(seed=0)
    found = look(accelerator)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def look(accelerator) -> dict:
    """What --json prints."""
    from common.accelerator import devices
    from common.download import ask_hub

    seen, disk_free = devices(accelerator), shutil.disk_usage(".").free
    # a script runs on the first device (MoAI shows all its GPUs as one); where its size is not known, think the best
    memory = float("inf") if seen[0]["memory_total"] is None else seen[0]["memory_total"] / 1e9
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "platform": accelerator.platform,
        "precision": str(accelerator.dtype).replace("torch.", ""),
        "devices": seen,
        "versions": {name: versions.get(name) for name in ("python", *PACKAGES)},
        "disk_free": disk_free,
        "hub": ask_hub(HUB_TIMEOUT),
        "tutorials": [way_to_run(tutorial, accelerator.platform, memory, disk_free / 1e9) for tutorial in TUTORIALS],
    }


def show(found: dict) -> None:
    """The tables. rich wraps long cells and knows how wide Korean letters are; into a pipe it writes plain text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False, markup=False, emoji=False)

    def table(first, *numbers):
        new = Table(first, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in numbers:
            new.add_column(name, justify="right")
        return new

    devices = table("Device", "Memory used", "Memory total", "Utilization")
    for number, row in enumerate(found["devices"]):
        percent = "-" if row["utilization"] is None else f"{row['utilization']:.0f} %"
        devices.add_row(f"{number}: {row['name']}", gb(row["memory_used"]), gb(row["memory_total"]), percent)
    console.print(devices)

    hub, facts = found["hub"], Table(box=None, show_header=False, pad_edge=False)
    facts.add_row("Platform", f"{found['platform']}, {found['precision']}")
    facts.add_row("Packages", ", ".join(f"{name} {which or '(none)'}" for name, which in found["versions"].items()))
    facts.add_row("Free disk", f"{gb(found['disk_free'])} in this directory")
    answer = "answers" if hub["reachable"] else "does not answer (--tiny rehearses without it)"
    facts.add_row("Model hub", f"{hub['endpoint'] or 'huggingface_hub (none)'} {answer}")
    facts.add_row("Token", TOKENS[hub["token"]])
    facts.add_row("Monitor", f"{MONITORS[found['platform']]}, in a second terminal while a training runs")
    for note in notes(found):
        facts.add_row("Note", note, style="yellow")
    console.print()
    console.print(facts)

    tutorials = table("Tutorial", *METHODS.values(), "disk")
    tutorials.add_column("on this machine")
    for tutorial, row in zip(TUTORIALS, found["tutorials"]):
        real = row["method"] in METHODS
        how = f"{METHODS[row['method']]}, {row['memory'] / 1e9:.0f} GB" if real else "rehearsal"
        least = [f"{memory_needed(tutorial.kind, method, checkpointing=True):.0f}" for method in METHODS]
        tutorials.add_row(tutorial.name, *least, f"{tutorial.disk:g}", how, style="green" if real else None)
    console.print("\nGB of GPU memory (at least, with --gradient-checkpointing) and of disk:\n")
    console.print(tutorials)

    real = [row["commands"][-1] for row in found["tutorials"] if row["method"] in METHODS]
    rehearsal = next((row for row in found["tutorials"] if row["method"] not in METHODS), None)
    lines = ["", "Train, after download_* and prepare_* of the same tutorial:"] * bool(real)
    lines += [f"  {command}" for command in real]
    if rehearsal:
        lines += ["", f"Rehearse with random weights, as {rehearsal['name']} here (--json has the others):"]
        lines += [f"  {command}" for command in rehearsal["commands"]]
    console.print("\n".join(lines), soft_wrap=True)  # they are to be pasted, so rich must not break them


def notes(found: dict) -> list:
    """What may stand in the way."""
    lines, first = [], found["devices"][0]
    tool = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if found["platform"] == "CPU" and tool:
        lines.append(f"{tool} is here, but this torch sees no GPU: https://pytorch.org/get-started/locally/")
    if len(found["devices"]) > 1:
        lines.append("The scripts use device 0; CUDA_VISIBLE_DEVICES=1 makes them use device 1.")
    free = float("inf") if first["memory_used"] is None else first["memory_total"] - first["memory_used"]
    for what, names in (
        ("memory is free now", [row["name"] for row in found["tutorials"] if row["memory"] > free]),
        ("disk is free here", [row["name"] for row in found["tutorials"] if not row["disk_enough"]]),
    ):
        if names:
            lines.append(f"Too little {what} for {', '.join(names)}.")
    return lines


def gb(size) -> str:
    return "-" if size is None else f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
