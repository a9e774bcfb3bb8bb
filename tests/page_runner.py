"""The Korean pages and the README, followed to the letter: what a page shows is what a reader gets.

A page's blocks run in order, as in one terminal: where a block went (`cd`), what it activated and exported, the next
one finds. A page that clones the repository begins in an empty folder on a machine without packages; any other one in
a clone whose environment is activated. A page's source says what a block is (a marker is an HTML comment on the line
before the fence, where GitHub doesn't show it):

    ```bash                          runs as one `bash -e` script
    ```pycon                         `>>>` lines, run and compared one by one
    ```python                        runs as a script
    ```text                          what the block before it prints: any number in place of a number, everything else
                                     by the letter; a line `...` or `…` is any number of lines, `…` in a line any text
    ```diff                          applied to the clone's files, as `patch -p1` does
    <!-- not run: REASON -->         bash, pycon, python, diff: left out, and counted in test_pages.py
    <!-- recorded: NAME -->          text: by the letter what a real run of the command before it printed, which
                                     tests/recorded/NAME.json holds (tests/record.py)
    <!-- Ctrl-C: after step 3 -->    bash: its training hears Ctrl-C as soon as that step is done, and ends by it
    <!-- typed: a | b -->            bash: its script runs in a terminal, where a reader types a, b and an empty line
    <!-- from: tutorial/x.py -->     python: quoted code; it must stand in that file (`...`: lines left out)
    <!-- file: my_data.jsonl -->     any language: a file of the reader's
    <!-- cell: train -->             bash, python, file: a cell of the notebooks, too (tests/notebook.py)

Links must lead somewhere, and what a page writes must be ignored by git. Whatever else stands in a fence is a mistake,
named with page and line.

Every command runs as the page has it, but for what comes from outside, which is on this machine already:

    sudo apt-get                     installs nothing; git, make and `python3 -m venv` work only after it named them
    git clone REPOSITORY_ADDRESS     copies this working tree
    python3 -m venv                  an environment whose python is that of the tests. Before it there is no `python`
    pip install                      finds what it is told to install among the tests' own packages, or fails; torch's
                                     index of CPU builds has the torch of the tests. A script may then import only what
                                     came with these (tests/page_packages.py)
    the model hub                    one on 127.0.0.1, with stand-ins for the models and with dataset/samples
    hf auth login                    is told the token of that hub, which stands in place of YOUR_TOKEN as well
    tutorial/download_smollm2.py     with --tiny: its model comes from the package registry
    torchrun --nproc-per-node 8      starts two processes, on the CPU: eight GPUs are not here
"""

from __future__ import annotations

import codeop
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Set, Tuple
from urllib.parse import unquote, urlsplit

import pytest
from packaging.requirements import InvalidRequirement, Requirement

from tests import terminal
from tests.conftest import FOLDERS, NOWHERE, ROOT, TIMEOUT, environment
from tests.page_packages import Command, missing
from tests.record import read_record

INTERRUPTED = 128 + signal.SIGINT  # the exit status of a training after Ctrl-C

# ------------------------------------------------------------------------------------------------ the reader's machine

TOKEN = "hf_of_mine"
# what a reader replaces
PLACEHOLDERS = {"YOUR_TOKEN": TOKEN}
ADDRESS = "REPOSITORY_ADDRESS"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What is another text on another machine: (pattern, what takes its place), in the page and in the output alike.
MACHINE = (
    (re.compile(r"^Device: .*"), "Device: (a name and a type)"),
    (re.compile(r"(?<=\d)\+(cpu|cu\d+|rocm[\d.]+)\b"), ""),  # the build, in the version of torch
    (re.compile(r"(?<=\d )MB\b"), "GB"),  # the plan of a tiny model is in MB
)
# of Debian, whose python3 has no packages and refuses to install any
SYSTEM = ("sudo", "git", "make", "python", "python3", "pip", "pip3", "hf", "huggingface-cli", "torchrun")
VENV = ("python", "python3", "pip", "pip3", "hf", "huggingface-cli", "torchrun")
PAGE = ".page.py"  # a page's own code, while it runs
APT = ("git", "make", "python3", "python3-venv")  # packages that a page may install

# A command of the reader's machine. It asks the test what that does: the test says what it printed, or what to execute.
CLIENT = """
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as server:
    job = {{"words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
    server.sendall(json.dumps(job).encode() + b"\\n")
    answer = json.loads(server.makefile("rb").readline())
if "words" in answer:
    os.execv(answer["words"][0], answer["words"])
sys.stdout.buffer.write(answer["out"].encode())
sys.stderr.buffer.write(answer["err"].encode())
sys.exit(answer["status"])
"""
# Before a block: what the blocks before it left in the shell. After it: all of that again, for the next.
STATE = """
trap '{{ declare -p | grep -Ev "^declare -[A-Za-z]*r"; declare -f; printf "cd %q\\n" "$PWD"; }} >"{state}"' EXIT
. "{state}" 2>/dev/null || :
"""


class Refused(Exception):
    """(exit status, what the command says)"""


class Shell:
    """The reader's shell. `place`: an empty folder for the machine's files.

    `go` runs a script, as tests.conftest.run does. `hub`: the address of the model hub. `home`: where the hub's library
    keeps its own. `ready`: there is a clone with an environment, and the shell is in it; by these commands the packages
    came into that. None: there is nothing yet.
    """

    def __init__(self, place: Path, go, hub: str = NOWHERE, home: Optional[Path] = None, ready: Optional[str] = None):
        self.place, self.go = place, go
        self.folder, self.bin, self.state = place / "page", place / "bin", place / "state"
        self.clone: Optional[Path] = None
        self.given: Set[Path] = set()  # what came with the clone, and what the page told to write
        self.apt: Set[str] = set()
        self.installed: Set[str] = set()  # packages that pip was told to install
        self.sources: List[str] = []  # of the scripts that ran
        self.page_imports = ""
        self.port = free_port()  # torchrun's: other pages are followed at the same time
        self.cut_after = 0  # the step of a training at which Ctrl-C is pressed
        self.typed: List[str] = []  # what the reader types into a script
        shell = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                job = json.loads(self.rfile.readline())
                try:
                    answer = shell.answer(Path(job["words"][0]), job["words"][1:], Path(job["cwd"]), job["env"])
                except Refused as refused:
                    answer = {"out": "", "err": f"{refused.args[1]}\n", "status": refused.args[0]}
                self.wfile.write(json.dumps(answer).encode() + b"\n")

        for folder in (self.folder, self.bin):
            folder.mkdir()
        # a script may run a command as well, while it is being answered
        self.server, self.one_script = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler), threading.Lock()
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.client = place / "client.py"
        self.client.write_text(CLIENT.format(port=self.server.server_address[1]), encoding="utf-8")
        (place / "before").write_text(STATE.format(state=self.state), encoding="utf-8")
        self.put(self.bin, SYSTEM)
        # without the environment of the tests, if that is activated
        others = [path for path in os.environ["PATH"].split(os.pathsep) if Path(path) != Path(sys.executable).parent]
        self.others = os.pathsep.join(others)
        self.environment = environment(
            HF_HOME=str(home or place / "hf_home"),
            HF_ENDPOINT=hub,
            PIP_NO_INDEX="1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            CUDA_VISIBLE_DEVICES="",  # the laptop of the pages has no GPU
            HIP_VISIBLE_DEVICES="",
            PET_MASTER_PORT=str(self.port),
            PATH=f"{self.bin}{os.pathsep}{self.others}",
        )
        self.environment.pop("VIRTUAL_ENV", None)
        if ready is not None:
            self.apt.update(APT)
            self.copy(self.folder / "quickstart")
            self.make_environment(self.folder / "quickstart" / ".venv")
            status, out, err = self(f"cd quickstart; . .venv/bin/activate; {ready}")
            assert status == 0, out + err

    def __call__(self, script: str) -> Tuple[int, str, str]:
        """(exit status, standard output, standard error) of a script of bash."""
        for placeholder, value in PLACEHOLDERS.items():
            script = script.replace(placeholder, value)
        block = self.place / "block"
        block.write_text(f'. "{self.place}/before"; {script}', encoding="utf-8")
        process = subprocess.Popen(
            ["bash", "-e", block],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nno end after {TIMEOUT} s"
        return process.returncode, out, err.replace(f"{block}: ", "")

    def python(self, source: str, imports: str = "") -> Tuple[int, str, str]:
        """The same of a Python script. `imports`: code in which its imports are, where it is not the source itself."""
        script = self.cwd / PAGE  # in the folder, from which it then imports, as `python` does there
        script.write_text(source, encoding="utf-8")
        self.page_imports = imports or source
        try:
            return self(f"python {PAGE}")
        finally:
            script.unlink()

    @property
    def cwd(self) -> Path:
        """Where the reader is."""
        if not self.state.exists():
            return self.folder
        return Path(subprocess.run(["bash", "-c", f'. "{self.state}" 2>/dev/null; pwd'], **CAPTURED).stdout.strip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # -- what the commands do: each returns what CLIENT expects

    def answer(self, path: Path, words: List[str], cwd: Path, env: Dict[str, str]) -> dict:
        name = path.name
        if path.parent == self.bin:
            if name == "sudo":
                return self.sudo(words)
            if name == "python3" and words[:2] == ["-m", "venv"]:
                return self.venv(words[2:], cwd)
            if name == "python3":  # -S: without packages
                return {"words": [sys.executable, "-IS", *words]}
            if name not in self.apt:
                raise Refused(127, f"bash: {name}: command not found")
            if name == "git" and words[:1] == ["clone"]:
                return self.git_clone(words[1:], cwd)
            return {"words": [shutil.which(name, path=self.others), *words]}
        if name.startswith("pip"):
            return self.pip(words, cwd, env)
        if name.startswith("python"):
            return self.run_python(words, cwd, env)
        if name == "torchrun":
            words = self.torchrun(words, cwd)
        return self.tool(name, words)

    def sudo(self, words: List[str]) -> dict:
        if words == ["apt-get", "update"]:
            self.apt.add("update")
        elif words[:2] == ["apt-get", "install"]:
            packages = [word for word in words[2:] if word != "-y"]
            if "update" not in self.apt:
                raise Refused(100, "E: the list of packages is empty: sudo apt-get update comes first")
            unknown = sorted({*packages} - {*APT}) or [None] * (not packages)
            if unknown:
                raise Refused(100, f"E: Unable to locate package {unknown[0]}")
            self.apt.update(packages)
        else:
            raise Refused(1, f"sudo {' '.join(words)}: only apt-get update and apt-get install have a stand-in")
        return SILENT

    def git_clone(self, words: List[str], cwd: Path) -> dict:
        if len(words) != 2 or words[0] != ADDRESS or (cwd / words[1]).exists():
            raise Refused(128, f"fatal: git clone {ADDRESS} FOLDER, where FOLDER does not exist yet")
        self.copy(cwd / words[1])
        return SILENT

    def copy(self, target: Path) -> None:
        """Copies, because a page may write beside the scripts."""
        target.mkdir()
        for name in FOLDERS:
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":
                shutil.copy(path, target)
        self.clone, self.given = target, {path for path in target.rglob("*") if path.is_file()}

    def venv(self, words: List[str], cwd: Path) -> dict:
        if "python3-venv" not in self.apt:
            raise Refused(1, "The virtual environment was not created successfully because ensurepip is not available.")
        if len(words) != 1 or words[0].startswith("-"):
            raise Refused(2, "python3 -m venv FOLDER")
        self.make_environment(cwd / words[0])
        return SILENT

    def make_environment(self, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        venv.EnvBuilder(symlinks=True).create(target)
        for path in (target / "bin").glob("*python*"):
            path.unlink()
        self.put(target / "bin", VENV)
        self.installed = set()

    def put(self, folder: Path, names: Tuple[str, ...]) -> None:
        for name in names:
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{self.client}" "$0" "$@"\n', encoding="utf-8")
            path.chmod(0o755)

    def run_python(self, words: List[str], cwd: Path, env: Dict[str, str]) -> dict:
        if words[:2] == ["-m", "pip"]:
            return self.pip(words[2:], cwd, env)
        if words[:2] == ["-m", "venv"]:
            return self.venv(words[2:], cwd)
        if not words or not words[0].endswith(".py"):
            return {"words": [sys.executable, *words]}
        script = cwd / words[0]
        self.require_packages(script, words[1:], cwd)
        if script.name == "download_smollm2.py" and "--tiny" not in words:
            words = [*words, "--tiny"]
        if self.typed:
            lines, self.typed = [f"{line}\n".encode() for line in (*self.typed, "")], []
            status, shown = terminal.run([sys.executable, *words], lines, cwd, {**env, "PYTHONUTF8": "1"})
            return {"out": shown, "err": "", "status": status % 256}
        if self.cut_after:
            place = "+common.trainer:Trainer.train_step"
            words = [str(ROOT / "tests" / "killed.py"), str(int(signal.SIGINT)), place, str(self.cut_after), *words]
        try:
            with self.one_script:
                done = self.go("python", *words, cwd=cwd, env=env, ok=None)
        except (subprocess.TimeoutExpired, pytest.fail.Exception) as error:  # of `run`, of `warm`
            raise Refused(124, str(error)) from None
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode  # as a shell has it
        return {"out": done.stdout, "err": done.stderr, "status": status}

    def require_packages(self, script: Path, words: List[str], cwd: Path) -> None:
        """Refused where the script needs what no command of the page has installed."""
        if script.is_file():
            source = self.page_imports if script.name == PAGE else script.read_text(encoding="utf-8")
            lacks = missing(Command(self.clone or cwd, script, source, words, self.sources), self.installed)
            if lacks:
                raise Refused(1, f"no package that this page installs has what {'; '.join(lacks)}")
            self.sources.append(source)

    def torchrun(self, words: List[str], cwd: Path) -> List[str]:
        """The words of a torchrun that starts two processes at most, and meets at a port of this page's own."""
        at = next((place for place, word in enumerate(words) if word.endswith(".py")), len(words))
        if at < len(words):
            self.require_packages(cwd / words[at], words[at + 1 :], cwd)
        own = re.sub(r"(?<=localhost:)\d+", str(self.port), " ".join(words[:at]))
        own = re.sub(r"(--nproc-per-node[ =])(?:[3-9]|\d\d+)\b", r"\g<1>2", own)
        return [*own.split(), *words[at:]]

    def tool(self, name: str, words: List[str]) -> dict:
        """A command that comes with a package."""
        path = Path(sys.executable).parent / name
        if not path.exists():
            raise Refused(127, f"bash: {name}: command not found")
        if words in (["auth", "login"], ["login"]):
            words = [*words, "--token", TOKEN]  # what the reader types
        return {"words": [str(path), *words]}

    def pip(self, words: List[str], cwd: Path, env: Dict[str, str]) -> dict:
        if words[:1] != ["install"]:
            return {"words": [sys.executable, "-m", "pip", *words]}
        if "PIP_CONSTRAINT" in env:
            requirements(cwd / env["PIP_CONSTRAINT"])
        wanted: List[Requirement] = []
        words, index = words[1:], None
        while words:
            word = words.pop(0)
            if word in ("-r", "--requirement", "-c", "--constraint", "--index-url") and not words:
                raise Refused(2, f"pip install: {word} option requires 1 argument")
            if word in ("-r", "--requirement"):
                wanted += requirements(cwd / words.pop(0))
            elif word in ("-c", "--constraint"):
                requirements(cwd / words.pop(0))
            elif word == "--index-url":
                index = words.pop(0)
            elif word.startswith("-") and word not in ("--quiet", "-q", "--upgrade", "-U"):
                raise Refused(2, f"pip install: the stand-in of the tests has no option {word}")
            elif not word.startswith("-"):
                wanted += [requirement(word)]
        if index not in (None, CPU_INDEX) or (index and {one.name for one in wanted} != {"torch"}):
            raise Refused(1, f"pip install: only {CPU_INDEX} has a stand-in, and it has but torch")
        for one in wanted:
            try:
                found = version(one.name)
            except PackageNotFoundError:
                found = None
            if found is None or not one.specifier.contains(found, prereleases=True):
                raise Refused(1, f"ERROR: No matching distribution found for {one} (the tests have {found})")
        self.installed.update(one.name for one in wanted)
        return {"out": "".join(f"Installed: {one}\n" for one in wanted), "err": "", "status": 0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


SILENT = {"out": "", "err": "", "status": 0}
WITHOUT_CONFIG = environment(GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL=os.devnull, XDG_CONFIG_HOME=os.devnull)
CAPTURED = {"capture_output": True, "text": True, "check": True}


def requirement(text: str) -> Requirement:
    try:
        return Requirement(text)
    except InvalidRequirement as error:
        raise Refused(1, f"ERROR: Invalid requirement: {text!r}: {error}") from None


def requirements(path: Path) -> List[Requirement]:
    """What a requirements file asks for."""
    if not path.is_file():
        raise Refused(1, f"ERROR: Could not open requirements file: No such file or directory: '{path}'")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            found += requirements(path.parent / line[len("-r ") :].strip())
        elif line:
            found.append(requirement(line))
    return found


# ------------------------------------------------------------------------------------------------ what a page says

FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*([^`\s]*)[^`]*")
COMMENT = re.compile(r"\s*<!--(.*?)-->\s*")
MARKER = re.compile(r"(not run|recorded|Ctrl-C|typed|from|file|cell): (\S.*)")


class Block(NamedTuple):
    language: str
    lines: List[str]
    line: int  # number of the first of them in the page
    marks: Dict[str, str]  # from a marker's kind to its words

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


RUN = ("bash", "pycon", "python")


class Mistake(Exception):
    """(line of the page, what is wrong there)"""


def read(text: str) -> Tuple[List[Block], List[str]]:
    """(blocks, lines of the page with the blocks' own lines empty). Mistake where a fence or a marker is broken."""
    blocks, prose = [], text.splitlines()
    start: Optional[int] = None
    for number, line in enumerate(text.splitlines()):
        fence = FENCE.fullmatch(line)
        if start is None and fence:
            start, (indent, ticks, language) = number, fence.groups()
        elif start is not None:
            if re.fullmatch(rf" *{ticks}{ticks[0]}*\s*", line):
                lines = [line[len(indent) :] for line in text.splitlines()[start + 1 : number]]
                blocks.append(Block(language, lines, start + 2, _marks(prose, start)))
                start = None
            prose[number] = ""
    if start is not None:
        raise Mistake(start + 1, "this fence is never closed")
    return blocks, [re.sub(r"<!--.*?-->", "", line) if not FENCE.fullmatch(line) else "" for line in prose]


def _marks(lines: List[str], fence: int) -> Dict[str, str]:
    marks = {}
    while fence and COMMENT.fullmatch(lines[fence - 1]):
        fence -= 1
        mark = MARKER.fullmatch(COMMENT.fullmatch(lines[fence]).group(1).strip())
        if not mark:
            raise Mistake(fence + 1, f"unknown marker {lines[fence].strip()}")
        marks[mark.group(1)] = mark.group(2)
    return marks


def commands(blocks: List[Block]) -> List[Block]:
    """The blocks that a reader runs."""
    return [block for block in blocks if block.language in RUN and not {"from", "file"} & {*block.marks}]


# ------------------------------------------------------------------------------------------------ comparing

NUMBER = re.compile(r"(?<![\w.\-])-?(?:\d+(?:\.\d+){2,}|\d+(?:,\d{3})+|\d+(?:\.\d*)?(?:e[+-]?\d+)?)")


def pattern_of(line: str) -> str:
    """A regular expression for what may stand in place of a line that a page shows."""
    parts, end = [], 0
    for number in NUMBER.finditer(line):
        parts.append(_by_the_letter(line[end : number.start()]))
        whole = "." not in number.group() and "e" not in number.group()
        parts.append(r"-?\d[\d,]*" if whole else r"-?\d+(?:\.[\d.]*(?:e[+-]?\d+)?|e[+-]?\d+)")
        end = number.end()
    return "".join([*parts, _by_the_letter(line[end:])])


def _by_the_letter(text: str) -> str:
    text = re.escape(text).replace(re.escape("…"), ".*")
    # columns of a table move with the width of its numbers
    return re.sub(r"(?<!^)(?:\\ ){2,}", r"\\ +", text)


def difference(shown: List[str], said: List[str], by_letter: bool = False) -> Optional[int]:
    """The first of the shown lines that does not fit what was said, len(shown) where that goes on; None: it fits.

    by_letter: numbers, and what is another text on another machine, are compared too.
    """
    shown, said = ([line.rstrip() for line in lines] for lines in (shown, said))
    if not by_letter:
        shown, said = ([_here_as_anywhere(line) for line in lines] for lines in (shown, said))
    places = {0}  # in what was said, up to which the lines so far may have gone
    for number, line in enumerate(shown):
        if line in ("...", "…"):
            places = {*range(min(places), len(said) + 1)}
            continue
        pattern = re.compile(re.escape(line) if by_letter else pattern_of(line))
        places = {place + 1 for place in places if place < len(said) and pattern.fullmatch(said[place])}
        if not places:
            return number
    return None if len(said) in places else len(shown)


def _here_as_anywhere(line: str) -> str:
    for pattern, replacement in MACHINE:
        line = pattern.sub(replacement, line)
    return line


def compare(shown: List[str], said: str, line: int) -> None:
    """Mistake where `shown`, from `line` of the page on, is not what was said."""
    shown, lines = "\n".join(shown).rstrip().split("\n"), said.rstrip().split("\n")
    at = difference(shown, lines)
    if at is None:
        return
    what = "the output goes on where the page ends" if at == len(shown) else f"the page shows {shown[at]!r}"
    raise Mistake(line + min(at, len(shown) - 1), f"{what}; the whole output is\n{textwrap.indent(said, '    ')}")


# ------------------------------------------------------------------------------------------------ following a page


class Reader:
    """Follows a page's blocks in a shell."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.said: Optional[Tuple[str, ...]] = None  # by the command before: what may be compared. (): it did not run
        self.command = ""  # the block before

    def follow(self, block: Block) -> None:
        """Mistake where the page doesn't tell the truth."""
        follow = getattr(self, f"_{block.language}", None)
        if block.language in RUN:
            self.command = block.text
        if "file" in block.marks:
            target = self.shell.cwd / block.marks["file"]
            if self.shell.folder not in target.resolve().parents:
                raise Mistake(block.line - 1, f"{block.marks['file']} is outside the page's folder")
            self.shell.given.add(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif "not run" in block.marks and block.language in (*RUN, "diff"):
            self.said = ()
        elif follow is None:
            raise Mistake(block.line - 1, f"a fence of {block.language or 'no language'} needs a marker")
        else:
            follow(block)

    def _bash(self, block: Block) -> None:
        cut = block.marks.get("Ctrl-C")
        step = re.fullmatch(r"after step (\d+)", cut or "after step 0")
        if not step:
            raise Mistake(block.line - 2, f"after which step? {cut!r} does not tell")
        self.shell.cut_after = int(step.group(1))
        self.shell.typed = [line.strip() for line in block.marks.get("typed", "").split("|") if line.strip()]
        try:
            status, out, err = self.shell(block.text)
            untyped = self.shell.typed
        finally:
            self.shell.cut_after, self.shell.typed = 0, []
        if untyped:
            raise Mistake(block.line, f"no script of it asks for a line, so {untyped[0]!r} cannot be typed")
        if cut and status != INTERRUPTED:
            raise Mistake(block.line, f"exit status {status}, where Ctrl-C should have ended it\n{out + err[-3000:]}")
        self._keep(block, 0 if cut else status, out, err)

    def _python(self, block: Block) -> None:
        if "from" not in block.marks:
            self._keep(block, *self.shell.python(block.text))
            return
        path = ROOT / block.marks["from"]
        if not path.is_file():
            raise Mistake(block.line - 2, f"there is no file {block.marks['from']}")
        at = missing_line(block.lines, path.read_text(encoding="utf-8").splitlines())
        if at is not None:
            raise Mistake(block.line + at, f"{block.marks['from']} has no {block.lines[at].strip()!r} in this place")

    def _keep(self, block: Block, status: int, out: str, err: str) -> None:
        if status:
            self.said = ()
            raise Mistake(block.line, f"exit status {status}\n{textwrap.indent(out + err[-3000:], '    ')}")
        self.said = (out, out + err)

    def _pycon(self, block: Block) -> None:
        examples = session(block)
        source = SESSION.format(sources=[source for source, _, _ in examples], mark=MARK)
        shown = "".join(source for source, _, _ in examples)
        status, out, err = self.shell.python(source, shown)
        self.said = None
        said = out.split(MARK + "\n")[1:]
        for (_, shown, line), output in zip(examples, said):
            if status and output is said[-1]:
                break
            compare(shown, output, line)
        if status:
            raise Mistake(examples[len(said) - 1][2] - 1, f"this fails\n{textwrap.indent(err[-3000:], '    ')}")

    def _text(self, block: Block) -> None:
        said, self.said = self.said, None
        if "recorded" in block.marks:
            self._compare_with_record(block)
            return
        if said == ():
            return
        if said is None:
            raise Mistake(block.line - 1, "a text without a command before it needs a marker")
        # the errors are compared where the page shows them
        shown = "\n".join(block.lines).rstrip().split("\n")
        shows_errors = difference(shown, said[1].rstrip().split("\n")) is None
        compare(block.lines, said[1] if shows_errors else said[0], block.line)

    def _compare_with_record(self, block: Block) -> None:
        name = block.marks["recorded"]
        try:
            record = read_record(name)
        except FileNotFoundError:
            raise Mistake(block.line - 2, f"there is no tests/recorded/{name}.json") from None
        if record["command"] not in self.command:
            raise Mistake(block.line - 2, f"{name} is the output of another command: {record['command']}")
        shown = "\n".join(block.lines).rstrip().split("\n")
        said = "\n".join(record["output"]).rstrip().split("\n")
        at = difference(shown, said, by_letter=True)
        if at is not None:
            raise Mistake(block.line + min(at, len(shown) - 1), f"tests/recorded/{name}.json has another output")

    def _diff(self, block: Block) -> None:
        for path, at, old, new in hunks(block):
            target = self.shell.cwd / path
            lines = target.read_text(encoding="utf-8").splitlines() if target.is_file() else []
            places = [place for place in range(len(lines) - len(old) + 1) if lines[place : place + len(old)] == old]
            if not places:
                raise Mistake(at, f"this does not fit {path}")
            lines[places[0] : places[0] + len(old)] = new
            target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


MARK = "-- the page's next line --"
SESSION = """
names = {{"__name__": "__main__"}}
for source in {sources!r}:
    print({mark!r}, flush=True)
    exec(compile(source, "the page", "single"), names)
"""


def session(block: Block) -> List[Tuple[str, List[str], int]]:
    """(source, what the page shows after it, line of that) of each `>>>` of a block."""
    examples: List[Tuple[str, List[str], int]] = []
    for number, line in enumerate(block.lines, block.line):
        if re.match(r">>>( |$)", line):
            examples.append((line[4:] + "\n", [], number + 1))
        elif not examples:
            raise Mistake(number, "a pycon block begins with >>>")
        else:
            source, shown, _ = examples[-1]
            # `...` goes on with a statement, or else it stands for lines of output
            if not shown and re.match(r"\.\.\.( |$)", line) and unfinished(source):
                examples[-1] = (source + line[4:] + "\n", [], number + 1)
            else:
                shown.append(line)
    return examples


def unfinished(source: str) -> bool:
    """Whether Python's prompt would ask for more after these lines."""
    try:
        return codeop.compile_command(source[:-1], symbol="single") is None
    except SyntaxError:
        return False


def missing_line(quote: List[str], source: List[str]) -> Optional[int]:
    """The first line of a quote that does not follow the ones before it in `source`; None: all of it stands there.

    The quote may be indented less, by the same everywhere; a line `...` stands for lines that were left out.
    """
    furthest = 0
    for start in range(len(source)):
        first = quote[0].strip()
        indent = source[start][: len(source[start]) - len(source[start].lstrip())]
        shift = indent[: len(indent) - (len(quote[0]) - len(quote[0].lstrip()))]
        if source[start].strip() != first:
            continue
        place, jump = start, False
        for number, line in enumerate(quote):
            if line.strip() == "...":
                jump = True
                continue
            wanted = (shift + line).rstrip()
            while jump and place < len(source) and source[place] != wanted:
                place += 1
            if place == len(source) or source[place] != wanted:
                furthest = max(furthest, number)
                break
            place, jump = place + 1, False
        else:
            return None
    return furthest


def hunks(block: Block):
    """(path, line of the page, old lines, new lines) of each hunk of a diff."""
    found, path = [], None
    for number, line in enumerate(block.lines, block.line):
        if line.startswith("--- "):
            path = None
        elif line.startswith("+++ b/"):
            path = line[len("+++ b/") :].split("\t")[0]
        elif line.startswith("@@ ") and path:
            found.append((path, number, [], []))
        elif not found or path is None:
            raise Mistake(number, "a diff that is to be applied has the lines --- a/..., +++ b/... and @@ first")
        else:
            if line[:1] in ("-", " ", ""):
                found[-1][2].append(line[1:])
            if line[:1] in ("+", " ", ""):
                found[-1][3].append(line[1:])
    return found


# ------------------------------------------------------------------------------------------------ links

LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^()\s>]*(?:\([^()\s]*\)[^()\s>]*)*)>?(?:\s+\"[^\"]*\")?\s*\)")
OTHER_LINK = re.compile(r"^ *\[[^\]]+\]: *(\S+)|(?:src|href)=\"([^\"]*)\"|<(https?:[^>]*)>")


def anchors(lines: List[str]) -> set:
    """GitHub's names for the headings of a page."""
    names: Dict[str, int] = {}
    found = set()
    for line in lines:
        heading = re.fullmatch(r" {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*", line)
        if heading:
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.group(1))
            name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.add(f"{name}-{names[name]}" if name in names else name)
            names[name] = names.get(name, 0) + 1
    return found


def dead_links(prose: List[str], page: Path) -> List[Tuple[int, str]]:
    """(line, what is wrong) of each link of a page that leads nowhere. What is outside is not asked, only its form."""
    wrong = []
    for number, line in enumerate(prose, 1):
        line = re.sub(r"(`+)[^`].*?\1", "code", line)
        links = LINK.findall(line) + [next(filter(None, groups), "") for groups in OTHER_LINK.findall(line)]
        for link in links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc):
                    wrong.append((number, f"{link} is no address"))
                continue
            if parts.scheme == "mailto":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not link or not (target == page or target.exists()) or ROOT not in (target, *target.parents):
                wrong.append((number, f"the link {link} leads to no file"))
            elif parts.fragment and target.suffix == ".md":
                headings = prose if target == page else read(target.read_text(encoding="utf-8"))[1]
                if unquote(parts.fragment) not in anchors(headings):
                    wrong.append((number, f"the link {link} leads to no heading"))
    return wrong


# ------------------------------------------------------------------------------------------------ a page


def prepared(text: str) -> Optional[str]:
    """What installed the packages with which a page begins: by its first link to section 1 of a page. None: it begins
    with nothing, and clones the repository."""
    if any("git clone" in block.text for block in commands(read(text)[0]) if "not run" not in block.marks):
        return None
    page = re.search(r"\((\w+\.md)#1-", text)
    first = (ROOT / "tutorial" / page.group(1)).read_text(encoding="utf-8").split("\n## 2.")[0] if page else ""
    lines = [line for block in commands(read(first)[0]) for line in block.lines]
    return "\n".join(line for line in lines if line.startswith("pip install "))


def mistakes(text: str, page: Path, shell: Shell) -> List[str]:
    """All that is wrong with a page, each with page and line."""
    name = page.relative_to(ROOT)
    try:
        blocks, prose = read(text)
    except Mistake as mistake:
        return ["{}:{}: {}".format(name, *mistake.args)]
    found = dead_links(prose, page)
    reader = Reader(shell)
    for block in blocks:
        try:
            reader.follow(block)
        except Mistake as mistake:
            found.append(mistake.args)
    found += [(len(prose), f"the page writes {path}, which .gitignore does not cover") for path in not_ignored(shell)]
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def not_ignored(shell: Shell) -> List[str]:
    """What git would show as new in the clone, but for the reader's own files and scripts."""
    if not shell.clone or not shutil.which("git"):
        return []
    subprocess.run(["git", "init", "--quiet", shell.clone], env=WITHOUT_CONFIG, check=True)
    git = ["git", "-C", shell.clone, "ls-files", "--others", "--exclude-standard", "-z"]
    new = subprocess.run(git, env=WITHOUT_CONFIG, **CAPTURED).stdout.split("\0")
    return [path for path in new if path and shell.clone / path not in shell.given and not path.endswith(".py")]
