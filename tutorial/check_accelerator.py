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

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ and model/ are found from any directory

from common import UserError
from common.accelerator import Accelerator, start_accelerator


class Tutorial(NamedTuple):
    name: str
    download: str  # tutorial/download_<download>.py, and so on
    prepare: str
    train: str
    sample: str  # its rehearsal's data, in dataset/samples
    parameters: float  # 10^9
    embeddings: float  # those of them in the embeddings and the output layer, which 4 bit leaves alone
    layers: int
    width: int
    disk: float  # GB that its page advises to have free


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
PYTHON, KOREAN = "Evol-Instruct-Python-26k", "korean_safe_conversation"
TUTORIALS = (
    Tutorial("SmolLM2 135M", "smollm2", "smollm2", "smollm2", CODE, 0.135, 0.028, 30, 576, 0.7),
    Tutorial("Llama2 13B", "llama2_13b", "llama2", "llama2", NEWS, 13.02, 0.33, 40, 5120, 50),
    Tutorial("Llama3 8B", "llama3_8b", "llama3", "llama3", NEWS, 8.03, 1.05, 32, 4096, 20),
    Tutorial("Llama3 70B", "llama3_70b", "llama3", "llama3_70b", NEWS, 70.55, 2.10, 80, 8192, 150),
    Tutorial("Mistral 7B", "mistral_7b", "mistral", "mistral", CODE, 7.24, 0.26, 32, 4096, 16),
    Tutorial("Cerebras-GPT 13B", "gpt_13b", "gpt", "gpt", PYTHON, 12.85, 0.26, 40, 5120, 60),
    Tutorial("Llama 3.1 8B, Korean", "llama3_1_8b", "llama3_1", "llama3_1", KOREAN, 8.03, 1.05, 32, 4096, 20),
)
# with which a stand-in learns something of the samples within a minute; without the adapter in 4 bit on random weights
REHEARSAL = " --batch-size 8 --epochs 10 --lr 6e-3 --lr-scheduler linear --warmup-steps 20"
KOREAN_REHEARSAL = f" --no-use-lora --no-quantization{REHEARSAL}"
METHODS = {"full": "full", "lora": "LoRA", "lora_4bit": "LoRA 4 bit"}
PACKAGES = ("transformers", "datasets", "peft", "bitsandbytes")
MONITORS = {"MoAI": "moreh-smi", "CUDA": "nvidia-smi", "ROCm": "rocm-smi", "CPU": "top"}
TOKENS = {
    "none": "none; for Llama and Mistral: https://huggingface.co/settings/tokens",
    "accepted": "accepted by the hub",
    "refused": "refused by the hub; make another: https://huggingface.co/settings/tokens",
    "not verified": "found, not verified by the hub",
}
HUB_TIMEOUT = 3  # seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object for programs, in place of the tables")
    args = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):  # what it says stands in the tables
        accelerator = start_accelerator(seed=0)
    found = look(accelerator)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def look(accelerator: Accelerator) -> dict:
    """What --json prints."""
    import torch

    gpu = "ROCm" if torch.version.hip else "CUDA"
    platform = "MoAI" if accelerator.static_shapes else "CPU" if accelerator.device.type == "cpu" else gpu
    devices, disk_free = look_at_devices(accelerator), shutil.disk_usage(".").free
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}  # with a platform's name for its build
    # a script runs on the first device (MoAI shows all its GPUs as one); where its size is not known, think the best
    memory = float("inf") if devices[0]["memory_total"] is None else devices[0]["memory_total"] / 1e9
    return {
        "platform": platform,
        "precision": str(accelerator.dtype).replace("torch.", ""),
        "devices": devices,
        "versions": {**versions, **{package: told(version, package) for package in PACKAGES}},
        "disk_free": disk_free,
        "hub": ask_hub(),
        "tutorials": [plan(tutorial, platform, memory, disk_free / 1e9) for tutorial in TUTORIALS],
    }


def plan(tutorial: Tutorial, platform: str, memory: float, disk_free: float) -> dict:
    """How a device with `memory` GB runs the tutorial: the first way that fits, and leaves 5 % free for what is lost
    between blocks of memory; a rehearsal where none does."""
    fitting = (way for way in ways(tutorial, platform) if way[2] <= 0.95 * memory)
    method, options, needed = next(fitting, ("rehearsal", "", 0.0))
    download, prepare, train = "", "", options
    disk = tutorial.disk * (2 if method == "full" else 1)  # the trained model is as large
    if method == "rehearsal":  # in directories of its own, apart from a real model's
        place, disk = f"./rehearsal/{tutorial.train}", 0.01
        model, dataset = f" --model-name-or-path {place}/model", f" --dataset-name-or-path {place}/dataset.pt"
        download = f" --tiny --save-dir {place}/model"
        prepare = f"{model} --dataset-name-or-path dataset/samples/{tutorial.sample} --save-path {place}/dataset.pt"
        learn = KOREAN_REHEARSAL if tutorial.train == "llama3_1" else REHEARSAL
        train = f"{model}{dataset} --save-dir {place}/trained{learn}"
    return {
        "name": tutorial.name,
        "method": method,
        "memory": int(needed * 1e9),
        "disk": int(disk * 1e9),
        "disk_enough": disk <= disk_free,
        "commands": [
            f"python tutorial/download_{tutorial.download}.py{download}",
            f"python dataset/prepare_{tutorial.prepare}_dataset.py{prepare}",
            f"python tutorial/train_{tutorial.train}.py{train}",
        ],
    }


def ways(tutorial: Tutorial, platform: str):
    """(method, options of the train script, GB of memory), the best first: rather every weight than LoRA, rather LoRA
    than 4 bit, and each rather fast than sparing."""
    korean = tutorial.train == "llama3_1"  # LoRA, 4 bit and checkpointing are that script's defaults
    if platform == "CPU":  # a larger model may fit as well, and would take weeks
        if tutorial.parameters < 1:
            yield "full", "", memory_needed(tutorial, "full", tokens=1024)
    elif platform == "MoAI":  # it splits model and batch by itself; bitsandbytes is not made for it
        if not korean:
            yield "full", "", memory_needed(tutorial, "full")
        yield "lora", " --no-quantization" if korean else " --use-lora", memory_needed(tutorial, "lora", korean)
    else:
        options = {"full": "", "lora": " --use-lora", "lora_4bit": " --use-lora --load-in-4bit"}
        for method in ["lora_4bit"] if korean else METHODS:
            words, sparing = ("", "") if korean else (options[method], " --gradient-checkpointing")
            if not korean:
                yield method, words, memory_needed(tutorial, method)
            yield method, words + sparing, memory_needed(tutorial, method, True)
            yield method, f"{words}{sparing} --micro-batch-tokens 2048", memory_needed(tutorial, method, True, 2048)


def memory_needed(tutorial: Tutorial, method: str, checkpointing: bool = False, tokens: int = 4096) -> float:
    """GB of the device's memory that a training takes with micro-batches of so many tokens, rather too high.

    Bytes a parameter: trained, 16 for the float32 weight, its gradient and AdamW's two states, and 2 for the copy that
    autocast makes; frozen, 2 in 16 bit, 0.52 as NF4 with double quantization (4.127 bit: QLoRA, section 3,
    https://arxiv.org/abs/2305.14314). An adapter of r 16 has some 0.5 % of the parameters, trained: 0.1 for each.
    Activations: a layer keeps up to 60 bytes a token and unit of width (counted in transformers' Llama under autocast;
    GPT-2 keeps 36); with checkpointing 4, its input, and 60 in the one layer that is being computed again.
    1.5 GB: the device's kernels and work space, torch itself on a CPU, the part of the logits that exists at once.
    """
    in_4bit = tutorial.parameters - tutorial.embeddings if method == "lora_4bit" else 0
    weights = 18 * tutorial.parameters if method == "full" else 2.1 * tutorial.parameters - (2 - 0.52) * in_4bit
    kept = 4 * tutorial.layers + 60 if checkpointing else 60 * tutorial.layers
    return weights + tokens * tutorial.width * kept / 1e9 + 1.5


def look_at_devices(accelerator: Accelerator) -> list:
    """Each device: its name, bytes of memory that all programs use, and in total, utilization in percent."""
    import torch

    def device(name, used, total, utilization):
        return {"name": name, "memory_used": used, "memory_total": total, "utilization": utilization}

    if accelerator.device.type == "cpu":
        try:
            import psutil
        except ImportError:
            return [device(accelerator.name, None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)]
        memory = psutil.virtual_memory()
        return [device(accelerator.name, memory.total - memory.available, memory.total, psutil.cpu_percent(0.3))]
    devices = []
    for index in range(torch.cuda.device_count()):
        name, utilization = torch.cuda.get_device_name(index), told(torch.cuda.utilization, index)
        properties = told(torch.cuda.get_device_properties, index)
        free, total = told(torch.cuda.mem_get_info, index) or (None, getattr(properties, "total_memory", None))
        devices.append(device(name, None if free is None else total - free, total, utilization))
    return devices


def told(question, about):
    """The answer, or None: drivers, and torch where a driver's Python package lacks, each fail in their own way."""
    try:
        return question(about)
    except Exception:
        return None


def ask_hub() -> dict:
    """Whether the model hub answers, and whether it knows the token. The token itself is never shown."""
    hub = {"endpoint": None, "reachable": False, "token": "none"}
    try:
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import get_session  # the library's own connection: its proxies and certificates
    except ImportError:  # before the first pip install
        return hub
    token = get_token()
    hub.update(endpoint=constants.ENDPOINT, token="not verified" if token else "none")

    def ask():
        headers = {"authorization": f"Bearer {token}"} if token and token.isascii() else {}  # else no header has it
        with contextlib.suppress(Exception):  # of the HTTP library, which changes by release
            address = f"{constants.ENDPOINT}/api/whoami-v2"
            status = get_session().get(address, headers=headers, timeout=HUB_TIMEOUT).status_code
            hub["reachable"] = status < 500
            if token:
                hub["token"] = {200: "accepted", 401: "refused"}.get(status, "not verified")

    # in a thread, for the timeout does not cover a name server that never answers
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return dict(hub)


def show(found: dict) -> None:
    """The tables. rich wraps long cells and knows how wide Korean letters are; into a pipe it writes plain text."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise UserError("The tables need rich: pip install rich, or add --json.") from None

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
        least = [f"{memory_needed(tutorial, method, checkpointing=True):.0f}" for method in METHODS]
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
