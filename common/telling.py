"""How far a long work has come: a progress bar, or a line now and then where there is no terminal to show one."""

from __future__ import annotations

import sys
from time import monotonic
from typing import Callable, Iterable, Iterator, Optional

SECONDS = 30  # from one line to the next


def told(parts: Iterable, rows_of: Callable, name: str, total: Optional[int], done: int = 0) -> Iterator:
    """`parts`, one after the other, each of as many rows as `rows_of` says; told once whoever takes them has used it.

    total: rows in all, where that is known; done: those that were done before.
    """
    from tqdm import tqdm

    terminal, start, before = sys.stderr.isatty(), monotonic(), done
    last = start
    with tqdm(total=total, initial=done, desc=name, unit=" rows", disable=not terminal, dynamic_ncols=True) as bar:
        for part in parts:
            yield part
            done += rows_of(part)
            bar.update(rows_of(part))
            now = monotonic()
            if not terminal and now - last >= SECONDS:
                rate = (done - before) / (now - start)
                left = f" of {total}, {(total - done) / rate / 60:.0f} minutes left" if total else ""
                print(f"{name}: {done} rows{left}, {rate:.{0 if rate >= 10 else 1}f} rows/s", flush=True)
                last = now
