"""The notebooks: they are what tests/notebook.py writes, and each runs from its first to its last cell."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

from tests import notebook, terminal
from tests.conftest import ROOT, TIMEOUT, environment, run
from tests.hub_server import HubServer
from tests.page_runner import APT, TOKEN, Mistake, Shell, compare, not_ignored, read
from tests.test_pages import PAGES, what_it_downloads

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


# ------------------------------------------------------------------------------------------------ as they are stored


def test_they_are_written_from_the_pages():
    """python tests/notebook.py --write writes them."""
    stored = {path: path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").iterdir()}
    assert stored == notebook.written()


@pytest.mark.parametrize("path", notebook.written(), ids=lambda path: path.stem)
def test_they_are_notebooks_without_outputs(path):
    content = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert len(code) > 14
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert len({cell.id for cell in content.cells}) == len(content.cells)


def test_each_marker_of_a_cell_is_on_a_page_that_has_a_notebook():
    marked = [page for page in PAGES if notebook.blocks_of((ROOT / page).read_text(encoding="utf-8"))]
    assert marked == sorted(["tutorial/install.md", *(f"tutorial/{kind}.md" for kind in notebook.KINDS)])


@pytest.mark.parametrize("line", ['echo "$HOME"', "echo {1..3}", "export A=1", ". .venv/bin/activate", "echo a \\"])
def test_what_a_notebook_would_run_as_something_else_is_no_cell(line):
    ((block,), _) = read(f"<!-- cell: a -->\n```bash\n{line}\n```")
    with pytest.raises(ValueError, match="can't be a cell"):
        notebook.code_of(block)


# ------------------------------------------------------------------------------------------------ in a real kernel


class Client(nbclient.NotebookClient):
    """Runs a notebook in a kernel of this Python, and types the token where a cell asks. An error ends it, also a
    command's after `!`."""

    def __init__(self, content, folder, env):
        super().__init__(
            content,
            timeout=TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--InteractiveShell.system_raise_on_error=True"],
            on_notebook_start=self.listen,
        )
        self.asked = []
        self.execute(env={**env, "IPYTHONDIR": str(folder.parent / "ipython")})

    async def listen(self, **_):
        self.kc.allow_stdin = True
        self.listener = asyncio.ensure_future(self.answer())

    async def answer(self):
        while True:
            message = await self.kc.get_stdin_msg(timeout=None)
            self.asked.append(message["content"])
            self.kc.input(TOKEN)


def printed(cell):
    """What a cell has printed, as it came."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def on_screen(text):
    """What is left of it to see: a carriage return begins the line again."""
    return "\n".join(re.split("\r+", line.rstrip("\r"))[-1] for line in text.split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", notebook.KINDS)
def test_from_the_first_to_the_last_cell(kind, tmp_path, warm, warm_hub, stand_in):
    """Without Colab and without a GPU; what is downloaded is as in tests/test_pages.py."""
    page = (ROOT / "tutorial" / f"{kind}.md").read_text(encoding="utf-8")
    downloads = what_it_downloads(page, warm, warm_hub, stand_in)
    with downloads, Shell(tmp_path, warm, warm_hub.url, warm.hf_home) as shell:
        content = nbformat.read(ROOT / "notebooks" / f"{kind}_colab.ipynb", as_version=4)
        client = Client(content, shell.folder, machine(shell, tmp_path / "colab"))
        assert not_ignored(shell) == []
    cells = {cell.id: cell for cell in content.cells if cell.cell_type == "code"}
    for cell in notebook.cells_of(kind):
        if cell.name:
            try:
                compare(cell.shows, on_screen(printed(cells[cell.name])), 0)
            except Mistake as mistake:
                pytest.fail(f"the cell {cell.name}: {mistake.args[1]}", pytrace=False)
    (curve,) = cells["curve"].outputs
    assert "image/png" in curve.data
    assert re.search(rf"^torch=={re.escape(version('torch'))}$", (shell.folder / "installed.txt").read_text(), re.M)
    assert "Would install" not in pip_install(kind, shell.folder / "installed.txt")
    asked = [{"prompt": "Hugging Face token: ", "password": True}] if kind == "llama3_1" else []
    assert client.asked == asked and TOKEN not in json.dumps(content)


def pip_install(kind, constraint):
    """What the real pip says of the notebook's packages, under the constraint that the notebook has made."""
    files = [ROOT / "requirements" / f"requirements_{name}.txt" for name in (kind, "4bit")]
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", files[0], "-r", files[1]]
    env = environment(PIP_CONSTRAINT=str(constraint))
    return subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def machine(shell, folder):
    """The environment of a kernel as Colab has it: git is there, and `python` is the one of the kernel. No GPU."""
    shell.apt.update(APT)
    shell.make_environment(folder)
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    return {**shell.environment, "PATH": f"{folder / 'bin'}{os.pathsep}{shell.environment['PATH']}"}


COLAB = {
    "drive": "from pathlib import Path\ndef mount(path): (Path(path) / 'MyDrive').mkdir(parents=True)",
    "files": "from pathlib import Path\ndef upload_file(name): Path(name).write_text('of mine')",
    "userdata": "from os import environ\ndef get(name): return environ['SECRET']",
}


@pytest.mark.slow
def test_the_cells_that_are_colabs_own(small):
    """With stand-ins for its three functions. A training whose directory is a link to the Drive goes on from there."""
    package = small / "colab" / "google" / "colab"
    package.mkdir(parents=True)
    for name, source in COLAB.items():
        (package / f"{name}.py").write_text(source, encoding="utf-8")
    cells = {cell.name: cell.source for cell in notebook.cells_of("llama3_1")}
    drive = cells["drive"].replace("USE_DRIVE = False", "USE_DRIVE = True").replace("/content", str(small))
    sources = [drive, cells["upload"], cells["token"], "os.environ['HF_TOKEN'][::-1]"]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    client = Client(content, small, environment(PYTHONPATH=str(small / "colab"), SECRET=TOKEN))
    assert (small / "my_data.csv").read_text() == "of mine" and client.asked == []
    assert [cell.outputs for cell in content.cells[:3]] == [[], [], []]
    assert content.cells[3].outputs[0].data["text/plain"] == repr(TOKEN[::-1])

    words = "tutorial/train_llama3.py --save-dir llama3_1_korean --max-train-steps 4"
    stop = f"{int(signal.SIGINT)} +common.trainer:Trainer.train_step 2"
    run(f"python {ROOT}/tests/killed.py {stop} {words}", cwd=small, ok=None)
    on_drive = small / "drive" / "MyDrive" / "llama3_1_korean"
    assert [path.name for path in on_drive.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "Resuming from step 2 of 4" in run(f"python {words}", cwd=small).stdout
    assert (on_drive / "model.safetensors").is_file() and (small / "llama3_1_korean").is_symlink()


BAR = re.compile(r"\d+%\|")
QUESTIONS = "--prompt-file questions.jsonl --save-path answers.jsonl"


def settings_of_bars():
    """{name: value} of the notebooks' settings for progress bars."""
    (cell,) = (cell for cell in notebook.cells_of("qwen3") if cell.name == "settings")
    return dict(re.findall(r"%env (TQDM_\w+)=(\w+)", cell.source))


@pytest.mark.slow
def test_a_progress_bar_is_one_line_that_moves(small):
    """Of a training, of a second bar below another, and of the hub's three: a notebook knows no way back up."""
    files = {path.name: path.read_bytes() for path in (small / "llama3-8b").iterdir()}
    (small / "questions.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    commands = {  # and how many bars are left to see when it has ended
        "train_llama3.py --max-train-steps 6 --log-interval 2 --eval-step 3": 2,
        f"inference_llama3.py --model-name-or-path llama3-8b {QUESTIONS}": 2,
        "download_llama3_8b.py --save-dir again": 3,
    }
    cells = [nbformat.v4.new_code_cell(f"!{sys.executable} tutorial/{command}") for command in commands]
    content = nbformat.v4.new_notebook(cells=cells)
    with HubServer(repos={"meta-llama/Meta-Llama-3-8B": files}) as hub:
        env = environment(HF_HOME=str(small / ".hf_home"), HF_ENDPOINT=hub.url, **settings_of_bars())
        Client(content, small, env)
    for cell, most in zip(cells, commands.values()):
        left = [line for line in on_screen(printed(cell)).splitlines() if BAR.search(line)]
        assert 0 < len(left) <= most, "\n".join(left)
        assert len(BAR.findall(printed(cell))) > most and "\x1b[A" not in printed(cell)


@pytest.mark.slow
def test_a_bar_is_shown_on_a_terminal_without_a_size(small):
    """As Colab's is; where tqdm asks for the size, it finds no line to write on."""
    command = [sys.executable, "tutorial/train_llama3.py", "--max-train-steps", "4"]
    env = environment(HF_HOME=str(small / ".hf_home"))
    _, hidden = terminal.run(command, [], small, env, size=(0, 0))
    status, shown = terminal.run([*command, "--save-dir", "b"], [], small, {**env, **settings_of_bars()}, size=(0, 0))
    assert status == 0 and "Training Done" in hidden
    assert "| 4/4 [" in shown and "| 4/4 [" not in hidden
