"""The house: which room imports which, how long they are, and how soon a script answers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from model.counts import can_count
from tests.conftest import ROOT, environment
from tests.page_packages import names_of

FOLDERS = ("common", "model", "dataset", "tutorial")
ROOMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
SCRIPTS = [path for path in ROOMS if "__main__" in path.read_text(encoding="utf-8")]
BELOW = {"common": {"common"}, "model": {"common", "model"}, "dataset": {"common", "dataset"}}
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOMS}


def imports(path):
    """The rooms of ours that `path` imports, inside its functions too."""
    names = [name for _, name in names_of(path.read_text(encoding="utf-8"))]
    found = {*names, *(name.rpartition(".")[0] for name in names)}  # of `from a import b`: a.b, and a
    return found & {*NAMES.values(), *FOLDERS}


def test_arrows_lead_downward_and_in_no_circle():
    arrows = {NAMES[path]: imports(path) for path in ROOMS}
    for name, others in arrows.items():
        folder = name.split(".")[0]
        for other in others:
            assert other.split(".")[0] in BELOW.get(folder, {"common", "model", "dataset"}), f"{name} imports {other}"
            # a script may be copied alone: nothing imports it
            assert ROOT.joinpath(*other.split(".")).with_suffix(".py") not in SCRIPTS, f"{name} imports {other}"
    done = set()
    while len(done) < len(arrows):  # rooms of the ground first, then those that stand on them alone
        floor = {name for name, others in arrows.items() if name not in done and others - {*FOLDERS} <= done | {name}}
        assert floor, f"in a circle: {sorted(set(arrows) - done)}"
        done |= floor


def test_no_room_is_too_large():
    limits = {"check_accelerator.py": 215, "evaluate.py": 150}
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOMS}
    assert not {NAMES[path]: length for path, length in lengths.items() if length > limits.get(path.name, 220)}


def test_the_way_to_the_first_step_is_short(warm, ready):
    words = "tutorial/train_llama2.py --model-name-or-path ./llama3-8b --dataset-name-or-path ./llama3_dataset.pt"
    done = warm(f"python {ROOT}/tests/path_length.py {words}", cwd=ready)
    lines = {name: int(count) for count, name in re.findall(r"^ *(\d+) (.+)$", done.stdout, re.MULTILINE)}
    total = lines.pop("in all")
    # 978 without checkpoints and without several processes (127, to share out and to meet): among them 160 to see how a
    # base is stored, what it is, and that no more and no less was loaded, 75 to see that the dataset file is whole, and
    # 110 for rows without padding and for memory that is used again, which make a CPU a fifth faster
    planned = {f"model/{room}.py" for room in ("fit", "plan", "counts", "on_paper")}  # a learner may pass it by
    assert planned <= set(lines) or not can_count()
    assert sum(lines.values()) == total
    assert sum(count for room, count in lines.items() if room not in planned) <= 1520, done.stdout
    assert sum(count for room, count in lines.items() if room in planned) <= 350, done.stdout
    # it has seen the way: the script, the loop, the loss, the optimizer
    assert {"tutorial/train_llama2.py", "common/training.py", "model/loss.py", "common/optimizer.py"} <= set(lines)


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
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
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
        _, tail = path.read_text(encoding="utf-8").split("    require_model(")
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
