"""Run a script in which something befalls one of several processes alone.

    torchrun --nproc-per-node 4 tests/apart.py 2 "9 -torch:Tensor.backward 5.2" tutorial/train_llama3.py ...
    torchrun --nproc-per-node 2 tests/apart.py 1 "word ./llama3-8b ./other" tutorial/train_llama3.py ...
    torchrun --nproc-per-node 2 tests/apart.py 1 "memory 3" tutorial/train_llama3.py ...
    torchrun --nproc-per-node 2 tests/apart.py 1 "nan 3" tutorial/train_llama3.py ...
    torchrun --nproc-per-node 2 tests/apart.py 1 "abort" tutorial/train_llama3.py ...

Process 2 is killed at a place as in tests/killed.py; process 1 is given another word in the place of one; its memory
gives out in the third step, in torch's own words; its loss is no number then; or it aborts in the end of C, where a
thread that is left over does it. Products are in float32.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def in_step(step: int, what) -> None:
    """Give what `what` makes of it in the place of each loss of this step."""
    from common.trainer import Trainer
    from model.loss import CausalLMLoss

    gradients, forward = Trainer.backward, CausalLMLoss.forward
    now = [0]

    def counted(self, *args):
        now[0] = self.state.step + 1
        return gradients(self, *args)

    def other(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        return what(loss) if now[0] == step else loss

    Trainer.backward, CausalLMLoss.forward = counted, other


def full_memory(_) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: error 12")


def no_number(loss):
    return loss * float("nan")


if __name__ == "__main__":
    _, process, what, *sys.argv = sys.argv
    sys.path.insert(0, str(ROOT))
    from common import device
    from tests.killed import Counter, kill_at, next_step, nothing, wrap

    device._cpu_has_bf16 = lambda: False
    if process in (os.environ.get("RANK"), "all"):
        first, *others = what.split()
        if first == "word":
            sys.argv = [others[1] if word == others[0] else word for word in sys.argv]
        elif first in ("memory", "nan"):
            in_step(int(others[0]), full_memory if first == "memory" else no_number)
        elif first == "abort":
            libc = ctypes.CDLL(None)
            libc["__cxa_atexit"](libc.abort, None, None)
        elif first.isdigit():
            wrap("common.trainer:Trainer.train_step", next_step, nothing)
            kill_at(others[0], Counter(int(first), others[1]))
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
