"""A terminal, in which somebody types: scripts that ask for a line behave there as they do nowhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from tests.conftest import TIMEOUT

PROMPT = b"\n> "


def run(
    arguments: List[str], typed: Sequence[bytes], cwd: Path, env: Dict[str, str], size: Tuple[int, int] = (40, 100)
) -> Tuple[int, str]:
    """(exit status, what the terminal shows) of a command to which these are typed, each when it asks by PROMPT.

    size: lines, and letters in one. The status is -9 where it has not ended in time, or has ended before all was typed.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(arguments, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown, left, deadline = b"", list(typed), time.time() + TIMEOUT
    while time.time() < deadline:
        try:
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 4096)
        except OSError:  # it has ended
            break
        if left and shown.count(PROMPT) == len(typed) - len(left) + 1:
            os.write(master, left.pop(0))
    else:
        process.kill()
    os.close(master)
    status = process.wait()
    return -9 if left and not status else status, shown.decode("utf-8", "replace").replace("\r\n", "\n")
