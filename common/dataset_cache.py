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
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

from common import UserError
from common.files import written_whole
from common.tokenization import encode_rows, fingerprint

FORMAT = "finetuning-dataset"
VERSION = 1
COUNTS = ("rows", "tokens", "prompts cut", "answers cut", "dropped")
ROWS_AT_ONCE = 1000  # memory stays bounded, and the tokenizer's threads have enough to do


def prepare_dataset(splits: Dict[str, Iterable[dict]], source: str, template, tokenizer, args) -> None:
    """Tokenize `splits` ("train", "validation") with `template` and save the dataset file at `args.save_path`.

    `source` says in the file where the rows came from (dataset.sources.load_splits gives both). Memory stays bounded:
    token ids go to a scratch file beside the target as they are made. UserError where "train" has no rows.
    """
    import torch
    from transformers import __version__ as transformers_version

    meta = {
        "tokenizer": fingerprint(tokenizer),
        "model": args.model_name_or_path,
        "dataset": source,
        "template": template.__name__,
        "block_size": args.block_size,
        "torch": str(torch.__version__),
        "transformers": transformers_version,
        "counts": {},
        "sha256": {},
    }
    document = {"format": FORMAT, "version": VERSION, "meta": meta}
    with written_whole(args.save_path) as new:
        for name, rows in splits.items():
            document[name], counts, digest = _flat(
                rows, template, tokenizer, args.block_size, new.parent / f"{name}.ids"
            )
            if name == "train" and not counts["rows"]:
                raise UserError(
                    f"The dataset {source} has no rows with an answer. Give another --dataset-name-or-path."
                )
            meta["counts"][name] = {what: counts[what] for what in COUNTS}
            meta["sha256"][name] = digest
            print(
                f"{name}: {counts['rows']} rows, {counts['tokens']} tokens; {counts['prompts cut']} prompts cut, "
                f"{counts['answers cut']} answers cut, {counts['dropped']} rows without an answer dropped"
            )
        print("Saving dataset into torch format...")
        with open(new, "wb") as file:  # a path would leave its name in the file
            torch.save(document, file)
    print(f"Dataset saved as {args.save_path}")


def _flat(rows: Iterable[dict], template, tokenizer, block_size: int, scratch_file: Path):
    """(the tensors of one split, counts of what was done to its rows, the SHA-256 of its token ids)"""
    import torch

    offsets, answer_starts, counts, digest = array("q", [0]), array("i"), Counter(), hashlib.sha256()
    rows = iter(rows)
    with open(scratch_file, "wb") as file:
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            encoded, counts_of_chunk = encode_rows(chunk, template, tokenizer, block_size)
            counts.update(counts_of_chunk)
            for ids, answer_start in encoded:
                packed = array("i", ids).tobytes()
                file.write(packed)
                digest.update(packed)
                offsets.append(offsets[-1] + len(ids))
                answer_starts.append(answer_start)
    if len(answer_starts) == 0:
        input_ids = torch.zeros(0, dtype=torch.int32)
    else:  # mapped, not read: the ids go from the scratch file to the dataset file without being in memory at once
        input_ids = torch.from_file(str(scratch_file), shared=False, size=offsets[-1], dtype=torch.int32)
    split = {
        "input_ids": input_ids,
        "offsets": torch.tensor(offsets, dtype=torch.int64),
        "answer_starts": torch.tensor(answer_starts, dtype=torch.int32),
    }
    return split, counts, digest.hexdigest()


def held_out_questions(dataset: dict, path: str, tokenizer, rows: int) -> List[Tuple[List[int], str]]:
    """(token ids of the prompt, text of the data's answer) of the first held-out rows of the file at `path`.

    They are the first of those on which a training measures its held-out loss.
    """
    split, questions = dataset["validation"], []
    for row in range(min(rows, len(split["answer_starts"]))):
        ids = split["input_ids"][split["offsets"][row] : split["offsets"][row + 1]].tolist()
        start = int(split["answer_starts"][row])
        questions.append((ids[:start], tokenizer.decode(ids[start:], skip_special_tokens=True).strip()))
    if not questions:
        raise UserError(f"{path} has no held-out rows. Prepare it from 20 rows or more.")
    return questions


def load_dataset(path: str, tokenizer, block_size: int = sys.maxsize, hint: str = "") -> dict:
    """The dataset file at `path`, checked. UserError where training on it would fail, or would teach nonsense."""
    import torch

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
