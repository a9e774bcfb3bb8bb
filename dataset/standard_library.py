"""Real code on every machine, nothing to download: the functions of Python's own standard library."""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import textwrap
import zlib
from typing import Dict, Iterator, List, Tuple

# installed packages, tests, examples and generated tables are not what one wants to learn from; distutils is gone since
# Python 3.12; and what begins with _py is a second implementation of a module in C, function for function
LEFT_OUT = {
    "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "distutils"
}  # fmt: skip
HELD_OUT_PERCENT = 5


def standard_library_splits() -> Dict[str, List[dict]]:
    """{"train": rows, "validation": rows}; a row has `instruction` (the docstring), `input`, `output` (the code).

    The input of a method is its signature, because no docstring tells that it is a method; that of a function is empty.
    Whole modules are held out, not rows, and a held-out function whose docstring or code also occurs in training
    (modules borrow from each other) is dropped: no held-out function has a twin in training.
    """
    splits: Dict[str, Dict[Tuple[str, str], dict]] = {"train": {}, "validation": {}}
    gc.disable()  # syntax trees are millions of small objects and no garbage: half of the time would go into looking
    try:
        for module, path in _modules(sysconfig.get_paths()["stdlib"]):
            # by name, so that every machine holds out the same; a package goes as a whole
            held_out = zlib.crc32(module.encode()) % 100 < HELD_OUT_PERCENT
            for docstring, signature, code in _functions(path):
                row = {"instruction": docstring, "input": signature, "output": code}
                splits["validation" if held_out else "train"].setdefault((docstring, code), row)
    finally:
        gc.enable()
    docstrings, codes = ({key[place] for key in splits["train"]} for place in (0, 1))
    held_out = splits["validation"].items()
    validation = [row for (docstring, code), row in held_out if docstring not in docstrings and code not in codes]
    return {"train": list(splits["train"].values()), "validation": validation}


def _modules(root: str) -> Iterator[Tuple[str, str]]:
    """(top-level module, path) of each source file, in order of the paths."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(set(subdirectories) - LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_py"):
                path = os.path.join(directory, file)
                yield os.path.relpath(path, root).split(os.sep)[0].replace(".py", ""), path


def _functions(path: str) -> Iterator[Tuple[str, str, str]]:
    """(docstring, signature of a method or "", source without docstring) of each function that has a docstring."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError):  # a few files are there to be broken
        return
    lines = text.splitlines()
    scopes = [tree]
    while scopes:
        scope = scopes.pop()
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(node.body) > 1:
                    first = node.body[0]
                    head = lines[node.lineno - 1 : first.lineno - 1]
                    signature = textwrap.dedent("\n".join(head)) if scope is not tree else ""
                    code = textwrap.dedent("\n".join(head + lines[first.end_lineno : node.end_lineno]))
                    yield docstring, signature, code
