"""What the end-to-end tests share: the reader's own words, run in a folder that looks like the repository's root."""

from __future__ import annotations

import os

# Before torch is imported: on a busy machine the threads of a small product wait for each other, and the tests that run
# in this process take twenty times as long with two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ruff: isort: split
import json
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer

# a shell that runs the tests in the background ignores Ctrl-C for them, and they would hand that on to the scripts
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tutorial", "dataset", "common", "model", "requirements")
TIMEOUT = 1800  # seconds: against a command that hangs, never against a slow machine
NOWHERE = "http://127.0.0.1:9"  # no hub is there: a test that asks the real one by mistake fails, and soon


def lay_out(folder):
    """Make `folder` a working directory for the commands of the pages: the repository's folders under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    return folder


def environment(**more):
    """This process's variables less the tester's own settings, plus `more`."""
    own = re.compile(r"(HF|HUGGING|TRANSFORMERS|PIP|PYTHON|PYTEST|CUBLAS|OMP)_?|.*_proxy$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not own.match(name)}
    # one thread: two workers share a machine of two cores
    return {**kept, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": NOWHERE, "PIP_CONFIG_FILE": os.devnull, **more}


def words_of(command, words):
    first, *others = [*shlex.split(command), *map(str, words)]
    assert first == "python"
    return others


def run(command, *words, cwd, env=None, ok=True):
    """Run `command`, as the page has it ("python tutorial/..."), with further `words`, in a process of its own.

    ok: it must succeed. None: it may fail.
    """
    arguments = [sys.executable, *words_of(command, words)]
    env = environment(**{"HF_HOME": str(cwd / ".hf_home"), **(env or {})})
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    return checked(done, ok)


def start(command, *words, cwd, own_group=False, **env):
    """As `run`, but does not wait: the Popen. What it prints comes at once. own_group: it leads a process group."""
    arguments = [sys.executable, *words_of(command, words)]
    env = environment(HF_HOME=str(cwd / ".hf_home"), PYTHONUNBUFFERED="1", **env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=cwd, env=env, start_new_session=own_group, **pipes)


def checked(done, ok):
    if ok:
        assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


# Three of the four seconds of a command go into importing torch and transformers. A process that has imported them, and
# nothing of this repository, forks: the child becomes the script. It ends with the exit status that Python would have,
# but does not take all modules apart, as Python does: 0.3 s, for memory shared with the server has to be copied.
SERVER = """
import atexit, json, logging, os, runpy, sys, threading
import torch, pyarrow.parquet
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import GPT2LMHeadModel, LlamaForCausalLM

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says something at its import
try:
    import peft, bitsandbytes.optim
except Exception:  # no bitsandbytes, or one that is too old for this machine
    pass
import datasets

print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    child = os.fork()
    if not child:
        break
    status = os.waitpid(child, 0)[1]
    print(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), flush=True)

__import__("gc").freeze()  # else a collection in the child looks through all that the server has imported, 0.7 s
job = json.loads(line)



def opened(path, flags):
    if path:
        return os.open(path, flags)
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


for number, path in enumerate((job["in"], job["out"], job["err"])):
    os.dup2(opened(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
if "PYTHONIOENCODING" in job["env"]:  # which Python reads at its start
    sys.stdout.reconfigure(encoding=job["env"]["PYTHONIOENCODING"])
    sys.stderr.reconfigure(encoding=job["env"]["PYTHONIOENCODING"])
os.chdir(job["cwd"])
os.environ.update(job["env"])
sys.argv = job["argv"]
sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))


def exit_status(code):
    if code is None or isinstance(code, int):
        return (code or 0) & 255
    print(code, file=sys.stderr)
    return 1


try:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except Exception as error:
        status, sys.last_value = 1, error
        sys.excepthook(*sys.exc_info())
except SystemExit as end:
    status = exit_status(end.code)
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


class Warm:
    """Runs scripts as `run` does, without the three seconds of importing torch.

    `hub`: the address of the model hub, and `hf_home`: its library's folder. They are the same for all scripts.
    """

    def __init__(self, folder, hub=NOWHERE):
        self.folder, self.hf_home = folder, folder / "hf_home"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVER],
            cwd=folder,
            env=environment(HF_HOME=str(self.hf_home), HF_ENDPOINT=hub),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.answer() == "ready"

    def answer(self):
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"no end after {TIMEOUT} s")
        return self.process.stdout.readline().strip()

    def __call__(self, command, *words, cwd, env=None, ok=True, typed="", into=None):
        """As `run`. typed: what its standard input has; into: a file for its standard output, "" for a
        pipe that nobody reads."""
        typed_in, out, err = (self.folder / name for name in ("in", "out", "err"))
        typed_in.write_text(typed, encoding="utf-8")
        argv = words_of(command, words)
        job = {"argv": argv, "cwd": str(cwd), "env": env or {}, "in": str(typed_in), "err": str(err)}
        job["out"] = str(out) if into is None else into
        out.write_text("")
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.answer())
        encoding = (env or {}).get("PYTHONIOENCODING", "utf-8")
        texts = [path.read_text(encoding=encoding) for path in (out, err)]
        return checked(subprocess.CompletedProcess(argv, status, *texts), ok)

    def close(self):
        self.process.stdin.close()
        self.process.wait(TIMEOUT)


@pytest.fixture(scope="session")
def warm_hub():
    """The model hub that `warm` asks: it has nothing, but for what a test puts there and takes away again."""
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="session")
def warm(warm_hub, tmp_path_factory):
    server = Warm(tmp_path_factory.mktemp("warm"), warm_hub.url)
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    """A fresh working directory for the commands of the pages."""
    return lay_out(tmp_path / "work")


@pytest.fixture(scope="session")
def base(warm, tmp_path_factory):
    """A folder in which Llama3's stand-in has been downloaded and its data prepared, in rows of 128 tokens."""
    folder = lay_out(tmp_path_factory.mktemp("base") / "work")
    warm("python tutorial/download_llama3_8b.py --tiny", cwd=folder)
    sample = "dataset/samples/cnn_dailymail"
    warm(f"python dataset/prepare_llama3_dataset.py --dataset-name-or-path {sample} --block-size 128", cwd=folder)
    return folder


@pytest.fixture
def ready(folder, base):
    """A fresh working directory with the model directory and the dataset file of `base`, a copy of each."""
    shutil.copytree(base / "llama3-8b", folder / "llama3-8b")
    shutil.copy(base / "llama3_dataset.pt", folder)
    return folder


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """{kind: directory} of every stand-in that this transformers can have; to be read only."""
    from model.tiny import write_tiny
    from tests.helpers import KINDS

    root = tmp_path_factory.mktemp("stand-ins")
    for kind in KINDS:
        write_tiny(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="session")
def stand_in(warm, tmp_path_factory):
    """A function: the files of the stand-in that a script of ours downloads with --tiny."""
    place, known = tmp_path_factory.mktemp("stand-ins"), {}

    def files(script):
        if script.name not in known:
            warm(f"python {script} --tiny", "--save-dir", place / script.stem, cwd=place)
            known[script.name] = {file.name: file.read_bytes() for file in (place / script.stem).iterdir()}
        return known[script.name]

    return files


@pytest.fixture(scope="session")
def tokenizers(stand_ins):
    """{kind: tokenizer} of the same."""
    from common.tokenization import load_tokenizer

    return {kind: load_tokenizer(str(directory)) for kind, directory in stand_ins.items()}


@pytest.fixture(scope="session")
def small_base(base, warm, tmp_path_factory):
    """As `base`, with rows of 48 tokens: a step takes a twentieth of a second."""
    folder = lay_out(tmp_path_factory.mktemp("small-base") / "work")
    shutil.copytree(base / "llama3-8b", folder / "llama3-8b")
    sample = "dataset/samples/cnn_dailymail"
    warm(f"python dataset/prepare_llama3_dataset.py --dataset-name-or-path {sample} --block-size 48", cwd=folder)
    return folder


@pytest.fixture
def small(small_base, tmp_path):
    """A fresh working directory with the model directory and the dataset file of `small_base`, a copy of each."""
    return shutil.copytree(small_base, tmp_path / "small", symlinks=True)


@pytest.fixture(scope="session")
def never_cut(small_base, warm, tmp_path_factory):
    """A function: the working directory, to be read only, of a training with these words that nothing has cut, and that
    has written no checkpoint."""
    made = {}

    def folder_of(words):
        if words not in made:
            made[words] = shutil.copytree(small_base, tmp_path_factory.mktemp("never-cut") / "work", symlinks=True)
            done = warm(f"python tutorial/train_llama3.py {words}", cwd=made[words])
            assert "Continuing" not in done.stdout
        return made[words]

    return folder_of
