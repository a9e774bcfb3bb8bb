"""Prompts as token ids, cut to the room that there is: the same ids whether one is tokenized or a thousand."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from typing import List, Optional, Tuple

LETTERS_A_TOKEN = 5  # of a text longer than a block, so many letters a token are looked at first
TAIL = 64  # letters, longer than any word that a tokenizer would join with others


def fit(tokenizer, prompts: List[List[str]], limits: List[int]) -> List[Tuple[List[int], bool]]:
    """(ids, whether it was cut) of each prompt, cut to its limit of tokens: its last cuttable piece at the end, then
    the one before it; the bare frame's ids where even that exceeds the limit.

    The text is cut, not the ids, and tokenized again: so every prompt is the tokens of some text. That costs most of
    the time where rows are long, so text that can't fit is not tokenized at all, all rows go in one call, and a cut
    between two words needs no second pass.
    """
    fitted: List[Tuple[List[int], bool]] = [([], False)] * len(prompts)
    left = {row: list(pieces) for row, pieces in enumerate(prompts)}
    shortened = {row: _shortened(pieces, limits[row]) for row, pieces in left.items()}
    while left:
        texts, joined = ["".join(shortened[row] or pieces) for row, pieces in left.items()], {}
        for (row, pieces), encoding in zip(list(left.items()), encodings(tokenizer, texts, True)):
            ids = _without_end(tokenizer, encoding.ids)
            place, excess = _last_cuttable(pieces), len(ids) - limits[row]
            if shortened[row] is None and (excess <= 0 or place is None):
                fitted[row] = ids, pieces != prompts[row]
                del left[row]
                continue
            seen, shortened[row] = shortened[row] or pieces, None
            start = sum(map(len, pieces[:place]))
            # by their begins alone: in tokenizers before 0.20.1 a whole word of Llama3 ends where it begins
            begins = [begin for begin, _ in encoding.offsets[: len(ids)]]
            first, last = bisect_left(begins, start), bisect_left(begins, start + len(seen[place]))
            cut = begins[last - excess] - start if 0 < excess < last - first else 0
            if seen is not pieces and not 0 < cut < len(seen[place]) - 2 * TAIL:
                continue  # what was kept of the text did not tell: the whole of it, next time
            text = "".join(pieces[: place + 1])
            pieces[place] = pieces[place][: min(cut, len(pieces[place]) - 1)]
            word = _between_words(text, start + cut) if cut else -1
            kept = bisect_left(begins, word)
            if word > start and begins[kept] == word:  # whole words keep their tokens, the rest gets its own
                joined[row] = ids[:kept], "".join(pieces)[word:]
        after = _ids_after_a_word(tokenizer, [rest for _, rest in joined.values()])
        for row, (ids, _), rest in zip(joined, joined.values(), after):
            if rest is not None and len(ids) + len(rest) <= limits[row]:
                fitted[row] = ids + rest, True
                del left[row]
    return fitted


def _last_cuttable(pieces: List[str]) -> Optional[int]:
    return max((place for place in range(1, len(pieces), 2) if pieces[place]), default=None)


def _shortened(pieces: List[str], limit: int) -> Optional[List[str]]:
    """`pieces` without the middle of the last cuttable one, of which no token can fit into `limit`; None: it is short.

    Taken out from one space between two words to another, so that no token of what stays is another than before.
    """
    place = _last_cuttable(pieces)
    if place is None:
        return None
    piece, most = pieces[place], max(limit, 1) * LETTERS_A_TOKEN + 4 * TAIL
    if len(piece) < most + 4 * TAIL:
        return None
    begin, end = _between_words(piece, most), _between_words(piece, len(piece) - 2 * TAIL)
    if not 0 < begin < end:
        return None
    return [*pieces[:place], piece[:begin] + piece[end:], *pieces[place + 1 :]]


def _between_words(text: str, near: int) -> int:
    """The place of a space between two letters or digits, at `near` or up to 2 * TAIL before it; -1: there is none."""
    for place in range(min(near, len(text) - 2), max(0, near - 2 * TAIL), -1):
        if text[place] == " " and text[place - 1].isalnum() and text[place + 1].isalnum():
            return place
    return -1


def _ids_after_a_word(tokenizer, texts: List[str]) -> List[Optional[List[int]]]:
    """The ids of texts that begin with a space and a letter, as they follow a word; None where they depend on it."""
    if not texts or not _words_stand_alone(tokenizer):
        return [None] * len(texts)
    word, *both = (
        encoding.ids for encoding in encodings(tokenizer, ["word", *("word" + text for text in texts)], False)
    )
    return [ids[len(word) :] if ids[: len(word)] == word else None for ids in both]


@lru_cache(maxsize=8)
def _words_stand_alone(tokenizer) -> bool:
    """Whether no token of this tokenizer depends on what stands before the space before it: asked of some words."""
    words = ["word", "Xy", "2024", "한국", "naïve", "東京"]
    ends = [" the end.\n\n### Output:\n", " 7 [/INST]\n", " 끝 [/SUMMARIZE]\n"]
    for end in ends:
        texts = [text for word in words for text in (word, word + end)]
        ids = [encoding.ids for encoding in encodings(tokenizer, texts, False)]
        rests = {
            tuple(both[len(alone) :]) if both[: len(alone)] == alone else () for alone, both in zip(ids[::2], ids[1::2])
        }
        if len(rests) != 1 or () in rests:
            return False
    return True


def encodings(tokenizer, texts: List[str], add_special_tokens: bool) -> list:
    """Of the tokenizer beneath; text that looks like a special token (`</s>`, `<|endoftext|>`) stays text."""
    beneath = tokenizer.backend_tokenizer
    beneath.encode_special_tokens = True
    beneath.no_truncation()
    beneath.no_padding()
    return beneath.encode_batch(texts, add_special_tokens=add_special_tokens) if texts else []


def _without_end(tokenizer, ids: List[int]) -> List[int]:
    """Some tokenizers add their end token to every text; a prompt goes on with its answer instead."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
