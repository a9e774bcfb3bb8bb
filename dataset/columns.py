"""From a row of your data to the text that a template makes of it.

A row is a dict: the columns of one line of a file, or of one row of a hub dataset. A template (dataset/templates.py)
asks it for columns. If one is missing, the error says which, and how to name yours with --columns.
"""

from __future__ import annotations

import math
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


def clean_cell(value):
    """The value of a cell as a template sees it: "" if the cell is empty, bytes as text, and anything else unchanged.

    None, NaN and infinity are empty cells: pandas writes NaN into a table where a cell is empty.
    """
    if value is None or (isinstance(value, Number) and (value != value or abs(value) == math.inf)):
        return ""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):  # An image, which a row may hold if no template uses it.
            return value.decode("utf-8")
    return value


def is_filled(value) -> bool:
    """Whether a cell holds something."""
    return clean_cell(value) not in ("", [], {})


def to_text(value) -> str:
    """The value of a cell as text: numbers, dates and labels as Python writes them. TypeError(value) for a list,
    an object, or bytes that are not UTF-8."""
    value = clean_cell(value)  # A template may have taken it out of a list.
    if not isinstance(value, (str, Number, date, time, timedelta)):
        raise TypeError(value)
    # str(Decimal("0.0000001")) would be "1E-7".
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    # Half of an emoji (a lone surrogate), as scraped text has it, is valid JSON, and no encoding can store it.
    return text.encode("utf-8", "replace").decode("utf-8")


# ------------------------------------------------------------------------------------------------ the columns of a row


def rename_columns(row: dict, columns: Dict[str, str]) -> dict:
    """`row` with its columns renamed by `columns`, {name that the template asks for: name in the data}."""
    new = copy(row)  # A copy of a Row keeps its place.
    for name, own in columns.items():
        if own not in row:
            raise UserError(
                f"--columns {name}={own}: {row_location(row)} has no column {own!r}, it has: {join_names(row)}."
            )
        new.pop(own, None)  # moved, not copied: an `input` that became the instruction is no input any more
    for name, own in columns.items():
        new[name] = row[own]
    return new


def require_asked(template: Callable, row: dict, columns: Dict[str, str]) -> None:
    """UserError if `columns` has a name, a mistyped one, that the template does not ask for."""
    # What a row holds may decide what a template asks for, so it is called with this row and with an empty one.
    asked = [*asked_columns(template, rename_columns(row, columns)), *asked_columns(template, {})]
    for name, own in columns.items():
        if asked and name not in asked:
            names = join_names(dict.fromkeys(asked))
            raise UserError(f"--columns {name}={own}: the template asks for no {name!r}, it asks for: {names}.")


def asked_columns(template: Callable, row: dict) -> Dict[str, bool]:
    """The columns that the template asks for, {name: whether it is required}."""
    recorder = ColumnRecorder(row)
    with suppress(Exception):  # A template may need more than that the column is there.
        template(recorder)
    return recorder.asked


def question_row(template: Callable, text: str) -> Dict[str, str]:
    """A row that asks `text`, which stands in the first column that the template asks for; all others are empty."""
    names = list(asked_columns(template, {}))
    return {**dict.fromkeys(names, ""), names[0]: text}


def unused_columns(template: Callable, row: dict) -> List[str]:
    """The columns that hold something for which the template does not ask."""
    asked = asked_columns(template, row)
    # The index that pandas writes has no name.
    return [name for name, value in row.items() if name and name not in asked and is_filled(value)]


def missing_columns(template: Callable, row: dict) -> List[str]:
    """The columns that the template requires and the row does not have."""
    return [name for name, required in asked_columns(template, row).items() if required and name not in row]


class ColumnRecorder(dict):
    """A row that records which columns it is asked for. One that it does not have is an empty cell."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.asked: Dict[str, bool] = {}

    def __getitem__(self, name):
        self.asked[name] = True
        return super().get(name, "")

    def __contains__(self, name):
        self.asked.setdefault(name, False)
        return super().__contains__(name)

    def get(self, name, default=None):
        self.asked.setdefault(name, False)
        return super().get(name, default)


def apply_template(template: Callable, row: dict):
    """The Example that the template makes of the row, all its pieces text; or its Conversation, unchanged.

    UserError, with the row's location, if the template fails or a piece is not text.
    """
    cells = {name: clean_cell(value) for name, value in row.items()}
    try:
        made = template(cells)
        if hasattr(made, "messages"):
            return made
        return Example([to_text(piece) for piece in made.prompt], to_text(made.answer))
    except UserError as error:
        raise UserError(f"{row_location(row)}: {error}") from None
    except Exception as error:  # A template is the user's own code and can fail in any way.
        raise UserError(row_location(row) + _complaint(template, cells, error)) from None


def _complaint(template: Callable, row: dict, error: Exception) -> str:
    """What to print after the row's location: why the template failed, and what to do."""
    if isinstance(error, TypeError) and error.args and not isinstance(error.args[0], str):
        kinds = {list: "a list", dict: "an object", bytes: "bytes that are not UTF-8"}
        [value] = error.args
        columns = [f"column {name!r}" for name in row if row[name] is value]
        kind = kinds.get(type(value), f"a {type(value).__name__}")
        return f": {(columns or ['a column'])[0]} holds {kind}, which is not text. Make it one string per row."
    missing = missing_columns(template, row)
    if missing and isinstance(error, KeyError):
        plural = "s" if len(missing) > 1 else ""
        names = ", ".join(map(repr, missing))
        option = " ".join(f"{name}=COLUMN" for name in missing)
        return f" has no column{plural} {names}; it has: {join_names(row)}. Name yours: --columns {option}"
    frame = extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f": the template {template.__name__} fails in {place} ({type(error).__name__}: {error})"
