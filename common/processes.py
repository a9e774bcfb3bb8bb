"""One process or several: the only file that knows of torchrun.

    torchrun --nproc-per-node 8 tutorial/train_llama2.py

starts the script eight times, and tells each by its environment which one it is. All of them run the same lines, and
meet in the functions below. Each of these is called by all processes at the same place, or they would wait for ever. A
script that was started by python alone, or as one process, meets nobody: there each returns what it is given.
How they meet: common/meeting.py.
"""

from __future__ import annotations

import os
from typing import Callable, ContextManager, Iterable, List


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def number_on_machine() -> int:
    """Which of the processes of this machine this is, from 0: it takes the GPU of that number."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def on_machine() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def is_first() -> bool:
    """Whether this process is the one that prints, logs, and writes what all have in common."""
    return number() == 0


def start(moai: bool) -> None:
    """Join the others. UserError where several processes can't train: on MoAI Platform, with a torch before 2.6, or
    with fewer GPUs on this machine."""
    if count() > 1:
        meeting().start(moai, on_machine(), number_on_machine())


def seed(number_of_first: int) -> None:
    """Let this process draw random numbers that the others do not; the first one's stay as they are."""
    if not is_first():
        import torch

        torch.manual_seed(number_of_first + 1_000_003 * number())


def total(tensor):
    """The sum of all processes' tensors, in place."""
    return meeting().total(tensor) if count() > 1 else tensor


def largest(numbers: List[float]) -> List[float]:
    """Of each of these numbers the largest that a process has."""
    return meeting().largest(numbers) if count() > 1 else numbers


def any_of(flag: bool) -> bool:
    """Whether a process says yes."""
    return bool(largest([flag])[0])


def from_first(value):
    """What the first process gives, for all: anything small that can be pickled."""
    return meeting().from_first(value) if count() > 1 else value


def require_same(text: str, what: str) -> None:
    """UserError where the processes do not all have the same short text, of `what`."""
    if count() > 1:
        meeting().require_same(text, what)


def average_gradients(weights: Iterable) -> None:
    """Give weights that each process holds whole, an adapter's, the mean of all processes' gradients. (Those of slices
    have been averaged in the backward pass.)"""
    if count() > 1:
        meeting().average_gradients(weights)


def same_from_first(weights: Iterable) -> None:
    """Give weights that each process holds whole the values that the first one has."""
    if count() > 1:
        meeting().same_from_first(weights)


def by_first(make: Callable[[], ContextManager]) -> ContextManager:
    """A context that only the first process enters and leaves: all get what it yields, and none goes on before it has
    been left. Where the first can't enter or leave it, or write inside (OSError, UserError), all have an error."""
    return meeting().by_first(make) if count() > 1 else make()


def lost_another(error: BaseException) -> bool:
    """Whether the error tells that another process is not there any more."""
    return count() > 1 and meeting().lost_another(error)


def meeting():
    """The functions of this file as several processes have them."""
    from common import meeting as found

    return found
