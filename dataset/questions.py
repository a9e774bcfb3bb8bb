"""What a model is asked, one question or each row of a file of prompts, and the file of answers.

A row of a file of prompts has the columns of the training data without the answer, or messages. Or it has a `prompt`,
which is asked as --prompt is, and in a chat a `system` text, if it likes.

    questions.jsonl   {"instruction": "..."}                                    the user's
    answers.jsonl     {"instruction": "...", "answer": "...", "ended": true}    a line for each answered row
    answers.run.json  how they were made: only with the same model, prompts and options are the others answered

The answers of a batch are saved as soon as it is done, in the order of the questions. The same command continues an
interrupted file.
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
from dataset.messages import read_messages, read_tools
from dataset.sources import Row, read_rows
from dataset.templates import MESSAGE_COLUMNS, chat

ANSWER_COLUMNS = ("answer", "ended")  # the text, and whether it ended with a stop token
SAME_OPTIONS = ("max_new_tokens", "temperature", "seed", "bits", "system")  # others change no answer


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
    rows = read_rows(path)
    if not rows:
        raise UserError(f"--prompt-file {path} is empty. Give a file with at least one row.")
    for row in rows:
        for name in ANSWER_COLUMNS:
            if name in row:
                raise UserError(f"{row.place} already has {name!r}, the name for its answer. Rename it.")
    asked = [make(row, question, template) for row in rows]
    answers = AnswersFile(args, rows, hashlib.sha256(path.read_bytes()).hexdigest())
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

    There is a line for each answered row, in the order of the rows: a file with n complete lines is continued with row
    n. UserError if the file at `args.save_path` is something else, or was made with another model, other prompts or
    other options.
    """

    def __init__(self, args, rows: List[dict], sha256: str):
        self.path = Path(args.save_path)
        self.run_path = self.path.with_suffix(".run.json")
        self.rows = rows
        self.answered = 0
        self.ended = 0  # answers that ended with a stop token
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
            self._count_lines()

    def missing(self) -> List[int]:
        """The rows that have no answer yet."""
        return list(range(self.answered, len(self.rows)))

    def begin(self, facts: dict) -> None:
        """Write down how the answers are made: `facts`, and what must be the same when others are added."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_path) as new:
            new.write_text(json.dumps({**facts, **self.facts}, indent=2, ensure_ascii=False), encoding="utf-8")

    def add(self, answers: Iterable[Tuple[str, bool]]) -> None:
        """Append the answers to the next rows, (text, whether it ended). After an error all lines are complete."""
        lines = []
        for row, (answer, ended) in zip(self.rows[self.answered :], answers):
            lines.append(json.dumps({**row, "answer": answer, "ended": ended}, ensure_ascii=False) + "\n")
            self.ended += ended
        content = "".join(lines).encode("utf-8", "backslashreplace")  # JSON's own form of a lone surrogate
        try:
            with open(self.path, "ab") as file:
                file.write(content)
            fsync(self.path)
        except BaseException:  # a full disk, Ctrl-C
            self._drop_half_line()
            raise
        self.answered += len(lines)

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
        reasons = []
        if before.get("model") != self.facts["model"]:
            reasons.append(f"--model-name-or-path {new['model_name_or_path']} has different weights")
        if before.get("sha256") != self.facts["sha256"]:
            reasons.append(f"--prompt-file {new['prompt_file']} has different content")
        for name in SAME_OPTIONS:
            nothing_is_sampled = name == "seed" and not new["temperature"]
            if old.get(name) != new.get(name) and not nothing_is_sampled:
                reasons.append(f"--{name.replace('_', '-')} was {old.get(name)} and is {new.get(name)}")
        if reasons:
            raise UserError(
                f"{self.path} has answers made with other options: {'; '.join(reasons)}. Use the same options to "
                "answer the other rows, or choose another --save-path."
            )

    def _drop_half_line(self) -> None:
        """Remove what stands behind the last line break: the writing was interrupted there."""
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def _count_lines(self) -> None:
        """Count the lines, each of which must be the answer to its row."""
        self._drop_half_line()
        for line in self.path.read_bytes().splitlines():
            try:
                fields = json.loads(line)
                del fields["answer"]
                ended = fields.pop("ended")
                is_right = fields == self.rows[self.answered]
            except (ValueError, TypeError, AttributeError, KeyError, IndexError):
                is_right = False
            if not is_right:
                raise UserError(
                    f"{self.path}, line {self.answered + 1} is not the answer to that row of "
                    f"{self.facts['options']['prompt_file']}. Delete this line and those below it, or choose another "
                    "--save-path."
                )
            self.answered += 1
            self.ended += bool(ended)
