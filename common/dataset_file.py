"""Whether a dataset file is whole: every bit of it as it was written, and every part as the others want it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Dict, Iterable, List, Tuple

from common import distributed
from common.support.exit import UserError
from common.support.files import atomic_write
from common.tokenization import fingerprint, largest_id

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
    from common.preparation import Encoder, show_rows

    row = next(iter(splits["train"]))
    first, chat = renamed(row, args.columns), None
    template = chosen(template, first)
    if args.columns:
        require_asked(template, row, args.columns)
    if gives_conversations(template, first):
        from common.chat_template import get_chat_template

        chat = get_chat_template(tokenizer)
    encoder = Encoder(template, tokenizer, args.block_size, args.columns, chat)
    # asked for now, and not when a model is saved that was trained for hours
    of_chat = {"end_of_turn": chat.end_of_turn()} if chat else {"chat_template": _form(template, tokenizer)}
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
    with atomic_write(args.save_path) as new:
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


def _form(template, tokenizer) -> str:
    """The chat template that the trained model is to have, "" where its form can't be one."""
    from dataset.templates import jinja_template

    made = jinja_template(template, tokenizer)
    if not made:
        print(
            f"No chat template will be saved with the model: the template {template.__name__} has no Jinja form. Your "
            "inference script is not affected."
        )
    return made


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


def stop_token_ids(meta: dict, tokenizer) -> List[int]:
    """The ids of the tokens at which an answer ends, of a model that has learned from the dataset file with that `meta`
    ({}: of none): first the one that it has learned, then the tokenizer's own."""
    return list(dict.fromkeys([meta.get("end_of_turn", tokenizer.eos_token_id), tokenizer.eos_token_id]))


def held_out_prompts(dataset: dict, path: str, tokenizer, rows: int) -> List[Tuple[List[int], str]]:
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
    distributed.require_same_on_all_ranks(document["sha256"], f"the dataset file {path}")
    rows = len(document["train"]["lengths"])
    if rows < distributed.world_size():
        raise UserError(
            f"{path} has {rows} rows, fewer than the {distributed.world_size()} processes. "
            "Start fewer, or prepare more rows."
        )
    return document
