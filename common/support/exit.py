"""How a script starts and ends: errors of one line, Ctrl-C and SIGTERM, a closed pipe, and which rank prints.

Every script ends with

    if __name__ == "__main__":
        run(main)
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from shlex import quote
from typing import Callable, Optional

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
INTERRUPTED = "Interrupted. Run the same command again to continue."
STOPPING = "Stopping after this micro-batch, then writing the checkpoint; press again to lose it."
CLOSED_PIPE = 128 + 13  # the exit status of a program that SIGPIPE ends
# Windows has no SIGHUP.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what happened, and what to do next."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP, raised as an exception so that files under way are cleaned up."""


def run(main: Callable[[], None]) -> None:
    """Call `main`, and end the process: what goes wrong is one line and an exit status, never a traceback.

    The exit status is 0, 2 for a UserError, 1 for an error in our code, and 128 + the number of a signal.
    """
    # Threads that wait for work sleep, so that other programs get the cores. libgomp reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without a terminal, as a service may be started, Python has no streams.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    # Line by line, so that our own print meets a closed pipe (`| head`), and not a library that hides the error.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    stderr = sys.stderr
    if _rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        main()
        _leave_group()
    except BaseException as error:
        sys.stderr = stderr
        try:
            status = _report(error)
        except BrokenPipeError:  # `2>&1 | head`
            status = CLOSED_PIPE
        _end(status)  # here, because torch 1.13 aborts if a torch.save that was interrupted is cleaned up
    _end(0)


def _terminate(number, _) -> None:
    for other in STOP_SIGNALS:  # `timeout` and torchrun send the signal twice
        signal.signal(other, signal.SIG_IGN)
    raise Terminated(128 + number)


# ------------------------------------------------------------------------------------------------ one line an error


def _report(error: BaseException) -> int:
    """Print one line about `error`; the exit status. Of several ranks that meet the same error, rank 0 prints it."""
    # torch.save, once interrupted, raises a RuntimeError of its own
    if isinstance(error, RuntimeError) and isinstance(error.__context__, (KeyboardInterrupt, SystemExit)):
        error = error.__context__
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, SystemExit) and not isinstance(error, Terminated):
        return error.code or 0  # --help
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        # Under torchrun all ranks get Ctrl-C, and all get SIGTERM when one has failed, which torchrun reports.
        is_ctrl_c = isinstance(error, KeyboardInterrupt)
        if world_size() == 1 or (is_ctrl_c and _rank() == 0):
            print(f"\n{INTERRUPTED}", file=sys.stderr)
        return 128 + signal.SIGINT if is_ctrl_c else error.code

    message = _one_line(error)
    line = f"error: {message}" if message else "".join(traceback.format_exception(None, error, error.__traceback__))
    if _rank() > 0 or is_peer_failure(error):
        time.sleep(3)  # torchrun ends all ranks as soon as one has failed: a rank that is still alive is alone
        line = f"\n{line}"  # the progress bar of rank 0 may stand in this line of the terminal
    print(without_secrets(line.rstrip()), file=sys.stderr)
    return 2 if message else 1


def _one_line(error: BaseException) -> str:
    """What to print of an error that a user can do something about; "" for an error in our code."""
    if isinstance(error, UserError):
        return str(error)
    if is_peer_failure(error):
        return "another process failed; see torchrun's report (Root Cause) below."
    if is_out_of_memory(error):
        return f"Out of memory ({short_message(error, 120)}). Close other programs or use a larger machine."
    if isinstance(error, ModuleNotFoundError) and error.name and install_command(error.name):
        return install_hint(error.name)
    if disk_problem(error):
        path = getattr(error, "filename", None) or "a file"
        return f"Cannot write {path}: {disk_problem(error)}. Free disk space or choose another path."
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the main memory, was full: torch and oneDNN say so in several ways."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = "out of memory|DefaultCPUAllocator|an't allocate memory|annot allocate memory|bad_alloc"
    # With "primitive descriptor", oneDNN has no such product for this CPU.
    signs += "|could not create a primitive(?! descriptor)|could not create a memory"
    return isinstance(error, RuntimeError) and bool(re.search(signs, str(error)))


def disk_problem(error: Optional[BaseException]) -> str:
    """What is wrong with a disk that cannot be written, whatever library reports it; "" for any other error."""
    if error is None:
        return ""
    # torch.distributed.checkpoint collects the errors of all ranks in `failures`.
    causes = [error.__context__] + [failure[0] for failure in getattr(error, "failures", {}).values()]
    for cause in causes:
        if disk_problem(cause):
            return disk_problem(cause)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter failed|unexpected pos", str(error)):
        return os.strerror(errno.ENOSPC)  # torch.save does not say why it could not write
    return ""


def short_message(error: BaseException, length: int = 200) -> str:
    """The message of a library's error in one line, as a part of ours."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, as a part of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def without_secrets(text: str) -> str:
    """`text` without the user's access token of the hub, and without anything that looks like one."""
    tokens = [word[len("--token=") :] for word in sys.argv if word.startswith("--token=")]
    tokens += [value for option, value in zip(sys.argv, sys.argv[1:]) if option == "--token"]
    tokens += [os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    for token in tokens:
        if token:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}", "***", text)


def install_command(module: str) -> str:
    """The command that installs the package of `module`, "" if no requirements file lists it.

    It names the file of the running script's tutorial, or the only one that lists the package, or else the package. In
    a shell without the environment, in which all are installed, it is the command that activates it.
    """
    activate = REQUIREMENTS.parent / ".venv" / "bin" / "activate"
    if sys.prefix == sys.base_prefix and activate.is_file():
        return f"first activate the environment with . {quote(os.path.relpath(activate))}"
    package = module.split(".")[0].replace("_", "-")
    found = {}
    for path in REQUIREMENTS.glob("requirements_*.txt"):
        listed = re.search(rf"(?m)^{package}\b(?!-)[^#\n]*", path.read_text(encoding="utf-8").replace("_", "-"))
        if listed:
            found[path.stem[len("requirements_") :]] = listed[0].strip()
    of_script = [name for name in found if name in Path(sys.argv[0]).stem]
    if of_script or len(found) == 1:
        return f"pip install -r requirements/requirements_{max(of_script or found, key=len)}.txt"
    return f"pip install {quote(min(found.values()))}" if found else ""


def install_hint(module: str) -> str:
    """The line for a package that is not installed."""
    package = module.split(".")[0]
    return f"{package} is not installed: {install_command(module) or f'pip install {package}'}"


def _end(status: int) -> None:
    """End the process with `status`; with another one where the output cannot be written."""
    # Python's own clean-up would write once more into a closed pipe, and a thread of the process group can abort there.
    at_once = status > 128 or world_size() > 1
    try:
        sys.stderr.flush()
        sys.stdout.flush()
    except OSError as error:  # a closed pipe, or a full disk
        status = CLOSED_PIPE if isinstance(error, BrokenPipeError) else 2
        at_once = True
    if not at_once:
        sys.exit(status)
    atexit._run_exitfuncs()
    if status == 128 + signal.SIGINT and os.name == "posix" and world_size() == 1:
        # Die by the signal itself, so that a shell loop around the script stops as well.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(status)


# ------------------------------------------------------------------------------------------------ a signal as a request


class Stopped(Exception):
    """Somebody asked the training to stop."""


class StopRequest:
    """Inside `with`, Ctrl-C and SIGTERM are requests: `number` is the signal that came, or 0.

    The first Ctrl-C is answered at once, a second one ends the script. A second SIGTERM changes nothing: schedulers
    send it to the whole group.
    """

    def __init__(self):
        self.number = 0
        self.at_once = False
        self._handlers: dict = {}
        self._signals = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                numbers.append(signal.SIGINT)
            self._handlers = {number: signal.signal(number, self._hear) for number in numbers}
        if signal.SIGINT in self._handlers:
            # Python calls `_hear` when torch returns, which takes seconds in a backward pass. Its C code writes the
            # number of the signal into this socket at once.
            reader, self._signals = socket.socketpair()
            self._signals.setblocking(False)
            signal.set_wakeup_fd(self._signals.fileno())
            threading.Thread(target=_answer_ctrl_c, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._signals:
            signal.set_wakeup_fd(-1)
            self._signals.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # the signal came after the last check
            signal.raise_signal(self.number)
        if self.number and error is not None and is_peer_failure(error):
            raise Terminated(128 + self.number) from None  # the other ranks have heard the signal as well

    def _hear(self, number, _) -> None:
        if self.number and number == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt
        self.number = self.number or number


def _answer_ctrl_c(signals: socket.socket) -> None:
    """Print a line when the number of SIGINT comes for the first time; end when the other side is closed."""
    answered = False
    for number in iter(lambda: signals.recv(1), b""):
        if number[0] == signal.SIGINT and not answered:
            print(f"\n{STOPPING}", file=sys.stderr, flush=True)
            answered = True


# ------------------------------------------------------------------------------------------------ torchrun


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_peer_failure(error: BaseException) -> bool:
    """Whether the error says that another rank is gone."""
    kind = type(error).__name__
    by_torch = isinstance(error, RuntimeError) or kind == "CheckpointException"
    signs = "^Dist|closed by peer|reset by peer|Broken pipe|[gG]loo|NCCL|TCPStore"
    return world_size() > 1 and by_torch and bool(re.search(signs, f"{kind}: {error}"))


def _leave_group() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
