"""The tutorials, and the best way to run each of them on a machine: what tutorial/check_accelerator.py shows."""

from __future__ import annotations

import shlex
from functools import lru_cache
from pathlib import Path
from typing import List, NamedTuple, Optional

import torch

from common.support.exit import UserError
from model.configs import config_of_kind
from model.memory_plan import (
    METHOD_OPTIONS,
    USABLE_FRACTION,
    MemoryPlan,
    ModelShape,
    TrainingSetup,
    build_shape,
    cheaper_setups,
    first_that_fits,
    predict,
    read_config,
)


class Tutorial(NamedTuple):
    """A tutorial, or a model of one's own that is trained by a tutorial's script."""

    name: str
    kind: str  # a key of model.configs; the script is tutorial/train_<kind>.py
    download: str  # tutorial/download_<download>.py
    prepare: str  # dataset/prepare_<prepare>_dataset.py
    sample: str  # the data of its rehearsal, in dataset/samples
    disk: float  # GB that its page advises to have free for the model
    block_size: int = 1024
    directory: str = ""  # of a model of one's own


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
PYTHON, KOREAN = "Evol-Instruct-Python-26k", "korean_safe_conversation"
TUTORIALS = (
    Tutorial("SmolLM2 135M", "smollm2", "smollm2", "smollm2", CODE, 0.7, 512),
    Tutorial("Llama2 13B", "llama2", "llama2_13b", "llama2", NEWS, 50),
    Tutorial("Llama3 8B", "llama3", "llama3_8b", "llama3", NEWS, 20),
    Tutorial("Llama3 70B", "llama3_70b", "llama3_70b", "llama3", NEWS, 150),
    Tutorial("Mistral 7B", "mistral", "mistral_7b", "mistral", CODE, 16),
    Tutorial("Cerebras-GPT 13B", "gpt", "gpt_13b", "gpt", PYTHON, 60),
    Tutorial("Llama 3.1 8B, Korean", "llama3_1", "llama3_1_8b", "llama3_1", KOREAN, 20, 2048),
    Tutorial("Qwen3 4B, chat", "qwen3", "qwen3", "qwen3", "korean_conversations", 10, 2048),
)
METHODS = {"full": "full", "lora": "LoRA", "lora_4bit": "LoRA 4 bit"}  # in this order: the first that fits is the best
# The options of each method for the scripts that train a LoRA adapter by default.
LORA_BY_DEFAULT = {
    "llama3_1": {"full": " --no-use-lora --no-quantization", "lora": " --no-quantization", "lora_4bit": ""},
    "qwen3": {"full": " --no-use-lora", "lora": "", "lora_4bit": " --load-in-4bit"},
}
# With these a tiny model learns something of the samples within a minute; an adapter on random weights would not.
REHEARSAL = " --batch-size 8 --epochs 10 --lr 6e-3 --lr-scheduler linear --warmup-steps 20"
MAX_GB_ON_CPU = 2  # a larger model may fit as well, but its training would take weeks


class Machine(NamedTuple):
    """What a training runs on."""

    platform: str  # "MoAI", "CUDA", "ROCm" or "CPU"
    memory: float  # bytes of one device
    dtype: torch.dtype  # of matrix products
    devices: int = 1


def recommend(tutorial: Tutorial, machine: Machine, disk_free: Optional[float]) -> dict:
    """The best method that fits the machine, with its commands; else a rehearsal, or of a model of one's own nothing.

    disk_free None: not known.
    """
    plan = best_plan(tutorial, machine)
    method = "none"
    disk = 0.0
    proposed: List[str] = []
    if plan:
        method = plan.setup.method
        # The last checkpoint stays until the next one is complete.
        disk = 1e9 * tutorial.disk + plan.result + 2 * plan.checkpoint
        proposed = commands(tutorial, plan)
    elif not tutorial.directory:
        method = "rehearsal"
        disk = 0.01e9
        proposed = rehearsal(tutorial)
    return {
        "name": tutorial.name,
        "method": method,
        "devices": plan.setup.world_size if plan else 1,
        "memory": int(plan.peak) if plan else 0,
        "least": {method: least_memory(tutorial, method, machine) for method in METHODS},
        "disk": int(disk),
        "disk_enough": None if disk_free is None else disk <= disk_free,
        "commands": proposed,
    }


def best_plan(tutorial: Tutorial, machine: Machine) -> Optional[MemoryPlan]:
    """The plan of the best method that fits, with as little gradient checkpointing as possible; None: nothing fits."""
    for method in methods(tutorial, machine):
        setups = cheaper_setups(fastest_setup(method, machine), tutorial.block_size)
        plan = first_that_fits(shape_of(tutorial), setups, machine.memory)
        if plan.peak <= USABLE_FRACTION * machine.memory:
            return plan
    return None


def methods(tutorial: Tutorial, machine: Machine) -> List[str]:
    """What the machine can do, the best method first."""
    if machine.platform == "CPU":
        return ["full"] if tutorial.disk < MAX_GB_ON_CPU else []
    if machine.platform == "MoAI":  # bitsandbytes is not made for it
        return ["full", "lora"]
    return list(METHODS)


def fastest_setup(method: str, machine: Machine) -> TrainingSetup:
    """What a script begins with when no option limits its memory."""
    on_cpu = machine.platform == "CPU"
    return TrainingSetup(
        method=method,
        tokens=1024 if on_cpu else 4096,
        dtype=machine.dtype,
        device="cpu" if on_cpu else "cuda",
        world_size=machine.devices,
    )


def least_memory(tutorial: Tutorial, method: str, machine: Machine) -> int:
    """Bytes that a training by this method needs at least: with gradient checkpointing, one row at a time."""
    *_, last = cheaper_setups(fastest_setup(method, machine), tutorial.block_size)
    return int(predict(shape_of(tutorial), last).peak)


@lru_cache(maxsize=None)
def shape_of(tutorial: Tutorial) -> ModelShape:
    """The sizes of its model. CannotPlan for a model of one's own that transformers can't build."""
    if tutorial.directory:
        return build_shape(read_config(tutorial.directory))
    return ModelShape(config_of_kind(tutorial.kind))


def commands(tutorial: Tutorial, plan: MemoryPlan) -> List[str]:
    """To download, prepare and train. A model of one's own is there, and has a tokenizer of its own."""
    download = [f"python tutorial/download_{tutorial.download}.py"]
    model = ""
    if tutorial.directory:
        download = []
        model = f" --model-name-or-path {shlex.quote(tutorial.directory)}"
    script = f"tutorial/train_{tutorial.kind}.py{model}"
    script += LORA_BY_DEFAULT.get(tutorial.kind, METHOD_OPTIONS)[plan.setup.method]
    devices = plan.setup.world_size
    return [
        *download,
        f"python dataset/prepare_{tutorial.prepare}_dataset.py{model}",
        f"torchrun --nproc-per-node {devices} {script}" if devices > 1 else f"python {script}",
    ]


def rehearsal(tutorial: Tutorial) -> List[str]:
    """The same with a tiny random model and the samples, in a directory apart from a real model's."""
    place = f"./rehearsal/{tutorial.kind}"
    sample = f"dataset/samples/{tutorial.sample}"
    model = f"--model-name-or-path {place}/model"
    full = LORA_BY_DEFAULT["llama3_1"]["full"] if tutorial.kind in LORA_BY_DEFAULT else ""
    return [
        f"python tutorial/download_{tutorial.download}.py --tiny --save-dir {place}/model",
        f"python dataset/prepare_{tutorial.prepare}_dataset.py {model} --dataset-name-or-path {sample} "
        f"--save-path {place}/dataset.pt",
        f"python tutorial/train_{tutorial.kind}.py {model} --dataset-name-or-path {place}/dataset.pt "
        f"--save-dir {place}/trained{full}{REHEARSAL}",
    ]


def tutorial_for_model(directory: str) -> Tutorial:
    """A model of one's own, or a tutorial by the name of its script. UserError where it is neither."""
    known = {tutorial.kind: tutorial for tutorial in TUTORIALS}
    if directory in known:
        return known[directory]
    if not (Path(directory) / "config.json").is_file():
        raise UserError(
            f"{directory} has no config.json. Give the directory of a model, or one of {', '.join(known)}; for a model "
            "of the hub download its config.json first."
        )
    return Tutorial(directory, "llama2", "", "llama2", NEWS, 0.0, directory=directory)
