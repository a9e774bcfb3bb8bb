"""The device's memory: how large it is, what a training holds of it, and what is said where it is full."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from typing import List

import torch

from common import UserError, is_out_of_memory, less_memory, processes


def memory_used(device: torch.device, static_shapes: bool = False) -> List[int]:
    """Bytes of the device's memory that a process holds, now and at most so far, of several the largest; 0 and 0 where
    nothing tells."""
    if static_shapes:
        return [0, 0]
    if device.type == "cuda":
        return processes.largest([torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()])
    try:
        import psutil
    except ImportError:
        return [0, 0]
    used, most = psutil.Process().memory_info().rss, 0
    with contextlib.suppress(OSError), open("/proc/self/status") as status:  # Linux has one that can be reset
        most = 1024 * sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return processes.largest([used, max(used, most or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)])


def forget_peak(device: torch.device) -> None:
    """From here on the peak is that of the training, and not what reading a model's files took."""
    gc.collect()
    if device.type == "cuda" and not hasattr(torch, "moreh"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/clear_refs", "w") as marks:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
        marks.write("5")  # https://docs.kernel.org/filesystems/proc.html


@contextlib.contextmanager
def room_for(what: str, needed: int, device: torch.device):
    """Inside, a full memory ends in one line: that `what` takes `needed` bytes, what there is, which options help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        total = total_memory(device)
        # smaller pieces of the data would not help where even these don't fit
        of_weights = ("--use-lora", "--load-in-4bit")
        options = [option for option in less_memory if needed <= total or option in of_weights]
        helps = f"What takes less: {', '.join(options)}." if options else "Take a larger device, or a smaller model."
        raise UserError(
            f"the memory is full: {what} take {needed / 1e9:.1f} GB, the device has {total / 1e9:.1f} GB. {helps}"
        ) from None


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory, or of the main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def devices(accelerator) -> List[dict]:
    """Of each device its name, bytes of memory that all programs use, and in total, utilization in percent; None where
    nothing tells."""

    def device(name, used, total, utilization):
        return {"name": name, "memory_used": used, "memory_total": total, "utilization": utilization}

    if accelerator.device.type == "cpu":
        try:
            import psutil
        except ImportError:  # before the first pip install
            return [device(accelerator.name, None, total_memory(accelerator.device), None)]
        memory = psutil.virtual_memory()
        return [device(accelerator.name, memory.total - memory.available, memory.total, psutil.cpu_percent(0.3))]

    def ask(question, index):  # drivers, and torch where a driver's Python package lacks, each fail in their own way
        try:
            return question(index)
        except Exception:
            return None

    found = []
    for index in range(torch.cuda.device_count()):
        name, utilization = torch.cuda.get_device_name(index), ask(torch.cuda.utilization, index)
        properties = ask(torch.cuda.get_device_properties, index)
        free, total = ask(torch.cuda.mem_get_info, index) or (None, getattr(properties, "total_memory", None))
        found.append(device(name, None if free is None else total - free, total, utilization))
    return found
