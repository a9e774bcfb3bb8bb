"""What the machine is: the only file that asks. MoAI Platform, CUDA or ROCm (both are `cuda` to torch), or CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import sys
from typing import Dict, List, NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from common import distributed
from common.support.exit import UserError, install_hint, is_out_of_memory


class Device(NamedTuple):
    """The device, its name, the type of its matrix products, and whether every step must have one shape."""

    torch_device: torch.device
    name: str
    dtype: torch.dtype  # torch.float32: no mixed precision
    static_shapes: bool  # MoAI compiles a graph for each shape

    @property
    def micro_batch_tokens(self) -> int:
        """A CPU is as fast on small micro-batches; a GPU wants large ones to be busy."""
        return 1024 if self.torch_device.type == "cpu" else 4096

    @property
    def packs(self) -> bool:
        """Whether rows go without padding, where the model takes them so: measured on a CPU alone."""
        return self.torch_device.type == "cpu" and not self.static_shapes

    @property
    def platform(self) -> str:
        """ "MoAI", "CUDA", "ROCm" or "CPU"."""
        gpu = "ROCm" if torch.version.hip else "CUDA"
        return "MoAI" if self.static_shapes else "CPU" if self.torch_device.type == "cpu" else gpu

    def autocast(self):
        """Matrix products in `dtype`, everything else and the weights themselves in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.dtype)

    def gradient_scaler(self):
        """float16 gradients underflow unless the loss is scaled up (https://arxiv.org/abs/1710.03740)."""
        enabled = self.dtype == torch.float16
        if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
            return torch.amp.GradScaler(self.torch_device.type, enabled=enabled)
        return torch.cuda.amp.GradScaler(enabled=enabled)

    def random_states(self) -> Dict[str, torch.Tensor]:
        """The state of torch's generator, and of the device's: what dropout draws next. uint8 tensors."""
        states = {"cpu": torch.get_rng_state()}
        return {**states, "cuda": torch.cuda.get_rng_state()} if self.torch_device.type == "cuda" else states

    def set_random_states(self, states: Dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.torch_device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"])

    def synchronize(self) -> None:
        """Wait until the device has finished, so that a clock read after this tells the truth."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Give back what a step that failed still holds in circles, and what torch keeps in pieces that fit nothing."""
        gc.collect()
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()

    def memory(self) -> str:
        """What the device's memory holds of this process, now and at most so far, and what share of it that is."""
        used, peak = memory_used(self.torch_device, self.static_shapes)
        if not peak:
            return "Memory: see moreh-smi" if self.static_shapes else f"Memory: not known, {install_hint('psutil')}"
        total = total_memory(self.torch_device)
        share = f"{peak / total:.0%} of {total / 1e9:.1f} GB"
        of = f", the largest of {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        return f"Memory: {used / 1e9:.2f} GB in use, {peak / 1e9:.2f} GB at its peak, which is {share}{of}"

    def room_for_training(self, model: torch.nn.Module, options):
        """Inside, a full memory ends in one line; it knows what the training of `model` takes before any activation."""
        forget_peak(self.torch_device)
        # a trained weight has a gradient like itself and AdamW's two states, float32; of several processes each a slice
        own = [(w.to_local() if hasattr(w, "to_local") else w, w.requires_grad) for w in model.parameters()]
        fixed = sum(w.numel() * (2 * w.element_size() + 8 if trained else w.element_size()) for w, trained in own)
        return room_for("weights, gradients and AdamW's states", fixed, self.torch_device, options)


def start_device(seed: int, deterministic: bool = False) -> Device:
    """Find the device and seed torch; `deterministic`: one seed, one result, to the last bit on a machine.

    To be called before the model is built: on MoAI Platform it turns automatic parallelization on, and of several
    processes each joins the others.
    """
    moai = _moai()
    distributed.init(moai is not None)
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
    several = distributed.world_size() > 1
    if torch.cuda.is_available():
        # T4 and older report bfloat16 as supported, because CUDA emulates it, slowly; compute capability 8 has it
        bf16 = moai is not None or torch.version.hip is not None or torch.cuda.get_device_capability()[0] >= 8
        name = torch.cuda.get_device_name()
        device = torch.device("cuda", distributed.local_rank()) if several else torch.device("cuda")
        device = Device(device, name, torch.bfloat16 if bf16 else torch.float16, moai is not None)
    else:
        dtype = torch.bfloat16 if _cpu_has_bf16() else torch.float32
        name = f"CPU, {torch.get_num_threads()} threads"
        device = Device(torch.device("cpu"), name, dtype, moai is not None)
    if several:
        device = device._replace(name=f"{distributed.world_size()} processes, each on {name}")
    print(f"Device: {device.name}, {str(device.dtype).replace('torch.', '')}")
    return device


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


def memory_used(device: torch.device, static_shapes: bool = False) -> List[int]:
    """Bytes of the device's memory that a process holds, now and at most so far, of several the largest; 0 and 0 where
    nothing tells."""
    if static_shapes:
        return [0, 0]
    if device.type == "cuda":
        return distributed.all_reduce_max([torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()])
    try:
        import psutil
    except ImportError:
        return [0, 0]
    used, most = psutil.Process().memory_info().rss, 0
    with contextlib.suppress(OSError), open("/proc/self/status") as status:  # Linux has one that can be reset
        most = 1024 * sum(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    if not most and resource:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return distributed.all_reduce_max([used, max(used, most)])


def forget_peak(device: torch.device) -> None:
    """From here on the peak is that of the training, and not what reading a model's files took."""
    gc.collect()
    if device.type == "cuda" and not hasattr(torch, "moreh"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError, TypeError), open("/proc/self/clear_refs", "w") as marks:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
        marks.write("5")  # https://docs.kernel.org/filesystems/proc.html


@contextlib.contextmanager
def room_for(what: str, needed: int, device: torch.device, options=()):
    """Inside, a full memory ends in one line: that `what` takes `needed` bytes, what there is, which options help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        total = total_memory(device)
        # smaller pieces of the data would not help where even these don't fit
        of_weights = ("--use-lora", "--load-in-4bit")
        options = [option for option in options if needed <= total or option in of_weights]
        helps = f"What takes less: {', '.join(options)}." if options else "Take a larger device, or a smaller model."
        raise UserError(
            f"the memory is full: {what} take {needed / 1e9:.1f} GB, the device has {total / 1e9:.1f} GB. {helps}"
        ) from None


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory, or of the main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil

    return psutil.virtual_memory().total


def devices(device) -> List[dict]:
    """Of each device its name, bytes of memory that all programs use, and in total, utilization in percent; None where
    nothing tells."""

    def device(name, used, total, utilization):
        return {"name": name, "memory_used": used, "memory_total": total, "utilization": utilization}

    if device.torch_device.type == "cpu":
        try:
            import psutil
        except ImportError:  # before the first pip install
            return [device(device.name, None, total_memory(device.torch_device), None)]
        memory = psutil.virtual_memory()
        return [device(device.name, memory.total - memory.available, memory.total, psutil.cpu_percent(0.3))]

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
