"""What the machine is: the only file that asks. MoAI Platform, CUDA or ROCm (both are `cuda` to torch), or CPU."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import NamedTuple

import torch


class Accelerator(NamedTuple):
    """The device, its name, the type of its matrix products, and whether every step must have one shape."""

    device: torch.device
    name: str
    dtype: torch.dtype  # torch.float32: no mixed precision
    static_shapes: bool  # MoAI compiles a graph for each shape

    @property
    def micro_batch_tokens(self) -> int:
        """A CPU is as fast on small micro-batches, which have less padding; a GPU wants large ones to be busy."""
        return 1024 if self.device.type == "cpu" else 4096

    def autocast(self):
        """Matrix products in `dtype`, everything else and the weights themselves in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def gradient_scaler(self):
        """float16 gradients underflow unless the loss is scaled up (https://arxiv.org/abs/1710.03740)."""
        enabled = self.dtype == torch.float16
        if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self.device.type, enabled=enabled)
        return torch.cuda.amp.GradScaler(enabled=enabled)

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a clock read after this tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> str:
        """What the device's memory holds of this process, now and at most so far, and what share of it that is."""
        if self.static_shapes:
            return "Memory: see moreh-smi"
        if self.device.type == "cuda":
            used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()
            total = torch.cuda.get_device_properties(self.device).total_memory
        else:
            import psutil

            used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
            peak = max(used, _peak_of_process())
        share = f"{peak / total:.0%} of {total / 1e9:.1f} GB"
        return f"Memory: {used / 1e9:.2f} GB in use, {peak / 1e9:.2f} GB at its peak, which is {share}"


def _peak_of_process() -> int:
    """Bytes that this process had in memory at most; 0 where the system doesn't tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start_accelerator(seed: int, repeatable: bool = False) -> Accelerator:
    """Find the device and seed torch; `repeatable`: the same seed gives the same losses to the last bit on one machine.

    To be called before the model is built: on MoAI Platform it turns automatic parallelization on.
    """
    moai = _moai()
    if moai is not None:
        moai.option.enable_advanced_parallelization()
    # cuBLAS gives the same sums in the same order only with this, set before its first call
    # (https://docs.pytorch.org/docs/stable/notes/randomness.html)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # On a CPU oneDNN keeps a program for each shape of a product that it has seen, up to 1024 of them: over a training
    # with rows of all lengths that is more than the model (https://uxlfoundation.github.io/oneDNN, primitive cache)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        if moai is None and repeatable:
            # torch 2.2 has a repeatable backward pass of attention, and takes it only without warn_only
            strict = hasattr(torch.utils, "deterministic")
            torch.use_deterministic_algorithms(True, warn_only=not strict)
            if strict:
                torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs that costs time
        # T4 and older report bfloat16 as supported, because CUDA emulates it, slowly; compute capability 8 has it
        bf16 = moai is not None or torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
        name, device = torch.cuda.get_device_name(), torch.device("cuda")
        accelerator = Accelerator(device, name, torch.bfloat16 if bf16 else torch.float16, moai is not None)
    else:
        dtype = torch.bfloat16 if _cpu_has_bf16() else torch.float32
        name = f"CPU, {torch.get_num_threads()} threads"
        accelerator = Accelerator(torch.device("cpu"), name, dtype, moai is not None)
    print(f"Device: {accelerator.name}, {str(accelerator.dtype).replace('torch.', '')}")
    return accelerator


def _moai():
    """`torch.moreh`, which comes with the platform's own build of torch, or None."""
    if hasattr(torch, "moreh"):
        return torch.moreh
    try:
        return importlib.import_module("torch.moreh")
    except ImportError:
        return None


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX), which is faster than float32 where it does.

    torch tells since 2.4, by names that start with an underscore; an older torch trains in float32 here.
    """
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(getattr(torch, "cpu", None), name, lambda: False)():
            return True
    return False
