"""What Windows lacks, taken away here: the scripts start, prepare, train, save and answer all the same.

This is no Windows: paths, consoles and what its other calls do differently are not tested.
"""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT, run, start
from tests.helpers import DOWNLOAD, INFERENCE, PREPARE, SAMPLE, TRAIN, steps_in

# sitecustomize.py: Python imports it at its start.
WITHOUT = """
import ctypes, os, shutil, signal, sys
import filelock, psutil  # on Windows they have other means

sys.modules["fcntl"] = sys.modules["resource"] = None
del os.pread, os.sysconf, signal.SIGHUP
shutil._use_fd_functions = False  # rmtree would open directories
real_open, real_init = os.open, ctypes.CDLL.__init__


def open_file(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_open(path, flags, *args, **kwargs)


def init(self, name, *args, **kwargs):
    if name is None:
        raise TypeError("a library has a name")
    real_init(self, name, *args, **kwargs)


os.open, ctypes.CDLL.__init__ = open_file, init
"""

# Each script's --help, in one process.
HELP = """
import runpy, sys

for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
"""


@pytest.fixture
def windows(tmp_path):
    """The environment of a process that has no more than this."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    return {"PYTHONPATH": str(tmp_path / "site")}


def test_each_script_starts(windows, folder):
    scripts = sorted((ROOT / "tutorial").glob("*.py")) + sorted((ROOT / "dataset").glob("prepare_*.py"))
    (folder / "help.py").write_text(HELP)
    done = run("python help.py", *(path.relative_to(ROOT) for path in scripts), cwd=folder, env=windows)
    assert done.stdout.count("usage: ") == len(scripts)


@pytest.mark.slow
def test_from_the_download_to_an_answer(windows, folder):
    run(f"{DOWNLOAD} --tiny", cwd=folder, env=windows)
    run(f"{PREPARE} --dataset-name-or-path {SAMPLE}", cwd=folder, env=windows)
    for _ in range(2):  # the second one puts its model in the place of the first
        done = run(f"{TRAIN} --max-train-steps 2 --save-steps 1 --log-interval 1", cwd=folder, env=windows)
        assert steps_in(done.stdout) == [(1, 2), (2, 2)] and "Model saved in" in done.stdout
        assert "Traceback" not in done.stderr
    saved = folder / "llama3_summarization"
    assert json.loads((saved / "run.json").read_text(encoding="utf-8"))["options"]["max_train_steps"] == 2
    assert not [path for path in saved.iterdir() if path.name.startswith((".", "checkpoint-"))]
    assert "[SUMMARIZE]" in run(INFERENCE, cwd=folder, env=windows).stdout


@pytest.mark.slow
def test_a_training_that_was_killed_resumes(windows, folder, ready):
    words = "--batch-size 8 --eval-rows 0 --log-interval 1 --save-steps 1"
    process = start(f"python tutorial/train_llama3.py {words} --max-train-steps 100000", cwd=ready, **windows)
    try:
        while not (ready / "llama3_summarization" / "checkpoint-2").is_dir():
            assert process.stdout.readline(), process.communicate()
    finally:
        process.kill()
        process.communicate()
    checkpoints = (ready / "llama3_summarization").glob("checkpoint-*")
    last = max(int(path.name[len("checkpoint-") :]) for path in checkpoints)
    done = run(f"python tutorial/train_llama3.py {words} --max-train-steps {last + 1}", cwd=ready, env=windows)
    assert steps_in(done.stdout)[-1] == (last + 1, last + 1) and steps_in(done.stdout)[0][0] in (last, last + 1)
