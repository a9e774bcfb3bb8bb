"""What older Pythons, torches and transformers lack, and whether an optional package is there.

The scripts run with Python 3.8, torch 1.13 and transformers 4.40, and with everything newer.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.support.exit import UserError, requirements_file_for


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
        raise UserError(
            f"{what} needs {package} {number} or newer, and {problem}: pip install -r {requirements_file_for(package)}"
        )


def load_chat_template_file(tokenizer) -> None:
    """Give the tokenizer the chat template in a file of its own, which transformers before 4.50 does not read."""
    file = Path(tokenizer.name_or_path) / "chat_template.jinja"
    if not tokenizer.chat_template and file.is_file():
        tokenizer.chat_template = file.read_text(encoding="utf-8")


def load_mapped(path: str):
    """What torch.load reads: plain objects alone, and tensors mapped where torch can do it (2.1 and newer), so that
    only the parts that are used are read."""
    import torch

    try:
        return torch.load(path, mmap=True, weights_only=True)
    except TypeError:
        return torch.load(path, weights_only=True)
