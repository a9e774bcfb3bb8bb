"""Where rows come from: a dataset of the hub, or your own file or folder.

A file is read whole, and its cells stay as they are written: 1.10 is "1.10" in a prompt, not "1.1". The rows of a hub
dataset stay on the disk and are read as they are used.
"""

from __future__ import annotations

import csv
import json
import platform
import re
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple
from unicodedata import normalize

from common.support.exit import UserError, first_line
from dataset.columns import join_names
from dataset.korean_numbers import korean_number_chats, korean_number_phrases, korean_number_splits
from dataset.standard_library import standard_library_splits

CONFIGS = {"abisee/cnn_dailymail": "3.0.0"}  # the version of a hub dataset that comes in several
MEASURES = {  # how tutorial/evaluate.py judges the answers of these; those of other data are judged as "text"
    "python_code_instructions_18k_alpaca": "code",
    "Evol-Instruct-Python-26k": "code",
    "standard-library": "code",
    "cnn_dailymail": "summary",
}
# Rows that are made on the spot: {name: (what run.json calls them, the function)}.
KOREAN_NUMBERS = "Korean numbers, made by dataset/korean_numbers.py"
MADE_HERE = {
    "standard-library": (f"the standard library of Python {platform.python_version()}", standard_library_splits),
    "korean-numbers": (KOREAN_NUMBERS, korean_number_splits),
    "korean-number-phrases": (KOREAN_NUMBERS, korean_number_phrases),
    "korean-number-chats": (KOREAN_NUMBERS, korean_number_chats),
}
HOLD_OUT_EVERY = 20  # without a validation split, every 20th row is held out,
HOLD_OUT_AT_MOST = 256  # up to this many
WHAT_DATA_CAN_BE = "Data can be a .jsonl, .json, .csv or .parquet file, a folder, or a hub id."
HINTS = {  # what to do with files of other kinds
    ".gz": "is compressed: gunzip it first",
    ".xlsx": "is an Excel workbook: save the sheet as CSV UTF-8",
    ".xls": "is an Excel workbook: save the sheet as CSV UTF-8",
}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
LONGEST_CELL = 10**8  # characters; a quote that is never closed makes the rest of a .csv file one cell


class Row(dict):
    """A row that knows its place, "my.jsonl, line 12", which a message about it names."""

    __slots__ = ("place",)

    def __init__(self, columns: dict, place: str):
        # macOS may write the letters of a name in parts (NFD); it looks like the name that somebody types.
        super().__init__({normalize("NFC", name): value for name, value in columns.items()})
        self.place = place


class Source(NamedTuple):
    """The name of the data, with the hub's revision, what its dataset card says ("license" and "language"), and how
    answers are judged."""

    name: str
    card: dict = {}
    measure: str = "text"


def load_splits(name_or_path: str) -> Tuple[Dict[str, Iterable[dict]], Source]:
    """{"train": rows, "validation": rows} of a file, a folder, a hub id or a name in MADE_HERE; and their source.

    The rows of a split can be iterated several times. Without a validation split, rows of train are held out.
    UserError if there is no such file or dataset, if it has no rows, or if a row cannot be read.
    """
    # macOS writes the letters of a file's name in parts (NFD), and no keyboard does.
    forms = [Path(name_or_path), Path(normalize("NFC", name_or_path)), Path(normalize("NFD", name_or_path))]
    path = next((form for form in forms if form.exists()), forms[0])
    may_be_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path)
    if name_or_path in MADE_HERE:
        description, make = MADE_HERE[name_or_path]
        source = Source(description)
        splits = make()
    elif path.is_dir():
        source = Source(name_or_path, _card_of_folder(path))
        splits = _read_folder(path)
    elif path.exists() or path.suffix.lower() in (*READERS, *HINTS) or not may_be_hub_id:
        source = Source(name_or_path)
        splits = {"train": read_rows(path)}
    else:
        splits, source = _load_from_hub(name_or_path)
    if not len(splits["train"]):
        raise UserError(f"The dataset {name_or_path} is empty. Give one with at least one row.")
    if "validation" not in splits:
        splits = {"train": Part(splits["train"], False), "validation": Part(splits["train"], True)}
        print(f"No validation split: every {HOLD_OUT_EVERY}th row is held out, up to {HOLD_OUT_AT_MOST}.")
    measures = [MEASURES[part] for part in path.parts if part in MEASURES]
    return splits, source._replace(measure=measures[-1] if measures else "text")


class Part:
    """The held-out rows of a split, or the others."""

    def __init__(self, rows, held_out: bool):
        self.rows = rows
        self.held_out = held_out

    def __len__(self) -> int:
        held_out = min(len(self.rows) // HOLD_OUT_EVERY, HOLD_OUT_AT_MOST)
        return held_out if self.held_out else len(self.rows) - held_out

    def __iter__(self) -> Iterator[dict]:
        last = HOLD_OUT_EVERY * HOLD_OUT_AT_MOST
        for number, row in enumerate(islice(self.rows, last) if self.held_out else self.rows, 1):
            if (number % HOLD_OUT_EVERY == 0 and number <= last) == self.held_out:
                yield row


# ------------------------------------------------------------------------------------------------ files


def read_rows(path: Path) -> List[Row]:
    """The rows of a .jsonl, .json, .csv or .parquet file. UserError, with the place, for what cannot be read."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise UserError(f"{path} does not exist. {WHAT_DATA_CAN_BE}")
    if suffix not in READERS or not path.is_file():
        raise UserError(f"{path} {HINTS.get(suffix, 'is not a file of these')}. {WHAT_DATA_CAN_BE}")
    rows = []
    try:
        for place, row in READERS[suffix](path):
            if not isinstance(row, dict):
                raise UserError(f"{path}, {place} is not a JSON object of columns: {str(row)[:40]!r}. Fix it.")
            rows.append(Row(row, f"{path}, {place}"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}. Check that you may read it.") from None
    return rows


def _read_folder(folder: Path) -> Dict[str, List[Row]]:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    files = {split: _files_of_split(folder, split, names) for split in ("train", "validation")}
    if not files["train"]:
        advice = "Name the file so."
        if "dataset_info.json" in names or "dataset_dict.json" in names:
            advice = 'Write it again: datasets.load_from_disk("...")["train"].to_json("train.jsonl").'
        raise UserError(f"{folder} has no train.jsonl (.json, .csv, .parquet), it has: {join_names(names)}. {advice}")
    others = [name for name in names if name not in (*files["train"], *files["validation"], "README.md", "LICENSE")]
    if others:
        advice = "Rename or unpack what shall be train or validation (.jsonl, .json, .csv, .parquet)."
        print(f"Not read in {folder}: {join_names(others)}. {advice}")
    return {split: [row for name in some for row in read_rows(folder / name)] for split, some in files.items() if some}


def _files_of_split(folder: Path, split: str, names: List[str]) -> List[str]:
    """The file of a split; or all of those into which the hub cuts a large one, as train-00000-of-00002.parquet."""
    readable = [name for name in names if Path(name).suffix.lower() in READERS]
    files = [name for name in readable if Path(name).stem == split]
    shards = {name: re.match(rf"{split}-(\d+)-of-(\d+)\b", name) for name in readable}
    numbers = {name: (int(match[1]), int(match[2])) for name, match in shards.items() if match}
    if files and len(files) + len(numbers) > 1:
        raise UserError(f"{folder} has {join_names([*files, *numbers])}; leave one of them in it.")
    if sorted(numbers.values()) != [(number, len(numbers)) for number in range(len(numbers))]:
        raise UserError(f"{folder} has not all parts of {split}, it has: {join_names(numbers)}. Add the others.")
    return files or sorted(numbers, key=lambda name: numbers[name])


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file. UserError for the first one that is not UTF-8, if the file is not CP949 as well."""
    encoding = "utf-8-sig"  # Where files were joined, a byte order mark stands in the middle.
    content = path.read_bytes()
    if _is_cp949(content):
        encoding = "cp949"
        print(f"{path} is not UTF-8 but CP949, which Korean Excel writes: it is read as CP949.")
    for number, line in enumerate(BytesIO(content), 1):
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            form = "CSV UTF-8, as Excel calls it" if path.suffix.lower() == ".csv" else "UTF-8"
            place = f"{path}, line {number}"
            raise UserError(f"{place} is not UTF-8 text ({error.reason}). Save it as {form}.") from None


def _is_cp949(content: bytes) -> bool:
    """Whether it is Korean text in CP949. If some lines are UTF-8, it is a damaged file."""
    lines = [line for line in content.splitlines() if not line.isascii()]
    if not lines or any(line.decode("utf-8", "ignore").encode() == line for line in lines):
        return False
    text = content.decode("cp949", "ignore")
    return text.encode("cp949") == content and bool(re.search("[가-힣]", text))


class JsonNumber(float):
    """A number in a JSON file that is not an integer. Its text is the one in the file."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


# pandas writes an empty cell as NaN.
DECODER = json.JSONDecoder(parse_constant=lambda _: None, parse_float=JsonNumber)


def _read_jsonl(path: Path) -> Iterator[Tuple[str, object]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield f"line {number}", DECODER.decode(line.strip())
            except (ValueError, RecursionError) as error:
                raise _invalid_json(path, number, error) from None


def _read_json(path: Path) -> Iterator[Tuple[str, object]]:
    """An array of objects, or JSON lines, as many .json files on the hub are."""
    text = "".join(_lines(path))
    try:
        document = DECODER.decode(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # a second object
            return _read_jsonl(path)
        raise _invalid_json(path, getattr(error, "lineno", 1), error) from None
    if isinstance(document, dict):
        raise UserError(
            f"{path} is one JSON object ({join_names(document)}), not an array of rows. Save the list that holds the "
            "rows in a file of its own: see tutorial/your_own_data.md."
        )
    rows = document if isinstance(document, list) else [document]
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _invalid_json(path: Path, line: int, error: Exception) -> UserError:
    return UserError(f"{path}, line {line} is not valid JSON: {getattr(error, 'msg', error)}. Fix that line.")


def _read_csv(path: Path) -> Iterator[Tuple[str, dict]]:
    csv.field_size_limit(LONGEST_CELL)  # An article is longer than the default limit.
    # Some programs put a space behind each comma: before quotes, and where the header has it, it belongs to no cell.
    text = re.sub(r'(?m)(^|,) *("[^"]*(?:""[^"]*)*")', r"\1\2", "".join(_lines(path)))
    spaced = ", " in text.partition("\n")[0]
    reader = csv.reader(StringIO(text, newline="\n"), strict=True, skipinitialspace=spaced)
    header: List[str] = []
    line = 0
    try:
        for cells in reader:
            line = reader.line_num
            if not cells or (not header and ",".join(cells) == "sep=,"):  # a line for Excel
                continue
            if not header:
                header = _column_names(path, cells)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {line} has more or fewer cells than the header. Put double quotes around text with "
                    "a comma or a line break."
                )
            yield f"line {line}", dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{path}, line {line + 1} is not a valid .csv row: {error}. Fix that row.") from None


def _column_names(path: Path, header: List[str]) -> List[str]:
    """The names in the header of a .csv file. UserError if it is not separated by commas, or if a name is twice."""
    names = [name.strip() for name in header]
    for sign, what in SEPARATORS.items():
        if len(names) == 1 and sign in names[0]:
            raise UserError(f"{path} is separated by {what}, not by commas: {names[0][:60]!r}. Save it with commas.")
    for name in names:
        if name and names.count(name) > 1:  # The index that pandas writes has no name, and no template asks for it.
            raise UserError(f"{path}: two columns have the name {name[:40]!r}. Rename one of them.")
    return names


def _read_parquet(path: Path) -> Iterator[Tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for start in range(batch.num_rows):
                number += 1
                [row] = batch.slice(start, 1).to_pylist()
                yield f"row {number}", row
    # It is another file or damaged, or it has text that is not UTF-8, or a year that Python does not have.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        place = f"{path}, row {number}" if number else path
        raise UserError(f"{place} is not valid .parquet: {first_line(error).rstrip('.')}. Save it again.") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


# ------------------------------------------------------------------------------------------------ the hub


class HubRows:
    """The rows of a split of a hub dataset. A class label is its name, not its number."""

    def __init__(self, name: str, rows):
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        from datasets import ClassLabel

        features = self.rows.features.items()
        labels = {column: feature.names for column, feature in features if isinstance(feature, ClassLabel)}
        for number, row in enumerate(self.rows, 1):
            for column, names in labels.items():
                label = row[column]
                row[column] = names[label] if label is not None and label >= 0 else None  # -1: unknown
            yield Row(row, f"{self.name}, row {number}")


def _load_from_hub(name: str) -> Tuple[Dict[str, HubRows], Source]:
    import datasets
    from huggingface_hub import HfApi, constants

    # datasets 4 never runs a repository's own code, and has no such option.
    trust = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
    try:
        info = HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        revision, card = info.sha, _read_card(getattr(info, "card_data", None))
    except Exception:  # Offline, the dataset may still be in the cache. If not, the next call says why.
        revision, card = None, {}
    try:
        # What datasets.load_dataset does; but that would not say whether it downloads.
        builder = datasets.load_dataset_builder(name, CONFIGS.get(name), revision=revision, **trust)
        if not Path(builder.cache_dir).exists():
            print("Downloading dataset...")
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except Exception as error:  # Its type differs between versions of datasets and huggingface_hub.
        sample = f"dataset/samples/{name.split('/')[-1]}"
        rehearse = f", or rehearse with --dataset-name-or-path {sample}" if Path(sample).is_dir() else "."
        raise UserError(
            f"The dataset {name} could not be loaded from the hub: {first_line(error).rstrip('.')}. Check the name and "
            f"the network{rehearse}"
        ) from None
    if "train" not in loaded:
        raise UserError(f"The dataset {name} has no split named train, it has: {', '.join(loaded)}.")
    splits = {split: HubRows(f"{name}, {split}", loaded[split]) for split in ("train", "validation") if split in loaded}
    if len(splits) == 1 and len(loaded) > 1:  # its validation split may have another name
        print(f"Not read in {name}: {join_names(split for split in loaded if split != 'train')}.")
    return splits, Source(f"{name} at {revision or 'an unknown revision'}", card)


def _card_of_folder(folder: Path) -> dict:
    from huggingface_hub import DatasetCard

    try:
        return _read_card(DatasetCard.load(folder / "README.md").data)
    except Exception:  # There is none, or its head is of another kind.
        return {}


def _read_card(data) -> dict:
    """{"license": text, "language": list of codes} of a dataset card, each if it is there."""
    card = {}
    for name in ("license", "language"):
        value = getattr(data, name, None)
        if isinstance(value, (str, list)):
            card[name] = [value] if isinstance(value, str) else [str(one) for one in value]
    if "license" in card:
        card["license"] = ", ".join(card["license"])
    return card
