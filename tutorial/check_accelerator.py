"""Show what a machine has and which tutorials it can run: the `moreh-smi` step of the pages, on any machine.

    python tutorial/check_accelerator.py
    python tutorial/check_accelerator.py --devices 8 --device-memory 80
    python tutorial/check_accelerator.py --model-name-or-path ./my-model
    python tutorial/check_accelerator.py --json

No model, data or account is needed. --device-memory asks about GPUs that you think of renting instead of this machine,
--model-name-or-path about a model of your own. --json prints one object; sizes are bytes, and null is "not known":

    platform   "MoAI", "CUDA", "ROCm" or "CPU";   precision  of matrix products: "bfloat16", "float16" or "float32"
    devices    [{"name", "memory_used", "memory_total", "utilization": percent}]
    rate       of large matrix products on one device, operations a second
    versions   {"python", "torch", ...}, null where not installed;   disk_free  in the working directory; both are of
               this machine, and null with --device-memory
    hub        {"endpoint", "reachable": true or false, "token": "none", "accepted", "refused" or "not verified"}
    tutorials  [{"name", "method": "full", "lora", "lora_4bit", "rehearsal", or "none" of a model of your own that does
               not fit, "devices" that it uses, "memory" of each and "disk" that it needs, "least": memory of a device
               by each method, "disk_enough": true or false, "commands": to download, prepare and train}]
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common.support.cli import Parser, positive_float, positive_int
from common.support.exit import run

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
    add = parser.add_argument
    add("--devices", type=positive_int, help="GPUs to ask for (default: those of this machine)")
    add("--device-memory", type=positive_float, metavar="GB", help="memory of each (default: that of this machine's)")
    add("--model-name-or-path", help="directory of a model to plan instead of the tutorials")
    add("--json", action="store_true", help="print one JSON object for programs instead of the tables")
    args = parser.parse_args()
    if args.devices and not args.device_memory:
        parser.error("--devices without --device-memory: say how many GB each has, as --device-memory 80")

    # imported below the arguments, so that --help and a mistyped option are answered at once
    from common.device import start_device

    with contextlib.redirect_stdout(io.StringIO()):  # what it says stands in the tables
        device = start_device(seed=0)
    found = look(device, args)
    print(json.dumps(found, indent=2)) if args.json else show(found)


def look(device, args) -> dict:
    """What --json prints."""
    import torch

    from common.support.hub import ask_hub
    from model.tutorials import TUTORIALS, Machine, recommend, tutorial_for_model

    if args.device_memory:  # another machine, of which nothing else is known
        machine = Machine("CUDA", int(1e9 * args.device_memory), torch.bfloat16, args.devices or 1)
        devices = [_facts("GPU", None, machine.memory, None)] * machine.devices
        rate = disk_free = None
        versions = {}
    else:
        devices = devices_of(device)
        platform = platform_of(device)
        # MoAI shows all its GPUs as one. Where a size is not known, everything fits.
        memory = min(float("inf") if found["memory_total"] is None else found["memory_total"] for found in devices)
        count = len(devices) if platform in ("CUDA", "ROCm") else 1
        machine = Machine(platform, memory, device.dtype, count)
        rate = rate_of(device)
        disk_free = shutil.disk_usage(".").free
        versions = installed_versions()
    tutorials = [tutorial_for_model(args.model_name_or_path)] if args.model_name_or_path else TUTORIALS
    return {
        "platform": machine.platform,
        "precision": str(machine.dtype).replace("torch.", ""),
        "devices": devices,
        "rate": rate,
        "versions": {name: versions.get(name) for name in ("python", *PACKAGES)},
        "disk_free": disk_free,
        "hub": ask_hub(HUB_TIMEOUT),
        "tutorials": [recommend(tutorial, machine, disk_free) for tutorial in tutorials],
    }


def installed_versions() -> dict:
    """The versions of Python and of the packages that are installed."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def devices_of(device) -> list:
    """For each device its name, its memory that all programs use and in total (bytes), and its utilization (percent);
    None where that is not known."""
    import psutil
    import torch

    if device.torch_device.type == "cpu":
        memory = psutil.virtual_memory()
        return [_facts(device.name, memory.total - memory.available, memory.total, psutil.cpu_percent(0.3))]
    found = []
    for index in range(torch.cuda.device_count()):
        free_and_total = _or_none(torch.cuda.mem_get_info, index)
        if free_and_total:
            free, total = free_and_total
            used = total - free
        else:
            total = getattr(_or_none(torch.cuda.get_device_properties, index), "total_memory", None)
            used = None
        found.append(_facts(torch.cuda.get_device_name(index), used, total, _or_none(torch.cuda.utilization, index)))
    return found


def _facts(name: str, used, total, utilization) -> dict:
    return {"name": name, "memory_used": used, "memory_total": total, "utilization": utilization}


def _or_none(ask, argument):
    try:
        return ask(argument)
    except Exception:  # drivers fail in many ways, and so does torch where a driver's Python package is missing
        return None


def platform_of(device) -> str:
    """ "MoAI", "CUDA", "ROCm" or "CPU"."""
    import torch

    if device.static_shapes:
        return "MoAI"
    if device.torch_device.type == "cpu":
        return "CPU"
    return "ROCm" if torch.version.hip else "CUDA"


def rate_of(device) -> Optional[float]:
    """Operations a second of a matrix product, the best of four; None on MoAI, which compiles first."""
    if device.static_shapes:
        return None
    size = 8192 if device.torch_device.type == "cuda" else 2048  # a GPU takes longer to begin a small one
    with contextlib.suppress(RuntimeError, AssertionError):  # a driver that does not work
        return matrix_rate(device, size, times=4)
    return None


def matrix_rate(device, size: int, times: int) -> float:
    """Operations a second of a product of two matrices [size, size] in the device's type, the best of some `times`."""
    import torch

    one = torch.randn((size, size), device=device.torch_device).to(device.dtype)
    best = 0.0
    for _ in range(times):
        device.synchronize()
        begin = perf_counter()
        one @ one
        device.synchronize()
        best = max(best, 2 * size**3 / (perf_counter() - begin))
    return best


def show(found: dict) -> None:
    """Print the tables."""
    from common.train_log import print_table
    from model.tutorials import METHODS

    rows = []
    for number, device in enumerate(found["devices"]):
        percent = "-" if device["utilization"] is None else f"{device['utilization']:.0f} %"
        rows.append([f"{number}: {device['name']}", gb(device["memory_used"]), gb(device["memory_total"]), percent])
    print_table(["Device", "Memory used", "Memory total", "Utilization"], rows)

    this_machine = found["disk_free"] is not None
    facts = [("Platform", f"{found['platform']}, {found['precision']}")]
    if this_machine:
        facts.append(
            ("Packages", ", ".join(f"{name} {which or '(none)'}" for name, which in found["versions"].items()))
        )
        facts.append(("Free disk", f"{gb(found['disk_free'])} in this directory"))
    hub = found["hub"]
    answer = "answers" if hub["reachable"] else "does not answer (--tiny rehearses without it)"
    facts.append(("Model hub", f"{hub['endpoint'] or 'huggingface_hub (none)'} {answer}"))
    facts.append(("Token", TOKENS[hub["token"]]))
    facts.append(("Monitor", f"{MONITORS[found['platform']]}, in a second terminal while a training runs"))
    for note in notes(found) if this_machine else []:
        facts.append(("Note", note))
    print()
    for title, text in facts:
        print(textwrap.fill(f"{title:<9}  {text}", 100, subsequent_indent=" " * 11, break_long_words=False))

    rows = []
    for tutorial in found["tutorials"]:
        best = tutorial["method"]
        if tutorial["method"] in METHODS:
            best = f"{METHODS[tutorial['method']]}, {tutorial['memory'] / 1e9:.0f} GB"
            if tutorial["devices"] > 1:
                best = f"{tutorial['devices']} devices, {best}"
        least = [f"{size / 1e9:.0f}" for size in tutorial["least"].values()]
        disk = f"{tutorial['disk'] / 1e9:.2g}" if tutorial["disk"] < 1e10 else f"{tutorial['disk'] / 1e9:.0f}"
        rows.append([tutorial["name"], *least, disk, best])
    print("\nMinimum memory of each device (GB), and disk for model, checkpoints and result (GB):\n")
    print_table(["Model", *METHODS.values(), "disk", "best method that fits"], rows, left=(0, len(METHODS) + 2))

    real = [row["commands"] for row in found["tutorials"] if row["method"] in METHODS]
    rehearsal = next((row for row in found["tutorials"] if row["method"] == "rehearsal"), None)
    if real and len(found["tutorials"]) == 1:
        print("\nCommands:")
        for command in real[0]:
            print(f"  {command}")
    elif real:
        print("\nTrain, after download_* and prepare_* of the same tutorial:")
        for commands in real:
            print(f"  {commands[-1]}")
    if rehearsal:
        print(f"\nRehearse with a tiny random model, here {rehearsal['name']} (--json lists the others):")
        for command in rehearsal["commands"]:
            print(f"  {command}")


def notes(found: dict) -> list:
    """What may stand in the way."""
    lines = []
    first = found["devices"][0]
    tool = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if found["platform"] == "CPU" and tool:
        lines.append(f"{tool} is here, but this torch sees no GPU: https://pytorch.org/get-started/locally/")
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
    run(main)
