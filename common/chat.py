"""The chat template of a tokenizer: conversations as token ids, and which of them are the assistant's.

A template is a program of the model's makers (Jinja), which writes all messages as one text, and says nowhere what of
it came from which message. So the answers are found from what it writes: what a turn adds to the text before it. Only
the control tokens that the template writes become such. What looks like one in a message stays text: it is hidden from
the template's text by a word that no data has, and the template's own are tokens of other names in a copy of the
tokenizer, in which the special ones are text.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from copy import deepcopy
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from common.conversation import SYSTEM
from common.support.compat import require_package
from common.support.exit import UserError, short_message
from common.tokenization import largest_id

QUESTION = {"role": "user", "content": "a"}


class Turns(NamedTuple):
    """A conversation as the template writes it, and where its answers are."""

    text: str  # its control tokens under the names of the copy
    answers: List[Tuple[int, int]]  # where in the text each begins, and ends, behind its end token
    ends: List[int]  # ids of the tokens that end an answer, of those that have one
    messages: int  # of the conversation


class Chat:
    """A tokenizer with its chat template. UserError where it has none."""

    def __init__(self, tokenizer):
        require_package("jinja2", (3, 1), "a chat template")
        from tokenizers import AddedToken, processors

        file = Path(tokenizer.name_or_path) / "chat_template.jinja"
        if not tokenizer.chat_template and file.is_file():  # transformers before 4.50 does not look for it
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, by which conversations become text: "
                "it is a base model. Take the Instruct or Chat model of its family, with --model-name-or-path, or "
                "rows of a question and an answer in place of conversations."
            )
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        self.no_end = (
            f"chat template of {self.name} ends no answer with a token that its tokenizer knows, so a model could "
            "never learn to stop. Take template and tokenizer of one chat model."
        )
        added = sorted(tokenizer.backend_tokenizer.get_added_tokens_decoder().items())
        specials = [(number, token) for number, token in added if token.special and token.content]
        self.texts = [token.content for _, token in specials]
        self.ids = [number for number, _ in specials]
        secret = secrets.token_hex(8)  # drawn anew, so that no data can hold it
        self.mark, self.hidden = f"<{secret} %d>", f"x{secret}t%dx"  # letters alone: filters of templates leave them
        self.places = {text: place for place, text in enumerate(self.texts)}
        longest_first = sorted(map(re.escape, self.texts), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first) or r"(?!)")
        self.found_hidden = re.compile(rf"x{secret}t(\d+)x", re.IGNORECASE)
        self.beneath = deepcopy(tokenizer.backend_tokenizer)
        self.beneath.no_truncation()
        self.beneath.no_padding()
        self.beneath.encode_special_tokens = True
        self.beneath.post_processor = processors.ByteLevel(trim_offsets=False)  # a token begins at its space
        marks = [
            AddedToken(self.mark % n, lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word, normalized=False)
            for n, (_, t) in enumerate(specials)
        ]
        fill = largest_id(tokenizer) + 1 - self.beneath.get_vocab_size()  # where ids are left out in a vocabulary
        self.beneath.add_tokens([AddedToken(f"<{secret} fill {n}>", normalized=False) for n in range(fill)])
        self.beneath.add_tokens(marks)
        self.own_ids = {self.beneath.token_to_id(self.mark % place): self.ids[place] for place in range(len(marks))}
        # some models end a turn with a token that is not marked as special
        plain = [(token.content, number) for number, token in added if not token.special and token.content.strip()]
        plain = [(text, number) for text, number in plain if text in str(tokenizer.chat_template)]
        self.end_ids = dict([*zip([self.mark % place for place in range(len(marks))], self.ids), *plain])
        bos = re.escape(self.mark % self.places.get(tokenizer.bos_token, -1))
        ends = "|".join(map(re.escape, self.end_ids)) or r"(?!)"
        self.at_end = re.compile(rf"({ends})(?:\s|{bos})*\Z")

    def render(self, messages: List[dict], tools: Optional[list] = None, ask: bool = False) -> str:
        """What the template writes, with `ask` up to where an answer begins. UserError where it refuses."""
        options = {"tools": tools} if tools else {}
        try:
            text = self.tokenizer.apply_chat_template(
                self._hide(messages), tokenize=False, add_generation_prompt=ask, **options
            )
        except Exception as error:  # whatever the template raises, in its own words
            advice = "Mend that row."
            if messages and messages[0]["role"] in SYSTEM and self._takes(messages[1:], tools, ask):
                advice = "It takes no system message: put that text before the first user message's."
            raise UserError(f"the chat template of {self.name} refuses it: {short_message(error)}. {advice}") from None
        text = self.special.sub(lambda found: self.mark % self.places[found.group()], text)
        return self.found_hidden.sub(lambda found: self.texts[int(found.group(1))], text)

    def turns(self, messages: List[dict], tools: Optional[list] = None) -> List[Turns]:
        """The conversation and all its answers; or, where the template writes earlier turns anew (it drops their
        thinking, moves the system text), the conversation up to each answer, with that alone."""
        whole = self.render(messages, tools)
        each = [self.last_turn(messages[:n], tools) for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
        if len(each) > 1 and not all(whole.startswith(one.text) for one in each):
            return each
        answers, ends = [one.answers[0] for one in each], [end for one in each for end in one.ends]
        return [Turns(whole, answers, ends, len(messages))]

    def last_turn(self, messages: List[dict], tools: Optional[list] = None) -> Turns:
        """A conversation that ends with an answer, and where that is."""
        text, before = self.render(messages, tools), messages[:-1]
        try:
            asked = self.render(before, tools, True)
        except UserError:
            if before:
                raise
            begin = self._begin()  # nothing was asked, and few templates can say nothing
            asked = text.partition(begin)[0] + begin if begin else ""
        start = len(asked)
        if not text.startswith(asked):  # it asks with more than an answer begins with, as `<think>`
            start = len(commonprefix([asked, text]))
            base = len(commonprefix([self.render(before, tools), text])) if before else 0
            content = text.find(messages[-1]["content"].strip(), base)
            start = min(start, content) if content >= 0 else start
        end = self.at_end.search(text, start)
        stop = end.end(1) if end else len(text)
        if stop <= start:
            raise UserError(
                f"the chat template of {self.name} writes nothing of message {len(messages)}. Mend that row."
            )
        return Turns(text, [(start, stop)], [self.end_ids[end.group(1)]] if end else [], len(messages))

    def encode(self, some: List[Turns]) -> List[Tuple[List[int], bytearray]]:
        """(token ids, for each a byte, 1 where it is of an answer) of conversations."""
        encoded = []
        for turns, encoding in zip(
            some, self.beneath.encode_batch([one.text for one in some], add_special_tokens=False)
        ):
            begins, mask = [begin for begin, _ in encoding.offsets], bytearray(len(encoding.ids))
            for start, stop in turns.answers:
                first, last = bisect_left(begins, start), bisect_left(begins, stop)
                # where none of its control tokens stands between, a token may have the template's last letters and the
                # answer's first; that of white space alone is the template's
                both = turns.text[start : begins[first] if first < len(begins) else stop].strip()
                first -= bool(both and first)
                mask[first:last] = b"\1" * (last - first)
            encoded.append(([self.own_ids.get(one, one) for one in encoding.ids], mask))
        return encoded

    def shortened(self, text: str, excess: int) -> str:
        """`text` without its last tokens, so many."""
        offsets = self.beneath.encode(text, add_special_tokens=False).offsets
        cut = offsets[-excess][0] if excess < len(offsets) else 0
        return text[: min(cut, len(text) - 1)]

    def end_of_turn(self) -> int:
        """The id of the token by which the template ends an answer. UserError where it has none."""
        ends = self.last_turn([QUESTION, {"role": "assistant", "content": "b"}]).ends
        if not ends:
            raise UserError(f"The {self.no_end}")
        return ends[0]

    def _begin(self) -> str:
        """What stands before an answer."""
        base, asked = self.render([QUESTION]), self.render([QUESTION], ask=True)
        return asked[len(commonprefix([base, asked])) :]

    def _takes(self, messages: List[dict], tools: Optional[list], ask: bool) -> bool:
        try:
            return bool(self.render(messages, tools, ask))
        except UserError:
            return False

    def _hide(self, value):
        """`value` with what looks like a special token, in any text within, under a name that is none."""
        if isinstance(value, str):
            return self.special.sub(lambda found: self.hidden % self.places[found.group()], value)
        if isinstance(value, dict):
            return {key: self._hide(inner) for key, inner in value.items()}
        return [self._hide(inner) for inner in value] if isinstance(value, list) else value


@lru_cache(maxsize=4)
def chat_of(tokenizer) -> Chat:
    """The one `Chat` of a tokenizer in this process."""
    return Chat(tokenizer)
