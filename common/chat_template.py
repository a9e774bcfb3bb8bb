"""The chat template of a tokenizer: conversations as token ids, and which of them are the assistant's.

A chat template is a Jinja program that comes with the model. It writes all messages as one text, and does not say which
part came from which message (https://huggingface.co/docs/transformers/chat_templating). So an answer is what its turn
adds to the text: the conversation is rendered up to the question, with the generation prompt, and up to the answer.

Only the template may write control tokens such as `<|im_end|>`. The same characters in a message stay text, or a user
who pastes them could end a turn. For that, both swap names: in the messages, markers replace what looks like a control
token; in the rendered text, control tokens become markers, and the markers that were there become the text again. A
copy of the tokenizer knows the markers as its control tokens, and the real ones as text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from copy import deepcopy
from functools import lru_cache, partial
from itertools import takewhile
from os.path import commonprefix
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from common.support.compat import load_chat_template_file, require_package
from common.support.exit import UserError, short_message
from common.tokenization import Encoded

SYSTEM_ROLES = ("system", "developer")  # their messages begin a conversation, and stay when it is truncated
QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
MARKER = "@~{}~@"  # with a token id; punctuation and digits, which templates do not change
MARKERS = re.compile(MARKER.format(r"\d+"))


class Conversation(NamedTuple):
    """What a template function returns for a row of messages, instead of an Example."""

    messages: list  # dicts with "role" and "content", or ShareGPT's "from" and "value"
    tools: Optional[list] = None  # that the assistant may call, as JSON schemas


class Rendered(NamedTuple):
    """Messages as the template writes them, and where the answers are."""

    messages: List[dict]
    text: str  # with markers instead of control tokens
    answers: List[Tuple[int, int]]  # start and stop in the text of each answer with its end token
    end_ids: List[int]  # the tokens that end answers


class ChatTemplate:
    """A tokenizer with its chat template. UserError if it has none."""

    def __init__(self, tokenizer):
        from tokenizers import AddedToken, processors

        require_package("jinja2", (3, 1), "a chat template")
        load_chat_template_file(tokenizer)
        self.tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name_or_path}"
        self.no_end = (
            f"{self.name} ends no answer with a token that its tokenizer knows, so the model could not learn to stop. "
            "Use the template and the tokenizer of the same chat model."
        )
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, which conversations need: it is a "
                "base model. Use the Instruct or Chat model of its family with --model-name-or-path, or data with "
                "columns for question and answer."
            )
        self.raw_tokenizer = deepcopy(tokenizer.backend_tokenizer)
        self.raw_tokenizer.no_truncation()
        self.raw_tokenizer.no_padding()
        self.raw_tokenizer.encode_special_tokens = True  # as text
        self.raw_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # a token starts at its space
        self.swapped: Dict[str, str] = {}  # {control token: marker} and {marker: control token}
        self.original_ids: Dict[str, int] = {}  # {marker: id of its control token}
        self.end_ids: Dict[str, int] = {}  # {marker or text: id} of the tokens that may end an answer
        markers = []
        for token_id, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items():
            if token.special and token.content:
                marker = MARKER.format(token_id)
                self.swapped.update({token.content: marker, marker: token.content})
                self.original_ids[marker] = self.end_ids[marker] = token_id
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                markers.append(AddedToken(marker, normalized=False, **flags))
            elif token.content.strip() and token.content in str(tokenizer.chat_template):
                self.end_ids[token.content] = token_id  # some models end a turn with a token that is not special
        self.raw_tokenizer.add_tokens(markers)  # all at once: each call builds the tokenizer's automaton again
        longest_first = sorted(map(re.escape, self.swapped), key=len, reverse=True)
        self.names = re.compile("|".join(longest_first))

    def render(self, messages: List[dict], tools: Optional[list] = None, add_generation_prompt: bool = False) -> str:
        """The text of `messages`, with markers instead of control tokens; with the generation prompt, an answer starts
        at its end. UserError if the template refuses the messages."""
        messages, tools = self._hide(messages), self._hide(tools)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can raise anything
            advice = "Fix that row."
            if messages and messages[0]["role"] in SYSTEM_ROLES:
                advice = "If it takes no system message, put that text before the first user message's."
            raise UserError(f"the {self.name} refuses it: {short_message(error)}. {advice}") from None
        return self.names.sub(lambda found: self.swapped[found.group()], text)

    def render_last_answer(self, messages: List[dict], tools: Optional[list] = None) -> Rendered:
        """A conversation that ends with an answer, and where that is."""
        text, before = self.render(messages, tools), messages[:-1]
        question = self.render(before, tools, True) if before else self._before_first_answer(text)
        start = len(commonprefix([question, text]))
        if start < len(question):
            # The generation prompt is more than this answer starts with (`<think>`). They may share some characters.
            content = text.rfind(messages[-1]["content"].strip())
            if 0 <= content < start:
                start = content
        stop = len(text.rstrip())  # the white space that templates write after the end token is not learned
        if stop <= start:
            raise UserError(f"the {self.name} leaves out message {len(messages)}. Fix that row.")
        end_ids = [token_id for name, token_id in self.end_ids.items() if text.endswith(name, start, stop)]
        return Rendered(messages, text, [(start, stop)], end_ids)

    def render_answers(self, messages: List[dict], tools: Optional[list] = None) -> List[Rendered]:
        """The conversation with all its answers. If the template rewrites earlier turns (it drops their thinking, or
        moves the system text): for each answer with content, the conversation up to it, with that answer alone."""
        parts = []
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant":
                parts.append(self.render_last_answer(messages[:number], tools))
        text = self.render(messages, tools)
        if not all(text.startswith(part.text) for part in parts):
            return [part for part in parts if has_content(part.messages[-1])]
        answers = [span for part in parts for span in part.answers]
        end_ids = [token_id for part in parts for token_id in part.end_ids]
        return [Rendered(messages, text, answers, end_ids)]

    def encode(self, text: str, answers: Sequence[Tuple[int, int]] = ()) -> Tuple[List[int], bytearray]:
        """The ids of a rendered text, those that apply_chat_template gives, and for each id 1 if it is of an answer."""
        encoding = self.raw_tokenizer.encode(text, add_special_tokens=False)
        # A marker takes white space with it where its control token does, hence strip.
        ids = [self.original_ids.get(token.strip(), own) for token, own in zip(encoding.tokens, encoding.ids)]
        # Only where tokens start: before tokenizers 0.20.1, the tokens of Llama 3's whole words end where they start.
        starts = [start for start, _ in encoding.offsets] + [len(text)]
        mask = bytearray(len(ids))
        for start, stop in answers:
            first, last = bisect_left(starts, start), bisect_left(starts, stop)
            if text[start : starts[first]].strip():
                first -= 1  # this token has the last characters of the template's text and the first of the answer
            mask[first:last] = b"\1" * (last - first)
        return ids, mask

    def end_of_turn(self) -> int:
        """The id of the token with which the template ends an answer. UserError if there is none."""
        end_ids = self.render_last_answer([QUESTION, ANSWER]).end_ids
        if not end_ids:
            raise UserError(f"The {self.no_end}")
        return end_ids[0]

    def truncate(self, text: str, excess: int) -> str:
        """The text of a message without its last `excess` tokens, and at least one character shorter."""
        offsets = self.raw_tokenizer.encode(text, add_special_tokens=False).offsets
        cut = offsets[-excess][0] if excess < len(offsets) else 0
        return text[: min(cut, len(text) - 1)]

    def _before_first_answer(self, text: str) -> str:
        """The text before an answer that is the first message: few templates can render a conversation without any."""
        asked = self.render([QUESTION], add_generation_prompt=True)
        generation_prompt = asked[len(commonprefix([asked, self.render([QUESTION])])) :]
        return text.partition(generation_prompt)[0] + generation_prompt if generation_prompt else ""

    def _hide(self, value):
        """`value` with markers for what looks like a control token, in any text in it."""
        if isinstance(value, dict):
            return {key: self._hide(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._hide(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if MARKERS.search(value):
            raise UserError(f"its text contains {MARKERS.search(value).group()}, which is reserved. Fix that row.")
        return self.names.sub(lambda found: self.swapped[found.group()], value)


@lru_cache(maxsize=4)
def get_chat_template(tokenizer) -> ChatTemplate:
    """The ChatTemplate of a tokenizer: one per tokenizer, because it copies it."""
    return ChatTemplate(tokenizer)


def has_content(message: dict) -> bool:
    """Whether a message has any text, or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def encode_conversation(
    chat: ChatTemplate, messages: List[dict], tools: Optional[list], block_size: int
) -> List[Encoded]:
    """The conversation as token ids, those of tokenizer.apply_chat_template, with all its answers in the loss.

    One entry; one per answer if the template rewrites earlier turns; none if no assistant message has content. A
    conversation of more than `block_size` tokens loses its oldest exchanges, then the end of its longest question, then
    the end of its newest answer. UserError if the template refuses it or ends no answer with a token, or if no token of
    an answer fits into the block.
    """
    if not any(message["role"] == "assistant" and has_content(message) for message in messages):
        return []
    return [_encode_within(chat, part, tools, block_size) for part in chat.render_answers(messages, tools)]


def encode_question(chat: ChatTemplate, messages: List[dict], tools: Optional[list], limit: int) -> List[int]:
    """The ids of a conversation up to where its next answer starts, truncated to `limit` as in training."""
    render = partial(chat.render, tools=tools, add_generation_prompt=True)
    ids, _ = chat.encode(render(messages))
    if len(ids) > limit:
        ids, _ = chat.encode(render(_truncate(chat, messages, limit, render)))
    return ids


def _encode_within(chat: ChatTemplate, part: Rendered, tools: Optional[list], block_size: int) -> Encoded:
    ids, mask = chat.encode(part.text, part.answers)
    truncated, answer_truncated = len(ids) > block_size, False
    if truncated:
        last = max(place for place, message in enumerate(part.messages) if message["role"] == "assistant")
        messages = _truncate(chat, part.messages[: last + 1], block_size, partial(chat.render, tools=tools))
        if len(part.answers) == 1:
            part = chat.render_last_answer(messages, tools)
        else:
            part = chat.render_answers(messages, tools)[-1]
        ids, mask = chat.encode(part.text, part.answers)
    if not part.end_ids:
        raise UserError(f"in this conversation the {chat.no_end}")
    if len(ids) > block_size:  # only the newest answer is left to be truncated; its end token stays
        end = mask.rindex(b"\1")
        start = mask.rfind(b"\0", 0, end) + 1
        kept = block_size - (len(ids) - end)
        if kept <= start:
            raise UserError(
                f"--block-size {block_size} leaves no room for an answer: the text of the chat template and the system "
                f"message take {start} tokens before it. Use a larger --block-size, or shorten that message."
            )
        answer_truncated = True
        ids, mask = ids[:kept] + ids[end:], mask[:kept] + mask[end:]
    return Encoded(ids, mask, truncated, answer_truncated)


def _truncate(chat: ChatTemplate, messages: List[dict], limit: int, render: Callable[[List[dict]], str]) -> List[dict]:
    """The system messages and as many of the newest exchanges as fit into `limit` tokens. If not even one does: that
    one, with the texts of user and tools truncated, the longest first."""

    def excess(messages: List[dict]) -> int:
        return len(chat.encode(render(messages))[0]) - limit

    head = list(takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    rest = messages[len(head) :]
    roles = [message["role"] for message in rest]
    exchanges = [0]  # where each starts
    for place in range(1, len(rest)):
        if roles[place] == "user" and roles[place - 1] != "user":
            exchanges.append(place)
    kept = head + rest[exchanges.pop() :]
    while exchanges and excess(head + rest[exchanges[-1] :]) <= 0:
        kept = head + rest[exchanges.pop() :]
    too_many = excess(kept)
    while too_many > 0:
        texts = [message for message in kept if message["role"] in ("user", "tool") and message["content"]]
        if not texts:
            break
        longest = max(texts, key=lambda message: len(message["content"]))
        shorter = {**longest, "content": chat.truncate(longest["content"], too_many)}
        kept = [shorter if message is longest else message for message in kept]
        too_many = excess(kept)
    return kept
