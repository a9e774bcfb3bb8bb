"""What a model is asked, one question or each row of a file of prompts, and the file of answers.

A row of a file of prompts has the columns of the training data without the answer, or messages. Or it has a `prompt`,
which is asked as --prompt is, and in a chat a `system` text, if it likes.

    questions.jsonl   {"instruction": "..."}                                    the user's
    answers.jsonl     {"instruction": "...", "answer": "...", "ended": true}    a line for each answered row
    answers.run.json  how they were made: only with the same model, prompts and options are the others answered

The answers of a batch are saved as soon as it is done, the longest prompts first. At the end, and when the work is
interrupted, they are put into the order of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from common.chat_template import SYSTEM_ROLES, ChatTemplate, Conversation, encode_question, has_content
from common.support.exit import UserError
from common.support.files import atomic_write, fsync, require_writable, weights_fingerprint
from common.support.model_dir import ModelSource, positions_and_embeddings
from common.tokenization import Example, encode_prompt, max_prompt_tokens
from dataset.columns import apply_template, clean_cell, join_names, row_location
from dataset.files import FileRows, Row
from dataset.json_files import json_lines
from dataset.messages import read_messages, read_tools
from dataset.templates import MESSAGE_COLUMNS, chat

ANSWER_COLUMNS = ("answer", "ended")  # the text, and whether it ended with a stop token
SAME_OPTIONS = ("max_new_tokens", "temperature", "seed", "bits", "system")  # others change no answer
AS_WRITTEN = json.JSONDecoder(parse_constant=lambda _: None)  # reads a row as it is to be written again


class Questions(NamedTuple):
    """Rows as they are asked: Examples of a template, or Conversations without their last answer."""

    asked: list
    locations: List[str]  # "questions.jsonl, line 2"
    answers: Optional[AnswersFile] = None  # of a file of prompts

    def encode(self, tokenizer, args, chat_template: Optional[ChatTemplate] = None) -> Dict[int, List[int]]:
        """{row: token ids} of the rows that have no answer yet. Conversations need the tokenizer's `chat_template`.

        A single question that is too long for the model is truncated as in training; in a file it is a UserError.
        """
        positions, _ = positions_and_embeddings(args.model_name_or_path)
        room = max_prompt_tokens(positions, args.max_new_tokens)
        limit = sys.maxsize if self.answers else room
        prompts = {}
        for row in self.answers.missing() if self.answers else [0]:
            try:
                if chat_template:
                    ids = encode_question(chat_template, *self.asked[row], limit)
                else:
                    ids = encode_prompt(tokenizer, self.asked[row], limit)
            except UserError as error:
                raise UserError(f"{self.locations[row]}: {error}") from None
            if len(ids) > room and self.answers:
                raise UserError(
                    f"{self.locations[row]}: its prompt takes {len(ids)} tokens, and with --max-new-tokens "
                    f"{args.max_new_tokens} the model has room for {room}. Shorten it, or use fewer new tokens."
                )
            prompts[row] = ids
        return prompts


def load_questions(args, template: Callable, question: dict) -> Questions:
    """`question`, a row without its answer; or with `args.save_path` the rows of `args.prompt_file`.

    In a file, a row's `prompt` stands for the first column of `question`, and columns that are empty in `question` may
    be left out. UserError for a row that cannot be asked, and for answers that cannot be continued. Ends the script if
    all rows are answered.
    """
    make = _conversation if template is chat else _example
    if not args.save_path:
        return Questions([make(question, question, template)], ["the question"])
    path, save_path = Path(args.prompt_file), Path(args.save_path)
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"--prompt-file {path}: with --save-path it must be a file of JSON lines, named .jsonl.")
    if not path.is_file():
        raise UserError(f"--prompt-file {path} {'is not a file' if path.exists() else 'does not exist'}. Give another.")
    if path.resolve() == save_path.resolve():
        raise UserError(f"--save-path {save_path} is the file of prompts, which would be lost. Give another.")
    rows = list(FileRows(path))
    if not rows:
        raise UserError(f"--prompt-file {path} is empty. Give a file with at least one row.")
    for row in rows:
        for name in ANSWER_COLUMNS:
            if name in row:
                raise UserError(f"{row.place} already has {name!r}, the name for its answer. Rename it.")
    asked = [make(row, question, template) for row in rows]
    fields = [fields for _, fields in json_lines(path, AS_WRITTEN)]
    answers = AnswersFile(args, fields, hashlib.sha256(path.read_bytes()).hexdigest())
    if not answers.missing():
        print(f"All {len(rows)} rows of {path} are answered in {save_path}.")
        sys.exit()
    return Questions(asked, [row.place for row in rows], answers)


def _example(row: dict, question: dict, template: Callable) -> Example:
    first = next(iter(question))
    missing = [name for name, value in question.items() if value and name not in row]
    if not missing:
        asked = {**dict.fromkeys(question, ""), **row}
    elif "prompt" in row:
        asked = {**question, **row, first: row["prompt"]}
    else:
        raise _missing(row, missing)
    if not str(clean_cell(asked[first])).strip():
        raise UserError(f"{row_location(row)}: {first if first in row else 'prompt'} is empty. Add the question.")
    return apply_template(template, Row(asked, row_location(row)))


def _conversation(row: dict, question: dict, template: Callable) -> Conversation:
    location = row_location(row)
    column = next((name for name in (*MESSAGE_COLUMNS, "instruction", "prompt") if name in row), None)
    if column is None:
        raise _missing(row, MESSAGE_COLUMNS[:1])
    if column == "prompt":
        conversation = Conversation([{"role": "user", "content": row["prompt"]}], row.get("tools"))
    else:
        conversation = apply_template(template, Row({**row, "output": ""}, location))
    system = row.get("system") or question.get("system")
    try:
        messages, tools = read_messages(conversation), read_tools(conversation)
        if column == "instruction":
            messages.pop()  # the answer, which is empty
        if system and not (messages and messages[0]["role"] in SYSTEM_ROLES):
            messages = read_messages(Conversation([{"role": "system", "content": system}])) + messages
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{location}: the last message must be from the user. Add the question.")
    if not has_content(messages[-1]):
        raise UserError(f"{location}: the last message is empty. Add the question.")
    return Conversation(messages, tools)


def _missing(row: dict, columns: Iterable[str]) -> UserError:
    names = join_names(map(repr, columns))
    return UserError(
        f"{row_location(row)} has no {names} and no 'prompt', it has: {join_names(row)}. Rename the question's column."
    )


class AnswersFile:
    """The answers to `rows`, the fields of each row of a file of prompts whose content has the digest `sha256`.

    done: {row: (answer, whether it ended with a stop token)}, at first what the file at `args.save_path` has. UserError
    if that is not such a file, or was made with another model, other prompts or other options.
    """

    def __init__(self, args, rows: List[dict], sha256: str):
        self.path = Path(args.save_path)
        self.run_path = self.path.with_suffix(".run.json")
        self.rows = rows
        self.done: Dict[int, Tuple[str, bool]] = {}
        # of an adapter and its base model; a model of the hub has no files here, only its name
        directories = dict.fromkeys([args.model_name_or_path, ModelSource(args.model_name_or_path).base])
        model = [weights_fingerprint(directory) or directory for directory in directories]
        self.facts = {"options": vars(args), "model": model, "sha256": sha256}
        for path in (self.path, self.run_path):
            if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
                raise UserError(f"{path} is a directory or is not writable. Choose another --save-path.")
        require_writable(self.path.parent, "--save-path")
        if self.path.exists():
            self._require_same_run()
            self._read()

    def missing(self) -> List[int]:
        """The rows that have no answer yet."""
        return [row for row in range(len(self.rows)) if row not in self.done]

    def begin(self, facts: dict) -> None:
        """Write down how the answers are made: `facts`, and what must be the same when others are added."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.done:
            self._sort()
        else:
            self.path.unlink(missing_ok=True)  # it has half a line at most
        with atomic_write(self.run_path) as new:
            new.write_text(json.dumps({**facts, **self.facts}, indent=2, ensure_ascii=False), encoding="utf-8")

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *_) -> None:
        if self.done:
            self._sort()

    def add(self, answers: Dict[int, Tuple[str, bool]]) -> None:
        """Append the answers to some rows: all of them or, after an error, none."""
        self.done.update(answers)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(self._lines(answers))
            fsync(self.path)
        except BaseException:  # a full disk, Ctrl-C
            os.truncate(self.path, size)
            raise

    def _sort(self) -> None:
        with atomic_write(self.path) as new:
            new.write_bytes(self._lines(sorted(self.done)))

    def _lines(self, rows: Iterable[int]) -> bytes:
        lines = []
        for row in rows:
            answer, ended = self.done[row]
            lines.append(json.dumps({**self.rows[row], "answer": answer, "ended": ended}, ensure_ascii=False) + "\n")
        return "".join(lines).encode("utf-8", "backslashreplace")  # JSON's own form of a lone surrogate

    def _require_same_run(self) -> None:
        try:
            before = json.loads(self.run_path.read_bytes())
            old = before["options"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path} exists, but there is no {self.run_path} that says how it was made. Choose another "
                "--save-path."
            ) from None
        new = self.facts["options"]
        changed = [name for name in SAME_OPTIONS if old.get(name) != new.get(name)]
        if "seed" in changed and not new["temperature"]:
            changed.remove("seed")  # nothing is sampled
        reasons = [f"--{name.replace('_', '-')} was {old.get(name)} and is {new.get(name)}" for name in changed]
        for fact, option, reason in (
            ("sha256", "prompt_file", "which has different content"),
            ("model", "model_name_or_path", "which has different weights"),
        ):
            if before.get(fact) != self.facts[fact]:
                name = option.replace("_", "-")
                reasons.insert(0, f"--{name} was {old.get(option)} and is {new[option]}, {reason}")
        if reasons:
            raise UserError(
                f"{self.path} has answers made with other options: {'; '.join(reasons)}. Use the same options to "
                "answer the other rows, or choose another --save-path."
            )

    def _read(self) -> None:
        """Find the row of each line by the fields that the two have in common."""
        rows: Dict[str, List[int]] = {}
        for row in reversed(range(len(self.rows))):
            rows.setdefault(_key(self.rows[row]), []).append(row)  # equal rows are taken from the end, in order
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # the machine went off while it was written
                break
            try:
                fields = json.loads(line)
                answer = fields.pop("answer"), fields.pop("ended")
                self.done[rows[_key(fields)].pop()] = answer
            except (ValueError, TypeError, AttributeError, KeyError, IndexError):
                raise UserError(
                    f"{self.path}, line {number} is not an answer to a row of {self.facts['options']['prompt_file']}. "
                    "Delete that line, and its row is answered again; or choose another --save-path."
                ) from None


def _key(fields: dict) -> str:
    return json.dumps(fields, sort_keys=True)
