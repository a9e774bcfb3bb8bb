"""Conversations as token ids that fit into a block: what is too long loses its oldest exchanges, whole."""

from __future__ import annotations

from collections import Counter
from itertools import compress, takewhile
from typing import Callable, List, Optional, Sequence, Tuple

from common.chat import Chat, Turns
from common.columns import applied, place_of
from common.conversation import SYSTEM, Conversation, checked, says_something, tools_of
from common.support.exit import UserError

Encoded = Tuple[List[int], bytearray]  # token ids, and of each a byte: 1 where it carries a loss


def encode_conversations(
    rows: Sequence[dict], template: Callable[[dict], Conversation], chat: Chat, block_size: int
) -> Tuple[List[Encoded], Counter]:
    """(token ids, mask) of each conversation that has an answer; where the chat template writes earlier turns anew, of
    each of its answers; and counts of what was done.

    The ids are those of tokenizer.apply_chat_template, `block_size` at most; the mask is 1 on each answer and on the
    token that ends it. Counted are rows, conversations, tokens, dropped, prompts cut, answers cut. Raises UserError,
    with the row's place, for messages that are none, where the template refuses them or ends no answer of a row with a
    token, and where a block has no room for an answer.
    """
    counts, written = Counter(rows=0, conversations=0, dropped=0), []
    for row in rows:
        conversation = applied(template, row)
        try:
            messages, tools = checked(conversation), tools_of(conversation)
            turns = chat.turns(messages, tools) if messages else []
        except UserError as error:
            raise _at(row, error) from None
        kept = [one for one in turns if len(turns) == 1 or says_something(messages[one.messages - 1])]
        written += [(one, messages[: one.messages], tools, len(turns) > 1, row) for one in kept]
        counts["conversations"] += bool(messages)
        counts["dropped"] += len(turns) - len(kept) if messages else 1
    encoded = []
    for (ids, mask), (turns, messages, tools, alone, row) in zip(chat.encode([one[0] for one in written]), written):
        try:
            if len(ids) > block_size:
                ids, mask = _cut(chat, messages, tools, alone, block_size, counts)
            if not {*turns.ends}.intersection(compress(ids, mask)):
                raise UserError(f"in this conversation the {chat.no_end}")
        except UserError as error:
            raise _at(row, error) from None
        encoded.append((ids, mask))
    counts["rows"] = len(encoded)
    if encoded:
        counts["tokens"] = sum(len(ids) for ids, _ in encoded)
    return encoded, counts


def encode_question(chat: Chat, messages: List[dict], tools: Optional[list], limit: int) -> List[int]:
    """The ids of messages, the last of which is to be answered, up to where the answer begins; cut as in a training
    where they are more than `limit`."""

    def write(messages: List[dict]) -> Encoded:
        return chat.encode([Turns(chat.render(messages, tools, ask=True), [], [], 0)])[0]

    return _fit(chat, messages, limit, write)[0]


def _cut(chat: Chat, messages: List[dict], tools: Optional[list], alone: bool, limit: int, counts: Counter) -> Encoded:
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")

    def write(messages: List[dict]) -> Encoded:
        turns = chat.last_turn(messages, tools) if alone else chat.turns(messages, tools)[-1]
        return chat.encode([turns])[0]

    counts["prompts cut"] += 1
    ids, mask = _fit(chat, messages[: last + 1], limit, write)
    if len(ids) > limit:  # nothing is left to cut but the newest answer
        end = mask.rindex(b"\1")
        start = mask.rfind(b"\0", 0, end) + 1
        room = limit - start - (len(ids) - end)
        if room < 1:
            raise UserError(
                f"a block of {limit} tokens has no room for an answer: what stands before it, the template's own text "
                f"and the system message, takes {start}. Take a larger --block-size, or shorten that message."
            )
        counts["answers cut"] += 1
        ids, mask = ids[: start + room] + ids[end:], mask[: start + room] + mask[end:]
    return ids, mask


def _fit(chat: Chat, messages: List[dict], limit: int, write: Callable[[List[dict]], Encoded]) -> Encoded:
    """What `write` makes of `messages` without as many of their oldest exchanges as it takes to be within the limit;
    where even the newest alone is beyond it, with the texts of user and tools cut, the longest first."""
    written = write(messages)
    if len(written[0]) <= limit:
        return written
    head = list(takewhile(lambda message: message["role"] in SYSTEM, messages))
    rest = messages[len(head) :]
    roles = [message["role"] for message in rest]
    begins = [n for n, role in enumerate(roles) if not n or (role == "user" and roles[n - 1] != "user")]
    fewest, most = 1, len(begins) - 1  # exchanges to leave out
    while fewest < most:
        some = (fewest + most) // 2
        if len(write(head + rest[begins[some] :])[0]) <= limit:
            most = some
        else:
            fewest = some + 1
    rest = rest[begins[most] :]
    written = write(head + rest)
    while len(written[0]) > limit:
        texts = [message for message in rest if message["role"] in ("user", "tool") and message["content"]]
        if not texts:
            break
        longest = max(texts, key=lambda message: len(message["content"]))
        content = chat.shortened(longest["content"], len(written[0]) - limit)
        rest = [{**message, "content": content} if message is longest else message for message in rest]
        written = write(head + rest)
    return written


def _at(row: dict, error: UserError) -> UserError:
    return UserError(f"{place_of(row)}: {error}")
