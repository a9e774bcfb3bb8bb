"""Text as token ids, word by word: a word that was seen before is not tokenized again, and a text is mostly such."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from functools import lru_cache
from typing import Dict, List

KNOWN = 200_000  # units, some 60 MB; with more, all are forgotten
ID = array("i").itemsize
LONGEST = 64  # letters of a unit that is worth keeping
BEGIN = " "  # stands before a text's first unit; all others never begin with a space
WORD = "word "  # stands before these as they are tokenized
LEFT = r"\w.,;:!?'\")-"
# one space, a letter, digit or common sign on either side: between words in every script that has spaces. Written so
# that it begins with its one letter: twice as fast
BETWEEN = re.compile(rf" (?<=[{LEFT}].)(?=[\w!-~])")
LAST = re.compile(rf"[{LEFT}]\Z")  # of a unit with another behind it
TOGETHER = 200  # units, as one text
# scripts, signs, white space, all that a tokenizer may take as a whole with what is before or behind it
SAMPLES = [
    "Hi there. I'm 42, and you're 7.5; it's (at) \"The end\" - isn't it? Yes! The snake_case x_ y, e.g.: 'a' [x] <y>",
    "그는 말했다, 오늘 2024 년 12 월 다람쥐 헌 쳇바퀴. 東京 は 日本 の 首都 です 。 naïve café",
    "Ünï ŁÓDŹ ŉ İstanbul ΣΑΣ ς end привет мир हिन्दी में पाठ สวัสดี ครับ مرحبا بالعالم ١٢٣ ٤",
    "👍🏽 a 👍 b 😀 c a\u0301 e 𒀀 ﬁ ½ x² a ▁b a▁ b Ġ Ġa aĠ b",
    "def f(x):\n    return x != 1e-5  # a  b\t c \t d\r\n e \n\n f   g. \u00a0h i\u00a0 j \u3000k  ",
    " begins so", "  twice", "\n\nnew", "</s> a <s> b <|endoftext|> c [INST] d [/INST]\n", "a b", "1 2 3 4 56 789 0123",
]  # fmt: skip


class Words:
    """What a tokenizer makes of text, cut into units at the spaces between words.

    Where a space may be part of a token with what is before it, or anything else makes the ids of a unit depend on
    the text around it, a text is one unit. So joined ids of the units are always those of the whole text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.known: Dict[str, bytes] = {}
        (framed,) = encodings(tokenizer, [WORD.strip()], True)
        inside = [place for place, special in enumerate(framed.special_tokens_mask) if not special]
        # ids that the tokenizer puts before and behind every text
        self.before, self.after = _as_bytes(framed.ids[: inside[0]]), _as_bytes(framed.ids[inside[-1] + 1 :])
        self.end = _as_bytes([tokenizer.eos_token_id])
        self.word = len(inside)
        self.apart = _words_stand_alone(tokenizer)
        if self.apart:
            parts = self.ids([self.units(BEGIN + text) for text in SAMPLES])
            joined = [as_list(self.before + b"".join(ids) + self.after) for ids in parts]
            # and no word vanishes, because places of tokens are not to be relied on then
            self.apart = all(map(all, parts)) and joined == [one.ids for one in encodings(tokenizer, SAMPLES, True)]
            self.known.clear()

    def units(self, text: str) -> List[str]:
        """The units, a space apart, of a text with BEGIN before it; or of its end, from the begin of a unit on."""
        return BETWEEN.split(text) if self.apart else [text]

    def ids(self, texts: List[List[str]]) -> List[List[bytes]]:
        """The ids of each unit of some texts, without special tokens: each int32, because bytes are joined fast."""
        known = self.known
        if len(known) > KNOWN:
            known.clear()
        unseen = [unit for unit in set().union(*texts) if unit not in known]
        self._see(unseen)
        found = [list(map(known.__getitem__, units)) for units in texts]
        for unit in unseen:
            if len(unit) > LONGEST:
                del known[unit]
        return found

    def framed(self, parts: List[bytes]) -> bytes:
        """The ids of a text of these parts, with those that the tokenizer puts around it, but for an end: a prompt goes
        on with its answer instead."""
        ids = self.before + b"".join(parts) + self.after
        return ids[:-ID] if ids.endswith(self.end) else ids

    def _see(self, unseen: List[str]) -> None:
        """Make units known. Many go as one text, which is three times as fast, but for those that nothing may follow
        or that begin a text."""
        joint = [unit for unit in unseen if self.apart and unit[0] != BEGIN and LAST.search(unit)]
        groups = [joint[first : first + TOGETHER] for first in range(0, len(joint), TOGETHER)]
        groups += [[unit] for unit in set(unseen).difference(joint)]
        texts = [_as_tokenized(" ".join(units)) for units in groups]
        for units, encoding in zip(groups, encodings(self.tokenizer, texts, False)):
            ids, begins = encoding.ids, [begin for begin, _ in encoding.offsets]
            first, place = (0, 0) if units[0][0] == BEGIN else (self.word, len(WORD))
            for unit in units[:-1]:
                place += len(unit) + 1
                last = bisect_left(begins, place - 1, first)  # the next token begins at the space before it, or behind
                self.known[unit], first = _as_bytes(ids[first:last]), last
            self.known[units[-1]] = _as_bytes(ids[first:])

    def begins(self, unit: str) -> List[int]:
        """Where in `unit` each of its tokens begins.

        The begins alone: in tokenizers before 0.20.1 a whole word of Llama3 ends where it begins.
        """
        text = _as_tokenized(unit)
        (encoding,) = encodings(self.tokenizer, [text], False)
        offsets = encoding.offsets if unit[0] == BEGIN else encoding.offsets[self.word :]
        return [begin + len(unit) - len(text) for begin, _ in offsets]


@lru_cache(maxsize=8)
def words_of(tokenizer) -> Words:
    """The one `Words` of a tokenizer in this process."""
    return Words(tokenizer)


def _as_bytes(ids: List[int]) -> bytes:
    return array("i", ids).tobytes()


def as_list(ids: bytes) -> List[int]:
    return array("i", ids).tolist()


def _as_tokenized(unit: str) -> str:
    return unit[1:] if unit[0] == BEGIN else WORD + unit


def _words_stand_alone(tokenizer) -> bool:
    """Whether no token can span a space between words, and none depends on what is before it: by what BPE does.

    BPE joins two neighbours where that is a token. Where none has a letter and then a space in it, words never meet.
    """
    from tokenizers import decoders

    beneath = tokenizer.backend_tokenizer
    model, bytes_of = beneath.model, decoders.ByteLevel()
    if type(model).__name__ != "BPE" or model.dropout:
        return False
    words = beneath.pre_tokenizer.pre_tokenize_str("a b") if beneath.pre_tokenizer else []
    if getattr(model, "ignore_merges", False) and len(words) < 2:  # a word that is a token is one: it must be a word
        return False
    added = beneath.get_added_tokens_decoder().values()
    # text begins anew behind an added token; special ones are text here
    if any(re.search(f"[{LEFT}]$", token.content) for token in added if not token.special):
        return False
    perhaps = (token for token in beneath.get_vocab(True) if re.search("[^ Ġ▁][ Ġ▁]", token))
    # half a letter is decoded as U+FFFD
    return not any(re.search(f"[{LEFT}\ufffd] ", bytes_of.decode([one]).replace("▁", " ")) for one in perhaps)


def encodings(tokenizer, texts: List[str], add_special_tokens: bool) -> list:
    """Of the tokenizer beneath; text that looks like a special token (`</s>`, `<|endoftext|>`) stays text."""
    beneath = tokenizer.backend_tokenizer
    beneath.encode_special_tokens = True
    beneath.no_truncation()
    beneath.no_padding()
    return beneath.encode_batch(texts, add_special_tokens=add_special_tokens) if texts else []
