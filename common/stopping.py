"""A training's way out: Ctrl-C and SIGTERM as requests, and a lock by which a directory belongs to one training."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from common import STOPPING, UserError, processes

heard: list = []  # signals by which this process was asked to stop


class Stopped(Exception):
    """Somebody has asked the training to stop."""


class StopRequest:
    """Inside, Ctrl-C and SIGTERM are requests, which `check` answers by Stopped where the training can be left.

    A second Ctrl-C ends at once. A second SIGTERM is nothing new: schedulers send it to the whole process group.
    """

    def __init__(self):
        self.number, self.at_once, self.before = 0, False, {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can they be set
            numbers = [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler) + STOPPING
            self.before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # it came after the last `check`
            os.kill(os.getpid(), self.number)

    def _hear(self, number, _) -> None:
        heard.append(number)
        if self.number and number == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt
        self.number = self.number or number

    def check(self) -> None:
        """Stopped where it has come: of several processes in all at once, where one of them has heard it."""
        self.number = int(processes.largest([self.number])[0])
        if self.number:
            heard.append(self.number)
            raise Stopped


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
