"""The device of this machine: MoAI Platform, CUDA or ROCm (torch calls both "cuda"), or a CPU. No other file asks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import sys
from pathlib import Path
from typing import Dict, Iterable, Iterator, NamedTuple, Tuple

import psutil
import torch

from common import distributed
from common.support import compat
from common.support.exit import UserError, is_out_of_memory

try:
    import resource
except ImportError:  # Windows
    resource = None


class Device(NamedTuple):
    """What a script runs on; `start_device` finds it."""

    torch_device: torch.device
    name: str
    dtype: torch.dtype  # of matrix products; torch.float32: no mixed precision
    static_shapes: bool  # MoAI Platform compiles a graph for each shape, so every step must have the same one

    @property
    def micro_batch_tokens(self) -> int:
        """The default of --micro-batch-tokens: a GPU needs large micro-batches to be busy, a CPU does not."""
        return 1024 if self.torch_device.type == "cpu" else 4096

    @property
    def packs(self) -> bool:
        """Whether rows are packed without padding, which was measured to be faster on a CPU."""
        return self.torch_device.type == "cpu" and not self.static_shapes

    def autocast(self):
        """A context in which matrix products are in `dtype`, while the weights stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.dtype)

    def gradient_scaler(self):
        """float16 gradients underflow unless the loss is scaled up (https://arxiv.org/abs/1710.03740)."""
        return compat.gradient_scaler(self.torch_device.type, enabled=self.dtype == torch.float16)

    def random_states(self) -> Dict[str, torch.Tensor]:
        """The states of the random number generators, which dropout draws from: uint8 tensors."""
        states = {"cpu": torch.get_rng_state()}
        if self.torch_device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_random_states(self, states: Dict[str, torch.Tensor]) -> None:
        """Set what `random_states` returned."""
        torch.set_rng_state(states["cpu"])
        if self.torch_device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])

    def synchronize(self) -> None:
        """Wait until the device has finished its work. Without this, a clock is read too early."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Free the tensors of a failed step, and the cached blocks that are too small for the next one."""
        gc.collect()
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()

    def memory_line(self) -> str:
        """What this process uses of the device's memory, for the terminal. All ranks must call it."""
        if self.static_shapes:
            return "Memory: see moreh-smi"
        used, peak = memory_used(self.torch_device)
        total = total_memory(self.torch_device)
        line = (
            f"Memory: {used / 1e9:.2f} GB used, peak {peak / 1e9:.2f} GB ({peak / total:.0%} of {total / 1e9:.1f} GB)"
        )
        if distributed.world_size() > 1:
            line += f", maximum over {distributed.world_size()} processes"
        return line


def start_device(seed: int, deterministic: bool = False) -> Device:
    """Find the device, join the other ranks and seed torch. Call it before the model is built: on MoAI Platform it
    turns automatic parallelization on.

    With `deterministic`, one seed gives one result on one machine, to the last bit.
    """
    moai = _find_moai()
    distributed.init(moai is not None)
    if moai is not None:
        moai.option.enable_advanced_parallelization()
    # On a CPU, oneDNN caches a program for each shape of a matrix product, 1024 by default. With rows of all lengths
    # they take more memory than the model (https://uxlfoundation.github.io/oneDNN, primitive cache).
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    torch.manual_seed(seed)
    if deterministic and moai is None:
        # cuBLAS adds in a fixed order only with this, set before its first call
        # (https://docs.pytorch.org/docs/stable/notes/randomness.html)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        compat.use_deterministic_algorithms()
    device = _find_device(moai is not None)
    print(f"Device: {device.name}, {str(device.dtype).replace('torch.', '')}")
    return device


def _find_moai():
    """`torch.moreh`, which is part of MoAI Platform's own build of torch, or None."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.moreh")
    return getattr(torch, "moreh", None)


def _find_device(moai: bool) -> Device:
    ranks = distributed.world_size()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        torch_device = torch.device("cuda", distributed.local_rank()) if ranks > 1 else torch.device("cuda")
        # CUDA emulates bfloat16 on a T4 and older GPUs, slowly. Compute capability 8 is the first that has it.
        has_bfloat16 = moai or bool(torch.version.hip) or torch.cuda.get_device_capability()[0] >= 8
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        torch_device = torch.device("cpu")
        dtype = torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if ranks > 1:
        name = f"{ranks} processes, each on {name}"
    return Device(torch_device, name, dtype, static_shapes=moai)


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX), which is faster than float32."""
    return compat.cpu_supports("avx512_bf16") or compat.cpu_supports("amx_tile")


# ------------------------------------------------------------------------------------------------ memory


def memory_used(device: torch.device) -> Tuple[int, int]:
    """Bytes of the device's memory that this process uses, and its peak; with several ranks, the maximum over them."""
    if device.type == "cuda":
        numbers = [torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()]
    else:
        used = psutil.Process().memory_info().rss
        numbers = [used, max(used, _peak_of_process())]
    used, peak = distributed.all_reduce_max(numbers)
    return int(used), int(peak)


def _peak_of_process() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):  # Linux has this one, which can be reset
                return 1024 * int(line.split()[1])
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak again, where the system can: reading a model's files is not part of the training."""
    gc.collect()
    if device.type == "cuda" and not hasattr(torch, "moreh"):
        torch.cuda.empty_cache()  # the peak is of reserved memory, of which loading has left some unused
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError, TypeError), open("/proc/self/clear_refs", "w") as file:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory
        file.write("5")  # https://docs.kernel.org/filesystems/proc.html


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of the main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def free_memory() -> int:
    """Bytes of main memory that are free; in a container, of those that it may use."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # another version of cgroups, or no limit
            cgroup = Path("/sys/fs/cgroup")
            free = min(free, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()))
    return free


@contextlib.contextmanager
def explain_out_of_memory(what: str, device: torch.device, options: Iterable[str] = ()) -> Iterator[None]:
    """Inside, an out-of-memory error is a UserError: what does not fit, and which `options` need less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"To save memory, use {', '.join(options)}." if options else "Use a larger device or a smaller model."
        if "create a primitive" in str(error):  # https://github.com/pytorch/pytorch/issues/89104
            advice += " If memory was free, oneDNN fails on this CPU: set ONEDNN_MAX_CPU_ISA=AVX2."
        raise UserError(
            f"Out of memory: {what} does not fit into the device's {total_memory(device) / 1e9:.1f} GB. {advice}"
        ) from None
