"""The tutorials, and the best way to run each on a device: what tutorial/check_accelerator.py answers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import List, NamedTuple, Optional

import torch

from common.support.exit import UserError
from model.configs import config_of_kind
from model.counts import Way, config_of
from model.fit import MOST, OPTIONS, ways
from model.plan import Plan, plan


class Tutorial(NamedTuple):
    name: str
    kind: str  # of model.configs; its script is tutorial/train_<kind>.py
    download: str  # tutorial/download_<download>.py
    prepare: str  # dataset/prepare_<prepare>_dataset.py
    sample: str  # its rehearsal's data, in dataset/samples
    disk: float  # GB that its page advises to have free for the model
    batch_size: int
    tokens: float  # of the whole training, roughly: news fill their blocks, code a quarter of them
    block_size: int = 1024
    directory: str = ""  # of a model of the reader's own

    @property
    def config(self):
        return config_of(self.directory) if self.directory else config_of_kind(self.kind)


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
PYTHON, KOREAN = "Evol-Instruct-Python-26k", "korean_safe_conversation"
OF_NEWS = 287_113 * 1024.0
TUTORIALS = (
    Tutorial("SmolLM2 135M", "smollm2", "smollm2", "smollm2", CODE, 0.7, 16, 4_915 * 251.0),
    Tutorial("Llama2 13B", "llama2", "llama2_13b", "llama2", NEWS, 50, 256, OF_NEWS),
    Tutorial("Llama3 8B", "llama3", "llama3_8b", "llama3", NEWS, 20, 256, OF_NEWS),
    Tutorial("Llama3 70B", "llama3_70b", "llama3_70b", "llama3", NEWS, 150, 512, OF_NEWS),
    Tutorial("Mistral 7B", "mistral", "mistral_7b", "mistral", CODE, 16, 256, 2 * 18_612 * 256.0),
    Tutorial("Cerebras-GPT 13B", "gpt", "gpt_13b", "gpt", PYTHON, 60, 32, 4 * 26_588 * 256.0),
    Tutorial("Llama 3.1 8B, Korean", "llama3_1", "llama3_1_8b", "llama3_1", KOREAN, 20, 8, 60 * 8 * 512.0, 2048),
    Tutorial("Qwen3 4B, chat", "qwen3", "qwen3", "qwen3", "korean_conversations", 10, 8, 60 * 8 * 512.0, 2048),
)
# LoRA is the default of these: the methods that are theirs on a GPU, and their options
LORA_BY_DEFAULT = {
    "llama3_1": {"lora_4bit": "", "lora": " --no-quantization"},
    "qwen3": {"lora": "", "lora_4bit": " --load-in-4bit"},
}
ON_A_GPU = {"llama3_1": ["lora_4bit"], "qwen3": ["lora", "lora_4bit"]}
METHODS = {"full": "full", "lora": "LoRA", "lora_4bit": "LoRA 4 bit"}
# with which a stand-in learns something of the samples within a minute; an adapter on random weights would not
REHEARSAL = " --batch-size 8 --epochs 10 --lr 6e-3 --lr-scheduler linear --warmup-steps 20"
SMALL = 2  # GB of files up to which a CPU is done within hours; a larger model may fit as well, and would take weeks
OF_RATE = 0.4  # of the rate of large products, what a training reaches


class Machine(NamedTuple):
    """What a training runs on."""

    platform: str  # "MoAI", "CUDA", "ROCm" or "CPU"
    memory: float  # bytes of one device
    dtype: torch.dtype
    devices: int = 1
    rate: Optional[float] = None  # matrix products of one device, operations a second; None: not known


def way_to_run(tutorial: Tutorial, machine: Machine, disk_free: float) -> dict:
    """How the machine runs the tutorial: the first way that fits; a rehearsal where none does. Bytes, seconds."""
    place = f"./rehearsal/{tutorial.kind}"  # apart from a real model's
    download, prepare, disk, planned = "", "", 0.01e9, first_that_fits(tutorial, machine)
    least = {method: least_memory(tutorial, method, machine) for method in METHODS}
    if planned:
        way = planned.way
        own = f" --model-name-or-path {tutorial.directory}" if tutorial.directory else ""
        train = f"tutorial/train_{tutorial.kind}.py{own}{_options(tutorial, way)}"
        train = f"torchrun --nproc-per-node {way.processes} {train}" if way.processes > 1 else f"python {train}"
        disk = 1e9 * tutorial.disk + planned.result + 2 * planned.checkpoint  # one stays until the next is whole
    else:
        model, dataset = f" --model-name-or-path {place}/model", f" --dataset-name-or-path {place}/dataset.pt"
        download = f" --tiny --save-dir {place}/model"
        prepare = f"{model} --dataset-name-or-path dataset/samples/{tutorial.sample} --save-path {place}/dataset.pt"
        plain = " --no-use-lora --no-quantization" if tutorial.kind in LORA_BY_DEFAULT else ""
        train = f"python tutorial/train_{tutorial.kind}.py{model}{dataset} --save-dir {place}/trained{plain}{REHEARSAL}"
    return {
        "name": tutorial.name,
        "method": planned.way.method if planned else "rehearsal",
        "devices": planned.way.processes if planned else 1,
        "memory": int(planned.peak) if planned else 0,
        "least": least,
        "disk": int(disk),
        "disk_enough": disk <= disk_free,
        "seconds": seconds(planned, tutorial.tokens, machine) if planned else None,
        "commands": [
            f"python tutorial/download_{tutorial.download}.py{download}",
            f"python dataset/prepare_{tutorial.prepare}_dataset.py{prepare}",
            train,
        ],
    }


def first_that_fits(tutorial: Tutorial, machine: Machine) -> Optional[Plan]:
    """Rather every weight than LoRA, rather LoRA than 4 bit, and each rather fast than sparing; None: nothing fits."""
    for method in methods(tutorial, machine):
        ways_of_method = list(ways(first_way(tutorial, method, machine)))
        if plan_of(tutorial, ways_of_method[-1]).peak <= MOST * machine.memory:
            plans = (plan_of(tutorial, way) for way in ways_of_method)
            return next(planned for planned in plans if planned.peak <= MOST * machine.memory)
    return None


def methods(tutorial: Tutorial, machine: Machine) -> List[str]:
    """Those that the machine can do, the best first."""
    if machine.platform == "CPU":
        return ["full"] if tutorial.disk < SMALL or tutorial.directory else []
    if machine.platform == "MoAI":  # it splits model and batch by itself; bitsandbytes is not made for it
        return ["lora"] if tutorial.kind in LORA_BY_DEFAULT else ["full", "lora"]
    return ON_A_GPU.get(tutorial.kind, list(METHODS))


def first_way(tutorial: Tutorial, method: str, machine: Machine) -> Way:
    """The fastest way by this method: as the tutorial's script begins without any option of memory."""
    on_cpu = machine.platform == "CPU"
    return Way(
        method=method,
        tokens=1024 if on_cpu else 4096,
        length=tutorial.block_size,
        dtype=machine.dtype,
        device="cpu" if on_cpu else "cuda",
        processes=machine.devices,
    )


@lru_cache(maxsize=None)
def plan_of(tutorial: Tutorial, way: Way) -> Plan:
    """The plan of its model."""
    return plan(tutorial.config, way)


def least_memory(tutorial: Tutorial, method: str, machine: Machine) -> int:
    """Bytes that a training by this method takes at least: with gradient checkpointing, a row at a time."""
    *_, last = ways(first_way(tutorial, method, machine))
    return int(plan_of(tutorial, last).peak)


def seconds(planned: Plan, tokens: float, machine: Machine) -> Optional[float]:
    """What the training of so many tokens takes, roughly; None where the rate of the machine is not known.

    Of each number of the model a token takes 2 operations in the forward pass and 4 in the backward pass, without those
    of its gradient 2; with checkpointing the forward pass comes twice (https://arxiv.org/abs/2001.08361, table 1)."""
    if not machine.rate:
        return None
    operations = (6 if planned.way.method == "full" else 4) + 2 * planned.way.checkpointing
    return tokens * planned.numbers * operations / (OF_RATE * machine.rate * planned.way.processes)


def own_model(directory: str) -> Tutorial:
    """A model of the reader's own, or a tutorial's by the name of its script. UserError where it is neither."""
    known = {tutorial.kind: tutorial for tutorial in TUTORIALS}
    if directory in known:
        return known[directory]
    if not (Path(directory) / "config.json").is_file():
        raise UserError(
            f"{directory} has no config.json. Give the directory of a model, or one of {', '.join(known)}; for one of "
            "the hub download its config.json first."
        )
    return Tutorial(directory, "llama2", "", "llama2", NEWS, 0.0, 256, OF_NEWS, directory=directory)


def _options(tutorial: Tutorial, way: Way) -> str:
    return LORA_BY_DEFAULT.get(tutorial.kind, OPTIONS)[way.method]
