"""The columns of a reader's row, and those that a template asks for: where they differ, one line says how to name them.

A template asks a row for columns as it asks any dict, so what it asks for is found by giving it a row that writes it
down.
"""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from copy import copy
from numbers import Number
from pathlib import Path
from traceback import extract_tb
from typing import Callable, Dict

from common.chat_template import Conversation
from common.support.exit import UserError
from common.text import cell, listed, not_text, text_of
from dataset.templates import MESSAGE_COLUMNS as COLUMNS
from dataset.templates import chat


def place_of(row: dict) -> str:
    """Where the row stands, for a message: "my.jsonl, line 12"."""
    return getattr(row, "place", "the data")


def renamed(row: dict, columns: Dict[str, str]) -> dict:
    """`row` with its columns under the names of `columns`, {name that the template asks for: the row's own}."""
    if not columns:
        return row
    for name, own in columns.items():
        if own not in row:
            raise UserError(f"--columns {name}={own}: {place_of(row)} has no column {own!r}, it has: {listed(row)}.")
    new = copy(row)  # a row of a file knows its place, which another dict would not
    for own in {*columns.values()}:  # moved: `input` that became the instruction is not the input as well
        del new[own]
    new.update((name, row[own]) for name, own in columns.items())
    return new


def require_asked(template: Callable, row: dict, columns: Dict[str, str]) -> None:
    """UserError where `columns` has a name, a mistyped one, for which the template does not ask."""
    # a template may look at the row first, and at what is in it: such a row, and one that has whatever it asks for
    probes = [_Probe(renamed(row, columns), ""), _Probe({}, "text")]
    asked = [name for probe in probes for name in probe.answer(template)]
    for name, own in columns.items():
        if asked and name not in asked:
            names = listed(dict.fromkeys(asked))
            raise UserError(f"--columns {name}={own}: the template asks for no {name!r}, it asks for: {names}.")


def chosen(template: Callable, row: dict) -> Callable:
    """`template`; or `chat`, where the row has a conversation and lacks columns for which the template asks."""
    probe = _Probe(_cells(row), "")
    probe.answer(template)
    return chat if probe.missing and any(name in row for name in COLUMNS) else template


def gives_conversations(template: Callable, row: dict) -> bool:
    """Whether the template makes a Conversation of such a row, and no Example."""
    with suppress(Exception):  # which row it is, whoever applies it will say
        return isinstance(template(_cells(row)), Conversation)
    return template is chat


def applied(template: Callable, row: dict):
    """The Example that the template makes of the row, of text alone, or its Conversation, as it is. UserError, with the
    row's place, where it can't.

    The template finds cells that read well within a text: an empty one is "", not None or nan, and bytes are text.
    """
    cells = _cells(row)
    try:
        example = template(cells)
        if isinstance(example, Conversation):
            return example
        return example._replace(prompt=[text_of(piece) for piece in example.prompt], answer=text_of(example.answer))
    except Exception as error:  # a template is the reader's own code: whatever fails, it is at this row
        raise UserError(place_of(row) + _complaint(template, cells, error)) from None


def _cells(row: dict) -> dict:
    return {name: cell(value) for name, value in row.items()}


def _complaint(template: Callable, row: dict, error: Exception) -> str:
    """Why the template failed with `error` at the row, to be said after its place, and what to do."""
    if isinstance(error, TypeError) and error.args and not isinstance(error.args[0], str):
        return f": {not_text(row, error.args[0])}. Make it one string a row."
    probe = _Probe(row, "")
    asked = probe.answer(template)
    missing = list(probe.missing)
    if not (missing and isinstance(error, KeyError)):
        frame = extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        return f": the template {template.__name__} fails in {place} ({type(error).__name__}: {error})"
    # names that can be pasted, of columns that hold text and are not asked for
    free = [
        name
        for name, value in row.items()
        if name not in asked and isinstance(value, (str, Number)) and name == listed([name])
    ]
    free.sort(key=lambda name: " " not in str(row[name]))  # of a sentence sooner than of an id or a date
    advice = "Add what is missing, or write a template for yours: see tutorial/your_own_data.md."
    if len(free) >= len(missing):
        advice = f"Name yours: --columns {' '.join(map(_option, missing, free))}"
    plural = "s" * (len(missing) > 1)
    return f" has no column{plural} {', '.join(map(repr, missing))}; it has: {listed(row)}. {advice}"


def _option(name: str, own: str) -> str:
    pair = f"{name}={own}"
    return pair if re.fullmatch(r"[\w=.,:/-]+", pair) else shlex.quote(pair)


class _Probe(dict):
    """A row that has whatever it is asked for, and writes down what that was."""

    def __init__(self, row: dict, filling: str):
        super().__init__(row)
        self.filling, self.asked, self.missing = filling, {}, {}  # names, in their order

    def answer(self, template: Callable) -> Dict[str, bool]:
        with suppress(Exception):  # it may want more of a column than to be there
            template(self)
        return self.asked

    def __getitem__(self, name):
        self.asked[name] = True
        return super().__getitem__(name)

    def __missing__(self, name):
        self.missing[name] = True
        return self.filling

    def __contains__(self, name):
        self.asked[name] = True
        return bool(self.filling) or super().__contains__(name)

    def get(self, name, default=None):
        self.asked[name] = True
        return super().get(name, self.filling)
