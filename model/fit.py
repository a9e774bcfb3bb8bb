"""Which way of training fits a device: what a train script says and decides before it loads anything."""

from __future__ import annotations

import sys
from typing import Iterator, NamedTuple, Optional

from common import distributed
from common.checkpoint import Checkpoint
from common.device import Device, total_memory
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from model.counts import NoPlan, Way, can_checkpoint, can_count, config_of
from model.plan import BITS, Plan, plan

MOST = 0.95  # of the memory: the rest is lost between its pieces
# one after the other, each takes less; 8 bit is not among them: 4 bit takes half, and 16 bit is faster
METHODS = ("full", "lora", "lora_4bit")
OPTIONS = {"full": "", "lora": " --use-lora", "lora_4bit": " --use-lora --load-in-4bit"}
WORDS = {"--use-lora", "--no-use-lora", "--load-in-4bit", "--load-in-8bit", "--no-quantization"}


class TrainingPlan(NamedTuple):
    """How a training is run, and what memory it is predicted to take."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    prediction: Optional[Plan] = None  # None on MoAI Platform, with an old torch, and for a model that can't be built


def plan_training(args, device: Device, resume: Optional[Checkpoint] = None) -> TrainingPlan:
    """Choose micro-batches and gradient checkpointing that fit into the device's memory, and print what they take.

    What the command says is not changed, and a resumed run keeps its choice. UserError where weights, gradients and
    optimizer states alone are more than the device has, with the command that fits.
    """
    tokens = args.micro_batch_tokens
    checkpointing = args.gradient_checkpointing
    if resume:
        if tokens == resume.options["micro_batch_tokens"]:  # no other value than for the interrupted command
            tokens = resume.state["micro_batch_tokens"]
        if checkpointing is None:
            checkpointing = resume.state["gradient_checkpointing"]
    if not device.static_shapes and can_count():
        try:
            return _plan_training(args, device, tokens, checkpointing)
        except NoPlan:  # loading the model says why
            pass
    return TrainingPlan(tokens or device.micro_batch_tokens, bool(checkpointing))


def _plan_training(args, device: Device, tokens: int, checkpointing: Optional[bool]) -> TrainingPlan:
    """The same for a model that can be planned. tokens 0 and checkpointing None: to be chosen."""
    config = config_of(ModelSource(args.model_name_or_path).base)
    memory = memory_of(device)
    if checkpointing is None and not can_checkpoint(config):
        checkpointing = False
    method = "full"
    if args.use_lora:
        method = next((name for name, bits in BITS.items() if bits == args.bits), "lora")
    micro_batch_tokens = tokens or device.micro_batch_tokens
    way = Way(
        method=method,
        checkpointing=bool(checkpointing),
        tokens=min(micro_batch_tokens, args.batch_size * args.block_size),
        length=args.block_size,
        dtype=device.dtype,
        device=device.torch_device.type,
        processes=distributed.world_size(),
        lora=(args.lora_r, args.lora_dropout, tuple(args.lora_target_modules)),
    )
    planned = best(config, ways(way, tokens == 0, checkpointing is None), memory)
    if tokens == 0 and planned.way.tokens < way.tokens:
        micro_batch_tokens = planned.way.tokens
    print(*planned.lines, sep="\n")
    if planned.state > memory:
        raise UserError(
            f"weights, gradients and optimizer states of {args.model_name_or_path} take {planned.state / 1e9:.1f} GB, "
            f"the device has {memory / 1e9:.1f} GB. {_what_fits(config, planned.way, memory)}"
        )
    if planned.peak > memory:
        print(
            f"Plan: that may be more than the {memory / 1e9:.1f} GB of the device. A smaller --block-size takes less. "
            f"{_what_fits(config, planned.way, memory)}"
        )
    return TrainingPlan(micro_batch_tokens, planned.way.checkpointing, planned)


def memory_of(device: Device) -> float:
    """Bytes that a process has for itself: of the smallest device, or its part of the main memory."""
    memory = total_memory(device.torch_device)
    return -distributed.all_reduce_max(
        [-memory if device.torch_device.type == "cuda" else -memory / distributed.local_world_size()]
    )[0]


def ways(way: Way, tokens: bool = True, checkpointing: bool = True) -> Iterator[Way]:
    """`way` and what takes less memory, the fastest first, where `tokens` and `checkpointing` may be chosen."""
    yield way
    if checkpointing:
        way = way._replace(checkpointing=True)
        yield way
    while tokens and way.tokens > way.length:
        way = way._replace(tokens=max(way.length, way.tokens // 2))
        yield way


def best(config, candidates: Iterator[Way], memory: float) -> Plan:
    """The plan of the first of them that fits `memory` bytes, of the last one where none does."""
    for way in candidates:
        planned = plan(config, way)
        if planned.peak <= MOST * memory:
            break
    return planned


def _what_fits(config, way: Way, memory: float) -> str:
    """A command for the reader, made of the one that was given."""
    others = METHODS[METHODS.index(way.method) + 1 :] if way.method in METHODS else METHODS[-1:]
    words = " ".join(word for word in sys.argv if word not in WORDS)
    start = "python" if way.processes == 1 else f"torchrun --nproc-per-node {distributed.local_world_size()}"
    for method in others:
        if best(config, ways(way._replace(method=method)), memory).peak <= MOST * memory:
            return f"What fits: {start} {words}{OPTIONS[method]}"
    for devices in (2, 4, 8, 16):
        if way.method not in BITS and best(config, ways(way._replace(processes=devices)), memory).peak <= MOST * memory:
            return f"What fits: {devices} such devices, torchrun --nproc-per-node {devices} {' '.join(sys.argv)}"
    return "Take a larger device, or a smaller model."
