"""Run a script that is killed, or told to stop, at places that the command names.

    python tests/killed.py SIGNAL PLACE COUNT [SIGNAL PLACE COUNT ...] tutorial/train_llama3.py --batch-size 8 ...

SIGNAL is a number (9: SIGKILL). PLACE is a function, `module:name` or `module:class.name`, with `-` before or `+` after
it: the signal comes before or after its call of the number COUNT. Or it is `event:part`, an audit event of Python
(`open`, `os.rename`, `os.remove`, `shutil.rmtree`) that names a path with `part` in it. A COUNT of 5.2 is the second
one after the fifth step of this process has begun, and before the sixth.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
steps = [0]  # that have begun in this process


class Counter:
    """Sends the signal when it has been called so often."""

    def __init__(self, number: int, count: str):
        step, _, times = count.rpartition(".")
        self.number, self.step, self.times, self.seen = number, int(step or -1), int(times), 0

    def __call__(self) -> None:
        self.seen += self.step in (-1, steps[0])
        if self.seen == self.times:
            self.seen += 1  # once
            os.kill(os.getpid(), self.number)


def wrap(place: str, before, after) -> None:
    """Call `before` and `after` with each call of the function `module:name`."""
    module, name = place.split(":")
    holder = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        holder = getattr(holder, part)
    real = getattr(holder, name)

    def counted(*args, **kwargs):
        before()
        result = real(*args, **kwargs)
        after()
        return result

    setattr(holder, name, counted)


def nothing() -> None:
    pass


def kill_at(place: str, counter: Counter) -> None:
    if place[0] == "-":
        wrap(place[1:], counter, nothing)
    elif place[0] == "+":
        wrap(place[1:], nothing, counter)
    else:
        event, part = place.split(":", 1)

        def look(name, args):
            if name == event and any(part in str(arg) for arg in args):
                counter()

        sys.addaudithook(look)


def next_step() -> None:
    steps[0] += 1


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    kills = []
    while words[0].isdigit():
        number, place, count, *words = words
        kills.append((place, Counter(int(number), count)))
    sys.argv = words
    if any(counter.step >= 0 for _, counter in kills):
        wrap("common.trainer:Trainer.train_step", next_step, nothing)
    for kill in kills:
        kill_at(*kill)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
