"""The reader's own files: their rows read as they are used, checked, and each with the place at which it stands."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from common.support.exit import UserError, first_line
from dataset.json_files import json_array, json_lines

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
WHAT_DATA_CAN_BE = "Data can be a .jsonl, .json, .csv or .parquet file, a folder, or a hub id."
# what people have instead: how such a file ends, how it begins, what to do with it
OTHERS = (
    (".gz", b"\x1f\x8b", "is compressed: gunzip it first"),
    (".xlsx", b"PK\x03\x04", "is an Excel workbook or a .zip: save the sheet as CSV UTF-8, or unzip it first"),
    (".xls", b"\xd0\xcf\x11\xe0", "is an Excel workbook: save the sheet as CSV UTF-8"),
    (".bz2", b"BZh", "is compressed: bunzip2 it first"),
    (".xz", b"\xfd7zXZ", "is compressed: unxz it first"),
    (".zst", b"\x28\xb5\x2f\xfd", "is compressed: unzstd it first"),
)
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
LONGEST_FIELD = 10**8  # letters: where a quote of a .csv is never closed, the rest of the file is one field
NARROW = {"float": "float32", "halffloat": "float16", "float32": "float32", "float16": "float16"}  # Arrow's, numpy's


class Row(dict):
    """A row that knows its place, "my.jsonl, line 12", which a message about it names."""

    def __init__(self, columns: dict, place: str):
        super().__init__(columns)
        self.place = place


class FileRows:
    """The rows of a .jsonl, .json, .csv or .parquet file, read anew each time they are gone through.

    `inside`: of a .json file, the list within it that holds the rows, as "data" or "data.paragraphs".
    """

    def __init__(self, path: Path, inside: str = ""):
        self.path, self.inside = path, inside
        self.suffix = path.suffix.lower()
        self.rows = 0  # where it is known

    def __length_hint__(self) -> int:
        """About how many rows there are: for whoever asks how much is left, by `operator.length_hint`."""
        if not self.rows:
            self.rows = line_ends(self.path, self.suffix == ".csv") - (self.suffix == ".csv")  # without the header
        return max(self.rows, 0)

    def __iter__(self) -> Iterator[Row]:
        try:
            require_no_other(self.path)
            for place, row in getattr(self, "_" + self.suffix[1:])():
                place = f"{self.path}, {place}"
                if not isinstance(row, dict):
                    raise UserError(f"{place} is not a JSON object of columns: {str(row)[:40]!r}. Mend it.")
                yield Row(row, place)
        except UnicodeDecodeError as error:
            place = f"{self.path}, line {self._first_line_that_is_not_utf8()}"
            form = "CSV UTF-8, as Excel calls it" if self.suffix == ".csv" else "UTF-8"
            raise UserError(f"{place} is not UTF-8 text ({error.reason}). Save it as {form}.") from None
        except RecursionError:
            raise UserError(f"{self.path} has JSON nested too deep to be read. Make each column a text.") from None
        except OSError as error:
            raise UserError(
                f"{self.path} can't be read: {error.strerror or error}. Check that you may read it."
            ) from None

    def _first_line_that_is_not_utf8(self) -> int:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return number
        return 1

    def _jsonl(self) -> Iterator[Tuple[str, object]]:
        return json_lines(self.path)

    def _json(self) -> Iterator[Tuple[str, object]]:
        rows = json_array(self.path, self.inside)
        if rows is None:
            yield from json_lines(self.path)
        else:
            self.rows = len(rows)
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row

    def _csv(self) -> Iterator[Tuple[str, dict]]:
        csv.field_size_limit(LONGEST_FIELD)  # an article is longer than csv's default limit
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            first = next((line.strip() for line in file if line.strip()), "")
            separated = [name for sign, name in SEPARATORS.items() if sign in first and "," not in first]
            if separated:
                raise UserError(
                    f"{self.path} is separated by {separated[0]}, not by commas: its header is {first[:60]!r}. Save it "
                    "with commas."
                )
            file.seek(0)
            reader, header, line = csv.reader(file, strict=True), None, 1
            try:
                for fields in reader:
                    place, line = f"line {line}", reader.line_num + 1
                    if len(fields) < 2 and not "".join(fields).strip():
                        continue
                    if header is None:
                        header = [name.strip() for name in fields]
                        _require_names(f"{self.path}, {place}", header)
                    elif len(fields) != len(header):
                        raise UserError(
                            f"{self.path}, {place} has {len(fields)} field{'s' * (len(fields) != 1)} and the header "
                            f"has {len(header)}. Put double quotes around text with a comma or a line break."
                        )
                    else:
                        yield place, dict(zip(header, fields))
            except csv.Error as error:
                raise UserError(f"{self.path}, line {line} is not a valid .csv row: {error}. Mend that row.") from None

    def _parquet(self) -> Iterator[Tuple[str, dict]]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            self.rows = file.metadata.num_rows
            _require_names(str(self.path), file.schema_arrow.names)
            narrow = {field.name: NARROW[str(field.type)] for field in file.schema_arrow if str(field.type) in NARROW}
            batches = file.iter_batches(batch_size=1000)
            ones = (batch.slice(number, 1) for batch in batches for number in range(batch.num_rows))
            for number, one in enumerate(ones, 1):
                try:
                    [row] = one.to_pylist()
                except Exception as error:  # text that isn't UTF-8, a year or a time zone that Python has not
                    raise UserError(
                        f"{self.path}, row {number} can't be read: {first_line(error).rstrip('.')}. Mend it."
                    ) from None
                yield f"row {number}", shortened(row, narrow)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is not a valid .parquet file: {first_line(error).rstrip('.')}") from None


def require_no_other(path: Path) -> None:
    """UserError where the file is of a kind that can be made one of ours, whatever it is called."""
    with open(path, "rb") as file:
        begin = file.read(8)
    for suffix, sign, what in OTHERS:
        if path.suffix.lower() == suffix or begin.startswith(sign):
            raise UserError(f"{path} {what}. {WHAT_DATA_CAN_BE}")


def line_ends(path: Path, quoted: bool) -> int:
    """Lines of a file; where `quoted`, without the line ends between double quotes. A gigabyte takes half a second."""
    count, within, last = 0, 0, b"\n"
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            parts = block.split(b'"') if quoted else [block]
            count += sum(part.count(b"\n") for part in parts[within::2])
            within, last = (within + len(parts) - 1) % 2, block[-1:]
    return count + (last != b"\n")


def shortened(row: dict, narrow: Dict[str, str]) -> dict:
    """`row`, with its narrow floats as they are written: float32's 0.1 is 0.10000000149011612 in Python's own float."""
    import numpy

    for name, kind in narrow.items():
        if row[name] is not None:
            row[name] = float(str(getattr(numpy, kind)(row[name])))
    return row


def _require_names(place: str, names: List[str]) -> None:
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(
                f"{place}: column {number} has no name. Name it; pandas writes its index so, without index=False."
            )
        if name in names[: number - 1]:
            raise UserError(f"{place}: two columns have the name {name[:40]!r}. Rename one of them.")
