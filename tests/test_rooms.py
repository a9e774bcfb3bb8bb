"""The house: which room imports which, how long they are, and how soon a script answers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TIMEOUT, environment
from tests.page_packages import names_of

ROOMS = ("common/support", "common", "model", "dataset", "tutorial")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
SCRIPTS = [path for path in FILES if path.read_text(encoding="utf-8").endswith("    run(main)\n")]
# What each room may import from.
BELOW = {
    "common/support": {"common/support"},
    "common": {"common", "common/support"},
    "model": {"model", "common", "common/support"},
    "dataset": {"dataset", "common", "common/support"},
    "tutorial": {"dataset", "model", "common", "common/support"},
}
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}


def room_of(path):
    return path.parent.relative_to(ROOT).as_posix()


def imports(path):
    """The modules of this repository that `path` imports, inside its functions too."""
    names = [name for _, name in names_of(path.read_text(encoding="utf-8"))]
    found = {*names, *(name.rpartition(".")[0] for name in names)}  # of `from a import b`: a.b, and a
    return found & set(NAMES)


def test_imports_lead_downward_and_in_no_circle():
    arrows = {name: imports(path) for name, path in NAMES.items()}
    for name, others in arrows.items():
        for other in others:
            assert room_of(NAMES[other]) in BELOW[room_of(NAMES[name])], f"{name} imports {other}"
            # Users copy a script alone, so nothing imports a script.
            assert NAMES[other] not in SCRIPTS, f"{name} imports {other}"
    done = set()
    while len(done) < len(arrows):
        floor = {name for name, others in arrows.items() if name not in done and others <= done | {name}}
        assert floor, f"in a circle: {sorted(set(arrows) - done)}"
        done |= floor


def test_importing_a_module_changes_nothing():
    """No handler, no setting of the streams, no environment variable: that is for exit.run()."""
    names = sorted(name for name, path in NAMES.items() if path not in SCRIPTS and not name.startswith("model."))
    code = f"""
import importlib, os, signal, sys

def state():
    ours = {{name: value for name, value in os.environ.items() if name.startswith(("OMP", "ONEDNN", "LRU", "CUBLAS"))}}
    return ours, sys.excepthook, sys.stdout, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

before = state()
for name in {names!r}:
    importlib.import_module(name)
assert state() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


def test_the_path_to_the_first_step_can_be_counted(warm, ready):
    """tests/path_length.py prints how many lines a learner reads; it has seen the script, the loop and the loss."""
    words = "tutorial/train_llama2.py --model-name-or-path ./llama3-8b --dataset-name-or-path ./llama3_dataset.pt"
    done = warm(f"python {ROOT}/tests/path_length.py {words}", cwd=ready)
    lines = {name: int(count) for count, name in re.findall(r"^ *(\d+) (.+)$", done.stdout, re.MULTILINE)}
    total = lines.pop("in all")
    assert sum(lines.values()) == total
    assert {"tutorial/train_llama2.py", "common/trainer.py", "model/loss.py", "common/optim.py"} <= set(lines)


@pytest.mark.parametrize("words", ["--help", "--bach-size 8"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_and_a_mistyped_option_are_answered_before_torch_is_imported(script, words):
    source = (
        "import runpy, sys\n"
        f"sys.argv = [{str(script)!r}, *{words.split()!r}]\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n"
        "try:\n"
        f"    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=TIMEOUT)
    if words == "--help":
        assert done.returncode == 0 and "--" in done.stdout and done.stderr == ""
        assert ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))).splitlines()[0] in done.stdout
    else:
        assert done.returncode == 2 and done.stdout == ""
        line = f"error: unrecognized arguments: --bach-size 8. The options: python {script} --help\n"
        assert done.stderr == line


def test_the_eight_train_scripts_end_alike():
    """A learner who has read one has read them all; whoever copies one finds the same lines in each."""
    tails = {}
    for path in (ROOT / "tutorial").glob("train_*.py"):
        _, tail = path.read_text(encoding="utf-8").split("    # Imported here")
        tails[path.name] = tail
    assert len(tails) == 8 and len(set(tails.values())) == 1


def test_the_six_inference_scripts_of_one_question_end_alike():
    tails = set()
    for path in (ROOT / "tutorial").glob("inference_*.py"):
        if path.name != "inference_qwen3.py":  # a conversation goes on
            tails.add(path.read_text(encoding="utf-8").split("  # this one, or with --save-path")[1])
    assert len(tails) == 1


def test_the_seven_downloads_from_the_hub_end_alike():
    tails = set()
    for path in (ROOT / "tutorial").glob("download_*.py"):
        if path.name != "download_smollm2.py":
            text = path.read_text(encoding="utf-8").split('"""', 2)[2]
            tails.add(re.sub(r'"[^"]*"', '""', text))
    assert len(tails) == 1
