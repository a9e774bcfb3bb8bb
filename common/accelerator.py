"""What the machine is: the only file that asks. MoAI Platform, CUDA or ROCm (both are `cuda` to torch), or CPU."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from typing import Dict, NamedTuple

import torch

from common import missing_package, processes
from common.memory import forget_peak, memory_used, room_for, total_memory


class Accelerator(NamedTuple):
    """The device, its name, the type of its matrix products, and whether every step must have one shape."""

    device: torch.device
    name: str
    dtype: torch.dtype  # torch.float32: no mixed precision
    static_shapes: bool  # MoAI compiles a graph for each shape

    @property
    def micro_batch_tokens(self) -> int:
        """A CPU is as fast on small micro-batches; a GPU wants large ones to be busy."""
        return 1024 if self.device.type == "cpu" else 4096

    @property
    def packs(self) -> bool:
        """Whether rows go without padding, where the model takes them so: measured on a CPU alone."""
        return self.device.type == "cpu" and not self.static_shapes

    @property
    def platform(self) -> str:
        """ "MoAI", "CUDA", "ROCm" or "CPU"."""
        gpu = "ROCm" if torch.version.hip else "CUDA"
        return "MoAI" if self.static_shapes else "CPU" if self.device.type == "cpu" else gpu

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

    def random_states(self) -> Dict[str, torch.Tensor]:
        """The state of torch's generator, and of the device's: what dropout draws next. uint8 tensors."""
        states = {"cpu": torch.get_rng_state()}
        return {**states, "cuda": torch.cuda.get_rng_state()} if self.device.type == "cuda" else states

    def set_random_states(self, states: Dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a clock read after this tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Give back what a step that failed still holds in circles, and what torch keeps in pieces that fit nothing."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> str:
        """What the device's memory holds of this process, now and at most so far, and what share of it that is."""
        used, peak = memory_used(self.device, self.static_shapes)
        if not peak:
            return "Memory: see moreh-smi" if self.static_shapes else f"Memory: not known, {missing_package('psutil')}"
        total = total_memory(self.device)
        share = f"{peak / total:.0%} of {total / 1e9:.1f} GB"
        of = f", the largest of {processes.count()} processes" if processes.count() > 1 else ""
        return f"Memory: {used / 1e9:.2f} GB in use, {peak / 1e9:.2f} GB at its peak, which is {share}{of}"

    def room_for_training(self, model: torch.nn.Module):
        """Inside, a full memory ends in one line; it knows what the training of `model` takes before any activation."""
        forget_peak(self.device)
        # a trained weight has a gradient like itself and AdamW's two states, float32; of several processes each a slice
        own = [(w.to_local() if hasattr(w, "to_local") else w, w.requires_grad) for w in model.parameters()]
        fixed = sum(w.numel() * (2 * w.element_size() + 8 if trained else w.element_size()) for w, trained in own)
        return room_for("weights, gradients and AdamW's states", fixed, self.device)


def start_accelerator(seed: int, deterministic: bool = False) -> Accelerator:
    """Find the device and seed torch; `deterministic`: one seed, one result, to the last bit on a machine.

    To be called before the model is built: on MoAI Platform it turns automatic parallelization on, and of several
    processes each joins the others.
    """
    moai = _moai()
    processes.start(moai is not None)
    if moai is not None:
        moai.option.enable_advanced_parallelization()
    # On a CPU oneDNN keeps a program for each shape of a product that it has seen, up to 1024 of them: over a training
    # with rows of all lengths that is more than the model (https://uxlfoundation.github.io/oneDNN, primitive cache)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    torch.manual_seed(seed)
    if deterministic and moai is None:
        # cuBLAS gives the same sums in the same order only with this, set before its first call
        # (https://docs.pytorch.org/docs/stable/notes/randomness.html)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch 2.2 has a repeatable backward pass of attention, and takes it only without warn_only
        strict = hasattr(torch.utils, "deterministic")
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        if strict:
            torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs that costs time
    several = processes.count() > 1
    if torch.cuda.is_available():
        # T4 and older report bfloat16 as supported, because CUDA emulates it, slowly; compute capability 8 has it
        bf16 = moai is not None or torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
        name = torch.cuda.get_device_name()
        device = torch.device("cuda", processes.number_on_machine()) if several else torch.device("cuda")
        accelerator = Accelerator(device, name, torch.bfloat16 if bf16 else torch.float16, moai is not None)
    else:
        dtype = torch.bfloat16 if _cpu_has_bf16() else torch.float32
        name = f"CPU, {torch.get_num_threads()} threads"
        accelerator = Accelerator(torch.device("cpu"), name, dtype, moai is not None)
    if several:
        accelerator = accelerator._replace(name=f"{processes.count()} processes, each on {name}")
    print(f"Device: {accelerator.name}, {str(accelerator.dtype).replace('torch.', '')}")
    return accelerator


def _moai():
    """`torch.moreh`, which comes with the platform's own build of torch, or None."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.moreh")
    return getattr(torch, "moreh", None)


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX), which is faster than float32 where it does.

    torch tells since 2.4, by names that start with an underscore; an older torch trains in float32 here.
    """
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(getattr(torch, "cpu", None), name, lambda: False)():
            return True
    return False
