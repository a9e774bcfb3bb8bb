"""What older versions of Python, torch and transformers lack, and whether an optional package is installed.

The scripts run with Python 3.8, torch 1.13 and transformers 4.40, and with everything newer.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Dict

from common.support.exit import UserError, install_command


def require_package(package: str, least: tuple, what: str) -> None:
    """UserError unless `package` is installed in version `least` or newer, and can be imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import, and at peft's, it advertises a package
    problem = ""
    try:
        installed = version(package)
        if tuple(map(int, installed.split(".")[:2])) < least:
            problem = f"{installed} is installed"
        else:
            import_module(package)
    except PackageNotFoundError:
        problem = "it is not installed"
    except Exception as error:  # a package that was built for another torch fails in ways of its own
        torch = sys.modules["torch"].__version__
        problem = f"{installed} does not work with torch {torch} ({type(error).__name__})"
    if problem:
        number = ".".join(map(str, least))
        raise UserError(f"{what} needs {package} {number} or newer, and {problem}: {install_command(package)}")


def load_chat_template_file(tokenizer) -> None:
    """Give the tokenizer the chat template in a file of its own, which transformers before 4.50 does not read."""
    file = Path(tokenizer.name_or_path) / "chat_template.jinja"
    if not tokenizer.chat_template and file.is_file():
        tokenizer.chat_template = file.read_text(encoding="utf-8")


def gradient_scaler(device_type: str, enabled: bool):
    """A GradScaler, which torch before 2.3 has for CUDA alone."""
    import torch

    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def has_fused_attention() -> bool:
    """Whether attention keeps no tensor of tokens x tokens: on a CPU since torch 2.2."""
    import torch

    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 2)


def meta_device():
    """A context in which modules are built without memory for their weights; torch before 2.0 needs accelerate."""
    import torch

    device = torch.device("meta")
    if hasattr(device, "__enter__"):
        return device
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=True)  # tables of positions can be larger than weights


def use_deterministic_algorithms() -> None:
    """Make torch choose algorithms that repeat their results. torch before 2.2 has none for attention's backward pass:
    there this warns."""
    import torch

    strict = hasattr(torch.utils, "deterministic")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    if strict:
        torch.utils.deterministic.fill_uninitialized_memory = False  # it helps to find bugs, and costs time


def cpu_supports(instructions: str) -> bool:
    """Whether this CPU has "avx512_bf16" or "amx_tile". torch before 2.4 does not know, and this returns False."""
    import torch

    return getattr(getattr(torch, "cpu", None), f"_is_{instructions}_supported", lambda: False)()


def add_switch(group, name: str, default: bool, help: str) -> None:
    """Options `--name` and `--no-name`. (argparse.BooleanOptionalAction came with Python 3.9.)"""
    dest = name.replace("-", "_")
    group.add_argument(f"--{name}", action="store_true", default=default, help=f"{help}; --no-{name} turns it off")
    group.add_argument(f"--no-{name}", dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)


def load_mapped(path: Path) -> Dict:
    """torch.load of tensors that stay in the file until they are used, where torch and the file's format allow it."""
    import torch

    try:
        return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    except (TypeError, RuntimeError):  # torch before 2.1, or a file in the format of torch before 1.6
        return torch.load(path, map_location="cpu", weights_only=True)


def distributed_checkpoint():
    """torch.distributed.checkpoint where it works without a process group, since torch 2.2; else None."""
    try:
        import torch.distributed.checkpoint as dcp
    except ImportError:
        return None
    warnings.filterwarnings("ignore", "torch.distributed is .*unavailable or uninitialized", UserWarning)
    return dcp if hasattr(dcp, "save") else None
