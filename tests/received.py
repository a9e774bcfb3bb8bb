"""Run a train script, and count the bytes that a process receives from the others in each step.

    torchrun --standalone --nproc-per-node 2 tests/received.py tutorial/train_llama3.py ...

Writes received.json: {"steps": [[bytes, micro-batches], ...], "weights": number of those in shards, "adapter": number
of the others that are trained}. Products are in bfloat16.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch.utils._python_dispatch import TorchDispatchMode

from common import device, distributed
from common.trainer import Trainer

steps: list = []


class Received(TorchDispatchMode):
    """Counts what each collective operation brings to this process where it goes round a ring."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        whole = {
            "c10d._allgather_base_.default": lambda: [args[0]],
            "c10d._reduce_scatter_base_.default": lambda: [args[1]],
            "c10d.allreduce_.default": lambda: [*args[0], *args[0]],
        }.get(str(operation), list)()
        others = distributed.world_size() - 1
        steps[-1][0] += sum(tensor.nbytes * others // distributed.world_size() for tensor in whole)
        return operation(*args, **(kwargs or {}))


def backward(self, rows, real=Trainer.backward):
    steps.append([0, len(self.batches.micro_batches(rows))])
    with Received():
        loss = real(self, rows)
    trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
    sizes = {
        "weights": sum(p.numel() for p in self.model.parameters() if hasattr(p, "full_tensor")),
        "adapter": sum(p.numel() for p in trained if not hasattr(p, "full_tensor")),
    }
    if distributed.is_main_process():
        Path("received.json").write_text(json.dumps({"steps": steps, **sizes}))
    return loss


if __name__ == "__main__":
    device._cpu_has_bf16 = lambda: True
    Trainer.backward = backward
    sys.argv = sys.argv[1:]
    runpy.run_path(str(ROOT / sys.argv[0]))["main"]()
