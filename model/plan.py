"""What a training takes of a device's memory, and the ways in which a tutorial can be run."""

from __future__ import annotations

from typing import Iterator, NamedTuple, Tuple

from model.configs import shape


class Tutorial(NamedTuple):
    name: str
    kind: str  # of model.configs; its script is tutorial/train_<kind>.py
    download: str  # tutorial/download_<download>.py
    prepare: str  # dataset/prepare_<prepare>_dataset.py
    sample: str  # its rehearsal's data, in dataset/samples
    disk: float  # GB that its page advises to have free


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
PYTHON, KOREAN = "Evol-Instruct-Python-26k", "korean_safe_conversation"
TUTORIALS = (
    Tutorial("SmolLM2 135M", "smollm2", "smollm2", "smollm2", CODE, 0.7),
    Tutorial("Llama2 13B", "llama2", "llama2_13b", "llama2", NEWS, 50),
    Tutorial("Llama3 8B", "llama3", "llama3_8b", "llama3", NEWS, 20),
    Tutorial("Llama3 70B", "llama3_70b", "llama3_70b", "llama3", NEWS, 150),
    Tutorial("Mistral 7B", "mistral", "mistral_7b", "mistral", CODE, 16),
    Tutorial("Cerebras-GPT 13B", "gpt", "gpt_13b", "gpt", PYTHON, 60),
    Tutorial("Llama 3.1 8B, Korean", "llama3_1", "llama3_1_8b", "llama3_1", KOREAN, 20),
    Tutorial("Qwen3 4B, chat", "qwen3", "qwen3", "qwen3", "korean_conversations", 10),
)
# LoRA and checkpointing are the defaults of these: the ways on a GPU, and their options
LORA_BY_DEFAULT = {"llama3_1": {"lora_4bit": ""}, "qwen3": {"lora": "", "lora_4bit": " --load-in-4bit"}}
METHODS = {"full": "full", "lora": "LoRA", "lora_4bit": "LoRA 4 bit"}
# with which a stand-in learns something of the samples within a minute; an adapter on random weights would not
REHEARSAL = " --batch-size 8 --epochs 10 --lr 6e-3 --lr-scheduler linear --warmup-steps 20"
OPTIONS = {"full": "", "lora": " --use-lora", "lora_4bit": " --use-lora --load-in-4bit"}


def way_to_run(tutorial: Tutorial, platform: str, memory: float, disk_free: float) -> dict:
    """How a device with `memory` GB runs the tutorial: the first way that fits, and leaves 5 % free for what is lost
    between blocks of memory; a rehearsal where none does."""
    fitting = (way for way in ways(tutorial.kind, platform) if way[2] <= 0.95 * memory)
    method, train, needed = next(fitting, ("rehearsal", "", 0.0))
    download, prepare = "", ""
    disk = tutorial.disk * (2 if method == "full" else 1)  # the trained model is as large
    if method == "rehearsal":  # in directories of its own, apart from a real model's
        place, disk = f"./rehearsal/{tutorial.kind}", 0.01
        model, dataset = f" --model-name-or-path {place}/model", f" --dataset-name-or-path {place}/dataset.pt"
        download = f" --tiny --save-dir {place}/model"
        prepare = f"{model} --dataset-name-or-path dataset/samples/{tutorial.sample} --save-path {place}/dataset.pt"
        plain = " --no-use-lora --no-quantization" if tutorial.kind in LORA_BY_DEFAULT else ""
        train = f"{model}{dataset} --save-dir {place}/trained{plain}{REHEARSAL}"
    return {
        "name": tutorial.name,
        "method": method,
        "memory": int(needed * 1e9),
        "disk": int(disk * 1e9),
        "disk_enough": disk <= disk_free,
        "commands": [
            f"python tutorial/download_{tutorial.download}.py{download}",
            f"python dataset/prepare_{tutorial.prepare}_dataset.py{prepare}",
            f"python tutorial/train_{tutorial.kind}.py{train}",
        ],
    }


def ways(kind: str, platform: str) -> Iterator[Tuple[str, str, float]]:
    """(method, options of the train script, GB of memory), the best first: rather every weight than LoRA, rather LoRA
    than 4 bit, and each rather fast than sparing. platform: "MoAI", "CUDA", "ROCm" or "CPU"."""
    lora = LORA_BY_DEFAULT.get(kind)
    if platform == "CPU":  # a larger model may fit as well, and would take weeks
        if shape(kind)["parameters"] < 1e9:
            yield "full", "", memory_needed(kind, "full", tokens=1024)
    elif platform == "MoAI":  # it splits model and batch by itself; bitsandbytes is not made for it
        if not lora:
            yield "full", "", memory_needed(kind, "full")
        words = ("" if "lora" in lora else " --no-quantization") if lora else " --use-lora"
        yield "lora", words, memory_needed(kind, "lora", bool(lora))
    else:
        for method in lora or METHODS:
            words, sparing = (lora[method], "") if lora else (OPTIONS[method], " --gradient-checkpointing")
            if not lora:
                yield method, words, memory_needed(kind, method)
            yield method, words + sparing, memory_needed(kind, method, True)
            yield method, f"{words}{sparing} --micro-batch-tokens 2048", memory_needed(kind, method, True, 2048)


def memory_needed(kind: str, method: str, checkpointing: bool = False, tokens: int = 4096) -> float:
    """GB of the device's memory that a training takes with micro-batches of so many tokens, rather too high.

    Bytes a parameter: trained, 16 for the float32 weight, its gradient and AdamW's two states, and 2 for the copy that
    autocast makes; frozen, 2 in 16 bit, 0.52 as NF4 with double quantization (4.127 bit: QLoRA, section 3,
    https://arxiv.org/abs/2305.14314). An adapter of r 16 has some 0.5 % of the parameters, trained: 0.1 for each.
    Activations: a layer keeps up to 60 bytes a token and unit of width (counted in transformers' Llama under autocast;
    GPT-2 keeps 36); with checkpointing 4, its input, and 60 in the one layer that is being computed again.
    1.5 GB: the device's kernels and work space, torch itself on a CPU, the part of the logits that exists at once.
    """
    of = shape(kind)
    in_4bit = of["parameters"] - of["embeddings"] if method == "lora_4bit" else 0
    weights = 18 * of["parameters"] if method == "full" else 2.1 * of["parameters"] - (2 - 0.52) * in_4bit
    kept = 4 * of["layers"] + 60 if checkpointing else 60 * of["layers"]
    return (weights + tokens * of["width"] * kept) / 1e9 + 1.5
