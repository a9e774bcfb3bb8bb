"""A model that lies in slices in several processes, written as plain safetensors: one tensor at a time is whole."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from safetensors import safe_open
from torch import nn

from common import distributed
from common.support.exit import UserError
from common.support.model_dir import ModelSource
from model.result import require
from model.stored import TYPES, Stored

FILE = 5 * 10**9  # bytes of a file at most, as transformers has it
NAMES = {**{dtype: name for name, dtype in TYPES.items()}, torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


class Weight(NamedTuple):
    """A weight, in slices or whole, and the type in which it is stored."""

    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * torch.empty((), dtype=self.dtype).element_size()

    def gathered(self) -> torch.Tensor:
        """All of it, on the CPU, in the first process; all have to ask."""
        whole = self.tensor.full_tensor() if hasattr(self.tensor, "full_tensor") else self.tensor
        return whole.detach().to("cpu", self.dtype).contiguous() if distributed.is_main_process() else whole


def write_gathered(model: nn.Module, directory: Path, stored: Optional[Stored]) -> None:
    """Write the configs and the weights, each in its type of the base's, as transformers' save_pretrained does: one
    file, or several with an index. To be called by all processes; the first one writes.

    OSError in the first process where it can't, and UserError where the files are not what is in the memory.
    """
    weights = _weights(model, stored)
    files = _files(weights)
    problems: List[Exception] = []

    def by_first(write: Callable) -> None:
        if distributed.is_main_process() and not problems:
            try:
                write()
            except (OSError, UserError) as error:  # the others gather on: it is told when all have come to the end
                problems.append(error)

    by_first(partial(_write_configs, model, directory, files, weights))
    for file, names in files.items():
        by_first(partial(_begin, directory / file, {name: weights[name] for name in names}))
        for name in names:
            whole = weights[name].gathered()
            by_first(partial(_append, directory / file, whole))
    by_first(partial(_check_headers, directory, weights))
    for name in sorted(weights)[::100]:
        whole = weights[name].gathered()
        by_first(partial(_check_values, directory, name, whole))
    if problems:
        raise problems[0]


def _weights(model: nn.Module, stored: Optional[Stored]) -> Dict[str, Weight]:
    """Tied weights under their first name, as they are stored."""
    of_all: Dict[int, List[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        of_all.setdefault(id(tensor), []).append(name)
    weights = {}
    for first, *others in of_all.values():
        tensor, dtype = tensors[first], tensors[first].dtype
        if stored and tensor.is_floating_point():
            known = [stored.types[name] for name in (first, *others) if name in stored.types]
            dtype = (known or [stored.most or dtype])[0]
        weights[first] = Weight(tensor, dtype)
    return weights


def _files(weights: Dict[str, Weight]) -> Dict[str, List[str]]:
    """{file: names of its weights}"""
    parts: List[List[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if parts[-1] and size + weight.bytes > FILE:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += weight.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}


def _write_configs(model: nn.Module, directory: Path, files: Dict[str, List[str]], weights: Dict[str, Weight]) -> None:
    directory.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    if len(files) > 1:
        total = {
            "total_parameters": sum(weight.tensor.numel() for weight in weights.values()),
            "total_size": sum(weight.bytes for weight in weights.values()),
        }
        index = {"metadata": total, "weight_map": {name: file for file, names in files.items() for name in names}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _begin(path: Path, weights: Dict[str, Weight]) -> None:
    """The header: its length in 8 bytes, and where each tensor will be
    (https://huggingface.co/docs/safetensors/index#format)."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (tensor, dtype) in weights.items():
        start, end = end, end + weights[name].bytes
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def _append(path: Path, whole: torch.Tensor) -> None:
    with path.open("ab") as file:
        file.write(memoryview(whole.flatten().view(torch.uint8).numpy()))


def _check_headers(directory: Path, weights: Dict[str, Weight]) -> None:
    saved = {name: (entry["dtype"], entry["shape"]) for name, entry in ModelSource(directory).tensors.items()}
    live = {name: (NAMES[weight.dtype], list(weight.tensor.shape)) for name, weight in weights.items()}
    differ = sorted(name for name in saved.keys() | live.keys() if saved.get(name) != live.get(name))
    require(not differ, f"{differ[:1]} is not as it should be")


def _check_values(directory: Path, name: str, whole: torch.Tensor) -> None:
    for file in ModelSource(directory).safetensors_files:
        with safe_open(str(file), "pt") as opened:
            if name in opened.keys():  # noqa: SIM118
                require(torch.equal(opened.get_tensor(name), whole), f"{name} has other values")
