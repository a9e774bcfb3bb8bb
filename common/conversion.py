"""Weights in the older form, pytorch_model*.bin, as safetensors: of these several processes can each read a part.

A .bin file is a pickle that can only be read whole. One after the other is turned into a .safetensors file and removed,
so that the disk needs room for one more at most. What is made says of which file it was made, for a download that was
cut goes on: a file that is already converted is not missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common import UserError
from common.files import require_room, written_whole
from common.model_directory import header_of

INDEX = "model.safetensors.index.json"


def name_of_converted(name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors"""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def is_converted(path: Path, size: int) -> bool:
    """Whether the safetensors file that was made of the .bin file `path` of `size` bytes is there, and whole."""
    facts = header_of(path.with_name(name_of_converted(path.name)), {}).get("__metadata__", {})
    return path.suffix == ".bin" and (facts.get("made_of"), facts.get("bytes")) == (path.name, str(size))


def to_safetensors(model_dir: str) -> None:
    """Turn the pytorch_model*.bin files of a directory into safetensors, with an index where they are several.

    Interrupted, it goes on with the file that it was at. UserError where one can't be read, or the disk has no room.
    """
    directory = Path(model_dir)
    for scratch in directory.glob(".model*.safetensors*.????????"):  # of a process that was killed
        shutil.rmtree(scratch, ignore_errors=True)
    for path in sorted(directory.glob("pytorch_model*.bin")):
        _convert(path)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if not shards or (directory / INDEX).is_file():
        return
    headers = {shard.name: header_of(shard, {}) for shard in shards}
    places = {name: shard for shard, header in headers.items() for name in header if name != "__metadata__"}
    size = sum(
        headers[shard][name]["data_offsets"][1] - headers[shard][name]["data_offsets"][0]
        for name, shard in places.items()
    )
    with written_whole(directory / INDEX) as new:
        new.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2), encoding="utf-8")


def _convert(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    size, target = path.stat().st_size, path.with_name(name_of_converted(path.name))
    if not is_converted(path, size):
        require_room(size, path.parent, target.name)
        print(f"Converting {path.name} to {target.name}...", flush=True)
        try:
            try:  # mapped, where torch can: the file is never in memory as a whole
                weights = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
            except (TypeError, RuntimeError):  # torch before 2.1, or a file in torch's form before 1.6
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file fails in many ways, of many types
            raise UserError(f"{path} can't be read: delete it and run the same command again") from None
        places = set()
        for name, weight in weights.items():  # safetensors takes no two names of one tensor
            shared = weight.data_ptr() in places
            places.add(weight.data_ptr())
            weights[name] = weight.clone() if shared else weight.contiguous()
        with written_whole(target) as new:
            save_file(weights, new, metadata={"format": "pt", "made_of": path.name, "bytes": str(size)})
            new.chmod(path.stat().st_mode)  # safetensors lets nobody else read its files
    path.unlink()
