"""Rows of JSON files: JSON lines, an array of objects, or a list within one large object."""

from __future__ import annotations

import json
import shlex
from itertools import islice
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from common.support.exit import UserError
from dataset.columns import join_names


def json_lines(path: Path, decoder: Optional[json.JSONDecoder] = None) -> Iterator[Tuple[str, object]]:
    """("line 12", the value of that line) of each line that is not empty; as `decoder` has it, without one DECODER."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff").strip()  # where files were joined, a byte order mark stands within
            if line:
                yield f"line {number}", _parsed(path, line, number, decoder)


def json_array(path: Path, inside: str) -> Optional[Sequence]:
    """The rows of an array, or of the list named `inside`, "data.paragraphs", of one large object; None: JSON lines."""
    lines = json_lines(path)  # many .json files on the hub are JSON lines
    try:
        first = list(islice(lines, 1))
    except UserError:  # its first line is nothing by itself
        with open(path, encoding="utf-8-sig") as file:
            document = _parsed(path, file.read())
    else:
        second = list(islice(lines, 1))
        if second and inside:
            raise UserError(f"{path} has a JSON object on each line, and no list to choose. Leave out #{inside}.")
        if second or not first:
            return None
        document = first[0][1]
    return document if isinstance(document, list) and not inside else _list_within(path, document, inside)


def _parsed(path: Path, text: str, line: int = 0, decoder: Optional[json.JSONDecoder] = None):
    try:
        return (decoder or DECODER).decode(text)
    except json.JSONDecodeError as error:
        reason, line = error.msg, line or error.lineno
    except ValueError as error:
        reason = str(error)
    place = f"{path}, line {line}" if line else path
    raise UserError(f"{place} is not valid JSON: {reason}. Mend {'that line' if line else 'it'}.")


def _object(pairs: List[Tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {max(names, key=names.count)[:40]!r} twice")
    return row


# pandas writes an empty cell as NaN; other numbers stay as they are written, which float would not keep (1.10, 1e999)
DECODER = json.JSONDecoder(
    parse_constant=lambda _: None,
    parse_float=str,
    parse_int=lambda digits: int(digits) if len(digits) < 1000 else digits,
    object_pairs_hook=_object,
)


def _list_within(path: Path, document, inside: str) -> Sequence:
    """The list named `inside`. UserError, with the lists that there are, where it is not clear which one is meant."""
    lists = _lists(document, "", {})
    if inside and inside in lists:
        return lists[inside]
    names = [name for name in lists if name]
    # of objects, as rows are; without any of these an object with texts is itself a row, which may have lists
    of_objects = [name for name in names if any(isinstance(item, dict) for item in lists[name])]
    if inside:
        raise UserError(
            f"{path} has no list {inside!r} within. Its lists: {join_names(names)}. Choose another after the #."
        )
    if of_objects or (names and not any(isinstance(value, str) for value in document.values())):
        choice = shlex.quote(" ".join(f"{path}#{[*of_objects, *names][0]}".split()))  # one line, whatever the name is
        raise UserError(
            f"{path} is one JSON object, not an array of rows. Its lists: {join_names(names)}. Choose the one that "
            f"holds the rows, as in --dataset-name-or-path {choice}"
        )
    if document and isinstance(document, dict) and all(isinstance(value, dict) for value in document.values()):
        raise UserError(
            f"{path} is one JSON object of objects ({join_names(document)}), not an array of rows. Save it as an "
            'array: in pandas, to_json(path, orient="records").'
        )
    return [document]


def _lists(value, name: str, found: Dict[str, list]) -> Dict[str, list]:
    """{"data.paragraphs": all that is in the lists of that name within `value`}"""
    if isinstance(value, list):
        found.setdefault(name, []).extend(value)
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            for key, inner in item.items():
                if isinstance(inner, (list, dict)):
                    _lists(inner, f"{name}.{key}" if name else key, found)
    return found
