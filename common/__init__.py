"""What every script shares, and nothing that knows a model's inside.

Importing this package makes a reader's mistake, Ctrl-C or SIGTERM end a script with one line instead of a traceback, a
closed pipe (`| head`) with none, and a terminal that lacks a letter show "?". It is done here, and not around each
`main()`, because importing torch and transformers takes seconds in which people press Ctrl-C as well.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Optional

# Threads that wait sleep, and leave the core to what runs beside them: libgomp's policy, read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
# options of the running script that save memory and are not taken yet: common.arguments writes them down
less_memory: list = []


class UserError(Exception):
    """A mistake that the reader can mend. The message is one line: what is wrong, why, what to do next."""


# what to do after Ctrl-C: common.checkpoints writes down from where a training goes on
after_interrupt = ["Run the same command to start again."]
CLOSED_PIPE = 128 + 13  # the exit status of a program that SIGPIPE ends


def brought_by(module: str) -> str:
    """The requirements file that brings the package of `module`, "" where none does.

    Of several files that of the running script's tutorial, if there is one.
    """
    package = module.split(".")[0].replace("_", "-")
    files = [
        path.stem
        for path in sorted(REQUIREMENTS.glob("requirements_*.txt"))
        if re.search(rf"(?m)^{package}\b(?!-)", path.read_text(encoding="utf-8").replace("_", "-"))
    ]
    own = [file for file in files if file[len("requirements_") :] in Path(sys.argv[0]).stem]
    chosen = max(own, key=len, default=files[0] if files else "")
    return f"requirements/{chosen}.txt" if chosen else ""


def missing_package(module: str) -> str:
    """The line for a package that is not there."""
    return f"{module.split('.')[0]} is not installed: pip install -r {brought_by(module)}"


def require_package(package: str, least: tuple, what: str) -> None:
    """UserError unless `package` of version `least` or newer is there and can be imported."""
    import logging
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at its import, peft's too, it offers a package
    problem = None
    try:
        have = version(package)
        if tuple(map(int, have.split(".")[:2])) < least:
            problem = f"{have} is installed"
        else:
            import_module(package)
    except PackageNotFoundError:
        problem = "it is not installed"
    except Exception as error:  # made for another torch, it fails in ways of its own
        torch = sys.modules["torch"].__version__  # whoever asks for such a package has imported it
        problem = f"{have} does not work with torch {torch} ({type(error).__name__})"
    if problem:
        number = ".".join(map(str, least))
        raise UserError(
            f"{what} needs {package} {number} or newer, and {problem}: pip install -r {brought_by(package)}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory, or the main memory, had no room: torch says so in several ways."""
    words = ("out of memory", "DefaultCPUAllocator", "an't allocate memory", "annot allocate memory", "bad_alloc")
    words += ("could not create a primitive", "could not create a memory")  # oneDNN's
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def full_disk(error: Optional[BaseException]) -> str:
    """What is told of a disk that takes no more, as whatever library has put it; "" where that is not the reason."""
    if error is None:
        return ""
    inner = [error.__context__, *(failure[0] for failure in getattr(error, "failures", {}).values())]
    told = next(filter(None, map(full_disk, inner)), "")  # torch: it failed because it failed
    if told:
        return told
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        words = rf"\(os error {number}\)|Os {{ code: {number},|failed with {os.strerror(number)}"  # Rust's, torch's
        told = re.search(words, str(error))
        if told or getattr(error, "errno", None) == number:
            return os.strerror(number)
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter failed|unexpected pos", str(error)):
        return os.strerror(errno.ENOSPC)  # torch.save does not tell why it could not write on
    return ""


def without_secrets(text: str) -> str:
    """`text` without the reader's token of the hub, wherever it came from, and without whatever looks like one."""
    words = [word[len("--token=") :] for word in sys.argv if word.startswith("--token=")]
    words += [after for word, after in zip(sys.argv, sys.argv[1:]) if word == "--token"]
    for token in filter(None, [*words, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]):
        text = text.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}", "***", text)


def reason_of(error: BaseException) -> str:
    """What a library says of its error, in one line and not too long, as a part of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_line(error: BaseException) -> str:
    """What a library says first of its error, as a part of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cause_of(error: Exception) -> str:
    """Why a model's files could not be loaded, and what helps, for the reader; "" where nothing tells."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return missing_package(error.name)
    if isinstance(error, ImportError):
        return f"{short} Install that package."
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code of its own, which is never run here. Take a model that transformers knows."
    if "Unrecognized configuration class" in text:
        return "it is no causal language model. Take one (Llama, Mistral, GPT)."
    if "not recognize this architecture" in text or "quantization" in text:
        return f"the transformers that is installed can't ({short}). A newer one may: pip install -U transformers"
    if "mismatch" in text:
        return f"config.json and weights are of different models ({short}). Download both again."
    return ""


def _one_line(kind, error, traceback):
    if isinstance(error, RuntimeError) and isinstance(error.__context__, (OSError, KeyboardInterrupt, SystemExit)):
        error = error.__context__  # torch.save, once stopped, fails in words of its own
    if is_out_of_memory(error):
        options = ", ".join(less_memory)
        helps = f"These options need less: {options}." if options else "Close other programs, or take a larger machine."
        error = UserError(f"the memory is full ({' '.join(str(error).split())[:120]}). {helps}")
    elif isinstance(error, ModuleNotFoundError) and error.name and brought_by(error.name):
        error = UserError(missing_package(error.name))
    elif kind is not UserError and full_disk(error):
        what = getattr(error, "filename", None) or "a file"
        error = UserError(f"can't write {what}: {full_disk(error)}. Free some space, or choose another place for it.")
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        error = UserError(f"can't write {error.filename or 'a file'}: {error.strerror}. Choose another place for it.")
    elif issubclass(kind, RuntimeError) and "without overflow" in str(error):
        # where AdamW isn't fused (on a CPU before torch 2.4) it refuses such a step, and makes no inf of it
        error = UserError("The training broke: a step is beyond float32. Take a smaller --lr, or more --warmup-steps.")
    if isinstance(error, UserError):
        print(without_secrets(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    elif isinstance(error, BrokenPipeError):
        sys.exit(CLOSED_PIPE)
    elif isinstance(error, SystemExit):
        sys.exit(error.code)
    elif isinstance(error, KeyboardInterrupt):
        sys.last_value = error  # for _flush
        _tell_interrupted()
    else:
        import traceback as of_python

        lines = of_python.format_exception(kind, error, traceback)
        print(without_secrets("".join(lines)), end="", file=sys.stderr)


def _tell_interrupted():
    print(f"\nInterrupted: nothing more is written. {after_interrupt[0]}", file=sys.stderr)


def _stop(number, _):
    """Leave by an exception, so that the clean-up runs, and nothing else: `timeout` sends SIGTERM twice."""
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    atexit.register(_tell_interrupted)  # not here, where a line may be half-written
    sys.exit(128 + number)


@atexit.register
def _flush():
    """What is still in a buffer meets a closed pipe, or a full disk, only now; Python would say it in its own words."""
    try:
        for stream in filter(None, (sys.stderr, sys.stdout)):
            stream.flush()
    except BrokenPipeError:
        os._exit(CLOSED_PIPE)
    except OSError as error:
        if not hasattr(sys, "last_value"):  # else it has been told
            os.write(2, f"error: can't write the output: {error.strerror}. Choose another place for it.\n".encode())
        os._exit(2)
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):  # Ctrl-C: Python may have forgotten it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


sys.excepthook = _one_line
# Line by line, so that a closed pipe is met by our own prints, and not by whatever library flushes next, which takes it
# for an error of its own. sys.stderr never fails: it writes \\ud55c for what its terminal lacks.
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
STOPPING = [number for number in STOPPING if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
if threading.current_thread() is threading.main_thread():  # only there can they be set
    for number in STOPPING:
        signal.signal(number, _stop)
