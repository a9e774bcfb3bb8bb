"""What every script shares, and nothing that knows a model's inside.

Importing this package makes a reader's mistake, or Ctrl-C, end a script with one line instead of a traceback. It is
done here, and not around each `main()`, because importing torch and transformers takes seconds in which people press
Ctrl-C as well.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path


class UserError(Exception):
    """A mistake that the reader can mend. The message is one line: what is wrong, why, what to do next."""


def nearest_existing(path) -> Path:
    """`path` itself where it exists, else the nearest directory above it that does: where it would be made."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _one_line(kind, error, traceback):
    if kind.__name__ == "OutOfMemoryError":  # torch's, by name: torch is not imported for its sake
        error = UserError(
            "the device's memory is full. Lower --micro-batch-tokens or --block-size, or take a smaller model."
        )
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        error = UserError(f"can't write {error.filename or 'a file'}: {error.strerror}. Choose another place for it.")
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    elif issubclass(kind, KeyboardInterrupt):  # Python itself then ends with the exit status of Ctrl-C (130)
        print("\nInterrupted: nothing more is written. Run the same command to start again.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _one_line
