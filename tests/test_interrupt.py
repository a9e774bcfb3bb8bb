"""Ctrl-C, SIGTERM or a closed terminal at any time: one line, and what was there before is there as it was."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import psutil
import pytest

from tests.conftest import ROOT, TIMEOUT, environment, run, start
from tests.helpers import DOWNLOAD, PREPARE, SAMPLE, STEP, TRAIN, contents, first_fast


def interrupted(status, err, number=signal.SIGINT):
    """One line, the status of the signal, and no error. A progress bar, or a library's warning, may stand before it."""
    assert status in (128 + number, -signal.SIGINT), err  # after Ctrl-C it dies by the signal itself
    assert not [word for word in ("Traceback", "Exception", "Error", "error:") if word in err], err
    line = "Interrupted. Run the same command again to continue."
    assert err.count("Interrupted") == 1 and err.splitlines()[-1] == line, err


def wait_for(process, happened):
    end = time.monotonic() + TIMEOUT
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


ANSWER = "Stopping after this micro-batch, then writing the checkpoint; press again to lose it."


def test_ctrl_c_in_training(ready):
    words = "--batch-size 8 --max-train-steps 100000 --log-interval 1 --eval-rows 0"
    process = start(f"python tutorial/train_llama3.py {words}", cwd=ready)
    try:
        while not STEP.fullmatch(process.stdout.readline().strip()):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    left = {path.name for path in (ready / "llama3_summarization").iterdir()}
    [checkpoint] = left - {"training_log.jsonl"}
    step = int(checkpoint[len("checkpoint-") :])
    line = f"Stopped after step {step}; checkpoint saved in llama3_summarization/{checkpoint}. "
    line += "Run the same command to resume."
    assert process.returncode == -signal.SIGINT and err.splitlines()[-1] == line, err
    assert ANSWER in err.splitlines(), err
    assert "Saving" not in out and "Traceback" not in err
    assert {path.name for path in ready.iterdir() if path.name.startswith(".")} <= {".hf_home"}


@pytest.mark.slow
def test_ctrl_c_is_answered_before_torch_returns(folder):
    """Python calls a signal's handler between two of its own instructions. A backward pass is one, of some seconds."""
    code = """
import torch
from common.support.exit import StopRequest
ones = torch.ones(5000, 5000)
with StopRequest():
    print("begin", flush=True)
    ones @ ones
    print("end", flush=True)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment(PYTHONPATH="."), **pipes)
    assert process.stdout.readline() == "begin\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=TIMEOUT)[0].splitlines()[:3] == ["", ANSWER, "end"]


def test_sigterm_in_prepare(ready):
    rows = (ROOT / "dataset" / "samples" / "cnn_dailymail" / "train.jsonl").read_text(encoding="utf-8")
    (ready / "many.jsonl").write_text(rows * 400, encoding="utf-8")
    before = (ready / "llama3_dataset.pt").read_bytes()
    names = {path.name for path in ready.iterdir()}
    process = start("python dataset/prepare_llama3_dataset.py --dataset-name-or-path many.jsonl", cwd=ready)
    try:
        wait_for(process, lambda: any(path.stat().st_size for path in ready.glob(".llama3_dataset.pt*/*")))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    interrupted(process.returncode, err, signal.SIGTERM)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names
    assert (ready / "llama3_dataset.pt").read_bytes() == before


# A real signal, at the moment when the named module is looked for.
AT_IMPORT = """
import os, signal, sys


class At:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))


sys.meta_path.insert(0, At())
"""


@pytest.mark.parametrize(
    "command, module, number",
    first_fast(
        3,
        [
            ("python tutorial/train_llama3.py", "torch.nn", signal.SIGINT),
            ("python dataset/prepare_llama3_dataset.py", "torch.nn", signal.SIGTERM),
            ("python tutorial/train_llama3.py", "transformers.utils", signal.SIGTERM),
            ("python dataset/prepare_llama3_dataset.py", "tokenizers", signal.SIGINT),
            ("python tutorial/inference_llama3.py --model-name-or-path ./llama3-8b", "torch.nn", signal.SIGHUP),
            ("python tutorial/download_llama3_8b.py", "huggingface_hub", signal.SIGINT),
            ("python tutorial/download_llama3_8b.py", "huggingface_hub", signal.SIGTERM),
        ],
    ),
)
def test_stopped_in_the_imports(command, module, number, ready, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AT_IMPORT)
    names = {path.name for path in ready.iterdir()}
    env = {"PYTHONPATH": str(tmp_path / "site"), "INTERRUPT_AT": module, "SIGNAL": str(int(number))}
    done = run(command, cwd=ready, env=env, ok=None)
    interrupted(done.returncode, done.stderr, number)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names


# A real signal when the script opens a file whose path ends so. And again when it cleans up: `timeout` sends it twice.
AT_FILE = """
import os, runpy, sys

number, name, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
sent = False


def look(event, args):
    global sent
    opened = event == "open" and str(args[0]).endswith(name)
    if opened and not sent or event == "shutil.rmtree" and sent and number != 2:
        sent = True
        os.kill(os.getpid(), number)


sys.addaudithook(look)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MERGE = "python tutorial/merge_adapter.py --model-name-or-path adapter --save-dir merged"
EVALUATE = "python tutorial/evaluate.py --model-name-or-path adapter --max-new-tokens 2 --rows 2"


@pytest.mark.parametrize(
    "number, command, name, left",
    [
        (signal.SIGINT, f"{PREPARE} --dataset-name-or-path {SAMPLE}", "/train.ids", set()),
        (signal.SIGTERM, f"{PREPARE} --dataset-name-or-path {SAMPLE}", "/validation.ids", set()),
        (signal.SIGHUP, f"{PREPARE} --dataset-name-or-path {SAMPLE}", "/llama3_dataset.pt", set()),
        (signal.SIGHUP, f"{TRAIN} --save-dir adapter", "/training_log.jsonl", {"training_log.jsonl"}),
        (
            signal.SIGTERM,
            f"{TRAIN} --save-dir adapter",
            "/adapter/tokenizer_config.json",
            {"training_log.jsonl", "training_loss.png"},
        ),
        (signal.SIGTERM, MERGE, "/merged/tokenizer_config.json", set()),
        (signal.SIGTERM, EVALUATE, "/evaluation.json", set()),
        (signal.SIGTERM, f"{DOWNLOAD} --tiny --save-dir new", "/new/tokenizer.json", set()),
        (signal.SIGHUP, f"{DOWNLOAD} --tiny --save-dir new", "/new/config.json", set()),
    ],
)
def test_stopped_in_the_middle_of_writing(number, command, name, left, with_adapter, ready, warm):
    """`left` are the files in ./adapter, the directory of an earlier training, that may have changed."""
    shutil.copytree(with_adapter, ready / "adapter")
    (ready / "at_file.py").write_text(AT_FILE)
    before = contents(ready)
    done = warm(f"python at_file.py {int(number)} {name} {command[len('python ') :]}", cwd=ready, ok=None)
    interrupted(done.returncode, done.stderr, number)
    after = contents(ready)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {f"adapter/{file}" for file in left}


@pytest.fixture(scope="module")
def with_adapter(base, warm, tmp_path_factory):
    """The directory of a finished training."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    warm(f"{TRAIN} --use-lora", "--save-dir", directory, cwd=base)
    return directory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_within_torch_save(number, folder, warm):
    """It then fails at what it has not written, with an error of its own, which would be all that a reader sees."""
    source = (
        f"import io, os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nfrom common.support.exit import run\n"
    )
    source += "class File(io.BytesIO):\n    def write(self, data):\n"
    source += f"        len(data) < 9999 or os.kill(os.getpid(), {int(number)})\n        return super().write(data)\n"
    (folder / "save.py").write_text(source + "run(lambda: torch.save({'a': torch.zeros(9999)}, File()))\n")
    done = warm("python save.py", cwd=folder, ok=None)
    interrupted(done.returncode, done.stderr, number)


@pytest.mark.slow
def test_a_terminal_that_is_closed(ready):
    """The system sends SIGHUP, and nothing can be written any more."""
    ours, theirs = pty.openpty()
    rows = (SAMPLE / "train.jsonl").read_text(encoding="utf-8")
    (ready / "many.jsonl").write_text(rows * 400, encoding="utf-8")
    before = contents(ready)
    process = subprocess.Popen(
        [sys.executable, *f"{PREPARE} --dataset-name-or-path many.jsonl".split()[1:]],
        cwd=ready,
        env=environment(HF_HOME=str(ready / ".hf_home")),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        wait_for(process, lambda: any(path.stat().st_size for path in ready.glob(".llama3_dataset.pt*/*")))
        os.close(ours)
        assert process.wait(TIMEOUT) not in (0, -signal.SIGHUP)
    finally:
        process.kill()
    assert contents(ready) == before


def test_nohup_goes_on(folder):
    """It ignores SIGHUP, and the scripts leave it so."""
    source = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); from common.support.exit import run; "
    source += "run(lambda: print(os.kill(os.getpid(), signal.SIGHUP)))"
    command = ["bash", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, source]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


CHILDREN = """
import multiprocessing, sys, time

sys.path.insert(0, {root!r})
from common.support.exit import run
from torch.utils.data import DataLoader


def main():
    for batch in DataLoader(list(range(99)), num_workers=2, multiprocessing_context="fork"):
        break
    runs = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=lambda: runs.set() or time.sleep(999))
    child.start()
    runs.wait()
    child.terminate()
    child.join()
    print(child.exitcode)


if __name__ == "__main__":
    run(main)
"""


def test_children_of_a_script_end_silently(folder, warm):
    """Workers that a reader adds are stopped by SIGTERM as well. They have nothing to say, and nothing to clean up."""
    (folder / "children.py").write_text(CHILDREN.format(root=str(ROOT)))
    done = warm("python children.py", cwd=folder)
    assert done.stderr == "" and done.stdout.strip() in ("143", "-15")


def test_stopped_while_pip_downloads(folder, warm, tmp_path):
    """No pip goes on, and nothing lies in the directory for scratch files."""
    (tmp_path / "scratch").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as registry:  # it never answers

        def stop():
            connection, _ = registry.accept()
            [script] = psutil.Process(warm.process.pid).children()
            found.extend(script.children(recursive=True))
            script.terminate()
            connection.settimeout(TIMEOUT)
            while connection.recv(9999):
                pass

        found, thread = [], threading.Thread(target=stop)
        thread.start()
        env = {
            "PIP_INDEX_URL": f"http://127.0.0.1:{registry.getsockname()[1]}/simple",
            "TMPDIR": str(tmp_path / "scratch"),
        }
        done = warm("python tutorial/download_smollm2.py", cwd=folder, env=env, ok=None)
        thread.join(TIMEOUT)
    interrupted(done.returncode, done.stderr, signal.SIGTERM)
    assert found and not [process for process in found if process.is_running()]
    assert not list((tmp_path / "scratch").iterdir()) and not (folder / "smollm2-135m").exists()
