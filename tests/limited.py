"""Run a script whose files can grow to so many bytes only, or whose memory can grow by so many in its training.

    python tests/limited.py files 100000 tutorial/train_llama3.py --batch-size 8 ...
    python tests/limited.py memory 100000000 tutorial/train_llama3.py --batch-size 64 ...
    python tests/limited.py room 5000000 tutorial/train_llama3.py --batch-size 8 ...

The system refuses what is more, as a full disk or a full memory does: nothing is put in the place of anything
(https://man7.org/linux/man-pages/man2/setrlimit.2.html). But `room` is only what is told of the disk.
"""

from __future__ import annotations

import resource
import runpy
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def limit_memory(more: int) -> None:
    """While gradients are computed: to what there was at the first of them, and so much more. In float32, as most
    laptops train: to make a product of bfloat16, oneDNN takes memory that no smaller micro-batch saves."""
    from common import device
    from common.trainer import Trainer

    device._cpu_has_bf16 = lambda: False
    gradients, limits = Trainer.backward, []

    def limited(*args):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits.append(pages * resource.getpagesize() + more)
        resource.setrlimit(resource.RLIMIT_AS, (limits[0], resource.RLIM_INFINITY))
        try:
            return gradients(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Trainer.backward = limited


if __name__ == "__main__":
    _, what, count, *sys.argv = sys.argv
    sys.path.insert(0, str(ROOT))
    if what == "files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(count), int(count)))
    elif what == "room":
        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**12, 10**12 - int(count), int(count))
    else:
        limit_memory(int(count))
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
