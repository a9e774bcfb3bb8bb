"""Rows of text on their way into the dataset file: encoded by as many processes as there are cores, in their order."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import struct
import sys
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, groupby, islice
from operator import attrgetter, length_hint
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple

from common.chat_template import encode_conversation
from common.columns import applied, place_of, renamed
from common.support.exit import UserError
from common.tokenization import encode_rows
from common.train_log import with_progress
from dataset.messages import read_messages, read_tools

ROWS_AT_ONCE = 250  # memory stays bounded, and a process that is to stop is never busy for long
ROWS_FOR_ONE = 1000  # up to so many are not worth further processes


class Chunk(NamedTuple):
    """Some rows, encoded. The same bytes in whatever process they were made."""

    rows: int  # that were read, those without an answer too
    ids: bytes  # int32, of all rows
    mask: bytes  # of each id a byte: 1 where it carries a loss
    lengths: bytes  # int32 [rows that have an answer]
    counts: Counter


class Encoder(NamedTuple):
    """What a process needs to know to encode rows."""

    template: object
    tokenizer: object
    block_size: int
    columns: Dict[str, str]  # names that the template asks for, and those that the data has in their place
    chat: object = None  # where the template gives conversations, the `Chat` of the tokenizer

    def rows(self, rows: List[dict]) -> Tuple[List[Tuple[List[int], bytes]], Counter]:
        """(token ids, of each a byte: 1 where it carries a loss) of rows under the data's own names; and counts."""
        rows = [renamed(row, self.columns) for row in rows]
        if self.chat:
            return encode_conversations(rows, self.template, self.chat, self.block_size)
        encoded, counts = encode_rows(rows, self.template, self.tokenizer, self.block_size)
        return [(ids, bytes(start) + b"\1" * (len(ids) - start)) for ids, start in encoded], counts

    def chunk(self, rows: List[dict]) -> Chunk:
        encoded, counts = self.rows(rows)
        ids, mask, lengths = bytearray(), bytearray(), array("i")
        for row, with_loss in encoded:
            ids += struct.pack(f"{len(row)}i", *row)  # four times as fast as array.extend
            mask += with_loss
            lengths.append(len(row))
        return Chunk(len(rows), bytes(ids), bytes(mask), lengths.tobytes(), counts)


def encode_conversations(rows: List[dict], template, chat, block_size: int):
    """((token ids, mask) of each conversation that has an answer, or of each answer; counts)."""
    counts, encoded = Counter(rows=0, conversations=0, dropped=0), []
    for row in rows:
        conversation = applied(template, row)
        try:
            messages, tools = read_messages(conversation), read_tools(conversation)
            made = encode_conversation(chat, messages, tools, block_size)
        except UserError as error:
            raise UserError(f"{place_of(row)}: {error}") from None
        counts["conversations" if made else "dropped"] += 1
        for one in made:
            counts["rows"] += 1
            counts["tokens"] += len(one.ids)
            counts["prompts cut"] += one.prompt_truncated
            counts["answers cut"] += one.answer_truncated
            encoded.append((one.ids, one.mask))
    return encoded, counts


def encoded_chunks(name: str, rows: Iterable[dict], encoder: Encoder) -> Iterator[Chunk]:
    """The rows of the split `name`, in their order, encoded; with a progress bar, or a line now and then."""
    iterator = iter(rows)
    chunks = iter(lambda: list(islice(iterator, ROWS_AT_ONCE)), [])
    first = list(islice(chunks, ROWS_FOR_ONE // ROWS_AT_ONCE + 1))
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(first) * ROWS_AT_ONCE <= ROWS_FOR_ONE or processes == 1:
        encoded = map(encoder.chunk, chain(first, chunks))
    else:
        encoded = _in_processes(chain(first, chunks), encoder, processes)
    return with_progress(encoded, attrgetter("rows"), name, length_hint(rows) or None)


def show_rows(rows: Iterable[dict], count: int, encoder: Encoder) -> None:
    """Print the first rows as the model will see them, the tokens with a loss in colour, or in brackets."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    print(f"Rows as the model sees them; it learns what is {'green' if colour else 'in brackets'}:")
    for number, row in enumerate(islice(rows, count), 1):
        encoded, counts = encoder.rows([row])
        if not encoded:
            print(f"--- row {number}: no answer, it is dropped")
        for ids, mask in encoded:
            cut = ", cut" if counts["prompts cut"] or counts["answers cut"] else ""
            print(f"--- row {number}: {len(ids)} tokens, {sum(mask)} with a loss{cut}")
            for with_loss, part in groupby(zip(ids, mask), lambda pair: pair[1]):
                text = encoder.tokenizer.decode([token for token, _ in part])
                print(f"{before}{text}{after}" if with_loss else text, end="")
            print()


def _in_processes(chunks: Iterable[List[dict]], encoder: Encoder, processes: int) -> Iterator[Chunk]:
    # a process of its own beats the tokenizer's threads, because half of the work is Python's
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    waiting: deque = deque()
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(encoder,)) as executor:
        try:
            for chunk in chunks:
                waiting.append(executor.submit(_chunk, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _begin(encoder: Encoder) -> None:
    """In a new process: the one that made it answers Ctrl-C for all, and its end is theirs."""
    global _encoder
    _encoder = encoder
    gc.freeze()  # what was imported stays: to look through it for garbage costs a tenth of the time, and copies it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: https://man7.org/linux/man-pages/man2/prctl.2.html
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _chunk(rows: List[dict]) -> Chunk:
    return _encoder.chunk(rows)
