"""Which packages a script of the repository needs, by its imports, and which come with what pip is told to install.

The tests run where every package is. So a page may send a reader to a script whose packages no command of that page
installs, and the script runs here all the same: this is how that is found.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Set, Tuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Command(NamedTuple):
    root: Path  # of the repository
    script: Path
    source: str  # of the script
    words: List[str]  # after it
    before: List[str]  # the sources of the scripts that ran before it


def in_fewer_bits(command: Command) -> bool:
    by_default = re.search(r"\bbits=[48]\b", command.source)
    return bool(
        {"--load-in-4bit", "--load-in-8bit"} & {*command.words}
        or (by_default and "--no-quantization" not in command.words)
    )


def of_summaries(command: Command) -> bool:
    return any("import summarization" in source for source in command.before)


def reports_to(package: str, command: Command) -> bool:
    return f"--report-to {package}" in " ".join(command.words)


# what a script imports under some condition only: when it does
OPTIONAL = {
    "bitsandbytes": in_fewer_bits,
    "rouge_score": of_summaries,
    "tensorboard": lambda command: reports_to("tensorboard", command),
    "wandb": lambda command: reports_to("wandb", command),
    "gguf": lambda command: "--tiny" not in command.words,  # nor is anything unpacked
}


def missing(command: Command, installed: Iterable[str], optional=OPTIONAL) -> List[str]:
    """ "FILE:LINE imports NAME" for each import of a package that `installed`, names of packages, does not bring.

    The script's own imports count, and those of the repository's modules that it reaches, in functions as well.
    """
    there, found = brought(frozenset(map(canonicalize_name, installed))), []
    for name, place in sorted(imports(command).items()):
        if name in optional and not optional[name](command):
            continue
        if not there & {*map(canonicalize_name, providers().get(name, [name]))}:
            found.append(f"{place} imports {name}")
    return found


def imports(command: Command) -> Dict[str, str]:
    """{name of a package: a place that imports it}, of all that the script reaches."""
    found: Dict[str, str] = {}
    ahead, seen = [(command.script, command.source)], {command.script}
    while ahead:
        path, source = ahead.pop()
        for line, name in names_of(source):
            modules = modules_of(name, command.script.parent) or modules_of(name, command.root)
            ahead += [(module, module.read_text(encoding="utf-8")) for module in modules if module not in seen]
            seen.update(modules)
            package = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
            if not modules and package not in (*sys.stdlib_module_names, "__future__"):
                found.setdefault(package, f"{os.path.relpath(path, command.root)}:{line}")
    return found


@lru_cache(maxsize=None)
def names_of(source: str) -> List[Tuple[int, str]]:
    """(line, dotted name) of each import. Of `from a import b`: a.b, which may be a module or a name in one."""
    found = []
    try:
        nodes = ast.walk(ast.parse(source))
    except SyntaxError:  # the script will say so itself
        return []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("import_module", "require_package"):  # by its name
                found.append((node.lineno, str(node.args[0].value)))
    return found


def modules_of(name: str, root: Path) -> List[Path]:
    """The files under `root` that importing `name` runs, none where it is not there."""
    parts, found = name.split("."), []
    for number in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:number])
        found += [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
    return found


@lru_cache(maxsize=None)
def providers() -> Dict[str, List[str]]:
    """{name to import: packages that have it}"""
    from importlib.metadata import packages_distributions  # Python 3.10, and test_rooms reads this file in 3.8 too

    return dict(packages_distributions())


@lru_cache(maxsize=None)
def brought(installed: frozenset) -> Set[str]:
    """The packages `installed` and all that they require here, to the last."""
    found: Set[Tuple[str, str]] = set()
    ahead = [(name, "") for name in installed]
    while ahead:
        name, extra = one = ahead.pop()
        if one in found:
            continue
        found.add(one)
        try:
            required = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of another platform
            continue
        for other in required:
            if other.marker is None or other.marker.evaluate({"extra": extra}):
                ahead += [(canonicalize_name(other.name), extra) for extra in ("", *other.extras)]
    return {name for name, _ in found}
