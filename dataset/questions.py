"""What a model is asked: one question, or each row of a file of prompts, checked before anything is loaded.

A row of a file of prompts is a row as the training had it, less the answer: the columns of its template, or messages.
Or it has a `prompt`, which is asked as --prompt is; of a chat with a `system` text, if it likes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

from common.answers import ADDED, Answers
from common.chat_template import SYSTEM_ROLES as SYSTEM
from common.chat_template import Conversation, encode_question, has_content
from common.columns import applied, place_of
from common.support.exit import UserError
from common.support.model_dir import positions_and_embeddings
from common.text import cell, listed
from common.tokenization import encode_prompt, max_prompt_tokens
from dataset.files import FileRows, Row
from dataset.json_files import json_lines
from dataset.messages import read_messages, read_tools
from dataset.templates import MESSAGE_COLUMNS as COLUMNS
from dataset.templates import chat

AS_WRITTEN = json.JSONDecoder(parse_constant=lambda _: None)  # of fields that are handed on: numbers stay numbers


class Questions(NamedTuple):
    """Rows as they are asked: Examples of a template, or Conversations that lack their last answer."""

    asked: list
    places: List[str]  # where each stands, for a message
    answers: Optional[Answers] = None  # of a file of prompts

    def encode(self, tokenizer, args, chat=None) -> Dict[int, List[int]]:
        """{row: token ids} of those without an answer; `chat`: the `Chat` of the tokenizer, that writes conversations.

        A single question is cut where the model has no room for it, as in the training; of a file it is a UserError.
        """
        room, prompts = max_prompt_tokens(positions_and_embeddings(args.model_name_or_path)[0], args.max_new_tokens), {}
        limit = sys.maxsize if self.answers else room
        for row in self.answers.missing() if self.answers else [0]:
            asked = self.asked[row]
            try:
                ids = encode_question(chat, *asked, limit) if chat else encode_prompt(tokenizer, asked, limit)
            except UserError as error:
                raise UserError(f"{self.places[row]}: {error}") from None
            if self.answers and len(ids) > room:
                raise UserError(
                    f"{self.places[row]}: its prompt takes {len(ids)} tokens, and the model has room for {room} beside "
                    f"--max-new-tokens {args.max_new_tokens}. Shorten it, or take fewer new tokens."
                )
            prompts[row] = ids
        return prompts


def load_questions(args, template: Callable, question: dict) -> Questions:
    """`question`, a row without its answer, as `template` asks it; with `args.save_path` those of `args.prompt_file`.

    `question`'s first column is the one whose place a row's `prompt` takes; those that are empty may be left out in a
    file. UserError for a row that can't be asked, and for answers that don't go on. Ends the script, with a line, where
    all rows are answered.
    """
    ask = _conversation if template is chat else _example
    if not args.save_path:
        return Questions([ask(question, question, template)], ["the question"])
    path, save_path = Path(args.prompt_file), Path(args.save_path)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"--prompt-file {path}: with --save-path it is a file of JSON lines, named .jsonl.")
    if not path.is_file():
        raise UserError(f"--prompt-file {path} {'is no file' if path.exists() else 'does not exist'}: give another.")
    if path.resolve() == save_path.resolve():
        raise UserError(f"--save-path {save_path} is the file of prompts, which would be lost. Give another.")
    rows = list(FileRows(path))
    if not rows:
        raise UserError(f"--prompt-file {path} is empty: give a file with at least one row.")
    for row in rows:
        for name in {*ADDED}.intersection(row):
            raise UserError(f"{row.place} has {name!r} already, under which its answer is saved. Rename it.")
    asked = [ask(row, question, template) for row in rows]
    fields = [fields for _, fields in json_lines(path, AS_WRITTEN)]
    answers = Answers(args, fields, hashlib.sha256(path.read_bytes()).hexdigest())
    if not answers.missing():
        print(f"All {len(rows)} rows of {path} are answered in {save_path}.")
        sys.exit()
    return Questions(asked, [row.place for row in rows], answers)


def _example(row: dict, question: dict, template: Callable):
    missing, first = [name for name, value in question.items() if value and name not in row], next(iter(question))
    if not missing:
        asked = {**{name: "" for name in question}, **row}
    elif "prompt" in row:
        asked = {**question, **row, first: row["prompt"]}
    else:
        raise UserError(_lacks(row, missing))
    if not str(cell(asked[first])).strip():
        raise UserError(f"{place_of(row)} asks nothing: {first if first in row else 'prompt'} is empty. Mend it.")
    return applied(template, Row(asked, place_of(row)))


def _conversation(row: dict, question: dict, template: Callable) -> Conversation:
    name = next((name for name in (*COLUMNS, "instruction", "prompt") if name in row), None)
    if name is None:
        raise UserError(_lacks(row, COLUMNS[:1]))
    conversation = Conversation([{"role": "user", "content": row.get("prompt")}], row.get("tools"))
    if name != "prompt":
        conversation = applied(template, Row({**row, "output": ""}, place_of(row)))
    system = row.get("system") or question.get("system")
    try:
        messages = read_messages(conversation)[: -1 if name == "instruction" else None]
        if system and not (messages and messages[0]["role"] in SYSTEM):
            messages = read_messages(Conversation([{"role": "system", "content": system}])) + messages
        tools = read_tools(conversation)
    except UserError as error:
        raise UserError(f"{place_of(row)}: {error}") from None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{place_of(row)} asks nothing: its last message is not the user's. End it with the question.")
    if not has_content(messages[-1]):
        raise UserError(f"{place_of(row)} asks nothing: its last message is empty. Mend it.")
    return Conversation(messages, tools)


def _lacks(row: dict, names) -> str:
    names = listed(map(repr, names))
    return f"{place_of(row)} has no {names} and no 'prompt', it has: {listed(row)}. Name its question so."
