"""Where several processes meet, by torch.distributed: the functions of common/processes.py."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Callable, ContextManager, Iterable, Iterator, List

import torch
import torch.distributed as dist

from common import UserError, reason_of

TIMEOUT = timedelta(minutes=30)  # that one process may be busy alone, with the digests of a large checkpoint for one


def start(moai: bool, here: int, index: int) -> None:
    """Join the others. here: how many processes this machine has; index: which of them this is, and of its GPUs."""
    gpus, script = torch.cuda.device_count(), f"python {sys.argv[0]}"
    if moai:
        raise UserError(f"MoAI Platform splits the work by itself: start one process, {script}, without torchrun.")
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        raise UserError(
            f"torchrun with several processes needs torch 2.6 or newer, and {torch.__version__} is installed. Start "
            f"one process, {script}, or install a newer torch."
        ) from None
    if gpus and here > gpus:
        line = f"{here} processes on a machine with {gpus} GPUs, of which each takes one: give torchrun"
        raise UserError(f"{line} --nproc-per-node {gpus}.")
    if dist.is_initialized():  # a second training in one process
        return
    if gpus:
        torch.cuda.set_device(index)
    store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set(f"process {number}", "is here")
    while not store.check([f"process {other}" for other in range(count)]):
        time.sleep(0.1)  # and not in the next line, which does not hear when torchrun ends it
    # numbers in the main memory always go by gloo, which does not wait for a GPU
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    # glibc keeps what is freed in pieces of less than 32 MB, and layers that come and go would leave holes as large as
    # the model: from 1 MB on they go back (M_MMAP_THRESHOLD: https://man7.org/linux/man-pages/man3/mallopt.3.html)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)


def total(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def largest(numbers: List[float]) -> List[float]:
    of_all = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return of_all.tolist()


def from_first(value):
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def require_same(text: str, what: str) -> None:
    if largest([text != from_first(text)])[0]:
        raise UserError(
            f"The processes see different files: {what} is not the same for all of them. Put the same one on each "
            "machine, or give a path that all share."
        )


def average_gradients(weights: Iterable[torch.Tensor]) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None and not hasattr(weight, "full_tensor")]
    if not gradients:
        return
    # as one tensor: hundreds of small ones would each wait for all processes
    flat = total(torch.cat([gradient.flatten() for gradient in gradients])) / dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def same_from_first(weights: Iterable[torch.Tensor]) -> None:
    for weight in weights:
        dist.broadcast(weight.data, src=0)


@contextmanager
def by_first(make: Callable[[], ContextManager]) -> Iterator:
    stack, value, error, first = ExitStack(), None, None, dist.get_rank() == 0
    try:
        value = stack.enter_context(make()) if first else None
    except (OSError, UserError) as caught:
        error = caught
    value = _raised_by_all(error, value)
    try:
        yield value
    except BaseException as caught:
        of_all = type(caught).__name__ == "CheckpointException" and not lost_another(caught)
        if not (of_all or (first and isinstance(caught, (OSError, UserError)))):
            stack.__exit__(*sys.exc_info())  # the others may be waiting somewhere else: nobody can be asked
            raise
        error = caught
    try:
        stack.__exit__(type(error) if error else None, error, None)
    except (OSError, UserError) as caught:
        error = error or caught
    _raised_by_all(error)


def _raised_by_all(error, value=None):
    problem, value = from_first((reason_of(error) if error else "", value))
    if error or problem:
        raise error or UserError(problem)
    return value


def lost_another(error: BaseException) -> bool:
    words = "closed by peer|reset by peer|Broken pipe|[gG]loo|NCCL|TCPStore"
    inner = [failure[0] for failure in getattr(error, "failures", {}).values()]  # of torch's CheckpointException
    told = isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or re.search(words, str(error)))
    return bool(told) or any(map(lost_another, inner))
