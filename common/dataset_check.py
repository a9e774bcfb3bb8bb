"""Whether a dataset file is whole: every bit of it as it was written, and every part as the others want it."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from common.tokenization import largest_id

SPLITS = ("train", "validation")
PARTS = {  # of a split: (type, dimensions)
    "input_ids": ("torch.int32", 1),
    "loss_mask": ("torch.bool", 1),
    "offsets": ("torch.int64", 1),
    "lengths": ("torch.int32", 1),
    "label_counts": ("torch.int32", 1),
}
META = {"tokenizer": str, "model": str, "dataset": str, "template": str, "block_size": int, "counts": dict}


def damage_of(path: str, document: dict, tokenizer, own: str) -> str:
    """What is wrong with the document that was read from `path`, for the reader; "" where it is whole.

    A file that was made with another tokenizer than `tokenizer`, of the fingerprint `own`, is for the caller to refuse.
    Its digests are checked once: it is written down for which size, time and inode of the file they were right.
    """
    meta = document.get("meta")
    try:
        right = type(meta) is dict and all(type(meta[name]) is kind for name, kind in META.items())
        if not right or meta["block_size"] < 2 or document["sha256"] != digest_of_meta(meta):
            return "what it says of itself is not as it was written"
        if _seen(path, document["sha256"]):
            return ""
        most = largest_id(tokenizer) if meta["tokenizer"] == own else 2**31
        for name in SPLITS:
            problem = _damage_of_split(document[name], meta["block_size"], most)
            if problem:
                return f"{problem} in {name!r}"
        if not len(document["train"]["lengths"]):
            return "'train' has no rows"
        tensors = [(name, part, document[name][part]) for name in SPLITS for part in PARTS]
        with ThreadPoolExecutor(4) as threads:  # hashing lets other threads run
            digests = list(threads.map(lambda entry: digest_of(entry[2]), tensors))
        for (name, part, _), digest in zip(tensors, digests):
            if meta["sha256"][name][part] != digest:
                return f"the numbers of {part} in {name!r} are not as they were written"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError):
        return "its parts are not those of a dataset file"
    _remember(path, document["sha256"])
    return ""


def label_counts(split: dict):
    """int32 [rows]: the tokens of each row that carry a loss, without its first, which nothing predicts."""
    import numpy
    import torch

    mask, offsets = split["loss_mask"].numpy().view(numpy.uint8), split["offsets"].numpy()
    some = (offsets[first : first + 4097] for first in range(0, len(offsets) - 1, 4096))  # numpy copies them, as int32
    counts = [numpy.add.reduceat(mask[rows[0] : rows[-1]], rows[:-1] - rows[0], dtype=numpy.int32) for rows in some]
    return torch.from_numpy(numpy.concatenate([mask[:0].astype(numpy.int32), *counts]) - mask[offsets[:-1]])


def digest_of(tensor) -> str:
    """SHA-256 of a tensor's type, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def digest_of_meta(meta: dict) -> str:
    """SHA-256 of all that the file says of itself, the digests of its tensors included."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _damage_of_split(split: dict, block_size: int, most: int) -> str:
    if set(split) != set(PARTS):
        return "there are other parts than those of a dataset file"
    for part, (dtype, dimensions) in PARTS.items():
        if str(split[part].dtype) != dtype or split[part].dim() != dimensions or split[part].is_sparse:
            return f"{part} is of another type or shape"
    ids, offsets, lengths = split["input_ids"], split["offsets"], split["lengths"]
    rows = len(lengths)
    if len(offsets) != rows + 1 or len(split["label_counts"]) != rows or len(split["loss_mask"]) != len(ids):
        return "rows and tokens do not fit each other"
    if int(offsets[0]) or int(offsets[-1]) != len(ids) or not bool((offsets[1:] - offsets[:-1] == lengths).all()):
        return "rows and tokens do not fit each other"
    if not rows:
        return ""
    if int(lengths.min()) < 2 or int(lengths.max()) > block_size:
        return "rows are of other lengths than it says"
    if int(ids.min()) < 0 or int(ids.max()) > most:
        return "there are token ids that the tokenizer has not"
    counts = label_counts(split)
    if not bool((counts == split["label_counts"]).all()) or not bool((counts > 0).all()):
        return "the tokens with a loss are not those that it says"
    return ""


def _record(path: str) -> Path:
    """In the folder where the hub's library keeps what it may make again, a file for each dataset file."""
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "checked_datasets"
    return folder / f"{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]}.json"


def _facts(path: str, digest: str) -> dict:
    status = os.stat(path)
    return {"size": status.st_size, "time": status.st_mtime_ns, "inode": status.st_ino, "sha256": digest}


def _seen(path: str, digest: str) -> bool:
    try:
        return json.loads(_record(path).read_bytes()) == _facts(path, digest)
    except (OSError, ValueError):
        return False


def _remember(path: str, digest: str) -> None:
    with suppress(OSError):  # where nothing may be written, it is checked again next time
        _record(path).parent.mkdir(parents=True, exist_ok=True)
        _record(path).write_text(json.dumps(_facts(path, digest)), encoding="utf-8")
