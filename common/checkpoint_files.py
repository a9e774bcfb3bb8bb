"""One checkpoint on the disk: the tensors of a training, and a JSON of ours that is written last.

    checkpoint-40/checkpoint.json   {"format": "finetuning-checkpoint", "version": 1, "sha256": "...", "files": {...}}
    checkpoint-40/...               the trained weights, the optimizer's state, the random states

The tensors are stored by torch.distributed.checkpoint, whose files another number of processes can read, before torch
2.2 by torch.save. Neither has a checksum, a flipped bit would load in silence: so the digest of each file stands in the
JSON, and is compared before anything is loaded. (The first one's metadata is a pickle, which could run code.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

from common import UserError, processes
from common.dataset_check import digest_of_meta
from common.files import written_whole

FORMAT, VERSION, FACTS, TENSORS = "finetuning-checkpoint", 1, "checkpoint.json", "tensors.pt"
PIECE = 2**24  # bytes that are hashed at once


def checkpoints_in(directory) -> List[Path]:
    """Those of this format in `directory`, the newest first: by the time of writing, for --restart begins at step 1.

    First of all stand those whose JSON can't be read. Other trainers give the same names to theirs, which are not ours.
    """

    def ours(path: Path) -> bool:
        return (path / FACTS).exists() or (path / TENSORS).exists() or any(path.glob("*.distcp"))

    found = [path for path in Path(directory).glob("checkpoint-*") if ours(path)]
    return sorted(found, key=lambda path: facts_of(path).get("time", math.inf), reverse=True)


def facts_of(checkpoint: Path) -> dict:
    """What stands in its JSON; {} where that is none of this format."""
    try:
        facts = json.loads((checkpoint / FACTS).read_bytes())
        return facts if facts["format"] == FORMAT and isinstance(facts["time"], float) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damage_of(checkpoint: Path) -> str:
    """Why nothing can go on from it, for the reader; "" where it is whole, and of this user."""
    facts = facts_of(checkpoint)
    if not facts:
        return f"has no {FACTS} that can be read"
    if facts.get("version") != VERSION:
        return f"is of another version of the format ({facts.get('version')}; this is {VERSION})"
    with tempfile.TemporaryFile(dir=checkpoint.parent) as new:  # by way of a network the owner may be another name
        mine = {os.getuid(), os.fstat(new.fileno()).st_uid}
    if not {path.stat().st_uid for path in (checkpoint, *checkpoint.iterdir())} <= mine:
        return "belongs to another user, whose files could run code here"
    names = {path.name for path in checkpoint.iterdir()} - {FACTS}
    if facts.get("sha256") != digest_of_meta({**facts, "sha256": ""}) or names != set(facts["files"]):
        return "is damaged"
    if any(_digest(checkpoint / name) != digest for name, digest in facts["files"].items()):
        return "is damaged"
    if facts["stored_by"] != _stored_by():
        return f"was written by {facts['stored_by']}, and this torch has {_stored_by()}"
    return ""


def has_room(directory: Path, new: int, size: int, asked: bool) -> bool:
    """Whether the disk has room for so many `new` ones of `size` bytes; where it has not, the reader is told, or, where
    checkpoints were `asked` for, UserError."""
    free = processes.from_first(shutil.disk_usage(directory).free if processes.is_first() else 0)
    if new * size <= free:
        return True
    line = (
        f"The disk of {directory} has no room for {new} checkpoints of {size / 1e9:.1f} GB: "
        f"{(new * size - free) / 1e9:.1f} GB are missing."
    )
    if asked:
        raise UserError(f"{line} Free them, give another --save-dir, or leave out --save-steps and --keep-best.")
    print(f"{line} This run writes none, so what it does is lost where it is cut.", flush=True)
    return False


def write_checkpoint(checkpoint: Path, tensors: dict, facts: dict) -> None:
    """Write it whole, or not at all. tensors: a nested dict; facts: whatever JSON holds. UserError where another
    trainer's has the name."""
    with processes.by_first(lambda: _new_checkpoint(checkpoint)) as new:
        if dcp():
            with _without_warnings():
                dcp().save(tensors, checkpoint_id=str(new))
        else:
            import torch

            # the writer of zip files aborts the process where the disk is full, in torch 1.13
            torch.save(tensors, new / TENSORS, _use_new_zipfile_serialization=False)
        if processes.is_first():
            files = {path.name: _digest(path) for path in sorted(new.iterdir())}
            how = {"format": FORMAT, "version": VERSION, "stored_by": _stored_by()}
            facts = {**how, **facts, "files": files, "sha256": ""}
            facts["sha256"] = digest_of_meta(facts)
            (new / FACTS).write_text(json.dumps(facts), encoding="utf-8")


@contextmanager
def _new_checkpoint(checkpoint: Path) -> Iterator[Path]:
    if checkpoint.exists() and checkpoint not in checkpoints_in(checkpoint.parent):
        raise UserError("it is there, and is another trainer's")
    with written_whole(checkpoint, stale=("*",)) as new:
        new.mkdir()
        yield new


def read_tensors(checkpoint: Path, tensors: dict) -> dict:
    """The tensors of a checkpoint that is whole: torch.distributed.checkpoint reads into those of `tensors`."""
    if not dcp():
        import torch

        return torch.load(checkpoint / TENSORS, map_location="cpu", weights_only=True)
    with _without_warnings():
        dcp().load(tensors, checkpoint_id=str(checkpoint))
    return tensors


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove it; one that is half removed does not have the name of one."""
    if not processes.is_first():
        return
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}.") as scratch:
        os.replace(checkpoint, Path(scratch) / checkpoint.name)


def dcp():
    """torch.distributed.checkpoint, where it works without a process group: in torch 2.2 and newer; else None."""
    try:
        import torch.distributed.checkpoint as found
    except ImportError:  # before torch 2.0, and where torch was built without it
        return None
    return found if hasattr(found, "save") else None


def _stored_by() -> str:
    return "torch.distributed.checkpoint" if dcp() else "torch.save"


@contextmanager
def _without_warnings():
    """It warns that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _digest(path: Path) -> str:
    """SHA-256 of the digests of a file's pieces, which are hashed side by side."""

    def digest_of_piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(PIECE)).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return hashlib.sha256(b"".join(threads.map(digest_of_piece, range(0, path.stat().st_size, PIECE)))).hexdigest()
