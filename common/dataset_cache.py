"""The dataset file: all rows as one flat tensor of token ids, written by `torch.save`, opened by a bare `torch.load`.

    {"format": "finetuning-dataset", "version": 2, "sha256": "...", "meta": {...},
     "train":      {"input_ids": int32 [tokens], "loss_mask": bool [tokens], "offsets": int64 [rows + 1],
                    "lengths": int32 [rows], "label_counts": int32 [rows]},
     "validation": {... the same ...}}

Row i is `input_ids[offsets[i]:offsets[i + 1]]`; `loss_mask` is true where its tokens carry a loss: one answer, or
several. `lengths` and `label_counts` (tokens that carry a loss and are predicted: not a row's first) stand beside it,
so that a training need not count. `sha256` is that of `meta`, which holds those of all tensors: it stands for all. Of
conversations `meta` has `end_of_turn` too: the id by which their template ends an answer, not always the tokenizer's;
of other rows `chat_template`, in which chat clients can ask as the rows do.
There are only plain tensors and plain dicts in it, and nothing outside it: the file can be copied anywhere and opens
without this repository, with `weights_only=True` as well.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

from common import UserError, processes
from common.dataset_check import damage_of, digest_of, digest_of_meta, label_counts
from common.files import written_whole
from common.tokenization import fingerprint

FORMAT = "finetuning-dataset"
VERSION = 2
COUNTS = ("rows", "tokens", "prompts cut", "answers cut", "dropped")


def prepare_dataset(splits: Dict[str, Iterable[dict]], source: str, template, tokenizer, args) -> None:
    """Tokenize `splits` ("train", "validation") with `template` and save the dataset file at `args.save_path`; rows of
    conversations, which the first row shows, with the tokenizer's own chat template.

    `source` says in the file where the rows came from (dataset.sources.load_splits gives both). Memory stays bounded:
    token ids go to scratch files beside the target as they are made. UserError where "train" has no rows.
    """
    from common.columns import chosen, gives_conversations, renamed, require_asked
    from common.preparation import Encoder, show_rows  # a training has no use for these

    row = next(iter(splits["train"]))
    first, chat = renamed(row, args.columns), None
    template = chosen(template, first)
    if args.columns:
        require_asked(template, row, args.columns)
    if gives_conversations(template, first):
        from common.chat import chat_of

        chat = chat_of(tokenizer)
    encoder = Encoder(template, tokenizer, args.block_size, args.columns, chat)
    # asked for now, and not when a model is saved that was trained for hours
    of_chat = {"end_of_turn": chat.end_of_turn()} if chat else {"chat_template": _form(template, first, tokenizer)}
    if args.show:
        show_rows(splits["train"], args.show, encoder)
    meta = {
        "tokenizer": fingerprint(tokenizer),
        "model": args.model_name_or_path,
        "dataset": str(source),
        **({"card": source.card} if getattr(source, "card", {}) else {}),  # its licence and language
        "template": "chat" if chat else template.__name__,
        "block_size": args.block_size,
        **of_chat,
        "counts": {},
        "sha256": {},
    }
    document = {"format": FORMAT, "version": VERSION, "sha256": "", "meta": meta}
    with written_whole(args.save_path) as new:
        made = {}
        for name, rows in splits.items():
            made[name] = _write(name, rows, encoder, new.parent)
            counts = made[name][1]
            if name == "train" and not counts["rows"]:
                raise UserError(
                    f"The dataset {source} has no rows with an answer. Give another --dataset-name-or-path."
                )
            meta["counts"][name] = {what: counts[what] for what in (*COUNTS, *["conversations"] * bool(chat))}
            print(f"{name}: {_told(counts)}")
        print("Saving dataset into torch format...")
        import torch  # here, because the processes that encode the rows have no use for it
        from transformers import __version__ as transformers_version

        meta.update(torch=str(torch.__version__), transformers=transformers_version)
        for name, (lengths, _) in made.items():
            document[name] = _split(lengths, new.parent / f"{name}.ids", new.parent / f"{name}.mask")
            meta["sha256"][name] = {part: digest_of(tensor) for part, tensor in document[name].items()}
        document["sha256"] = digest_of_meta(meta)
        with open(new, "wb") as file:  # a path would leave its name in the file
            torch.save(document, file)
    print(f"Dataset saved as {args.save_path}")


def _form(template, row: dict, tokenizer) -> str:
    """The chat template that the trained model is to have, "" where its form can't be one."""
    from common.chat_of_blocks import chat_of_blocks

    try:
        return chat_of_blocks(template, row, tokenizer)
    except UserError as error:
        print(f"The model will have no chat template: {error}. Your inference script asks it, chat clients can't.")
        return ""


def _told(counts: Counter) -> str:
    rows = f"{counts['rows']} rows"
    if counts["rows"] > counts["conversations"] > 0:  # the chat template writes earlier turns anew
        rows += f", one for each answer of {counts['conversations']} conversations"
    return (
        f"{rows}, {counts['tokens']} tokens; {counts['prompts cut']} prompts cut, {counts['answers cut']} answers cut, "
        f"{counts['dropped']} rows without an answer dropped"
    )


def _write(name: str, rows: Iterable[dict], encoder, scratch: Path) -> Tuple[array, Counter]:
    """Write a split's ids and marks into scratch files; (the tokens of each row, counts of what was done)."""
    from common.preparation import encoded_chunks

    lengths, counts = array("i"), Counter()
    with open(scratch / f"{name}.ids", "wb") as ids, open(scratch / f"{name}.mask", "wb") as mask:
        for chunk in encoded_chunks(name, rows, encoder):
            ids.write(chunk.ids)
            mask.write(chunk.mask)
            lengths.frombytes(chunk.lengths)
            counts.update(chunk.counts)
    return lengths, counts


def _split(lengths: array, ids_file: Path, mask_file: Path) -> dict:
    """The tensors of a split. Mapped, not read: from the scratch files to the dataset file they are never in memory."""
    import torch

    lengths = torch.tensor(lengths, dtype=torch.int32)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    input_ids, mask = torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bool)
    if len(lengths):  # a file of no bytes can't be mapped
        size = int(offsets[-1])
        input_ids = torch.from_file(str(ids_file), shared=False, size=size, dtype=torch.int32)
        mask = torch.from_file(str(mask_file), shared=False, size=size, dtype=torch.bool)
    split = {"input_ids": input_ids, "loss_mask": mask, "offsets": offsets, "lengths": lengths}
    return {**split, "label_counts": label_counts(split)}


def ends_of(meta: dict, tokenizer) -> List[int]:
    """The ids of the tokens at which an answer ends, of a model that has learned from the dataset file with that `meta`
    ({}: of none): first the one that it has learned, then the tokenizer's own."""
    return list(dict.fromkeys([meta.get("end_of_turn", tokenizer.eos_token_id), tokenizer.eos_token_id]))


def held_out_questions(dataset: dict, path: str, tokenizer, rows: int) -> List[Tuple[List[int], str]]:
    """(token ids of the prompt, text of the data's answer) of the first held-out rows of the file at `path`; of a
    conversation its last answer and all that is before it.

    They are the first of those on which a training measures its held-out loss.
    """
    split, questions = dataset["validation"], []
    for row in range(min(rows, len(split["lengths"]))):
        begin, end = int(split["offsets"][row]), int(split["offsets"][row + 1])
        ids, mask = split["input_ids"][begin:end].tolist(), bytes(split["loss_mask"][begin:end].tolist())
        stop = mask.rindex(1) + 1
        start = mask.rfind(0, 0, stop) + 1
        questions.append((ids[:start], tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()))
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
    if not isinstance(document, dict) or str(document.get("format")) != FORMAT:
        raise UserError(f"{path} is not a dataset file of these tutorials. {again}")
    version = str(document.get("version"))
    if version != str(VERSION):
        raise UserError(f"{path} has format version {version[:20]}, these scripts read {VERSION}. {again}")
    own = fingerprint(tokenizer)
    damage = damage_of(path, document, tokenizer, own)
    if damage:
        raise UserError(f"{path} is damaged: {damage}. {again}")
    meta, longest = document["meta"], document["meta"]["block_size"]
    if meta["tokenizer"] != own:
        raise UserError(
            f"{path} was made with another tokenizer (that of {meta['model']}), so its ids mean other text. {again}"
        )
    if longest > block_size:
        raise UserError(
            f"{path} has rows of up to {longest} tokens, more than --block-size {block_size}. "
            f"Train with --block-size {longest}, or prepare it again with --block-size {block_size}."
        )
    processes.require_same(document["sha256"], f"the dataset file {path}")
    rows = len(document["train"]["lengths"])
    if rows < processes.count():
        raise UserError(
            f"{path} has {rows} rows, fewer than the {processes.count()} processes, of which each takes one at least. "
            "Start fewer, or prepare more rows."
        )
    return document
