"""What is in the cells of the reader's data, as text; and what a message says of columns."""

from __future__ import annotations

import math
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from numbers import Number


class NotUtf8(bytes):
    """Bytes that are no text. A column that no template uses may hold them: only who makes text of them fails."""

    def __str__(self):
        raise TypeError(self)


def cell(value):
    """What a template finds in a cell: "" where it is empty, the text of bytes, anything else as it is."""
    if value is None or (isinstance(value, Number) and (value != value or abs(value) == math.inf)):
        return ""  # of a table that pandas wrote, NaN is an empty cell as well
    if type(value) is bytes:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return NotUtf8(value)
    return value


def text_of(value) -> str:
    """A cell as text: of a number, a date or a label what Python writes, of an empty cell "".

    TypeError, with the value, where it is none of these.
    """
    value = cell(value)  # a template may have taken it out of a list
    if not isinstance(value, (str, Number, date, time, timedelta)):
        raise TypeError(value)
    # of a Decimal not 1E-7; and half an emoji, as scraped text has them, is legal in JSON and in no encoding
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")


def not_text(row: dict, value) -> str:
    """Where in `row` the value stands, of which `text_of` makes no text, and what it is."""
    column = next((f"column {name!r}" for name, own in row.items() if own is value), "a column")
    kinds = {list: "a list", dict: "an object", NotUtf8: "bytes that are not UTF-8"}
    return f"{column} holds {kinds.get(type(value), f'a {type(value).__name__}')}, which is not text"


def listed(names) -> str:
    """Some names for a message: in one line, however many and long they are, and whatever is in them."""
    shown = [" ".join(str(name).split())[:40] for name in islice(names, 9)]
    return ", ".join(shown[:8] + ["..."] * (len(shown) > 8)) or "none"
