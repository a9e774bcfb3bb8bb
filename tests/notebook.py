"""The notebooks for Google Colab, notebooks/*.ipynb, written from tests/notebook.md and the pages.

    python tests/notebook.py            print which of them differ from what would be written
    python tests/notebook.py --write    write them

tests/notebook.md is the outline of them all. A block that is empty there stands in a page, where it has the same marker
`<!-- cell: NAME -->` (tests/page_runner.py); the others are code that only a notebook needs. A ```text is what the cell
above it prints in the rehearsal of tests/test_notebook.py. The notebooks differ in the values of `values`, and in what
stands between `<!-- only KIND -->` and `<!-- /only -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from string import Template
from typing import Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.page_runner import Block, read

OUTLINE = ROOT / "tests" / "notebook.md"
KINDS = ("qwen3", "llama3_1")  # of a page tutorial/KIND.md
TASKS = {
    "qwen3": "대화 모델 Qwen3 4B Instruct를 한국어 대화로",
    "llama3_1": "base 모델 Llama 3.1 8B를 한국어 지시문과 답으로",
}


class Cell(NamedTuple):
    """A cell of text, or with a name one of code."""

    source: str
    name: str = ""
    shows: List[str] = []  # lines that it prints in the rehearsal


def cells_of(kind: str) -> List[Cell]:
    """The cells of a notebook in their order. ValueError where a cell of a page has no place in the outline."""
    page = read_text(f"tutorial/{kind}.md")
    from_pages = {**blocks_of(read_text("tutorial/install.md")), **blocks_of(page)}
    text = re.sub(rf"<!-- only (?!{kind} ).*?<!-- /only -->", "", OUTLINE.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks, prose = read(Template(re.sub("<!-- /?only.*?-->", "", text)).substitute(values(kind, page)))
    cells, end = [], 0
    for block in [*blocks, None]:
        words = "\n".join(prose[end : block.line - 1 if block else None]).strip()
        if words:
            cells.append(Cell(words))
        if block is None:
            break
        end = block.line + len(block.lines)
        if block.language == "text":
            cells[-1] = cells[-1]._replace(shows=block.lines)
        else:
            name = block.marks["cell"]
            cells.append(Cell(block.text.rstrip() or code_of(from_pages.pop(name)), name))
    if from_pages:
        raise ValueError(f"{OUTLINE.name} has no place for the cells {', '.join(from_pages)}")
    return cells


def values(kind: str, page: str) -> Dict[str, str]:
    """What stands for the names with a $ in the outline."""
    return {
        "kind": kind,
        "title": page.splitlines()[0],
        "task": TASKS[kind],
        "peak": figure(page, f"{kind} lora_4bit peak"),
        "download": figure(page, f"{kind} full result"),
        "save_dir": re.search(r"결과 \| `\./(\w+)`", page).group(1),
    }


def figure(page: str, words: str) -> str:
    """A figure of the plan, as the page has it (tests/plan_tables.py)."""
    return re.search(rf"<!-- plan: {words} -->(.*?)<!-- /plan -->", page).group(1)


def blocks_of(page: str) -> Dict[str, Block]:
    """{name: block} of a page's blocks that are cells."""
    return {block.marks["cell"]: block for block in read(page)[0] if "cell" in block.marks}


def code_of(block: Block) -> str:
    """The code of a cell: a shell's commands after `!`, `cd` and a file by their magics, Python as it is.

    ValueError for what a notebook would not run as a shell does: each `!` is a shell of its own, and IPython puts the
    values of its variables in the place of $name and {name}.
    """
    if "file" in block.marks:
        return f"%%writefile {block.marks['file']}\n{block.text.rstrip()}"
    if block.language == "python":
        return block.text.rstrip()
    if block.language != "bash" or re.search(r"[{}$\\]|<<|^(export|source|\.) ", block.text, re.MULTILINE):
        raise ValueError(f"this block can't be a cell:\n{block.text}")
    return "\n".join(f"%{line}" if line.startswith("cd ") else f"!{line}" for line in block.lines)


def notebook(kind: str) -> dict:
    """A notebook without outputs (https://nbformat.readthedocs.io/en/latest/format_description.html)."""
    cells = []
    for number, cell in enumerate(cells_of(kind)):
        made = {"cell_type": "markdown", "id": cell.name or f"text-{number}", "metadata": {}}
        if cell.name:
            made.update(cell_type="code", execution_count=None, outputs=[])
        cells.append({**made, "source": cell.source.splitlines(keepends=True)})
    metadata = {
        "accelerator": "GPU",  # Colab's own names: it starts with a T4
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def written() -> Dict[Path, str]:
    """{path: content} of the notebooks as they are written."""
    return {
        ROOT / "notebooks" / f"{kind}_colab.ipynb": json.dumps(notebook(kind), ensure_ascii=False, indent=1) + "\n"
        for kind in KINDS
    }


def read_text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def main() -> None:
    for path, content in written().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            print(f"{path.relative_to(ROOT)} differs")
        if sys.argv[1:] == ["--write"]:
            path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
