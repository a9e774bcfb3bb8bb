"""Where rows come from: a dataset of the hub, or the reader's own file or folder, in the same columns."""

from __future__ import annotations

import csv
import json
import platform
import sys
from pathlib import Path
from typing import Dict, Iterable, Iterator, Tuple

from common import UserError
from dataset.standard_library import standard_library_splits

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
CONFIGS = {"abisee/cnn_dailymail": "3.0.0"}  # of a hub dataset that comes in several versions, the one that is meant
HOLD_OUT_EVERY = 20  # of a dataset without a validation split, every 20th row is held out,
HOLD_OUT_AT_MOST = 256  # up to this many


def load_splits(name_or_path: str) -> Tuple[Dict[str, Iterable[dict]], str]:
    """{"train": rows, "validation": rows} of a file, of a folder with train and validation files, or of a hub id; and
    a name for them, with the hub's revision where there is one.

    Rows can be gone through several times and are read as they are used. Where there is no validation split, rows of
    train are held out. UserError: no such file or dataset, no rows; and later, a row that is not valid JSON.
    """
    path, source = Path(name_or_path), name_or_path
    looks_local = path.suffix in SUFFIXES or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if name_or_path == "standard-library":
        splits, source = standard_library_splits(), f"the standard library of Python {platform.python_version()}"
    elif path.is_dir():
        splits = _folder(path)
    elif path.suffix in SUFFIXES and path.is_file():
        splits = {"train": FileRows(path)}
    elif path.exists() or looks_local:
        what = "is not a file of these" if path.exists() else "does not exist"
        raise UserError(
            f"{name_or_path} {what}. Data can be a .jsonl, .json, .csv or .parquet file, a folder, or a hub id."
        )
    else:
        splits, source = _hub(name_or_path)
    if next(iter(splits["train"]), None) is None:
        raise UserError(f"The dataset {name_or_path} is empty. Give one with at least one row.")
    if "validation" not in splits:
        splits = {"train": HoldOut(splits["train"], False), "validation": HoldOut(splits["train"], True)}
        print(f"No validation split: every {HOLD_OUT_EVERY}th row is held out, up to {HOLD_OUT_AT_MOST}.")
    return splits, source


class HoldOut:
    """The held-out rows of `rows`, or the others."""

    def __init__(self, rows: Iterable[dict], held_out: bool):
        self.rows, self.held_out = rows, held_out

    def __iter__(self) -> Iterator[dict]:
        last = HOLD_OUT_EVERY * HOLD_OUT_AT_MOST
        for number, row in enumerate(self.rows, 1):
            if (number % HOLD_OUT_EVERY == 0 and number <= last) == self.held_out:
                yield row


class FileRows:
    """The rows of a .jsonl, .json, .csv or .parquet file, read anew each time they are gone through."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[dict]:
        try:
            for row in getattr(self, "_" + self.path.suffix[1:])():
                if not isinstance(row, dict):
                    raise UserError(
                        f"{self.path} has a row that is not a JSON object of columns: {str(row)[:40]!r}. Mend it."
                    )
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None

    def _jsonl(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise self._no_json(number, error) from None

    def _json(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8-sig") as file:
            if file.read(4096).lstrip()[:1] != "[":  # many .json files on the hub are JSON lines
                yield from self._jsonl()
                return
            file.seek(0)
            try:
                yield from json.load(file)
            except json.JSONDecodeError as error:
                raise self._no_json(error.lineno, error) from None

    def _no_json(self, line: int, error: json.JSONDecodeError) -> UserError:
        return UserError(f"{self.path}, line {line} is not valid JSON: {error.msg}. Mend that line.")

    def _csv(self) -> Iterator[dict]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # an article is longer than csv's default limit
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            try:
                yield from csv.DictReader(file, strict=True)
            except csv.Error as error:
                raise UserError(f"{self.path} is not a valid .csv file: {error}. Mend it.") from None

    def _parquet(self) -> Iterator[dict]:
        import pyarrow
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(self.path).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is not a valid .parquet file: {str(error).splitlines()[0]}") from None


def _folder(path: Path) -> Dict[str, Iterable[dict]]:
    splits = {}
    for split in ("train", "validation"):
        files = sorted(file for file in path.iterdir() if file.stem == split and file.suffix in SUFFIXES)
        if len(files) > 1:
            raise UserError(f"{path} has {' and '.join(file.name for file in files)}; leave one of them in it.")
        if files:
            splits[split] = FileRows(files[0])
    if "train" not in splits:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path} has no train.jsonl (.json, .csv, .parquet), it has: {names}. Name the file so.")
    return splits


def _hub(name: str) -> Tuple[Dict[str, Iterable[dict]], str]:
    import datasets
    from huggingface_hub import HfApi, constants

    try:
        revision = HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except Exception:  # not reachable: the next call may still find the dataset in its cache, and says why if not
        revision = None
    try:
        loaded = datasets.load_dataset(name, CONFIGS.get(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # of many types in each version of datasets, huggingface_hub and their HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The dataset {name} could not be loaded from the hub: {reason}. Check the name and the network, or "
            f"rehearse with --dataset-name-or-path dataset/samples/{name.split('/')[-1]}"
        ) from None
    if "train" not in loaded:
        raise UserError(f"The dataset {name} has no split named train, it has: {', '.join(loaded)}.")
    splits = {split: loaded[split] for split in ("train", "validation") if split in loaded}
    return splits, f"{name} at {revision or 'an unknown revision'}"
