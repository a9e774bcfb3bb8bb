"""The chat template of a tokenizer: conversations as token ids, and which of them are the assistant's.

A chat template is a Jinja program that comes with the model. It writes all messages as one text, and does not say which
part came from which message (https://huggingface.co/docs/transformers/chat_templating). So an answer is what its turn
adds to the text: the conversation is rendered up to the question, with the generation prompt, and up to the answer.

Only the template may write control tokens such as `<|im_end|>`: text that is pasted into a message could end a turn
with one. The rendered text does not show where a token came from. So the messages are searched before: rows that
contain a control token are dropped, and questions are refused.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from copy import deepcopy
from functools import cached_property, lru_cache
from itertools import takewhile
from os.path import commonprefix
from typing import List, NamedTuple, Optional, Sequence, Tuple

from common.support.compat import load_chat_template_file, require_package
from common.support.exit import UserError, short_message
from common.tokenization import Encoded

SYSTEM_ROLES = ("system", "developer")  # their messages begin a conversation, and stay when it is truncated
QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


class Conversation(NamedTuple):
    """What a template function returns for a row of messages, instead of an Example."""

    messages: list  # dicts with "role" and "content", or ShareGPT's "from" and "value"
    tools: Optional[list] = None  # that the assistant may call, as JSON schemas
    system: str = ""  # the system message, if `messages` have none


class Rendered(NamedTuple):
    """Messages that end with an answer, as the template writes them, and where the answers are."""

    messages: List[dict]
    text: str
    answers: List[Tuple[int, int]]  # start and stop in the text of each answer with its end token


class ChatTemplate:
    """A tokenizer with its chat template. UserError if it has none."""

    def __init__(self, tokenizer):
        from tokenizers import processors

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
        # A copy, because these settings differ from those that other functions need.
        self.backend = deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False  # control tokens become their ids
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)  # a token starts at its space
        added = self.backend.get_added_tokens_decoder()
        self.end_ids = set(added)  # not only the special ones: some models end a turn with another added token
        control_tokens = [token.content for token in added.values() if token.special and token.content]
        self.control_tokens = [_as_json(content)[1:-1] for content in control_tokens]  # without the quotes

    def find_control_token(self, messages: List[dict], tools: Optional[list] = None) -> Optional[str]:
        """A control token that is part of a text in `messages` or `tools`, keys included. None if there is none."""
        texts = _as_json([messages, tools])
        return next((token for token in self.control_tokens if token in texts), None)

    def render(self, messages: List[dict], tools: Optional[list] = None, add_generation_prompt: bool = False) -> str:
        """The text of `messages`; with the generation prompt, an answer starts at its end. UserError if the template
        refuses the messages."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template can raise anything
            advice = "Fix that row."
            if messages and messages[0]["role"] in SYSTEM_ROLES:
                advice = "If it takes no system message, put that text before the first user message's."
            raise UserError(f"the {self.name} refuses it: {short_message(error)}. {advice}") from None

    @cached_property
    def takes_objects(self) -> bool:
        """Whether the arguments of tool calls may be objects. Some templates join them to their text."""
        call = {"type": "function", "id": "a" * 9, "function": {"name": "f", "arguments": {"a": "b"}}}
        try:
            text = self.render([QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except UserError:
            return False
        return "{'a': 'b'}" not in text

    def render_last_answer(self, messages: List[dict], tools: Optional[list] = None) -> Rendered:
        """A conversation that ends with an answer, and where that is."""
        text, before = self.render(messages, tools), messages[:-1]
        question = self.render(before, tools, True) if before else self._before_first_answer(text)
        # Not all of the question, if its generation prompt begins a thought (`<think>`) that this answer lacks.
        start = len(commonprefix([question, text]))
        stop = len(text.rstrip())  # the white space that templates write after the end token is not learned
        if stop <= start:
            raise UserError(f"the {self.name} leaves out message {len(messages)}. Fix that row.")
        return Rendered(messages, text, [(start, stop)])

    def render_answers(self, messages: List[dict], tools: Optional[list] = None) -> List[Rendered]:
        """The conversation up to its last answer with content, with all answers; [] if there is none. If the template
        rewrites earlier turns (it drops their thinking, or moves the system text): one for each answer with content."""
        numbers = [number for number, message in enumerate(messages, 1) if is_learned(message)]
        while numbers and not has_content(messages[numbers[-1] - 1]):
            numbers.pop()
        if not numbers:
            return []
        parts = [self.render_last_answer(messages[:number], tools) for number in numbers]
        text = parts[-1].text
        if not all(text.startswith(part.text) for part in parts):
            return [part for part in parts if has_content(part.messages[-1])]
        return [Rendered(parts[-1].messages, text, [span for part in parts for span in part.answers])]

    def encode(self, text: str, answers: Sequence[Tuple[int, int]] = ()) -> Tuple[List[int], bytearray]:
        """The ids of a rendered text, those that apply_chat_template gives, and for each id 1 if it is of an answer."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        # Only where tokens start: before tokenizers 0.20.1, the tokens of Llama 3's whole words end where they start.
        starts = [start for start, _ in encoding.offsets] + [len(text)]
        mask = bytearray(len(encoding.ids))
        for start, stop in answers:
            first, last = bisect_left(starts, start), bisect_left(starts, stop)
            if text[start : starts[first]].strip():
                first -= 1  # this token has the last characters of the template's text and the first of the answer
            mask[first:last] = b"\1" * (last - first)
        return encoding.ids, mask

    def end_of_turn(self) -> int:
        """The id of the token with which the template ends an answer. UserError if there is none."""
        rendered = self.render_last_answer([QUESTION, ANSWER])
        ids, mask = self.encode(rendered.text, rendered.answers)
        end = ids[mask.rindex(b"\1")]
        if end not in self.end_ids:
            raise UserError(f"The {self.no_end}")
        return end

    def _before_first_answer(self, text: str) -> str:
        """The text before an answer that is the first message: few templates can render a conversation without any."""
        asked = self.render([QUESTION], add_generation_prompt=True)
        generation_prompt = asked[len(commonprefix([asked, self.render([QUESTION])])) :]
        return text.partition(generation_prompt)[0] + generation_prompt if generation_prompt else ""


@lru_cache(maxsize=4)
def get_chat_template(tokenizer) -> ChatTemplate:
    """The ChatTemplate of a tokenizer: one per tokenizer, because it copies it."""
    return ChatTemplate(tokenizer)


def _as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def is_learned(message: dict) -> bool:
    """Whether a message is an answer; in OpenAI's format, one with `"weight": 0` is only read."""
    return message["role"] == "assistant" and message.get("weight") != 0


def has_content(message: dict) -> bool:
    """Whether a message has any text, or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def encode_conversation(
    chat: ChatTemplate, messages: List[dict], tools: Optional[list], block_size: int
) -> List[Encoded]:
    """The conversation as token ids, those of tokenizer.apply_chat_template, with all its answers in the loss.

    One entry; one per answer if the template rewrites earlier turns; none if no assistant message has content. What
    follows the last such message is left out: nothing is learned from it. A conversation of more than `block_size`
    tokens loses its oldest exchanges, then the end of its longest question, then the end of its newest answer. The
    messages must contain no control token. UserError if the template refuses them or ends no answer with a token, or
    if no token of an answer fits into the block.
    """
    return [_encode_within(chat, part, tools, block_size) for part in chat.render_answers(messages, tools)]


def encode_question(chat: ChatTemplate, messages: List[dict], tools: Optional[list], limit: int) -> List[int]:
    """The ids of a conversation up to where its next answer starts, truncated to `limit` as in training. UserError if
    the template refuses it, or if it contains a control token."""
    control_token = chat.find_control_token(messages, tools)
    if control_token:
        raise UserError(
            f"the text contains the control token {control_token}, which only the chat template may write. Remove it "
            "from the text."
        )
    ids, _ = chat.encode(chat.render(messages, tools, True))
    if len(ids) > limit:
        ids, _ = chat.encode(chat.render(_truncate(chat, messages, tools, limit), tools, True))
    return ids


def _encode_within(chat: ChatTemplate, part: Rendered, tools: Optional[list], block_size: int) -> Encoded:
    ids, mask = chat.encode(part.text, part.answers)
    prompt_truncated = len(ids) > block_size
    answer_truncated = False
    if prompt_truncated:
        messages = _truncate(chat, part.messages, tools, block_size)
        if len(part.answers) == 1:
            part = chat.render_last_answer(messages, tools)
        else:
            part = chat.render_answers(messages, tools)[-1]
        ids, mask = chat.encode(part.text, part.answers)
    end = mask.rindex(b"\1")
    if ids[end] not in chat.end_ids:
        raise UserError(f"in this conversation the {chat.no_end}")
    if len(ids) > block_size:  # only the newest answer is left to be truncated; its end token stays
        start = mask.rfind(b"\0", 0, end) + 1
        kept = block_size - (len(ids) - end)
        if kept <= start:
            raise UserError(
                f"--block-size {block_size} leaves no room for an answer: the text of the chat template and the system "
                f"message take {start} tokens before it. Use a larger --block-size, or shorten that message."
            )
        answer_truncated = True
        ids, mask = ids[:kept] + ids[end:], mask[:kept] + mask[end:]
    return Encoded(ids, mask, prompt_truncated, answer_truncated)


def _truncate(chat: ChatTemplate, messages: List[dict], tools: Optional[list], limit: int) -> List[dict]:
    """The system messages and as many of the newest exchanges as fit into `limit` tokens. If not even one does: that
    one, with the texts of user and tools truncated, the longest first."""
    is_question = messages[-1]["role"] != "assistant"

    def excess(messages: List[dict]) -> int:
        return len(chat.encode(chat.render(messages, tools, is_question))[0]) - limit

    head = list(takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    rest = messages[len(head) :]
    exchanges = [0]  # where each starts
    for place in range(1, len(rest)):
        if rest[place]["role"] == "user" and rest[place - 1]["role"] != "user":
            exchanges.append(place)
    kept = head + rest[exchanges.pop() :]
    while exchanges and excess(head + rest[exchanges[-1] :]) <= 0:
        kept = head + rest[exchanges.pop() :]
    kept = [dict(message) for message in kept]
    texts = [message for message in kept if message["role"] in ("user", "tool")]
    too_many = excess(kept)
    while too_many > 0 and any(message["content"] for message in texts):
        longest = max(texts, key=lambda message: len(message["content"]))
        text = longest["content"]
        offsets = chat.backend.encode(text, add_special_tokens=False).offsets
        cut = offsets[-too_many][0] if too_many < len(offsets) else 0
        longest["content"] = text[: min(cut, len(text) - 1)]  # always shorter, or this would not end
        too_many = excess(kept)
    return kept
