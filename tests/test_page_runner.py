"""The runner of the pages: it finds what is true, and what is not, and runs a page as a reader does."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT, run
from tests.page_runner import Shell, commands, difference, mistakes, read
from tests.record import write_record

pytestmark = pytest.mark.slow  # of the runner itself; the pages are what it is for
EXAMPLE = ROOT / "tutorial" / "example.md"  # there is none; the links of a page begin in its folder


@pytest.fixture
def shell(tmp_path):
    with Shell(tmp_path, run, ready="") as shell:
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
echo "name      100 MB"; echo "Device: some GPU, float16"
```

```text
name  7 MB
Device: CPU, 2 threads, bfloat16
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
from common.support.exit import UserError

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
        ("<!-- file: ../../a.txt -->\n```text\nb\n```", 2, "outside"),
        ("<!-- Ctrl-C: soon -->\n```bash\necho\n```", 1, "after which step"),
        ("<!-- Ctrl-C: after step 2 -->\n```bash\necho\n```", 3, "exit status 0, where Ctrl-C"),
        ("<!-- typed: a -->\n```bash\necho\n```", 3, "'a' cannot be typed"),
        ("<!-- recorded: no -->\n```text\na\n```", 1, "there is no tests/recorded/no.json"),
        ("```diff\n-a\n+b\n```", 2, "a diff that is to be applied"),
        ("```diff\n--- a/LICENSE\n+++ b/LICENSE\n@@ -1 +1 @@\n-a\n+b\n```", 4, "does not fit LICENSE"),
    ],
)
def test_an_untrue_page(text, line, words, shell):
    """Each mistake is found, and named with page and line."""
    found = mistakes(text, EXAMPLE, shell)
    assert any(what.startswith(f"tutorial/example.md:{line}: ") and words in what for what in found), found
    assert len(found) == text.count("](#b), ") + 1


@pytest.mark.parametrize(
    "command, shown, words",
    [
        ("python slow.py --rows 8", "8 rows\nDevice: a GPU", None),
        ("cd there\npython slow.py --rows 8", "...\nDevice: a GPU", None),
        ("python slow.py --rows 8", "9 rows\nDevice: a GPU", "has another output"),
        ("python slow.py --rows 8", "8 rows\nDevice: a CPU", "has another output"),
        ("python slow.py --rows 8", "8 rows", "has another output"),
        ("python slow.py --rows 9", "8 rows\nDevice: a GPU", "of another command"),
    ],
)
def test_a_recorded_output(command, shown, words, shell, monkeypatch, tmp_path):
    """It is compared with the record, numbers too, and not with what the command says in the test."""
    monkeypatch.setattr("tests.record.RECORDED", tmp_path)
    write_record("slow", {"command": "python slow.py --rows 8", "output": ["8 rows", "Device: a GPU"]})
    page = f"<!-- not run: slow -->\n```bash\n{command}\n```\n\n<!-- recorded: slow -->\n```text\n{shown}\n```\n"
    found = mistakes(page, EXAMPLE, shell)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0]), found


PROCESS = """
import os

import torch  # noqa: F401

if os.environ["RANK"] == "0":
    print(os.environ["WORLD_SIZE"], "processes")
"""


def test_torchrun(shell):
    """Two processes where the page has eight; and what they import has to be installed."""
    (shell.cwd / "mine.py").write_text(PROCESS, encoding="utf-8")
    command = "torchrun --nproc-per-node 8 mine.py --nproc-per-node 8"
    status, _, err = shell(command)
    assert status == 1 and "torch" in err.splitlines()[0] and "no package that this page installs" in err
    status, out, err = shell(f"pip install torch; {command}")
    assert status == 0 and out.splitlines()[-1] == "2 processes", err


TALK = """
<!-- typed: 하나 | 둘 -->
```bash
python mine.py
```

```text
terminal: True

> 하나
나하

> 둘
둘

>
```
"""
ASKS = """
import sys

print("terminal:", sys.stdin.isatty())
for line in iter(lambda: input("\\n> "), ""):
    print(line[::-1])
"""


@pytest.mark.parametrize(
    "page, source, words",
    [
        (TALK, ASKS, None),
        (TALK.replace("나하", "하나"), ASKS, "the page shows '하나'"),
        (TALK, ASKS.replace(', ""', ', "하나"'), "exit status 247"),  # it ends while somebody still types
        (TALK, "print()", "exit status 247"),
    ],
    ids=["true", "another answer", "ends too early", "asks nothing"],
)
def test_what_is_typed(page, source, words, shell):
    """A script hears it in a terminal, line by line, and an empty line at the end."""
    (shell.cwd / "mine.py").write_text(source, encoding="utf-8")
    found = mistakes(page, EXAMPLE, shell)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0]), found


def test_numbers():
    def fits(shown, said):
        return difference([shown], [said]) is None

    assert fits("Throughput: 110643.89 tokens/sec", "Throughput: 1.2e+06 tokens/sec")
    assert fits("torch 2.13.0+cpu, 98 MB", "torch 2.1.0, 1,024 MB")
    assert fits("[Step 2/1121]", "[Step 12/12]") and fits("x -1", "x 100")
    for name in ("llama-2-13b-hf", "llama3-8b", "requirements_llama3_1.txt"):
        assert fits(name, name) and not fits(name, re.sub(r"(?<=\D)\d", "9", name))
    assert not fits("12 rows", "12.0 rows") and not fits("12 rows", "no rows")
