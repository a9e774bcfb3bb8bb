"""A package that is missing, too old or made for another torch: one line that names what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.support.exit import UserError
from model import lora
from tests.conftest import ROOT, environment, run
from tests.helpers import TRAIN, contents, first_fast, needs_bitsandbytes, refusal, tells

LORA = f"{TRAIN} --use-lora"
FOUR_BIT = "requirements/requirements_4bit.txt"


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


# bitsandbytes is not installed, as far as Python goes.
HIDDEN = """
import importlib.metadata as metadata
import sys

find = metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name == "bitsandbytes":
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)


metadata.Distribution.from_name = classmethod(from_name)
sys.modules["bitsandbytes"] = None
"""
# A script with another package first on the path; in `warm`, torch is there already.
WITH = """
import runpy, sys
sys.path.insert(0, "site")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_4_bit_without_bitsandbytes(ready, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDDEN)
    before = contents(ready)
    done = run(f"{LORA} --load-in-4bit", cwd=ready, env={"PYTHONPATH": str(tmp_path / "site")}, ok=None)
    tells(done, "--load-in-4bit", "bitsandbytes 0.46", "it is not installed", f"pip install -r {FOUR_BIT}")
    assert contents(ready) == before
    assert (ROOT / FOUR_BIT).is_file()


def test_4_bit_with_a_bitsandbytes_that_is_too_old(ready, refused):
    installed = ready / "site" / "bitsandbytes-0.42.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.42.0\n")
    (ready / "with.py").write_text(WITH)
    words = ["bitsandbytes 0.46", "0.42.0 is installed", f"pip install -r {FOUR_BIT}"]
    for option in ("--load-in-4bit", "--load-in-8bit"):
        command = f"{LORA} {option}".replace("python ", "python with.py ")
        refused(command, tells_of=[f"{option} needs", *words])


@needs_bitsandbytes
def test_4_bit_with_a_bitsandbytes_for_another_torch(monkeypatch):
    """Its import fails, in a way of its own."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = ["--load-in-8bit needs bitsandbytes 0.46", f"does not work with torch {torch.__version__}", FOUR_BIT]
    with pytest.raises(UserError) as error:
        lora.quantization_config(8, torch.device("cpu"), torch.float32)
    assert not [word for word in words if word not in str(error.value)], error


def test_bitsandbytes_for_a_gpu_may_be_older_than_for_a_cpu(monkeypatch):
    monkeypatch.setattr("common.support.compat.version", lambda _: "0.45.1")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for device, error in (("cuda", "0.43.*does not work"), ("cpu", "0.46 or newer, and 0.45.1 is installed")):
        with pytest.raises(UserError, match=error):
            lora.quantization_config(4, torch.device(device), torch.float16)


def test_lora_with_a_peft_that_is_too_old(monkeypatch):
    monkeypatch.setattr("common.support.compat.version", lambda _: "0.9.0")
    problem = r"needs peft 0\.1\d or newer, and 0\.9\.0 is installed: pip install "
    with pytest.raises(UserError, match=f"--use-lora {problem}"):
        lora.add_lora(None, "./model", 16, 16, 0.0, ["all-linear"])
    with pytest.raises(UserError, match=f"an adapter {problem}"):
        lora.load_adapter(None, "./adapter")


@pytest.mark.parametrize("package", first_fast(1, ["gguf", "accelerate"]))
def test_smollm2_without_a_reader_of_its_format(package, folder, tmp_path):
    """As on a page that installs the packages of another tutorial: told before the download."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    done = run("python tutorial/download_smollm2.py", cwd=folder, env={"PYTHONPATH": str(tmp_path)}, ok=None)
    tells(done, package, "pip install -r requirements/requirements_smollm2.txt")
    assert contents(folder) == {}


@pytest.mark.parametrize("package, measure", first_fast(1, [("rouge_score", "summary"), ("sacrebleu", "text")]))
def test_what_judges_answers_is_told_before_any_is_made(package, measure, ready, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    before = contents(ready)
    words = f"--measure {measure} --base-model-name-or-path ./llama3-8b --dataset-name-or-path ./llama3_dataset.pt"
    command = f"python tutorial/evaluate.py --model-name-or-path ./llama3-8b {words}"
    done = run(command, cwd=ready, env={"PYTHONPATH": str(tmp_path)}, ok=None)
    tells(done, f"{package} is not installed: pip install '{package.replace('_', '-')}>=")  # of no tutorial
    assert contents(ready) == before and "Loading weights" not in done.stderr


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "activate").is_file(), reason="needs the environment of the page")
def test_a_shell_without_the_environment_is_told_to_activate_it(ready):
    """By the Python that the environment was made of, with no packages."""
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}"
    script = [python, "-S", ROOT / "dataset" / "prepare_llama3_dataset.py"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "is not installed: first activate the environment with . .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("package", first_fast(1, ["peft", "matplotlib", "psutil", "transformers", "tqdm"]))
def test_each_package_of_ours_is_named_with_its_file(package, ready, tmp_path):
    """matplotlib only draws a picture: the training goes on without it."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    command = f"{LORA if package == 'peft' else TRAIN} --max-train-steps 1"
    done = run(command, cwd=ready, env={"PYTHONPATH": str(tmp_path)}, ok=None)
    assert "pip install -r requirements/requirements_llama3.txt" in done.stdout + done.stderr
    if package == "matplotlib":
        assert done.returncode == 0 and f"{package} is not installed" in done.stdout
    else:
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
