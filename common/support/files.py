"""Places to write, and files and directories that are written whole or not at all."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Iterator, Sequence

from common.support.exit import UserError


def nearest_existing(path) -> Path:
    """`path` itself where it exists, else the nearest directory above it that does: where it would be made."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def require_writable(directory, option: str) -> None:
    """UserError, which names `option`, where `directory` can't be made, or nothing may be written in it."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, so nothing can be saved in {directory}. Give another {option}.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"Nothing may be written in {existing}. Give another {option}.")


def require_disk_space(needed: int, directory, what: str) -> None:
    """UserError where the disk of `directory` has no room for `needed` bytes."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB in {directory}, and that disk has {free / 1e9:.1f} GB free. "
            "Free some space, or give another --save-dir."
        )


@contextmanager
def atomic_write(path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the path at which to write the file, or the directory, that is to be at `path`.

    When the block ends it is on the disk and takes its place in one step; when it ends by an error (Ctrl-C is one)
    nothing has changed. In a directory that is there already, other files stay, except those that match a pattern of
    `stale`. Scratch files may lie beside the yielded path; they are removed.
    """
    path = Path(os.path.realpath(path))
    beside = nearest_existing(path.parent)
    place = beside if os.access(beside, os.W_OK) else path
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{path.name}.") as scratch:
        new = Path(scratch) / path.name
        yield new
        for file in (new, *new.rglob("*")):
            flush(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            _replace_directory(new, path, stale)
        else:
            os.replace(new, path)
        flush(path.parent)


def remove_scratch(directory: Path) -> None:
    """Remove what a process that was killed in `atomic_write` has left beside and in a directory of ours."""
    directory = Path(os.path.realpath(directory))
    names = {directory.parent: re.escape(directory.name), directory: r"checkpoint-\d+|training_loss\.png|new"}
    names[directory] += f"|{names[directory.parent]}"
    for place, name in names.items():
        for path in place.glob(".*"):
            if re.fullmatch(rf"\.({name})\.[a-z0-9_]{{8}}", path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def weights_fingerprint(model_dir: str) -> str:
    """A hash of a little from everywhere in a model's weight files; 16 hex digits, of a hub id none at all."""
    digest = hashlib.sha256()
    files = sorted(Path(model_dir).glob("*.safetensors")) or sorted(Path(model_dir).glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1024)):
                file.seek(place)
                digest.update(file.read(64))
    return digest.hexdigest()[:16] if files else ""


def flush(path: Path) -> None:
    """Wait until the file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _replace_directory(new: Path, path: Path, stale: Sequence[str]) -> None:
    names = sorted(file.name for file in new.iterdir())

    def is_stale(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in stale)

    try:
        shutil.copymode(path, new)
        for old in path.iterdir():  # what stays goes along, as a second name of the same file
            if old.name not in names and old != new.parent and not is_stale(old.name):
                _link(old, new / old.name)
        _exchange(new, path)
        return
    except (OSError, AttributeError, TypeError):  # a disk of its own, a file system or a system that can't
        pass
    # The next best: a directory without its config.json, which goes first and comes last, is no model, and no mixture.
    with tempfile.TemporaryDirectory(dir=path, prefix=".new.") as inside:
        for name in names:
            shutil.move(str(new / name), inside)  # a copy where it is another disk
            flush(Path(inside) / name)
        for old in sorted(path.iterdir(), key=lambda file: not file.name.endswith("config.json")):
            comes_anew = old.name.endswith("config.json") and old.name in names
            if old.is_file() and (comes_anew or is_stale(old.name)):
                old.unlink()
        for name in sorted(names, key=lambda name: name.endswith("config.json")):
            os.replace(Path(inside) / name, path / name)
    for old in [old for old in path.iterdir() if old.is_dir() and is_stale(old.name)]:
        shutil.rmtree(old)


def _link(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=os.link)
    else:
        os.link(old, new, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories' names in one step: renameat2, on Linux (https://man7.org/linux/man-pages/man2/rename.2.html)."""
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


class Lock:
    """`directory` for this process alone, until it ends: a lock that the system takes from a process that is killed
    (https://man7.org/linux/man-pages/man2/flock.2.html). UserError, with who holds it, where another one does."""

    held: set = set()  # by this process

    def __init__(self, directory: Path):
        self.path, self.made, self.handle = directory / ".training.lock", not directory.exists(), None
        if os.path.realpath(self.path) in self.held:  # a second training in a notebook
            return
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{directory} is in use: {self._holder()}. Wait until that has ended, or give another --save-dir."
                ) from None
            except OSError:  # a file system that has no locks
                break
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                    break
            os.close(self.handle)  # its holder has removed it in the meantime
        self.held.add(os.path.realpath(self.path))
        os.ftruncate(self.handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.write(self.handle, json.dumps(holder).encode())
        atexit.register(self.release)

    def _holder(self) -> str:
        try:
            facts = json.loads(os.pread(self.handle, 1000, 0))
            return f"process {facts['process']} on {facts['host']} trains there since {facts['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # it has just begun
            return "another process trains there"

    def release(self) -> None:
        """Leave the directory to others, before the process ends."""
        if self.handle is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            if self.made:
                os.rmdir(self.path.parent)  # only where nothing has come into it
        os.close(self.handle)
        self.handle = self.held.discard(os.path.realpath(self.path))
