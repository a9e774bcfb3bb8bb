"""The check of tests/page_packages.py: it finds what a page does not install, and no more."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT, run
from tests.page_packages import OPTIONAL, Command, imports, missing
from tests.page_runner import Shell, mistakes, requirements


def lacks(script, *words, files, before=(), optional=OPTIONAL):
    path = ROOT / script
    command = Command(
        ROOT, path, path.read_text(encoding="utf-8"), list(words), [(ROOT / name).read_text() for name in before]
    )
    names = [one.name for file in files for one in requirements(ROOT / "requirements" / f"requirements_{file}.txt")]
    return missing(command, names, optional)


OLD_PAGE = """```bash
sudo apt-get update
sudo apt-get install git python3-venv
git clone REPOSITORY_ADDRESS quickstart
cd quickstart
python3 -m venv .venv
. .venv/bin/activate
```

```bash
pip install -r requirements/requirements_llama3_1.txt
pip install -r requirements/requirements_4bit.txt
```

```bash
python tutorial/download_smollm2.py
```
"""


@pytest.mark.slow
def test_a_page_that_does_not_install_what_its_script_needs(tmp_path):
    """As the page of Llama 3.1 once did: the reader got a traceback, and the tests had gguf."""
    example = ROOT / "tutorial" / "example.md"
    with Shell(tmp_path, run) as shell:
        (found,) = mistakes(OLD_PAGE, example, shell)
    assert found.startswith("tutorial/example.md:16: ")
    assert "tutorial/download_smollm2.py:" in found and "imports gguf" in found
    (tmp_path / "mended").mkdir()
    with Shell(tmp_path / "mended", run) as shell:
        assert mistakes(OLD_PAGE.replace("4bit", "smollm2"), example, shell) == []


@pytest.mark.parametrize(
    "package, script, words, files, before",
    [
        ("bitsandbytes", "tutorial/train_llama2.py", ["--load-in-4bit"], ["llama2"], []),
        ("bitsandbytes", "tutorial/inference_llama2.py", ["--load-in-8bit"], ["llama2"], []),
        ("bitsandbytes", "tutorial/train_llama3_1.py", [], ["llama3_1"], []),
        ("gguf", "tutorial/download_smollm2.py", [], ["mistral"], []),
        ("rouge_score", "tutorial/evaluate.py", [], ["mistral"], ["dataset/prepare_llama2_dataset.py"]),
        ("tensorboard", "tutorial/train_llama2.py", ["--report-to", "tensorboard"], ["llama2"], []),
        ("wandb", "tutorial/train_llama2.py", ["--report-to", "wandb"], ["llama2"], []),
    ],
)
def test_what_is_missing(package, script, words, files, before):
    (found,) = lacks(script, *words, files=files, before=before)
    assert found.endswith(f" imports {package}")


@pytest.mark.parametrize(
    "package, script, words, files",
    [
        ("bitsandbytes", "tutorial/train_llama2.py", [], ["llama2"]),
        ("bitsandbytes", "tutorial/train_llama3_1.py", ["--no-quantization"], ["llama3_1"]),
        ("gguf", "tutorial/download_smollm2.py", ["--tiny"], ["mistral"]),
        ("rouge_score", "tutorial/evaluate.py", [], ["mistral"]),
        ("tensorboard", "tutorial/train_llama2.py", [], ["llama2"]),
        ("wandb", "tutorial/train_llama2.py", [], ["llama2"]),
    ],
)
def test_each_exception_is_needed(package, script, words, files):
    """A reader runs these without the package."""
    assert lacks(script, *words, files=files) == []
    (found,) = lacks(script, *words, files=files, optional={**OPTIONAL, package: lambda command: True})
    assert found.endswith(f" imports {package}")


def test_imports_are_followed():
    """Into the repository's modules, functions, packages required by packages; not into the standard library."""
    path = ROOT / "tutorial" / "train_llama2.py"
    found = imports(Command(ROOT, path, path.read_text(encoding="utf-8"), [], []))
    assert found["torch"].split(":")[0].startswith(("common/", "model/")) and "peft" in found and "psutil" in found
    assert not {"common", "model", "dataset", "sys", "pathlib", "__future__"} & {*found}
    nothing = missing(Command(ROOT, path, "import numpy, safetensors, jinja2", [], []), ["transformers", "torch"])
    assert nothing == []
    assert any(line.endswith(" imports transformers") for line in lacks("tutorial/train_llama2.py", files=[]))
