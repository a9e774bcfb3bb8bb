"""Files and directories that are written completely or not at all, and the lock of a directory."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Iterator, Sequence

from common.support.exit import UserError

CONFIGS = ("config.json", "adapter_config.json")  # no library loads a directory that has neither


def nearest_existing(path) -> Path:
    """`path` itself where it exists, else the nearest directory above it that does."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def require_writable(directory, option: str) -> None:
    """UserError, which names `option`, where `directory` cannot be made or written."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, so nothing can be saved in {directory}. Choose another {option}.")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not writable. Choose another {option}.")


def require_disk_space(needed: int, directory, what: str) -> None:
    """UserError where the disk of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(nearest_existing(directory)).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB in {directory}, and that disk has {free / 1e9:.1f} GB free. "
            "Free disk space or choose another --save-dir."
        )


@contextmanager
def atomic_write(path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary path at which to write what shall become the file or the directory `path`.

    When the block ends, the new files are on the disk and take their place; when it ends with an error (Ctrl-C is one),
    nothing has changed. Scratch files may be written next to the yielded path. They are removed.

    In a directory that exists, files of the same names are replaced, and those that match a pattern of `stale` are
    removed; all others stay. Its config.json goes first and comes last, so that a process that is killed in between
    leaves no mixture of two models that loads. `stale` checkpoints go after that, so that the run can be resumed.
    """
    path = Path(os.path.realpath(path))
    parent = path if path.is_dir() else nearest_existing(path.parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}.") as scratch:
        new = Path(scratch) / path.name
        yield new
        for file in (new, *new.rglob("*")):
            fsync(file)
        if path.is_dir():
            _move_files(new, path, stale)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, path)
            fsync(path.parent)


@contextmanager
def atomic_directory(path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """The same for a directory: yield a temporary directory, which is empty."""
    with atomic_write(path, stale) as new:
        new.mkdir()
        yield new


def _move_files(new: Path, path: Path, stale: Sequence[str]) -> None:
    """Replace files of the directory `path` by those of `new`, which lies in a scratch directory."""
    names = os.listdir(new)
    old = [name for name in os.listdir(path) if name in names or any(fnmatch(name, pattern) for pattern in stale)]
    old_checkpoints = [name for name in old if name.startswith("checkpoint-")]
    # A rename is one step, a removal of a directory is not: it happens in the scratch directory.
    removed = new.parent / "removed"
    removed.mkdir()

    def move(names, source, target):
        for name in names:
            os.replace(source / name, target / name)
        fsync(path)

    move([name for name in old if name in CONFIGS], path, removed)
    move([name for name in old if name not in CONFIGS and name not in old_checkpoints], path, removed)
    move([name for name in names if name not in CONFIGS], new, path)
    move([name for name in names if name in CONFIGS], new, path)
    move(old_checkpoints, path, removed)


def remove_scratch(directory: Path) -> None:
    """Remove what processes that were killed in `atomic_write` have left in and next to a save directory."""
    directory = Path(os.path.realpath(directory))
    name = re.escape(directory.name)
    for place, names in ((directory.parent, name), (directory, rf"{name}|checkpoint-\d+|training_loss\.png")):
        for path in place.glob(".*"):
            if re.fullmatch(rf"\.({names})\.[a-z0-9_]{{8}}", path.name) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    is_directory = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not is_directory:  # Windows, and some network file systems, cannot do it with a directory
            raise


def weights_fingerprint(model_dir: str) -> str:
    """A hash of samples from everywhere in a model's weight files: 16 hex digits; "" of a hub id."""
    digest = hashlib.sha256()
    files = sorted(Path(model_dir).glob("*.safetensors")) or sorted(Path(model_dir).glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1024)):
                file.seek(place)
                digest.update(file.read(64))
    return digest.hexdigest()[:16] if files else ""


class Lock:
    """The lock of a save directory, or with `name` of a file in it, which one process holds until it ends, even if it
    is killed.

    UserError, with the process that holds it, where another one does. On a file system without locks nothing is
    locked. A second training of the same process, as in a notebook, may use the same directory.
    """

    def __init__(self, directory: Path, name: str = "", work: str = "training", option: str = "--save-dir"):
        import filelock  # not at the top: it takes a moment, and --help needs none

        self.directory = directory
        self.made_directory = not directory.exists()
        hidden = f".{name or 'training'}"
        self.holder = directory / f"{hidden}.holder"  # on Windows nobody can read a file that is locked
        self.lock = filelock.FileLock(directory / f"{hidden}.lock")
        directory.mkdir(parents=True, exist_ok=True)
        process = f"process {os.getpid()} on {socket.gethostname()},"
        try:
            self.lock.acquire(timeout=1)
        except filelock.Timeout:
            holder = self.holder.read_text("utf-8") if self.holder.is_file() else ""
            if holder and not holder.startswith(process):
                wait = f"Wait until it has ended or choose another {option}."
                raise UserError(f"{directory / name} is locked by {holder}. {wait}") from None
        except (OSError, NotImplementedError):  # a file system without locks
            return
        if isinstance(self.lock, filelock.SoftFileLock):
            self.lock.release()  # filelock's replacement on such a file system would outlive a process that is killed
        if self.lock.is_locked:
            atexit.register(self.release)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            self.holder.write_text(f"{process} which has been {work} there since {since}", encoding="utf-8")

    def release(self) -> None:
        """Release the lock, and remove its files; its directory too, where nothing else has come into it."""
        if not self.lock.is_locked:
            return
        for file in (self.holder, Path(self.lock.lock_file)):
            with suppress(OSError):  # Windows removes no file that is open: filelock does it there
                file.unlink()
        self.lock.release()
        if self.made_directory:
            with suppress(OSError):
                self.directory.rmdir()
