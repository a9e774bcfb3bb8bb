"""Text as token ids, word by word: a word that was seen before is not tokenized again, and a text is mostly such."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import chain
from typing import Dict, List, Tuple

KNOWN = 200_000  # units, some 60 MB; with more, all are forgotten
LONGEST = 64  # letters of a unit that is worth keeping
BEGIN = " "  # stands before a text's first unit; all others never begin with a space
WORD = "word "  # stands before these as they are tokenized
LEFT = r"\w.,;:!?'\")-"
# one space, a letter, digit or common sign on either side: between words in every script that has spaces. Written so
# that it begins with its one letter: twice as fast
BETWEEN = re.compile(rf" (?<=[{LEFT}].)(?=[\w!-~])")
# scripts, signs, white space, all that a tokenizer may take as a whole with what is before or behind it
SAMPLES = [
    "Hi there. I'm 42, and you're 7.5; it's (at) \"The end\" - isn't it? Yes! The snake_case x_ y, e.g.: 'a' [x] <y>",
    "그는 말했다, 오늘 2024 년 12 월 다람쥐 헌 쳇바퀴. 東京 は 日本 の 首都 です 。 naïve café",
    "Ünï ŁÓDŹ ŉ İstanbul ΣΑΣ ς end привет мир हिन्दी में पाठ สวัสดี ครับ مرحبا بالعالم ١٢٣ ٤",
    "👍🏽 a 👍 b 😀 c a\u0301 e ﬁ ½ x² a ▁b a▁ b Ġ Ġa aĠ b",
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
        self.known: Dict[str, Tuple[int, ...]] = {}
        (framed,) = encodings(tokenizer, [WORD.strip()], True)
        inside = [place for place, special in enumerate(framed.special_tokens_mask) if not special]
        # ids that the tokenizer puts before and behind every text
        self.before, self.after = framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
        self.word = len(inside)
        self.apart = _words_stand_alone(tokenizer) and all(
            [*self.before, *chain.from_iterable(parts), *self.after] == whole.ids
            for whole, parts in zip(
                encodings(tokenizer, SAMPLES, True), self.ids([BETWEEN.split(BEGIN + text) for text in SAMPLES])
            )
        )

    def units(self, text: str) -> List[str]:
        """The units, a space apart, of a text with BEGIN before it; or of its end, from the begin of a unit on."""
        return BETWEEN.split(text) if self.apart else [text]

    def ids(self, texts: List[List[str]]) -> List[List[Tuple[int, ...]]]:
        """The ids of each unit of some texts, without special tokens."""
        known = self.known
        if len(known) > KNOWN:
            known.clear()
        unseen = [unit for unit in set().union(*texts) if unit not in known]
        for unit, encoding in zip(unseen, encodings(self.tokenizer, list(map(_as_tokenized, unseen)), False, True)):
            known[unit] = tuple(encoding.ids if unit[0] == BEGIN else encoding.ids[self.word :])
        found = [list(map(known.__getitem__, units)) for units in texts]
        for unit in unseen:
            if len(unit) > LONGEST:
                del known[unit]
        return found

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


def encodings(tokenizer, texts: List[str], add_special_tokens: bool, only_ids: bool = False) -> list:
    """Of the tokenizer beneath; text that looks like a special token (`</s>`, `<|endoftext|>`) stays text.

    `only_ids`: without offsets, faster in tokenizers 0.20 and newer.
    """
    beneath = tokenizer.backend_tokenizer
    beneath.encode_special_tokens = True
    beneath.no_truncation()
    beneath.no_padding()
    encode = getattr(beneath, "encode_batch_fast", beneath.encode_batch) if only_ids else beneath.encode_batch
    return encode(texts, add_special_tokens=add_special_tokens) if texts else []
