"""A row that is a conversation: its messages, checked, as the chat template of a tokenizer takes them."""

from __future__ import annotations

from typing import List, NamedTuple, Optional

from common.support.exit import UserError
from common.text import cell, listed, text_of

COLUMNS = ("messages", "conversations")  # the usual name of the column, and ShareGPT's
SHAREGPT = {"human": "user", "gpt": "assistant"}
ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ROLES[:2]  # stand before a conversation, and stay where it is cut


class Conversation(NamedTuple):
    """What a template gives in place of an Example: the chat template of the model's tokenizer makes text of it."""

    messages: list  # of {"role", "content"}, or ShareGPT's {"from", "value"}
    tools: Optional[list] = None  # that the assistant may call, as JSON schemas


def chat(row: dict) -> Conversation:
    """`messages`, ShareGPT's `conversations`, or instruction, input and output as a question and its answer."""
    name = next((name for name in COLUMNS if name in row), None)
    if name or "instruction" not in row:
        return Conversation(row[name or COLUMNS[0]], row.get("tools"))
    question = [text_of(row["instruction"]), text_of(row.get("input", ""))]
    answer = {"role": "assistant", "content": row["output"]}
    return Conversation([{"role": "user", "content": "\n\n".join(filter(str.strip, question))}, answer])


def checked(conversation: Conversation) -> List[dict]:
    """Its messages, as messages_of gives them; [] where no assistant's says anything."""
    done = messages_of(conversation)
    return done if any(message["role"] == "assistant" and says_something(message) for message in done) else []


def messages_of(conversation: Conversation) -> List[dict]:
    """The messages, {"role", "content": text, ...} each.

    UserError, to be said after the row's place, for a message that is none: in a file of conversations a mistyped role
    would take its text out of the training in silence.
    """
    messages = cell(conversation.messages)
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        messages = [dict(zip(messages, one)) for one in zip(*messages.values())]  # datasets' Sequence of objects
    if not isinstance(messages or [], list):
        raise UserError(f"its messages are {_kind(messages)}, not a list. Save the data as JSON lines.")
    return [_message(f"message {number}", message) for number, message in enumerate(messages or [], 1)]


def says_something(message: dict) -> bool:
    """Whether a message has any text, or calls a tool."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def tools_of(conversation: Conversation) -> Optional[list]:
    """The row's tools, None where it has none. UserError, to be said after the row's place, where they are no list."""
    tools = cell(conversation.tools) or None
    if not isinstance(tools or [], list):
        raise UserError(f"its tools are {_kind(tools)}, not a list of JSON schemas. Save the data as JSON lines.")
    return tools


def _message(name: str, message) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{name} is {_kind(message)}, not an object with role and content. Mend it.")
    form = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    for key in form:
        # who calls a tool need not say anything
        if key not in message and not (key == form[1] and message.get("tool_calls")):
            raise UserError(f"{name} has no {key!r}, it has: {listed(message)}. Name it so.")
    role, content = message[form[0]], message.get(form[1])
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        known = f"{', '.join(ROLES[:-1])} and {ROLES[-1]}, and ShareGPT's {' and '.join(SHAREGPT)}"
        raise UserError(f"{name} has the role {str(role)[:40]!r}. There are {known}: rename it, or leave it out.")
    try:
        text = text_of(content)
    except TypeError:
        what = "a list of parts" if isinstance(content, list) else _kind(content)
        raise UserError(f"the {form[1]} of {name} is {what}. Make it one string: only text is learned here.") from None
    # a table gives every message every key; and templates ask whether a key is there, not what it is
    others = {key: value for key, value in message.items() if key not in form and value is not None}
    return {"role": role, "content": text, **others}


def _kind(value) -> str:
    kinds = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
