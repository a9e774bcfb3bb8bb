"""The dataset file: all rows as one flat tensor of token ids, written by `torch.save`, opened by a bare `torch.load`.

    {"format": "finetuning-dataset", "version": 1, "meta": {...},
     "train":      {"input_ids": int32 [tokens], "offsets": int64 [rows + 1], "answer_starts": int32 [rows]},
     "validation": {... the same ...}}

Row i is `input_ids[offsets[i]:offsets[i + 1]]`; its answer begins at `answer_starts[i]` within the row. There are only
plain tensors and plain dicts in it, and nothing outside it: the file can be copied anywhere and opens without this
repository, with `weights_only=True` as well.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from array import array
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, Tuple

import torch

from common import UserError, nearest_existing
from common.tokenization import encode_rows, fingerprint

FORMAT = "finetuning-dataset"
VERSION = 1


def prepare_dataset(splits: Dict[str, Iterable[dict]], source: str, template, tokenizer, args) -> None:
    """Tokenize `splits` ("train", "validation") with `template` and save the dataset file at `args.save_path`.

    `source` says in the file where the rows came from (dataset.sources.load_splits gives both).

    Memory stays bounded: token ids go to a scratch file beside the target as they are made. Target and scratch file
    are renamed or removed together, so nothing half-written is ever left. UserError where "train" has no rows.
    """
    from transformers import __version__ as transformers_version

    block_size, path = args.block_size, Path(args.save_path)
    # in the nearest directory that there is: a refused dataset leaves no empty directories
    existing = nearest_existing(path.absolute().parent)
    meta = {
        "tokenizer": fingerprint(tokenizer),
        "model": args.model_name_or_path,
        "dataset": source,
        "template": template.__name__,
        "block_size": block_size,
        "torch": str(torch.__version__),
        "transformers": transformers_version,
        "counts": {},
        "sha256": {},
    }
    document = {"format": FORMAT, "version": VERSION, "meta": meta}
    with tempfile.TemporaryDirectory(dir=existing, prefix=f".{path.name}.") as scratch:
        for name, rows in splits.items():
            counts = Counter({"rows": 0, "tokens": 0, "prompts cut": 0, "answers cut": 0, "dropped": 0})
            encoded = encode_rows(rows, template, tokenizer, block_size, counts)
            document[name], digest = _flat(encoded, os.path.join(scratch, name))
            if name == "train" and not counts["rows"]:
                raise UserError(
                    f"The dataset {source} has no rows with an answer. Give another --dataset-name-or-path."
                )
            meta["counts"][name] = dict(counts)
            meta["sha256"][name] = digest
            print(
                f"{name}: {counts['rows']} rows, {counts['tokens']} tokens; {counts['prompts cut']} prompts cut, "
                f"{counts['answers cut']} answers cut, {counts['dropped']} rows without an answer dropped"
            )
        print("Saving dataset into torch format...")
        temporary = os.path.join(scratch, "dataset.pt")
        with open(temporary, "wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    print(f"Dataset saved as {args.save_path}")


def _flat(rows: Iterable[Tuple[list, int]], scratch_file: str) -> Tuple[Dict[str, torch.Tensor], str]:
    """The tensors of one split, and the SHA-256 of its token ids."""
    offsets, answer_starts, digest = array("q", [0]), array("i"), hashlib.sha256()
    with open(scratch_file, "wb") as file:
        for ids, answer_start in rows:
            packed = array("i", ids).tobytes()
            file.write(packed)
            digest.update(packed)
            offsets.append(offsets[-1] + len(ids))
            answer_starts.append(answer_start)
    if len(answer_starts) == 0:
        input_ids = torch.zeros(0, dtype=torch.int32)
    else:  # mapped, not read: the ids go from the scratch file to the dataset file without being in memory at once
        input_ids = torch.from_file(scratch_file, shared=False, size=offsets[-1], dtype=torch.int32)
    split = {
        "input_ids": input_ids,
        "offsets": torch.tensor(offsets, dtype=torch.int64),
        "answer_starts": torch.tensor(answer_starts, dtype=torch.int32),
    }
    return split, digest.hexdigest()


def load_dataset(path: str, tokenizer, block_size: int = sys.maxsize, hint: str = "") -> dict:
    """The dataset file at `path`, checked. UserError where training on it would fail, or would teach nonsense."""
    if not os.path.isfile(path):
        raise UserError(f"There is no dataset file {path}. {hint or 'Give it with --dataset-name-or-path.'}")
    again = f"Prepare it again. {hint}".strip()
    try:
        try:
            # mapped where torch can (2.1 and newer): only the rows that are used are read
            document = torch.load(path, mmap=True, weights_only=True)
        except TypeError:
            document = torch.load(path, weights_only=True)
    except Exception:  # a cut or foreign file fails in many ways, of many types, and all mean the same
        raise UserError(f"{path} is cut short, or is not a dataset file of these tutorials. {again}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path} is not a dataset file of these tutorials. {again}")
    if document.get("version") != VERSION:
        raise UserError(f"{path} has format version {document.get('version')}, these scripts read {VERSION}. {again}")
    try:
        meta = document["meta"]
        made_with, model, longest = meta["tokenizer"], meta["model"], meta["block_size"]
        whole = all(
            len(document[name]["offsets"]) == len(document[name]["answer_starts"]) + 1
            and int(document[name]["offsets"][-1]) == len(document[name]["input_ids"])
            for name in ("train", "validation")
        )
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: its rows don't fit its tokens. {again}")
    if made_with != fingerprint(tokenizer):
        raise UserError(
            f"{path} was made with another tokenizer (that of {model}), so its ids mean other text. {again}"
        )
    if longest > block_size:
        raise UserError(
            f"{path} has rows of up to {longest} tokens, more than --block-size {block_size}. "
            f"Train with --block-size {longest}, or prepare it again with --block-size {block_size}."
        )
    return document
