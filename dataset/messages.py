"""The messages of a row: OpenAI's role and content, or ShareGPT's from and value, checked and in one form."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import List, Optional

from common.chat_template import SYSTEM_ROLES, ChatTemplate, Conversation
from common.support.exit import UserError
from dataset.columns import clean_cell, join_names, to_text

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")


def read_messages(conversation: Conversation) -> List[dict]:
    """The messages, each {"role": one of ROLES, "content": text, ...}; the first is the system message, if any.

    UserError, without the row's place, for a message that is not valid: a mistyped role must not silently remove its
    text from the training data.
    """
    messages = clean_cell(conversation.messages) or []
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        # the library datasets stores a Sequence of objects as an object of lists
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if not isinstance(messages, list):
        raise UserError(f"its messages are {_kind(messages)}, not a list. Save the data as JSON lines.")
    messages = [_read_message(f"message {number}", message) for number, message in enumerate(messages, 1)]
    if conversation.system and not any(message["role"] in SYSTEM_ROLES for message in messages):
        system = {"role": "system", "content": conversation.system}
        messages.insert(0, _read_message("the system message", system))
    return messages


def read_tools(conversation: Conversation) -> Optional[list]:
    """The row's tools, None if it has none. UserError, without the row's place, if they are not a list."""
    tools = _plain(_parsed(clean_cell(conversation.tools))) or None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"its tools are {_kind(tools)}, not a list of JSON schemas. Save the data as JSON lines.")
    return tools


def read_history(history) -> List[list]:
    """The earlier turns, each [question, answer]. UserError, without the row's place, if they are anything else."""
    turns = _parsed(history) or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise UserError("its history is not a list of [question, answer]. Fix it.")
    return turns


def parse_arguments(messages: List[dict], chat_template: ChatTemplate) -> None:
    """Make objects of the arguments of tool calls that are JSON text, as OpenAI's interface gives them, if the chat
    template takes objects. UserError, without the row's place, if they are no JSON object."""
    for number, message in enumerate(messages, 1):
        calls = message.get("tool_calls") if chat_template.takes_objects else None
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, dict) else call
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = _plain(_parsed(function["arguments"].strip() or "{}"))
                if not isinstance(function["arguments"], dict):
                    raise UserError(f"the arguments of a call in message {number} are not a JSON object. Fix them.")


def _read_message(name: str, message) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{name} is {_kind(message)}, not an object with role and content. Fix it.")
    role_key, content_key = "role", "content"
    if "from" in message and "role" not in message:
        role_key, content_key = "from", "value"
    calls_tool = bool(message.get("tool_calls"))  # such a message needs no content
    if role_key not in message or (content_key not in message and not calls_tool):
        missing = content_key if role_key in message else role_key
        raise UserError(f"{name} has no {missing!r}, it has: {join_names(message)}. Rename its key.")
    role, content = message[role_key], message.get(content_key)
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    if role not in ROLES:
        known = f"{', '.join(ROLES)}, and ShareGPT's {' and '.join(SHAREGPT_ROLES)}"
        raise UserError(f"{name} has the role {str(role)[:40]!r}. Rename it to one of: {known}; or leave it out.")
    try:
        text = to_text(content)
    except TypeError:
        kind = "a list of parts" if isinstance(content, list) else _kind(content)
        raise UserError(f"the {content_key} of {name} is {kind}. Make it one string: only text is supported.") from None
    others = _plain({key: value for key, value in message.items() if key not in (role_key, content_key)})
    if calls_tool:
        others["tool_calls"] = _plain(_parsed(message["tool_calls"]))
    return {"role": role, "content": text, **others}


def _parsed(value):
    """What JSON text says; any other value unchanged."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _plain(value):
    """`value` without None at any depth of its objects, and with plain numbers.

    Tables give every object all keys, None where it has none; templates only ask whether a key is there.
    """
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, float) else value  # a JsonNumber's text is for cells


def _kind(value) -> str:
    kinds = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
