"""Prompts as token ids, cut to the room that there is: the same ids whether one is tokenized or a thousand."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import List, Optional, Tuple

from common.words import BEGIN, BETWEEN, ID, Words, as_list, words_of

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
    return [(as_list(prompt.ids), prompt.pieces != pieces) for prompt, pieces in zip(fitted, prompts)]


class _Prompt:
    """A prompt on its way into its limit. Places are those in its text, with BEGIN before it."""

    def __init__(self, words: Words, pieces: List[str], limit: int):
        self.words, self.limit, self.pieces = words, limit, list(pieces)
        self.ids = b""
        self.whole: Optional[str] = None  # of its last cuttable piece, where the middle was taken out
        place = self.last_cuttable()
        if words.apart and place is not None:
            short = _shortened(pieces[place], limit)
            if short:
                self.whole, self.pieces[place] = pieces[place], short
        self.restart([], [])

    def restart(self, units: List[str], parts: List[bytes]) -> None:
        """Go on behind these units, which stay; what is behind them may be other text now."""
        self.units, self.parts = units, parts
        self.text = BEGIN + "".join(self.pieces)
        self.rest = self.text[_length(units) :]

    def last_cuttable(self) -> Optional[int]:
        return max((place for place in range(1, len(self.pieces), 2) if self.pieces[place]), default=None)

    def fits_with(self, units: List[str], parts: List[bytes]) -> bool:
        """Whether the prompt fits, now that its rest is known as units and their ids; if not, it is cut."""
        place = self.last_cuttable()
        self.units, self.parts = self.units + units, self.parts + parts
        self.ids = self.words.framed(self.parts)
        excess = len(self.ids) // ID - self.limit
        if self.whole is None and (excess <= 0 or place is None):
            return True
        start, piece = len(BEGIN) + sum(map(len, self.pieces[:place])), self.pieces[place]
        # of tokens before each unit, and of all, in bytes
        self.counts = list(accumulate(map(len, self.parts), initial=len(self.words.before)))
        cut, token = 0, self.tokens_before(start + len(piece)) - excess  # the first token that is too many
        if excess > 0 and token > 0 and self.begin_of(token - 1) >= start:
            cut = self.begin_of(token) - start
        whole, self.whole = self.whole, None
        if whole is not None and not 0 < cut < len(piece) - 2 * TAIL:  # what was looked at did not tell
            self.pieces[place], kept = whole, 0
        else:
            self.pieces[place] = piece[: min(cut, len(piece) - 1)]
            # the cut is in the token's unit, or at the space before it: the unit before may end at another place now
            kept = max(0, self.unit_of(token) - 1) if cut else 0
        self.restart(self.units[:kept], self.parts[:kept])
        return False

    def tokens_before(self, place: int) -> int:
        """How many tokens begin before `place`, which is near the end."""
        unit, begin = len(self.units), len(self.text) + 1
        while begin > place:
            unit -= 1
            begin -= len(self.units[unit]) + 1
        if place - begin == len(self.units[unit]) and unit + 1 < len(self.units):
            return self.counts[unit + 1] // ID  # it ends in a letter; a text may end in spaces, which begin at its end
        return self.counts[unit] // ID + bisect_left(self.words.begins(self.units[unit]), place - begin)

    def unit_of(self, token: int) -> int:
        return bisect_right(self.counts, token * ID) - 1

    def begin_of(self, token: int) -> int:
        unit = self.unit_of(token)
        if unit < 0:  # it stands before every text
            return len(BEGIN)
        begins = self.words.begins(self.units[unit])
        return _length(self.units[:unit]) + begins[token - self.counts[unit] // ID]


def _length(units: List[str]) -> int:
    """Of the text of some units with the space behind the last."""
    return len(" ".join(units)) + 1 if units else 0


def _shortened(piece: str, limit: int) -> str:
    """`piece` without the middle, of which no token can fit into `limit`, from one space between words to another, so
    that no token of what stays is another than before; "" where it is short."""
    first = max(limit, 1) * LETTERS_A_TOKEN + 4 * TAIL
    if len(piece) < first + 4 * TAIL:
        return ""
    head, tail = BETWEEN.search(piece, first), BETWEEN.search(piece, len(piece) - 2 * TAIL)
    return piece[: head.start()] + piece[tail.start() :] if head and tail and head.start() < tail.start() else ""
