"""Where rows come from: a dataset of the hub, or the reader's own file or folder, in the same columns."""

from __future__ import annotations

import platform
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Dict, Iterable, Iterator, Tuple

from common.support.exit import UserError, first_line
from dataset.files import (
    NARROW,
    OTHERS,
    SUFFIXES,
    WHAT_DATA_CAN_BE,
    FileRows,
    Row,
    require_no_other,
    shortened,
)
from dataset.standard_library import standard_library_splits

CONFIGS = {"abisee/cnn_dailymail": "3.0.0"}  # of a hub dataset that comes in several versions, the one that is meant
HOLD_OUT_EVERY = 20  # of a dataset without a validation split, every 20th row is held out,
HOLD_OUT_AT_MOST = 256  # up to this many


class Source(str):
    """A name for data, and what its dataset card says, of the hub or of README.md in a folder."""

    card: dict = {}  # "license" and "language", each where it is known


def load_splits(name_or_path: str) -> Tuple[Dict[str, Iterable[dict]], str]:
    """{"train": rows, "validation": rows} of a file, of a folder with train and validation files, or of a hub id; and
    a name for them, with the hub's revision where there is one. "my.json#data" is the list `data` within my.json.

    Rows can be gone through several times and are read as they are used. Where there is no validation split, rows of
    train are held out. UserError: no such file or dataset, no rows; and later, a row that can't be read.
    """
    name, _, inside = name_or_path.rpartition("#")
    if not name or Path(name_or_path).exists():
        name, inside = name_or_path, ""
    path, source = Path(name), name_or_path
    suffix = path.suffix.lower()
    looks_local = suffix in (*SUFFIXES, *(other[0] for other in OTHERS))
    looks_local = looks_local or name.startswith((".", "/", "~")) or name.count("/") > 1
    if inside and path.exists() and (suffix != ".json" or path.is_dir()):
        raise UserError(f"{name_or_path}: only a .json file has lists within. Leave out #{inside}.")
    if name_or_path == "standard-library":
        splits, source = standard_library_splits(), f"the standard library of Python {platform.python_version()}"
    elif path.is_dir():
        splits, source = _folder(path), Source(name_or_path)
        source.card = _card_of(path)
    elif suffix in SUFFIXES and path.is_file():
        splits = {"train": FileRows(path, inside)}
    elif path.exists() or looks_local:
        if path.is_file():
            require_no_other(path)
        what = "is not a file of these" if path.exists() else "does not exist"
        raise UserError(f"{name} {what}. {WHAT_DATA_CAN_BE}")
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
        for number, row in enumerate(islice(self.rows, last) if self.held_out else self.rows, 1):
            if (number % HOLD_OUT_EVERY == 0 and number <= last) == self.held_out:
                yield row

    def __length_hint__(self) -> int:
        rows = length_hint(self.rows)
        held_out = min(rows // HOLD_OUT_EVERY, HOLD_OUT_AT_MOST)
        return held_out if self.held_out else rows - held_out


class HubRows:
    """The rows of a split of a hub dataset, where a class is its name and not its number."""

    def __init__(self, name: str, rows):
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        from datasets import ClassLabel, Value

        features = self.rows.features
        classes = {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
        kinds = {column: feature.dtype for column, feature in features.items() if isinstance(feature, Value)}
        narrow = {column: NARROW[kind] for column, kind in kinds.items() if kind in NARROW}
        for number, row in enumerate(self.rows, 1):
            for column, names in classes.items():
                label = row[column]
                row[column] = names[label] if label is not None and label >= 0 else None  # -1: it is not known
            yield Row(shortened(row, narrow), f"{self.name}, row {number}")


def _folder(path: Path) -> Dict[str, Iterable[dict]]:
    splits = {}
    for split in ("train", "validation"):
        files = sorted(file for file in path.iterdir() if file.stem == split and file.suffix.lower() in SUFFIXES)
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

    # datasets 4 runs no code of others, and does not know that it is asked not to
    trust = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}

    try:
        info = HfApi().dataset_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        revision, card = info.sha, _known(getattr(info, "card_data", None))
    except Exception:  # not reachable: the next call may still find the dataset in its cache, and says why if not
        revision, card = None, {}
    try:
        # as datasets.load_dataset does it, which would not say whether it has it already
        builder = datasets.load_dataset_builder(name, CONFIGS.get(name), revision=revision, **trust)
        if not Path(builder.cache_dir).exists():
            print("Downloading dataset...")
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except Exception as error:  # of many types in each version of datasets, huggingface_hub and their HTTP library
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"The dataset {name} could not be loaded from the hub: {reason}. Check the name and the "
            f"network, or rehearse with --dataset-name-or-path dataset/samples/{name.split('/')[-1]}"
        ) from None
    if "train" not in loaded:
        raise UserError(f"The dataset {name} has no split named train, it has: {', '.join(loaded)}.")
    splits = {split: HubRows(f"{name}, {split}", loaded[split]) for split in ("train", "validation") if split in loaded}
    source = Source(f"{name} at {revision or 'an unknown revision'}")
    source.card = card
    return splits, source


def _card_of(folder: Path) -> dict:
    from huggingface_hub import DatasetCard

    try:
        return _known(DatasetCard.load(folder / "README.md").data)
    except Exception:  # there is none, or a README.md with another head, or none
        return {}


def _known(data) -> dict:
    """What matters of a card's data, huggingface_hub's, to whoever publishes a model of it."""
    card = {key: getattr(data, key, None) for key in ("license", "language")}
    card = {key: [value] if isinstance(value, str) else value for key, value in card.items()}
    card = {key: [str(one) for one in value] for key, value in card.items() if isinstance(value, list) and value}
    return {**card, **({"license": ", ".join(card["license"])} if "license" in card else {})}
