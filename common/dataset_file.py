"""The dataset file: token ids and loss masks of all rows, as plain tensors that a bare `torch.load` opens.

{
    "format": "finetuning-dataset", "version": 3,
    "sha256": ...                      # of meta, and so of everything: meta has the digests of all tensors
    "meta": {
        "tokenizer": fingerprint, "model": ..., "dataset": where the rows came from, "template": its name,
        "measure": what tutorial/evaluate.py measures of the answers, "code", "summary" or "text",
        "block_size": tokens of a row at most, "counts": {"train": {"rows": ...}, "validation": {...}},
        "end_tokens": ids with which answers end, first the usual one,
        "kinds": ["money", "date", ...]  # of the held-out rows, if the data has a column "kind"
        "sha256": {"train": {"input_ids": ...}, ...}, ...
    },
    "train": {
        "input_ids": int32 [tokens]     # all rows, one after the other
        "loss_mask": bool [tokens]      # where the loss is computed: answers, and the tokens that end them
        "offsets": int64 [rows + 1]     # row n is input_ids[offsets[n] : offsets[n + 1]]
        "lengths": int32 [rows]
        "label_counts": int32 [rows]    # tokens of the row in the loss; the first has none, nothing predicts it
    },
    "validation": {...}                 # as "train"; it may have no rows
}
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from array import array
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List, Set, Tuple

import numpy
import torch

from common import distributed
from common.support.compat import load_mapped
from common.support.exit import UserError
from common.tokenization import Encoded, fingerprint, last_ids

FORMAT = "finetuning-dataset"
VERSION = 3
SPLITS = ("train", "validation")
META = {
    "tokenizer": str,
    "model": str,
    "dataset": str,
    "template": str,
    "measure": str,
    "block_size": int,
    "counts": dict,
    "end_tokens": list,
}


# ------------------------------------------------------------------------------------------------ writing


class SplitWriter:
    """Collects the rows of a split in scratch files: however many there are, memory stays bounded."""

    def __init__(self, directory: Path, name: str):
        self.ids_path = directory / f"{name}.ids"
        self.mask_path = directory / f"{name}.mask"
        self.ids_file = open(self.ids_path, "wb")
        self.mask_file = open(self.mask_path, "wb")
        self.lengths = array("i")
        self.end_tokens: Set[int] = set()  # with which the answers end
        self.kinds: List[str] = []  # of each row, "" where it has none

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_) -> None:
        self.ids_file.close()
        self.mask_file.close()

    def add(self, row: Encoded, kind: str) -> None:
        self.ids_file.write(struct.pack(f"{len(row.ids)}i", *row.ids))
        self.mask_file.write(row.mask)
        self.lengths.append(len(row.ids))
        self.end_tokens |= last_ids(row.ids, row.mask)
        self.kinds.append(kind)

    def tensors(self) -> Dict[str, torch.Tensor]:
        """The split. Its large tensors are mapped from the closed scratch files, not read into memory."""
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        num_tokens = int(offsets[-1])
        input_ids, loss_mask = torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bool)
        if num_tokens:  # an empty file cannot be mapped
            input_ids = torch.from_file(str(self.ids_path), size=num_tokens, dtype=torch.int32)
            loss_mask = torch.from_file(str(self.mask_path), size=num_tokens, dtype=torch.bool)
        return {
            "input_ids": input_ids,
            "loss_mask": loss_mask,
            "offsets": offsets,
            "lengths": lengths,
            "label_counts": label_counts(loss_mask, offsets),
        }


def label_counts(loss_mask: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """int32 [rows]: the tokens of each row in the loss, without its first, which nothing predicts."""
    mask, offsets = loss_mask.numpy().view(numpy.uint8), offsets.numpy()
    counts = [numpy.zeros(0, dtype=numpy.int32)]
    for first in range(0, len(offsets) - 1, 4096):  # numpy copies the mask as int32: 4096 rows at a time
        bounds = offsets[first : first + 4097]
        part = mask[bounds[0] : bounds[-1]]
        counts.append(numpy.add.reduceat(part, bounds[:-1] - bounds[0], dtype=numpy.int32))
    return torch.from_numpy(numpy.concatenate(counts) - mask[offsets[:-1]])


def save_dataset(path: Path, meta: dict, splits: Dict[str, Dict[str, torch.Tensor]]) -> None:
    """Write the dataset file. `meta` gets the digests of the tensors, and the versions that made the file."""
    digests = {name: {part: digest_of(tensor) for part, tensor in split.items()} for name, split in splits.items()}
    versions = {"torch": str(torch.__version__), "transformers": version("transformers")}
    meta = {**meta, **versions, "sha256": digests}
    document = {"format": FORMAT, "version": VERSION, "sha256": digest_of_meta(meta), "meta": meta, **splits}
    with open(path, "wb") as file:  # torch.save would write the name of a path into the file
        torch.save(document, file)


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def digest_of_meta(meta: dict) -> str:
    """SHA-256 of all of `meta`, with the digests of the tensors."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ loading


def load_dataset(path: str, tokenizer, block_size: int = sys.maxsize, hint: str = "") -> dict:
    """The dataset file at `path`, verified. UserError if a training with it would fail, or would learn nonsense."""
    if not os.path.isfile(path):
        raise UserError(f"There is no dataset file {path}. {hint or 'Give it with --dataset-name-or-path.'}")
    again = f"Prepare it again. {hint}".strip()
    try:
        document = load_mapped(path)
    except Exception:  # a truncated or foreign file fails in many ways, of many types
        raise UserError(f"{path} is truncated or is not a dataset file written by prepare_*. {again}") from None
    if not isinstance(document, dict) or str(document.get("format")) != FORMAT:
        raise UserError(f"{path} is not a dataset file written by prepare_*. {again}")
    if str(document.get("version")) != str(VERSION):
        number = str(document.get("version"))[:20]
        raise UserError(f"{path} has format version {number}, but these scripts read {VERSION}. {again}")
    if not _is_valid_meta(document.get("meta"), document.get("sha256")):
        raise UserError(f"{path} is damaged: checksum mismatch in meta. {again}")
    meta, longest = document["meta"], document["meta"]["block_size"]
    if meta["tokenizer"] != fingerprint(tokenizer):
        made_by, installed = meta.get("transformers"), version("transformers")
        versions = f", or by transformers {made_by}, not {installed}" if made_by != installed else ""
        raise UserError(
            f"{path} was made with another tokenizer (that of {meta['model']}){versions}, so its token ids do not "
            f"match this model. {again}"
        )
    if longest > block_size:
        raise UserError(
            f"{path} has rows of up to {longest} tokens, more than --block-size {block_size}. "
            f"Train with --block-size {longest}, or prepare it again with --block-size {block_size}."
        )
    damage = find_damage(document)
    if damage:
        raise UserError(f"{path} is damaged: {damage}. {again}")
    distributed.require_same_on_all_ranks(document["sha256"], f"the dataset file {path}")
    rows = len(document["train"]["lengths"])
    if rows < distributed.world_size():
        raise UserError(
            f"{path} has {rows} rows, fewer than the {distributed.world_size()} processes. "
            "Start fewer, or prepare more rows."
        )
    return document


def find_damage(document: dict) -> str:
    """What is wrong with the tensors of a dataset file, by their digests; "" if nothing is."""
    try:
        for name in SPLITS:
            digests = {part: digest_of(tensor) for part, tensor in document[name].items()}
            if digests != document["meta"]["sha256"][name]:
                return f"checksum mismatch in {name}"
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return "its parts are not those of a dataset file"
    return ""


def _is_valid_meta(meta, digest) -> bool:
    if not isinstance(meta, dict) or not all(type(meta.get(name)) is kind for name, kind in META.items()):
        return False
    try:
        return meta["block_size"] >= 2 and digest == digest_of_meta(meta)
    except (TypeError, ValueError):  # something that JSON does not have
        return False


# ------------------------------------------------------------------------------------------------ use


def stop_token_ids(meta: dict, tokenizer, model=None) -> List[int]:
    """The ids of the tokens at which an answer ends, for a model trained on the dataset file with that `meta` ({}: not
    trained): first those that it has learned, then the tokenizer's own, and those that `model` had before."""
    own = model.generation_config.eos_token_id if model else None
    own = own if isinstance(own, list) else [own]
    learned = meta.get("end_tokens", [meta.get("end_of_turn")])  # the latter in results of files of version 2
    ids = [*learned, tokenizer.eos_token_id, *own]
    return list(dict.fromkeys(one for one in ids if one is not None))


def held_out_prompts(dataset: dict, path: str, tokenizer, rows: int) -> List[Tuple[List[int], str]]:
    """(token ids of the prompt, text of the data's answer) of the first held-out rows; of a conversation its last
    answer, with all before it as the prompt. UserError if the file at `path` has no held-out rows.

    They are the first of the rows on which a training measures its held-out loss.
    """
    split = dataset["validation"]
    prompts = []
    for row in range(min(rows, len(split["lengths"]))):
        begin, end = int(split["offsets"][row]), int(split["offsets"][row + 1])
        ids, mask = split["input_ids"][begin:end].tolist(), bytes(split["loss_mask"][begin:end].tolist())
        stop = mask.rindex(1) + 1
        start = mask.rfind(0, 0, stop) + 1
        answer = tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()
        prompts.append((ids[:start], answer))
    if not prompts:
        raise UserError(f"{path} has no held-out rows. Prepare it from 20 rows or more.")
    return prompts
