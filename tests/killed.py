"""Run a script that is killed, or told to stop, at a place that the command names.

    python tests/killed.py SIGNAL PLACE COUNT tutorial/train_llama3.py --batch-size 8 ...

SIGNAL is a number (9: SIGKILL). PLACE is a function of ours, `module:name` or `module:class.name`, with `-` before or
`+` after it: the signal comes before or after its call of the number COUNT. Or it is `event:part`, an audit event of
Python (`open`, `os.rename`, `os.remove`, `shutil.rmtree`) that names a path with `part` in it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def kill_at_call(number: int, place: str, count: int) -> None:
    before, (module, name) = place[0] == "-", place[1:].split(":")
    holder = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    real, calls = getattr(holder, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == count:
            os.kill(os.getpid(), number)
        result = real(*args, **kwargs)
        if not before and calls[0] == count:
            os.kill(os.getpid(), number)
        return result

    setattr(holder, name, counted)


def kill_at_event(number: int, place: str, count: int) -> None:
    event, part = place.split(":", 1)
    seen = [0]

    def look(name, args):
        if name == event and any(part in str(arg) for arg in args):
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), number)

    sys.addaudithook(look)


if __name__ == "__main__":
    _, signal_number, place, count, *sys.argv = sys.argv
    sys.path.insert(0, str(ROOT))
    kill = kill_at_call if place[0] in "+-" else kill_at_event
    kill(int(signal_number), place, int(count))
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
