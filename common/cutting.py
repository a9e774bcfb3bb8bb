"""Prompts as token ids, cut to the room that there is: the same ids whether one is tokenized or a thousand."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate, chain, count
from operator import add
from typing import List, Optional, Tuple

from common.words import BEGIN, BETWEEN, Words, words_of

LETTERS_A_TOKEN = 6  # of a text longer than its limit, so many letters a token are looked at first
TAIL = 64  # letters: of its end


def fit(tokenizer, prompts: List[List[str]], limits: List[int]) -> List[Tuple[List[int], bool]]:
    """(ids, whether it was cut) of each prompt, cut to its limit of tokens: its last cuttable piece at the end, then
    the one before it; the bare frame's ids where even that exceeds the limit.

    The text is cut, not the ids, and tokenized again: so every prompt is the tokens of some text. Text that can't fit
    is not looked at, and of a text that was cut only the end again.
    """
    words = words_of(tokenizer)
    fitted = [_Prompt(words, pieces, limit) for pieces, limit in zip(prompts, limits)]
    left = fitted
    while left:
        texts = [words.units(prompt.rest) for prompt in left]
        left = [
            prompt for prompt, units, parts in zip(left, texts, words.ids(texts)) if not prompt.fits_with(units, parts)
        ]
    return [(prompt.ids, prompt.pieces != pieces) for prompt, pieces in zip(fitted, prompts)]


class _Prompt:
    """A prompt on its way into its limit. Places are those in its text, with BEGIN before it."""

    def __init__(self, words: Words, pieces: List[str], limit: int):
        self.words, self.limit, self.pieces = words, limit, list(pieces)
        self.ids: List[int] = []
        self.whole: Optional[str] = None  # of its last cuttable piece, where the middle was taken out
        place = self.last_cuttable()
        if words.apart and place is not None:
            short = _shortened(pieces[place], limit)
            if short:
                self.whole, self.pieces[place] = pieces[place], short
        self.restart()

    def restart(self, kept: int = 0) -> None:
        """Go on behind the first `kept` units; the others may be other text now."""
        begin = self.starts[kept] if kept else 0
        self.units, self.parts = (self.units[:kept], self.parts[:kept]) if kept else ([], [])
        self.rest = (BEGIN + "".join(self.pieces))[begin:]

    def last_cuttable(self) -> Optional[int]:
        return max((place for place in range(1, len(self.pieces), 2) if self.pieces[place]), default=None)

    def fits_with(self, units: List[str], parts: List[Tuple[int, ...]]) -> bool:
        """Whether the prompt fits, now that its rest is known as units and their ids; if not, it is cut."""
        words, place = self.words, self.last_cuttable()
        self.units, self.parts = self.units + units, self.parts + parts
        self.ids = _without_end(words.tokenizer, [*words.before, *chain.from_iterable(self.parts), *words.after])
        excess = len(self.ids) - self.limit
        if self.whole is None and (excess <= 0 or place is None):
            return True
        self.starts = list(map(add, accumulate(map(len, self.units), initial=0), count()))  # of units, and of one more
        self.counts = list(accumulate(map(len, self.parts), initial=len(words.before)))  # of tokens before each
        start, piece = len(BEGIN) + sum(map(len, self.pieces[:place])), self.pieces[place]
        cut, token = 0, self.tokens_before(start + len(piece)) - excess  # the first token that is too many
        if excess > 0 and token > 0 and self.begin_of(token - 1) >= start:
            cut = self.begin_of(token) - start
        if self.whole is not None:
            whole, self.whole = self.whole, None
            if not 0 < cut < len(piece) - 2 * TAIL:  # what was looked at did not tell
                self.pieces[place] = whole
                self.restart()
                return False
        self.pieces[place] = piece[: min(cut, len(piece) - 1)]
        # the unit before the cut may end at another place now
        self.restart(max(0, self.unit_at(start + len(self.pieces[place])) - 1))
        return False

    def unit_at(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1

    def tokens_before(self, place: int) -> int:
        """How many tokens begin before `place`."""
        unit = self.unit_at(place)
        within = place - self.starts[unit]
        if within == len(self.units[unit]) and unit + 1 < len(self.units):
            return self.counts[unit + 1]  # it ends in a letter; a text may end in spaces, which begin where it ends
        return self.counts[unit] + bisect_left(self.words.begins(self.units[unit]), within)

    def begin_of(self, token: int) -> int:
        unit = bisect_right(self.counts, token) - 1
        if unit < 0:  # it stands before every text
            return len(BEGIN)
        return self.starts[unit] + self.words.begins(self.units[unit])[token - self.counts[unit]]


def _shortened(piece: str, limit: int) -> str:
    """`piece` without the middle, of which no token can fit into `limit`, from one space between words to another, so
    that no token of what stays is another than before; "" where it is short."""
    first = max(limit, 1) * LETTERS_A_TOKEN + 4 * TAIL
    if len(piece) < first + 4 * TAIL:
        return ""
    head, tail = BETWEEN.search(piece, first), BETWEEN.search(piece, len(piece) - 2 * TAIL)
    return piece[: head.start()] + piece[tail.start() :] if head and tail and head.start() < tail.start() else ""


def _without_end(tokenizer, ids: List[int]) -> List[int]:
    """Some tokenizers add their end token to every text; a prompt goes on with its answer instead."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
