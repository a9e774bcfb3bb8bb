"""The chat template of a tokenizer: conversations as token ids, and which of them are the assistant's.

A chat template is a Jinja program that comes with the model. It writes all messages as one text, and does not say which
part came from which message (https://huggingface.co/docs/transformers/chat_templating). So an answer is what its turn
adds to the text: the conversation is rendered up to the question, with the generation prompt, and up to the answer.
Some templates ask in another form than they write an answered question in: with a `<think>` that the answer lacks, or
with a system text that only the newest question has. Then the row is what the model is asked with, and the answer.

Only the template may write control tokens such as `<|im_end|>`: text that is pasted into a message could end a turn
with one. The rendered text does not show where a token came from. So the messages are searched before: rows that
contain a control token are dropped, and questions are refused.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from copy import deepcopy
from functools import cached_property, lru_cache
from itertools import takewhile
from os.path import commonprefix
from typing import List, NamedTuple, Optional, Sequence, Tuple

from common.support.compat import load_chat_template_file, require_package
from common.support.exit import UserError, short_message
from common.tokenization import Encoded, last_ids, require_length

SYSTEM_ROLES = ("system", "developer")  # their messages begin a conversation, and stay when it is truncated
QUESTION = {"role": "user", "content": "a"}
ANSWERS = [{"role": "assistant", "content": letter} for letter in "ab"]  # what both have in common is no answer's
TAG = re.compile(r"\s*([<\[][\w|]+[>\]])")  # with which a thought begins: `<think>`, `[THINK]`


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
    remarks: List[str]  # what the template does with an answer that the reader should know, for each


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
        special = [token for token in added.values() if token.special and token.content]
        control_tokens = [token.content for token in special]
        # Some are looked for in the normalized text: with small letters only, for example.
        self.normalizer = self.backend.normalizer if any(token.normalized for token in special) else None
        if self.normalizer:
            control_tokens += [self.normalizer.normalize_str(token.content) for token in special if token.normalized]
        self.control_tokens = [_as_json(content)[1:-1] for content in control_tokens]  # without the quotes

    def find_control_token(self, messages: List[dict], tools: Optional[list] = None) -> Optional[str]:
        """A control token that is part of a text in `messages` or `tools`, keys included. None if there is none.
        UserError for texts that are too long."""
        texts = _as_json([messages, tools])
        require_length(texts, "the conversation")
        if self.normalizer:
            texts += self.normalizer.normalize_str(texts)
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
        """A conversation that ends with an answer, and where that is: all before it is as the model is asked."""
        text, before = self.render(messages, tools), messages[:-1]
        asked = self.render(before, tools, True) if before else commonprefix([text, self._header([], tools)])
        remarks = []
        if not text.startswith(asked):
            remarks = ["asks in another form than it writes (trained as it asks)"]
            text = asked + self._answer_alone(text, before, tools)
        stop = len(text.rstrip())  # the white space that templates write after the end token is not learned
        if stop <= len(asked):
            raise UserError(f"the {self.name} leaves out message {len(messages)}. Fix that row.")
        turn = text[max(0, len(asked) - len(self._frame[0])) : stop]
        remarks += [f"leaves out {name}" for name in _missing(messages[-1], turn)]
        context = {"the system message": [one["content"] for one in before if one["role"] in SYSTEM_ROLES]}
        context["the tools"] = _function_names(tools or [])
        remarks += [f"leaves out {name}" for name, texts in context.items() if not _are_in(asked, texts)]
        return Rendered(messages, text, [(len(asked), stop)], remarks)

    def _header(self, before: List[dict], tools: Optional[list]) -> str:
        """What the template writes before the text of any answer to `before`."""
        return commonprefix([self.render([*before, answer], tools) for answer in ANSWERS])

    def _answer_alone(self, text: str, before: List[dict], tools: Optional[list]) -> str:
        """What follows in `text`, which ends with an answer to `before`, on what the model is asked with."""
        header, begin = self._header(before, tools), self._frame[1]
        # A call of a tool may have another header than a text.
        differs = len(header) - len(commonprefix([header, text]))
        if differs > len(begin):
            raise UserError(
                f"the {self.name} writes message {len(before) + 1} in another form than it asks in, so the model would "
                "be asked as it was never trained. Fix that row."
            )
        return begin[: len(begin) - differs] + text[len(header) - differs :]

    @cached_property
    def _frame(self) -> Tuple[str, str]:
        """Of a plain question and answer: the generation prompt, and what the answer's turn has behind it (gpt-oss:
        `<|channel|>final<|message|>`)."""
        question, asked = self.render([QUESTION]), self.render([QUESTION], add_generation_prompt=True)
        header = self._header([QUESTION], None)
        return asked[len(commonprefix([asked, question])) :], header[len(commonprefix([header, asked])) :]

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
        spans = [span for part in parts for span in part.answers]
        return [Rendered(parts[-1].messages, text, spans, [remark for part in parts for remark in part.remarks])]

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
        rendered = self.render_last_answer([QUESTION, ANSWERS[0]])
        ids, mask = self.encode(rendered.text, rendered.answers)
        end = ids[mask.rindex(b"\1")]
        if end not in self.end_ids:
            following, _ = self.encode(self.render([QUESTION, ANSWERS[0], QUESTION])[len(rendered.text) :])
            if following and following[0] in self.end_ids:
                token = self.backend.id_to_token(following[0])
                raise UserError(
                    f"The {self.name} ends no answer with a token of its own: {token} of the next turn does, which "
                    "these scripts do not support. Use a model whose template ends each answer."
                )
            raise UserError(f"The {self.no_end}")
        return end


@lru_cache(maxsize=4)
def get_chat_template(tokenizer) -> ChatTemplate:
    """The ChatTemplate of a tokenizer: one per tokenizer, because it copies it."""
    return ChatTemplate(tokenizer)


def _missing(answer: dict, turn: str) -> List[str]:
    """The parts of an answer that are not in its turn as the template writes it: keys, or `<think>` and the like."""
    parts = {key: [value] for key, value in answer.items() if isinstance(value, str) and key != "role"}
    parts["tool_calls"] = _function_names(answer.get("tool_calls") or [])
    missing = [key for key, texts in parts.items() if not _are_in(turn, texts)]
    tag = TAG.match(answer["content"])
    return [tag.group(1) if tag and key == "content" else key for key in missing]


def _function_names(entries: list) -> List[str]:
    """The names in tool calls, or in the schemas of tools: OpenAI's form, or the function alone."""
    functions = [entry.get("function", entry) for entry in entries if isinstance(entry, dict)]
    return [str(function.get("name", "")) for function in functions if isinstance(function, dict)]


def _are_in(written: str, texts: List[str]) -> bool:
    """Whether all `texts` are part of what was written, white space apart, which templates may change."""
    written = "".join(written.split()) if texts else ""
    return all("".join(text.split()) in written for text in texts)


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
    if not chat.end_ids.issuperset(last_ids(ids, mask)):
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
    return Encoded(ids, mask, prompt_truncated, answer_truncated, len(part.answers), part.remarks)


def _truncate(chat: ChatTemplate, messages: List[dict], tools: Optional[list], limit: int) -> List[dict]:
    """The system messages and as many of the newest exchanges as fit into `limit` tokens. If not even one does: that
    one, with the texts of user and tools truncated, the longest first."""
    is_question = messages[-1]["role"] != "assistant"

    def excess(messages: List[dict]) -> int:
        text = chat.render(messages, tools, True) if is_question else chat.render_last_answer(messages, tools).text
        return len(chat.encode(text)[0]) - limit

    head = list(takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    rest = messages[len(head) :]
    exchanges = [0]  # where each starts
    for place in range(1, len(rest)):
        if rest[place]["role"] == "user" and rest[place - 1]["role"] != "user":
            exchanges.append(place)
    oldest, newest = 0, len(exchanges) - 1
    while oldest < newest:  # a binary search: fewer exchanges are never longer
        middle = (oldest + newest) // 2
        if excess(head + rest[exchanges[middle] :]) <= 0:
            newest = middle
        else:
            oldest = middle + 1
    kept = [dict(message) for message in head + rest[exchanges[newest] :]]
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
