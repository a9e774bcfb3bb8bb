"""Of several processes one speaks: what all of them have to say is told once.

Without it a mistyped path would be told eight times by eight processes, and each process that torchrun ends, because
another one has failed, would complain as well.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from typing import Callable

from common import STOPPING, _flush
from common.processes import count, is_first, lost_another, number
from common.stopping import heard


def speak_once() -> None:
    """What is the same in all processes is told once. To be called before anything can be printed.

    Only the first prints. An error that all meet is told by the first: torchrun then ends the others, which had waited
    a little. One that another process alone meets is told by that one.
    """
    if count() == 1 or sys.excepthook.__module__ == __name__:  # or a second training in one process
        return
    sys.excepthook = _told_once(sys.excepthook)
    for stop in STOPPING:  # torchrun ends the others so, and tells why
        signal.signal(stop, _leave)
    atexit.register(_end)
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def _told_once(tell: Callable) -> Callable:
    """An excepthook that leaves the telling to the first process, or to torchrun, where these can do it."""

    def hook(kind, error, traceback):
        lost, status = lost_another(error), 1
        everywhere = isinstance(error, KeyboardInterrupt)  # torchrun hands Ctrl-C to all
        try:
            # if it is not alone with its error, torchrun ends it meanwhile
            if not (is_first() or everywhere) or (lost and not heard):
                time.sleep(5 if lost else 2 + 0.25 * number())
            sys.stderr = sys.__stderr__
            if lost and is_first() and not heard:
                print("error: another process has ended: torchrun tells which, and why.", file=sys.stderr)
            elif not lost and is_first():
                tell(kind, error, traceback)
            elif not lost and not everywhere:
                print(file=sys.stderr)  # the first one's bar may stand in this line
                tell(kind, error, traceback)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        atexit._run_exitfuncs()  # but not the end of the group, which would wait for the others
        os._exit(status)

    return hook


def _leave(stop: int, _) -> None:
    heard.append(stop)
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + stop)


def _end() -> None:
    """Leave the group, where all have come to the end together, and then at once: in the end of Python a thread of the
    group may still be there, and makes it end by SIGABRT, one training in some hundred."""
    distributed = sys.modules.get("torch.distributed")
    failed = hasattr(sys, "last_value") or distributed is None
    if not failed and distributed.is_initialized():
        distributed.destroy_process_group()
        _flush()
        os._exit(128 + heard[-1] if heard else 0)
