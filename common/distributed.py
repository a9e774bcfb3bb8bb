"""Several processes that train one model together: who is who, and what they tell each other.

    torchrun --nproc-per-node 8 tutorial/train_llama2.py

starts the script eight times and gives each process ("rank") its number in the environment. All ranks run the same
lines. The collective functions below must be called by all ranks at the same place, or the others wait for ever. In a
script that plain `python` started there is one rank, and each of these functions returns what it is given.

Source: https://docs.pytorch.org/docs/stable/distributed.html
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Callable, ContextManager, Iterable, Iterator, List

import torch
import torch.distributed as dist

from common.support.exit import UserError, is_peer_failure, short_message, world_size

TIMEOUT = timedelta(minutes=30)  # after which a rank that waits for another one gives up


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine, from 0: it takes the GPU of that number."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which prints, logs, and writes what all ranks have in common."""
    return rank() == 0


def init(moai: bool) -> None:
    """Join the other ranks.

    Raises UserError where several ranks cannot train: on MoAI Platform, with a torch before 2.6, or with fewer GPUs
    than ranks on this machine.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    script = f"python {sys.argv[0]}"
    if moai:
        raise UserError(f"MoAI Platform splits the work by itself: start one process, {script}, without torchrun.")
    if not _has_fsdp2():
        raise UserError(
            f"torchrun with several processes needs torch 2.6 or newer, and {torch.__version__} is installed. Start "
            f"one process, {script}, or install a newer torch."
        )
    gpus = torch.cuda.device_count()
    if gpus and local_world_size() > gpus:
        raise UserError(
            f"torchrun started {local_world_size()} processes on a machine with {gpus} GPUs, and each process takes "
            f"one GPU. Use --nproc-per-node {gpus}."
        )
    if gpus:
        torch.cuda.set_device(local_rank())
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set(f"rank {rank()}", "is here")
    # init_process_group would wait too, but it does not react when torchrun ends this process meanwhile.
    while not store.check([f"rank {other}" for other in range(world_size())]):
        time.sleep(0.1)
    # Tensors in main memory always go by gloo, which does not wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=TIMEOUT)
    # glibc keeps freed pieces of less than 32 MB. Layers that are gathered and dropped would leave holes as large as
    # the model, so pieces from 1 MB on are given back (M_MMAP_THRESHOLD, man 3 mallopt).
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)


def _has_fsdp2() -> bool:
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return False
    return True


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(numbers: List[float]) -> List[float]:
    """The largest value of each of these numbers on any rank."""
    if world_size() == 1:
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return bool(all_reduce_max([flag])[0])


def broadcast_object(value):
    """The value of rank 0, for all ranks: anything small that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value) -> list:
    """The values of all ranks, in their order: anything small that can be pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_parameters(parameters: Iterable[torch.Tensor]) -> None:
    """Give parameters that every rank holds whole the values of rank 0."""
    if world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Average the gradients of parameters that every rank holds whole (those of an adapter) over all ranks.

    FSDP2 has averaged the gradients of sharded parameters in the backward pass.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
    if not gradients:
        return
    # One large message instead of hundreds of small ones, which would each wait for all ranks.
    flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def require_same_on_all_ranks(text: str, what: str) -> None:
    """UserError where the ranks do not all have the same short text for `what`."""
    if any_rank(text != broadcast_object(text)):
        raise UserError(
            f"The processes read different files: {what} differs between machines. Copy the same file to every "
            "machine or use a shared path."
        )


@contextmanager
def on_main_process(context: Callable[[], ContextManager]) -> Iterator:
    """Enter `context()` on rank 0 alone: all ranks get what it yields, and none goes on before it has been left.

    Where rank 0 fails to enter or leave it, or fails inside (OSError, UserError), all ranks raise.
    """
    if world_size() == 1:
        with context() as value:
            yield value
        return
    stack = ExitStack()
    value = None
    error = None
    try:
        if is_main_process():
            value = stack.enter_context(context())
    except (OSError, UserError) as caught:
        error = caught
    value = _raise_on_all_ranks(error, value)
    try:
        yield value
    except BaseException as caught:
        on_all_ranks = type(caught).__name__ == "CheckpointException" and not is_peer_failure(caught)
        on_rank_0 = is_main_process() and isinstance(caught, (OSError, UserError))
        if not (on_all_ranks or on_rank_0):
            stack.__exit__(*sys.exc_info())  # the other ranks may be waiting somewhere else
            raise
        error = caught
    try:
        stack.__exit__(type(error) if error else None, error, None)
    except (OSError, UserError) as caught:
        error = error or caught
    _raise_on_all_ranks(error)


def _raise_on_all_ranks(error, value=None):
    message, value = broadcast_object((short_message(error) if error else "", value))
    if error or message:
        raise error or UserError(message)
    return value
