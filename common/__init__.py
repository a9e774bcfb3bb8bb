"""What every script shares, and nothing that knows a model's inside.

Importing this package makes a reader's mistake, or Ctrl-C, end a script with one line instead of a traceback. It is
done here, and not around each `main()`, because importing torch and transformers takes seconds in which people press
Ctrl-C as well.
"""

from __future__ import annotations

import sys


class UserError(Exception):
    """A mistake that the reader can mend. The message is one line: what is wrong, why, what to do next."""


def _one_line(kind, error, traceback):
    if issubclass(kind, UserError):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    elif issubclass(kind, KeyboardInterrupt):  # Python itself then ends with the exit status of Ctrl-C (130)
        print("\nInterrupted: nothing more is written. Run the same command to start again.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _one_line
