"""The Korean pages and the README, followed to the letter: what a page shows is what a reader gets.

A page's blocks run in order, in a fresh copy of the repository's folders, with stand-in models and samples. A page's
source says what a block is (a marker is an HTML comment on the line before the fence, where GitHub doesn't show it):

    ```bash                          runs as one `bash -e` script, in the page's folder
    ```pycon                         `>>>` lines, run and compared one by one
    ```python                        runs as a script in the page's folder
    ```text                          what the block before it prints: any number in place of a number, everything else
                                     by the letter; a line `...` or `…` is any number of lines, `…` in a line any text
    ```diff                          applied to the folder's files, as `patch -p1` does
    <!-- not run: REASON -->         bash, pycon, python, diff: left out, and counted below
    <!-- not compared: REASON -->    text: an output of the real model, or no output at all
    <!-- compared up to: LINE -->    text: what follows that line is the real model's answer
    <!-- from: tutorial/x.py -->     python: quoted code; it must stand in that file (`...`: lines left out)
    <!-- file: my_data.jsonl -->     any language: a file of the reader's, written into the folder

Links must lead somewhere. Whatever else stands in a fence is a mistake, named with page and line.
"""

from __future__ import annotations

import codeop
import json
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import textwrap
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import FOLDERS, NOWHERE, ROOT, environment, run
from tests.hub_server import HubServer

PAGES = ["README.md", *sorted(f"tutorial/{path.name}" for path in (ROOT / "tutorial").glob("*.md"))]
BLOCK_TIMEOUT = 600  # seconds; the longest takes some twenty

# ------------------------------------------------------------------------------------------------ the rehearsal

# What turns a page's command into one for a laptop without a network: an option is added where the command does not
# have it, or has more of it. Twelve steps, because the widest interval between log lines is ten.
REHEARSAL = (
    ("download_smollm2.py", "--tiny", None),  # the others download a stand-in from a hub on this machine: see `hub_of`
    ("prepare_llama2_dataset.py", "--dataset-name-or-path", "cnn_dailymail"),
    ("prepare_llama3_dataset.py", "--dataset-name-or-path", "cnn_dailymail"),
    ("prepare_mistral_dataset.py", "--dataset-name-or-path", "python_code_instructions_18k_alpaca"),
    ("prepare_smollm2_dataset.py", "--dataset-name-or-path", "python_code_instructions_18k_alpaca"),
    ("prepare_gpt_dataset.py", "--dataset-name-or-path", "Evol-Instruct-Python-26k"),
    ("prepare_llama3_1_dataset.py", "--dataset-name-or-path", "korean_safe_conversation"),
    ("prepare_*.py", "--dataset-name-or-path", "python_code_instructions_18k_alpaca"),  # the reader's own script
    ("train_*.py", "--max-train-steps", 12),
    ("train_*.py", "--batch-size", 8),  # of the samples' 64 rows
    ("inference_*.py", "--max-new-tokens", 16),
)
# what a reader replaces
PLACEHOLDERS = {"<user-token>": "hf_of_mine"}
# What is another text on another machine: (pattern, what takes its place), in the page and in the output alike.
MACHINE = (
    (re.compile(r"^Device: .*"), "Device: (a name and a type)"),
    (re.compile(r"(?<=\d)\+(cpu|cu\d+|rocm[\d.]+)\b"), ""),  # the build, in the version of torch
)


def rehearsed(words: List[str], cwd: Path, samples: Path) -> List[str]:
    """`words`, a command's after `python`, with what REHEARSAL adds."""
    script = next((Path(word).name for word in words if word.endswith(".py")), "")
    added: List[str] = []
    for pattern, option, value in REHEARSAL:
        if not fnmatch(script, pattern) or option in added:
            continue
        given = words[words.index(option) + 1] if option in words[:-1] else None
        if value is None:
            added += [] if option in words else [option]
        elif isinstance(value, int):
            added += [option, str(value)] if given is None or int(given) > value else []
        elif given is None or not (cwd / given).exists():  # not there: a data set on the hub
            added += [option, str(samples / value)]
    return [*words, *added]


# `python` in the page's shell. It asks the test what to run: a script the test runs itself (in `warm`, which saves the
# three seconds of importing torch), everything else is executed here.
CLIENT = """
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as server:
    job = {{"words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}}
    server.sendall(json.dumps(job).encode() + b"\\n")
    answer = json.loads(server.makefile("rb").readline())
if "words" in answer:
    os.execv({python!r}, [{python!r}, *answer["words"]])
sys.stdout.buffer.write(answer["out"].encode())
sys.stderr.buffer.write(answer["err"].encode())
sys.exit(answer["status"])
"""
COMMANDS = {
    "python": 'exec "{python}" -IS "{client}" "$@"',
    "python3": 'exec "{bin}/python" "$@"',
    "pip": 'exec "{python}" -m pip "$@"',
    "torchrun": 'exec "{bin}/python" -m torch.distributed.run "$@"',
    # the Makefile's environment is the tests' own: .venv is there, its packages are installed
    "make": 'mkdir -p .venv/bin; cp "{bin}/python" .venv/bin; touch .venv/demo; PATH=$PLAIN_PATH exec make "$@"',
}


class Shell:
    """The reader's shell, in a fresh copy of the repository's folders under `place`.

    `go` runs a script, as tests.conftest.run does. `hub`: the address of the model hub.
    """

    def __init__(self, place: Path, go, hub: str = NOWHERE):
        self.folder, bin = place / "page", place / "bin"
        self.folder.mkdir()
        for name in FOLDERS:  # copies, because a page may write beside the scripts
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Makefile", self.folder)
        samples = self.folder / "dataset" / "samples"

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                job = json.loads(self.rfile.readline())
                words = rehearsed(job["words"], Path(job["cwd"]), samples)
                answer: dict = {"words": words}
                if words and words[0].endswith(".py"):
                    env = {name: value for name, value in job["env"].items() if name != "HF_HOME"}  # `go` has its own
                    try:
                        done = go("python", *words, cwd=Path(job["cwd"]), env=env, ok=None)
                        answer = {"out": done.stdout, "err": done.stderr, "status": done.returncode % 256}
                    except (subprocess.TimeoutExpired, pytest.fail.Exception) as error:  # of `run`, of `warm`
                        answer = {"out": "", "err": str(error), "status": 124}
                self.wfile.write(json.dumps(answer).encode() + b"\n")

        self.server = socketserver.TCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        bin.mkdir()
        places = {"python": sys.executable, "bin": bin, "client": place / "client.py"}
        source = CLIENT.format(port=self.server.server_address[1], python=sys.executable)
        places["client"].write_text(source, encoding="utf-8")
        for name, command in COMMANDS.items():
            (bin / name).write_text(f"#!/bin/sh\n{command.format(**places)}\n", encoding="utf-8")
            (bin / name).chmod(0o755)
        plain = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = environment(
            HF_HOME=str(place / "hf_home"),
            HF_ENDPOINT=hub,
            PIP_NO_INDEX="1",
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            CUDA_VISIBLE_DEVICES="",  # the laptop of the pages has no GPU
            HIP_VISIBLE_DEVICES="",
            PLAIN_PATH=plain,
            PATH=f"{bin}{os.pathsep}{plain}",
        )

    def __call__(self, script: str) -> Tuple[int, str, str]:
        """(exit status, standard output, standard error) of a script of bash."""
        for placeholder, value in PLACEHOLDERS.items():
            script = script.replace(placeholder, value)
        process = subprocess.Popen(
            ["bash", "-e", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=BLOCK_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nno end after {BLOCK_TIMEOUT} s"
        return process.returncode, out, err

    def python(self, source: str) -> Tuple[int, str, str]:
        """The same of a Python script."""
        script = self.folder / ".page.py"  # in the folder, from which it then imports, as `python` does there
        script.write_text(source, encoding="utf-8")
        try:
            return self("python .page.py")
        finally:
            script.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


# ------------------------------------------------------------------------------------------------ what a page says

FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*([^`\s]*)[^`]*")
COMMENT = re.compile(r"\s*<!--(.*?)-->\s*")
MARKER = re.compile(r"(not run|not compared|compared up to|from|file): (\S.*)")


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


def difference(shown: List[str], said: List[str]) -> Optional[int]:
    """The first of the shown lines that does not fit what was said, len(shown) where that goes on; None: it fits."""
    shown, said = ([_here_as_anywhere(line.rstrip()) for line in lines] for lines in (shown, said))
    patterns = [r"(?:.*\n)*?" if line in ("...", "…") else pattern_of(line) + r"\n" for line in shown]
    text = "".join(line + "\n" for line in said)
    if re.fullmatch("".join(patterns), text):
        return None
    fitting = (n for n in range(len(shown), 0, -1) if re.match("".join(patterns[:n]), text))
    return next(fitting, 0)


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

    def follow(self, block: Block) -> None:
        """Mistake where the page doesn't tell the truth."""
        follow = getattr(self, f"_{block.language}", None)
        if "file" in block.marks:
            target = self.shell.folder / block.marks["file"]
            if self.shell.folder not in target.resolve().parents:
                raise Mistake(block.line - 1, f"{block.marks['file']} is outside the page's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif "not run" in block.marks and block.language in (*RUN, "diff"):
            self.said = ()
        elif follow is None:
            raise Mistake(block.line - 1, f"a fence of {block.language or 'no language'} needs a marker")
        else:
            follow(block)

    def _bash(self, block: Block) -> None:
        self._keep(block, *self.shell(block.text))

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
        status, out, err = self.shell.python(source)
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
        if "not compared" in block.marks or said == ():
            return
        if said is None:
            raise Mistake(block.line - 1, "a text without a command before it needs a marker")
        shown, last = block.lines, block.marks.get("compared up to")
        if last is not None:
            if last not in shown:
                raise Mistake(block.line - 2, f"{last!r} is no line of this text")
            shown = shown[: shown.index(last) + 1]
            said = tuple(re.sub(rf"(?ms)^({re.escape(last)})$.*", r"\1", text, count=1) for text in said)
        # the errors are compared where the page shows them
        shows_errors = difference("\n".join(shown).rstrip().split("\n"), said[1].rstrip().split("\n")) is None
        compare(shown, said[1] if shows_errors else said[0], block.line)

    def _diff(self, block: Block) -> None:
        for path, at, old, new in hunks(block):
            target = self.shell.folder / path
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


# ------------------------------------------------------------------------------------------------ the tests


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
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def hub_of(text: str, warm, place: Path) -> HubServer:
    """A hub with a stand-in of each model that a page downloads, gated where its script asks for a token.

    Another model that the page names is a stand-in by the script that the page named last.
    """
    repos: dict = {}
    gated, files = {}, {}
    for script, name in re.findall(r"tutorial/(download_\w+)\.py|(?:--model-name |model_name=\")([^\s\"]+)", text):
        path = ROOT / "tutorial" / f"{script}.py"
        if name:
            repos.setdefault(name, files)
        elif path.is_file():  # not one that the page tells to write
            source = path.read_text(encoding="utf-8")
            if not (place / script).exists():
                warm(f"python {path} --tiny", "--save-dir", place / script, cwd=place)
            files = {file.name: file.read_bytes() for file in (place / script).iterdir()}
            for name in re.findall(r'model_name="(.*?)"', source):
                repos[name] = files
                if "--token" in source:
                    gated[name] = PLACEHOLDERS["<user-token>"]
    return HubServer(repos, gated=gated)


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tmp_path, warm):
    def go(command, *words, **options):
        # `warm` was told where the hub is before there was one
        asks_the_hub = Path(words[0]).name.startswith("download_") and "--tiny" not in words
        return (run if asks_the_hub else warm)(command, *words, **options)

    text = (ROOT / page).read_text(encoding="utf-8")
    with hub_of(text, warm, tmp_path) as hub, Shell(tmp_path, go, hub.url) as shell:
        found = mistakes(text, ROOT / page, shell)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_nine_of_ten_blocks_run(capfd):
    """And the others are printed, with their reasons (on standard error, which pytest-xdist lets through)."""
    lines, total, left_out = [], 0, 0
    for page in PAGES:
        blocks = commands(read((ROOT / page).read_text(encoding="utf-8"))[0])
        skipped = [block for block in blocks if "not run" in block.marks]
        lines.append(f"{page}: {len(blocks) - len(skipped)} of {len(blocks)} blocks run")
        lines += [f"  {page}:{block.line - 1} does not: {block.marks['not run']}" for block in skipped]
        total, left_out = total + len(blocks), left_out + len(skipped)
    lines.append(f"{total - left_out} of {total} blocks run, {left_out} do not")
    with capfd.disabled():
        print("", *lines, sep="\n", file=sys.stderr)
    assert left_out < 0.1 * total


# ------------------------------------------------------------------------------------------------ the runner itself

EXAMPLE = ROOT / "tutorial" / "example.md"  # there is none; the links of a page begin in its folder


@pytest.fixture
def shell(tmp_path):
    with Shell(tmp_path, run) as shell:
        yield shell


TRUE = """# 예제 page, with a `heading`!

## 1. 이 페이지의 `제목`!

[here](#1-이-페이지의-제목), [there](../README.md#english-summary), [out](https://example.org/a), ![](../LICENSE)
<!-- a note of the writer's -->

<!-- file: data/mine.jsonl -->
```json
{"a": 1}
```

```bash
cat data/mine.jsonl
echo "Step 12/1,000 | loss 0.25 | 3e-05 | llama3-8b"; echo one; echo two; echo "took 3 s on this machine"
```

So it says:

```text
{"a": 2}
Step 7/20 | loss 1.5 | 0.1 | llama3-8b
...
took 12 s on …
```

```bash
echo "name      100 MB"; echo "Device: some GPU, float16"; echo question; echo "answer of $RANDOM words"
```

<!-- compared up to: question -->
```text
name  7 MB
Device: CPU, 2 threads, bfloat16
question
an answer
```

```bash
echo "error: no" >&2
```

```text
error: no
```

<!-- not run: no such machine -->
```bash
moreh-smi
```

```text
not compared
```

<!-- not compared: a drawing -->
```text
+--+
```

  ```pycon
  >>> def largest(numbers):
  ...     if numbers:
  ...         return max(numbers)
  >>> largest([1, 2])
  3
  >>> print("a\\nb\\nc")
  a
  …
  ```

```python
from common import UserError

print(UserError.__name__)
```

```text
UserError
```

<!-- from: dataset/templates.py -->
```python
return Example(["[INST] ", row["instruction"], " [/INST]\\n"], row["output"])
...
    row["output"],
```

```bash
printf 'one\\ntwo\\n' > tutorial/mine.py
```

```diff
--- a/tutorial/mine.py
+++ b/tutorial/mine.py
@@ -1,2 +1,2 @@
 one
-two
+three
```

```bash
cat tutorial/mine.py
```

```text
one
three
```
"""


def test_a_true_page(shell):
    assert mistakes(TRUE, EXAMPLE, shell) == []
    assert not (ROOT / "tutorial" / "mine.py").exists()
    blocks = commands(read(TRUE)[0])
    assert [block.language for block in blocks].count("bash") == len(blocks) - 2 == 6
    assert [block.marks for block in blocks if block.marks] == [{"not run": "no such machine"}]


ECHO = "```bash\necho one; echo 2 words\n```\n\n```text\n"
QUOTE = "<!-- from: dataset/templates.py -->\n```python\n"


@pytest.mark.parametrize(
    "text, line, words",
    [
        (ECHO + "one\n2 letters\n```", 7, "the page shows '2 letters'"),
        (ECHO + "one\n2.5 words\n```", 7, "the page shows '2.5 words'"),
        (ECHO + "two\n2 words\n```", 6, "the page shows 'two'"),
        (ECHO + "one\n```", 6, "the output goes on"),
        (ECHO + "one\n2 words\nthree\n```", 8, "the page shows 'three'"),
        (ECHO + "...\nthree\n...\n```", 7, "the page shows 'three'"),
        (ECHO + "one\n...\n```\n\n```text\none\n```", 10, "a text without a command"),
        (ECHO.replace("```text", "<!-- compared up to: two -->\n```text") + "one\n```", 5, "'two' is no line"),
        ("```bash\necho one\nfalse\necho two\n```", 2, "exit status 1"),
        ("```pycon\n>>> 1 + 1\n3 apples\n```", 3, "the page shows '3 apples'"),
        ("```pycon\n>>> 1 + 1\n2\n>>> 1 / 0\n```", 4, "ZeroDivisionError"),
        ("```pycon\n>>> 1 +\n```", 2, "SyntaxError"),
        ("```pycon\n1 + 1\n```", 2, "begins with >>>"),
        ("```python\nprint(\n```", 2, "SyntaxError"),
        (QUOTE + "def alpaca(row: dict) -> Exemple:\n```", 3, "has no 'def alpaca"),
        (QUOTE + "def alpaca(row: dict) -> Example:\n    return\n```", 4, "has no 'return'"),
        (QUOTE + "def instruction(row: dict) -> Example:\n...\ndef alpaca(row: dict) -> Example:\n```", 5, "has no"),
        (QUOTE + "    def alpaca(row: dict) -> Example:\n```", 3, "has no 'def alpaca"),
        (QUOTE.replace("templates", "template") + "x\n```", 1, "there is no file"),
        ("# A\n\n[b](c.md)", 3, "leads to no file"),
        ("# A\n\n[b](../README.md#c)", 3, "leads to no heading"),
        ("# A\n\n[b](#b), [c](https://c), `[d](e)`", 3, "leads to no heading"),
        ("# A\n\n[b](https://c)", 3, "is no address"),
        ("# A\n\n![b](../../etc/passwd)", 3, "leads to no file"),
        ("# A\n\n```html\n<p>\n```", 3, "a fence of html needs a marker"),
        ("# A\n\n```\n<p>\n```", 3, "a fence of no language needs a marker"),
        ("# A\n\n```text\nb\n```", 3, "a text without a command"),
        ("# A\n\n```bash\necho", 3, "never closed"),
        ("# A\n\n<!-- not-run: b -->\n```bash\necho\n```", 3, "unknown marker"),
        ("# A\n\n<!-- not run: -->\n```bash\necho\n```", 3, "unknown marker"),
        ("<!-- file: ../a.txt -->\n```text\nb\n```", 2, "outside"),
        ("```diff\n-a\n+b\n```", 2, "a diff that is to be applied"),
        ("```diff\n--- a/LICENSE\n+++ b/LICENSE\n@@ -1 +1 @@\n-a\n+b\n```", 4, "does not fit LICENSE"),
    ],
)
def test_an_untrue_page(text, line, words, shell):
    """Each mistake is found, and named with page and line."""
    found = mistakes(text, EXAMPLE, shell)
    assert any(what.startswith(f"tutorial/example.md:{line}: ") and words in what for what in found), found
    assert len(found) == text.count("](#b), ") + 1


def test_numbers():
    def fits(shown, said):
        return difference([shown], [said]) is None

    assert fits("Throughput: 110643.89 tokens/sec", "Throughput: 1.2e+06 tokens/sec")
    assert fits("torch 2.13.0+cpu, 98 MB", "torch 2.1.0, 1,024 MB")
    assert fits("[Step 2/1121]", "[Step 12/12]") and fits("x -1", "x 100")
    for name in ("llama-2-13b-hf", "llama3-8b", "requirements_llama3_1.txt"):
        assert fits(name, name) and not fits(name, re.sub(r"(?<=\D)\d", "9", name))
    assert not fits("12 rows", "12.0 rows") and not fits("12 rows", "no rows")


def test_the_rehearsal(tmp_path):
    """Options are added where a command lacks them or asks for more, and an option that can stay stays."""
    (tmp_path / "mine.jsonl").touch()
    sample = f"--dataset-name-or-path {tmp_path / 'cnn_dailymail'}"
    for command, more in (
        ("tutorial/download_smollm2.py", "--tiny"),
        ("tutorial/download_smollm2.py --tiny", ""),
        ("tutorial/download_llama2_13b.py --token t", ""),
        ("dataset/prepare_llama2_dataset.py", sample),
        ("../dataset/prepare_llama2_dataset.py --dataset-name-or-path abisee/cnn_dailymail", sample),
        ("dataset/prepare_llama2_dataset.py --dataset-name-or-path mine.jsonl", ""),
        ("tutorial/train_llama2.py --batch-size 512", "--max-train-steps 12 --batch-size 8"),
        ("tutorial/train_llama2.py --batch-size 4 --max-train-steps 20", "--max-train-steps 12"),
        ("-m torch.distributed.run tutorial/train_llama2.py --max-train-steps 3", "--batch-size 8"),
        ("tutorial/inference_llama2.py --prompt a", "--max-new-tokens 16"),
        ("-c 1", ""),
    ):
        assert rehearsed(command.split(), tmp_path, tmp_path) == [*command.split(), *more.split()]
