"""From a row of the user's data to the text that a template makes of it.

A row is a dict: the columns of one line of a file, or of one row of a hub dataset. A template (dataset/templates.py)
asks it for columns. Where a column is missing, one line says which, and how to name the user's own with --columns.
"""

from __future__ import annotations

import math
import re
import shlex
from contextlib import suppress
from copy import copy
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from numbers import Number
from pathlib import Path
from traceback import extract_tb
from typing import Callable, Dict, List

from common.support.exit import UserError
from common.tokenization import Example


def row_location(row: dict) -> str:
    """Where the row is, for a message: "my.jsonl, line 12"."""
    return getattr(row, "place", "the data")


def join_names(names) -> str:
    """Names for a message, in one line: at most eight, each shortened to 40 characters."""
    shown = [" ".join(str(name).split())[:40] for name in islice(names, 9)]
    if len(shown) > 8:
        shown[8] = "..."
    return ", ".join(shown) or "none"


# ------------------------------------------------------------------------------------------------ cells as text


class NotUtf8(bytes):
    """Bytes that are not text. A row may hold them in a column that no template uses: only `str` of them fails."""

    def __str__(self):
        raise TypeError(self)


def clean_cell(value):
    """The value of a cell as a template sees it: "" if the cell is empty, bytes as text, and anything else unchanged.

    None, NaN and infinity are empty cells: pandas writes NaN into a table where a cell is empty.
    """
    if value is None or (isinstance(value, Number) and (value != value or abs(value) == math.inf)):
        return ""
    if type(value) is bytes:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return NotUtf8(value)
    return value


def to_text(value) -> str:
    """The value of a cell as text: numbers, dates and labels as Python writes them. TypeError(value) for a list,
    an object, or bytes that are not UTF-8."""
    value = clean_cell(value)  # a template may have taken it out of a list
    if not isinstance(value, (str, Number, date, time, timedelta)):
        raise TypeError(value)
    # str(Decimal("0.0000001")) would be "1E-7"
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    # Half of an emoji (a lone surrogate), as scraped text has it, is valid JSON, and no encoding can store it.
    return text.encode("utf-8", "replace").decode("utf-8")


# ------------------------------------------------------------------------------------------------ the columns of a row


def rename_columns(row: dict, columns: Dict[str, str]) -> dict:
    """`row` with its columns renamed by `columns`, {name that the template asks for: name in the data}."""
    if not columns:
        return row
    for name, own in columns.items():
        if own not in row:
            raise UserError(
                f"--columns {name}={own}: {row_location(row)} has no column {own!r}, it has: {join_names(row)}."
            )
    new = copy(row)  # a copy of a Row keeps its place, a new dict would not
    for own in set(columns.values()):
        del new[own]  # moved, not copied: an `input` that became the instruction is no input any more
    for name, own in columns.items():
        new[name] = row[own]
    return new


def require_asked(template: Callable, row: dict, columns: Dict[str, str]) -> None:
    """UserError where `columns` has a name, a mistyped one, that the template does not ask for."""
    # A template may take another path by what a row holds: ask with this row, and with one that has every column.
    asked = ColumnRecorder(rename_columns(row, columns)).record(template)
    asked += ColumnRecorder({}, default="text").record(template)
    for name, own in columns.items():
        if asked and name not in asked:
            names = join_names(dict.fromkeys(asked))
            raise UserError(f"--columns {name}={own}: the template asks for no {name!r}, it asks for: {names}.")


def clean_row(row: dict) -> dict:
    return {name: clean_cell(value) for name, value in row.items()}


def apply_template(template: Callable, row: dict):
    """The Example that the template makes of the row, all its pieces text; or its Conversation, unchanged.

    UserError, with the row's location, where the template fails or a piece is not text.
    """
    cells = clean_row(row)
    try:
        made = template(cells)
        if hasattr(made, "messages"):
            return made
        return Example([to_text(piece) for piece in made.prompt], to_text(made.answer))
    except Exception as error:  # a template is the user's own code and can fail in any way, at this row
        raise UserError(row_location(row) + _complaint(template, cells, error)) from None


def _complaint(template: Callable, row: dict, error: Exception) -> str:
    """What to print after the row's location: why the template failed, and what to do."""
    if isinstance(error, TypeError) and error.args and not isinstance(error.args[0], str):
        return f": {_not_text(row, error.args[0])}. Make it one string per row."
    recorder = ColumnRecorder(row)
    asked = recorder.record(template)
    missing = list(dict.fromkeys(recorder.missing))
    if missing and isinstance(error, KeyError):
        names = ", ".join(map(repr, missing))
        plural = "s" if len(missing) > 1 else ""
        return f" has no column{plural} {names}; it has: {join_names(row)}. {_advice(row, asked, missing)}"
    frame = extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f": the template {template.__name__} fails in {place} ({type(error).__name__}: {error})"


def _advice(row: dict, asked: List[str], missing: List[str]) -> str:
    """The --columns option that would name the missing columns, ready to be pasted."""
    free = []
    for name, value in row.items():
        fits_into_a_line = name == join_names([name])
        if name not in asked and isinstance(value, (str, Number)) and fits_into_a_line:
            free.append(name)
    if len(free) < len(missing):
        return "Add what is missing, or write a template for yours: see tutorial/your_own_data.md."
    free.sort(key=lambda name: " " not in str(row[name]))  # columns with sentences first, then ids and dates
    pairs = [f"{name}={own}" for name, own in zip(missing, free)]
    plain = r"[\w=.,:/-]+"  # needs no quotes in a shell; shlex would quote Korean letters
    options = [pair if re.fullmatch(plain, pair) else shlex.quote(pair) for pair in pairs]
    return f"Name yours: --columns {' '.join(options)}"


def _not_text(row: dict, value) -> str:
    column = "a column"
    for name, own in row.items():
        if own is value:
            column = f"column {name!r}"
            break
    kinds = {list: "a list", dict: "an object", NotUtf8: "bytes that are not UTF-8"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    return f"{column} holds {kind}, which is not text"


class ColumnRecorder(dict):
    """A row that has every column it is asked for, and records which were asked for and which were missing."""

    def __init__(self, row: dict, default: str = ""):
        super().__init__(row)
        self.default = default
        self.asked: List[str] = []
        self.missing: List[str] = []

    def record(self, template: Callable) -> List[str]:
        """The columns that the template asks for, in their order."""
        with suppress(Exception):  # the template may need more than that the column is there
            template(self)
        return self.asked

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)

    def __missing__(self, name):
        self.missing.append(name)
        return self.default

    def __contains__(self, name):
        self.asked.append(name)
        return bool(self.default) or super().__contains__(name)

    def get(self, name, default=None):
        self.asked.append(name)
        return super().get(name, self.default)
