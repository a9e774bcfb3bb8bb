"""Ctrl-C at any time: one line, the exit status of Ctrl-C, and what was there before is there as it was."""

from __future__ import annotations

import signal
import time

import pytest

from tests.conftest import ROOT, run, start
from tests.helpers import STEP

# what libraries say at any time: progress, transformers 4.40 of the special tokens, torch 2.1 of its own torch.load
OF_LIBRARIES = ("%|", "Loading weights", "Special tokens have been added", "TypedStorage", "return self.fget.__get__(")


def interrupted(status, err):
    """One line, the status of Ctrl-C, and no traceback. What libraries say may stand before it."""
    assert status in (130, -signal.SIGINT), err
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert lines[-1] == "Interrupted: nothing more is written. Run the same command to start again."
    assert [line for line in lines[:-1] if line.strip() and not any(words in line for words in OF_LIBRARIES)] == []


def wait_for(process, happened):
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_in_training(ready):
    words = "--batch-size 8 --max-train-steps 100000 --log-interval 1 --eval-rows 0"
    process = start(f"python tutorial/train_llama3.py {words}", cwd=ready)
    try:
        while not STEP.fullmatch(process.stdout.readline().strip()):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    interrupted(process.returncode, err)
    assert "Saving" not in out
    left = {path.name for path in (ready / "llama3_summarization").iterdir()}
    assert left == {"training_log.jsonl"}
    assert {path.name for path in ready.iterdir() if path.name.startswith(".")} <= {".hf_home"}


def test_ctrl_c_in_prepare(ready):
    rows = (ROOT / "dataset" / "samples" / "cnn_dailymail" / "train.jsonl").read_text(encoding="utf-8")
    (ready / "many.jsonl").write_text(rows * 400, encoding="utf-8")
    before = (ready / "llama3_dataset.pt").read_bytes()
    names = {path.name for path in ready.iterdir()}
    process = start("python dataset/prepare_llama3_dataset.py --dataset-name-or-path many.jsonl", cwd=ready)
    try:
        wait_for(process, lambda: any(path.stat().st_size for path in ready.glob(".llama3_dataset.pt*/*")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    interrupted(process.returncode, err)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names
    assert (ready / "llama3_dataset.pt").read_bytes() == before


# A real SIGINT, at the moment when the named module is looked for.
AT_IMPORT = """
import os, signal, sys


class At:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, At())
"""


@pytest.mark.parametrize(
    "command, module",
    [
        ("python tutorial/train_llama3.py", "torch.nn"),
        ("python tutorial/train_llama3.py", "transformers.utils"),
        ("python dataset/prepare_llama3_dataset.py", "torch.nn"),
        ("python dataset/prepare_llama3_dataset.py", "tokenizers"),
        ("python tutorial/inference_llama3.py --model-name-or-path ./llama3-8b", "torch.nn"),
        ("python tutorial/download_llama3_8b.py", "huggingface_hub"),
    ],
)
def test_ctrl_c_in_the_imports(command, module, ready, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AT_IMPORT)
    names = {path.name for path in ready.iterdir()}
    done = run(command, cwd=ready, env={"PYTHONPATH": str(tmp_path / "site"), "INTERRUPT_AT": module}, ok=None)
    interrupted(done.returncode, done.stderr)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names
