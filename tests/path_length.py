"""How much of our code a learner reads to follow a training script to its first optimizer step.

    python tests/path_length.py tutorial/train_llama2.py --batch-size 8

The script runs here, traced, in the working directory; what it prints goes to standard error. Counted are the lines of
each function of ours that was entered before the first `optimizer.step`, docstrings and comments included, each line
once and empty ones not at all, and the whole script itself.
"""

from __future__ import annotations

import inspect
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import MethodType
from typing import Dict, Set

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) + "/" for folder in ("common", "model", "dataset", "tutorial"))


class FirstStep(Exception):
    """The optimizer was about to make its first step."""


def entered(script: str, words: list) -> Dict[str, Set[int]]:
    """{file: numbers of its lines that belong to a function which was entered before the first step}"""
    codes = set()

    def profile(frame, event, _):
        # a class's body is run at its definition, and is not read for that
        of_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and of_function and frame.f_code.co_filename.startswith(OURS):
            codes.add(frame.f_code)
            if frame.f_code.co_name == "train":  # in its frame the optimizer is at hand
                optimizer = frame.f_locals["optimizer"]

                def stop(*_, **__):
                    sys.setprofile(None)
                    raise FirstStep

                optimizer.step = MethodType(stop, optimizer)

    sys.argv = [script, *words]
    sys.setprofile(profile)
    try:
        with redirect_stdout(sys.stderr):
            runpy.run_path(script)["main"]()  # not by exit.run, which would report FirstStep as an error
    except FirstStep:
        pass
    finally:
        sys.setprofile(None)
    own = str(Path(script).resolve())
    lines: Dict[str, Set[int]] = {}
    for code in codes:
        if code.co_name.startswith("<"):  # of a module, or inside a function that counts already
            continue
        source, first = inspect.getsourcelines(code)
        written = (number for number, line in enumerate(source, first) if line.strip())
        lines.setdefault(code.co_filename, set()).update(written)
    whole = Path(script).read_text(encoding="utf-8").splitlines()
    lines[own] = {number for number, line in enumerate(whole, 1) if line.strip()}
    return lines


if __name__ == "__main__":
    found = entered(sys.argv[1], sys.argv[2:])
    for file, numbers in sorted(found.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(numbers):5} {Path(file).relative_to(ROOT)}")
    print(f"{sum(map(len, found.values())):5} in all")
