"""Prepares a dataset: the rows of each split become token ids in a dataset file (common/dataset_file.py)."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from itertools import groupby, islice
from operator import itemgetter, length_hint
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Set
from unicodedata import is_normalized, normalize

from common.chat_template import Conversation, encode_conversation, get_chat_template
from common.dataset_file import SplitWriter, save_dataset
from common.support.exit import UserError
from common.support.files import atomic_write
from common.tokenization import Encoded, Example, encode_examples, fingerprint
from common.train_log import with_progress
from dataset.columns import (
    apply_template,
    is_filled,
    join_names,
    missing_columns,
    rename_columns,
    require_asked,
    row_location,
    to_text,
    unused_columns,
)
from dataset.messages import parse_arguments, read_messages, read_tools
from dataset.sources import Source
from dataset.templates import MESSAGE_COLUMNS, chat, jinja_template

ROWS_PER_CHUNK = 250  # at a time in memory


def prepare_dataset(splits: Dict[str, Iterable[dict]], source: Source, template: Callable, tokenizer, args) -> None:
    """Tokenize `splits` ("train", "validation") with `template` and save the dataset file at `args.save_path`.

    Rows of messages, if the first row is one, are tokenized with the tokenizer's own chat template. `source` says in
    the file where the rows came from; dataset.sources.load_splits returns both. UserError for a row that cannot be
    used, with its location, and if no row has an answer.
    """
    first = next(iter(splits["train"]))
    renamed = rename_columns(first, args.columns)
    template = pick_template(template, renamed)
    require_asked(template, first, args.columns)
    meta = {
        "tokenizer": fingerprint(tokenizer),
        "model": args.model_name_or_path,
        "dataset": source.name,
        "measure": source.measure,
        "template": template.__name__,
        "block_size": args.block_size,
        "counts": {},
        "end_tokens": [tokenizer.eos_token_id],
    }
    if source.card:
        meta["card"] = source.card  # its license and language
    is_chat = isinstance(apply_template(template, renamed), Conversation)
    encoder = RowEncoder(template, tokenizer, args.block_size, args.columns, is_chat)
    if is_chat:
        meta["template"] = "chat"
        meta["end_tokens"] = [get_chat_template(tokenizer).end_of_turn()]
    else:
        meta["chat_template"] = jinja_template(template, tokenizer)
    if args.show:
        show_rows(splits["train"], args.show, encoder)
    with atomic_write(args.save_path) as new:
        tensors = {}
        for name, rows in splits.items():
            with SplitWriter(new.parent, name) as writer:
                counts = write_rows(name, rows, encoder, writer)
            if name == "train" and not counts["rows"]:
                raise UserError(
                    f"All rows of the dataset {source.name} were dropped. Give another --dataset-name-or-path."
                )
            meta["counts"][name] = dict(counts)
            tensors[name] = writer.tensors()
            meta["end_tokens"] += sorted(writer.end_tokens.difference(meta["end_tokens"]))
            if name == "validation" and any(writer.kinds):
                meta["kinds"] = writer.kinds
        report(meta, encoder)
        print("Saving dataset into torch format...")
        save_dataset(new, meta, tensors)
    print(f"Dataset saved as {args.save_path}")


def pick_template(template: Callable, row: dict) -> Callable:
    """`template`; or `chat`, if the row has messages and lacks a column that the template asks for, or has null."""
    filled = {name: value for name, value in row.items() if value is not None}
    has_messages = any(name in filled for name in MESSAGE_COLUMNS)
    return chat if has_messages and missing_columns(template, filled) else template


def report(meta: dict, encoder: RowEncoder) -> None:
    """Print what of the data will be missing in the model, or is unusual."""
    if encoder.unused:
        print(f"Columns not used: {join_names(encoder.unused)}")
    if encoder.decomposed:
        rows = _num_rows(len(encoder.decomposed))
        print(f'{rows} with letters in parts, as macOS writes them: join them by unicodedata.normalize("NFC", text)')
    if not encoder.is_chat and not meta["chat_template"]:
        print(
            f"No chat template will be saved with the model: {encoder.template.__name__} has no Jinja form (inference "
            "scripts are not affected)."
        )


class EncodedRow(NamedTuple):
    """What becomes of a row of the data."""

    encoded: List[Encoded]  # its rows in the dataset file, none if it is dropped
    control_token: str = ""  # if it is dropped because of one in its text: "my.jsonl, line 12: <|im_end|>"
    kind: str = ""  # its cell in a column "kind", by which tutorial/evaluate.py sorts the answers


class RowEncoder:
    """Makes token ids of rows.

    columns: {name that the template asks for: name in the data}; is_chat: whether the template returns Conversations.
    `unused` are the columns and keys of messages that hold something and were not used; `decomposed` the places of
    rows that have letters in parts (Unicode NFD).
    """

    def __init__(self, template: Callable, tokenizer, block_size: int, columns: Dict[str, str], is_chat: bool = False):
        self.template = template
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.columns = columns
        self.is_chat = is_chat
        self.unused: Dict[str, None] = {}  # a dict keeps their order
        self.decomposed: Set[str] = set()

    def encode(self, rows: List[dict]) -> List[EncodedRow]:
        """For each row the rows of the dataset file that it becomes: none without an answer, and of a conversation one
        for each answer if the chat template rewrites earlier turns, or none if its text contains a control token."""
        rows = [rename_columns(row, self.columns) for row in rows]
        made = [apply_template(self.template, row) for row in rows]
        for row in rows:
            self.unused.update(dict.fromkeys(unused_columns(self.template, row)))
        self.unused.pop("kind", None)
        if self.is_chat:
            encoded = [self._encode_conversation(row, conversation) for row, conversation in zip(rows, made)]
        else:
            encoded = self._encode_examples(rows, made)
        return [one._replace(kind=_kind_of(row)) for row, one in zip(rows, encoded)]

    def _note_decomposed(self, row: dict, texts: List[str]) -> None:
        if any(not is_normalized("NFC", text) and len(normalize("NFC", text)) < len(text) for text in texts):
            self.decomposed.add(row_location(row))

    def _encode_examples(self, rows: List[dict], examples: List[Example]) -> List[EncodedRow]:
        for row, example in zip(rows, examples):
            self._note_decomposed(row, [*example.prompt, example.answer])
            unused = unused_columns(self.template, row) if not example.answer.strip() else []
            if any(name in unused for name in MESSAGE_COLUMNS):
                raise UserError(f"{row_location(row)} has messages, the first row has none. Make two files of them.")
        answered = [number for number, example in enumerate(examples) if example.answer.strip()]
        some = encode_examples(self.tokenizer, [examples[number] for number in answered], self.block_size)
        encoded = [EncodedRow([]) for _ in rows]
        for number, one in zip(answered, some):
            if sum(one.mask) == 1:  # the end token alone
                raise UserError(f"{row_location(rows[number])}: its answer is empty after tokenization. Fix it.")
            encoded[number].encoded.append(one)
        return encoded

    def _encode_conversation(self, row: dict, conversation: Conversation) -> EncodedRow:
        chat_template = get_chat_template(self.tokenizer)
        try:
            messages, tools = read_messages(conversation), read_tools(conversation)
            self.unused.update(dict.fromkeys(_unused_keys(chat_template, messages, tools, conversation.system)))
            self._note_decomposed(row, [message["content"] for message in messages])
            parse_arguments(messages, chat_template)
            control_token = chat_template.find_control_token(messages, tools)
            if control_token:
                return EncodedRow([], f"{row_location(row)}: {control_token}")
            return EncodedRow(encode_conversation(chat_template, messages, tools, self.block_size))
        except UserError as error:
            raise UserError(f"{row_location(row)}: {error}") from None


def _kind_of(row: dict) -> str:
    """The cell in a column "kind"; "" for a list or an object, which a column may hold that no template uses."""
    kind = row.get("kind")
    return to_text(kind) if isinstance(kind, (str, int, float)) else ""


def _unused_keys(chat_template, messages: List[dict], tools, system) -> Iterator[str]:
    """What of a conversation holds something and has no place in the text that the chat template writes."""
    source = str(chat_template.tokenizer.chat_template)
    if tools and "tools" not in source:
        yield "tools"
    if system and to_text(system) not in [message["content"] for message in messages]:
        yield "system"  # the messages have another one
    for key, value in (item for message in messages for item in message.items()):
        is_used = key in ("role", "content") or (key == "weight" and value in (0, 1))
        if not is_used and is_filled(value) and not re.search(rf"\b{re.escape(key)}\b", source):
            yield f"messages.{key}"


def write_rows(name: str, rows: Iterable[dict], encoder: RowEncoder, writer: SplitWriter) -> Counter:
    """Encode the rows of the split `name` and write them, with a progress bar. Print and return counts of what was
    done."""
    counts = Counter({"rows": 0, "tokens": 0, "prompts cut": 0, "answers cut": 0, "dropped": 0})
    first_control_token = ""
    num_answers, remarks = 0, Counter()
    for chunk in with_progress(encode_chunks(rows, encoder), len, name, length_hint(rows) or None):
        for row in chunk:
            if row.control_token:
                counts["control tokens"] += 1
                first_control_token = first_control_token or row.control_token
            else:
                counts["dropped"] += not row.encoded
            if encoder.is_chat:
                counts["conversations"] += bool(row.encoded)
            for one in row.encoded:
                writer.add(one, row.kind)
                counts["rows"] += 1
                counts["tokens"] += len(one.ids)
                counts["prompts cut"] += one.prompt_truncated
                counts["answers cut"] += one.answer_truncated
                num_answers += one.num_answers
                remarks.update(one.remarks)
    print(f"{name}: {summary_line(counts, first_control_token)}")
    for remark, number in sorted(remarks.items()):
        print(f"{name}: the chat template {remark} in {number} of {num_answers} answers")
    return counts


def encode_chunks(rows: Iterable[dict], encoder: RowEncoder) -> Iterator[List[EncodedRow]]:
    """What `encoder` makes of the rows, in their order. The tokenizer encodes the texts of a chunk on all cores."""
    iterator = iter(rows)
    while True:
        chunk = list(islice(iterator, ROWS_PER_CHUNK))
        if not chunk:
            return
        yield encoder.encode(chunk)


def summary_line(counts: Counter, first_control_token: str) -> str:
    rows = f"{counts['rows']} rows"
    if 0 < counts["conversations"] < counts["rows"]:
        rows += f", one for each answer of {counts['conversations']} conversations"
    line = (
        f"{rows}, {counts['tokens']} tokens; {counts['prompts cut']} prompts and {counts['answers cut']} answers "
        f"truncated, {_num_rows(counts['dropped'])} without an answer dropped"
    )
    if first_control_token:
        dropped = _num_rows(counts["control tokens"])
        line += f", {dropped} with control tokens in the text dropped (first: {first_control_token})"
    return line


def _num_rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def show_rows(rows: Iterable[dict], count: int, encoder: RowEncoder) -> None:
    """Print the first rows as the model will see them, with the tokens in the loss in colour, or in brackets."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    print(f"Rows as the model sees them (the loss is computed on the text in {'green' if colour else 'brackets'}):")
    for number, row in enumerate(islice(rows, count), 1):
        [made] = encoder.encode([row])
        if made.control_token:
            print(f"--- row {number}: dropped (control token in {made.control_token})")
        elif not made.encoded:
            print(f"--- row {number}: dropped (no answer)")
        for one in made.encoded:
            truncated = ", truncated" if one.prompt_truncated or one.answer_truncated else ""
            print(f"--- row {number}: {len(one.ids)} tokens, {sum(one.mask)} in the loss{truncated}")
            for in_loss, part in groupby(zip(one.ids, one.mask), key=itemgetter(1)):
                text = encoder.tokenizer.decode([token_id for token_id, _ in part])
                print(f"{before}{text}{after}" if in_loss else text, end="")
            print()
