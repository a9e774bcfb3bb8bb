"""What a model is asked, one question or each row of a file of prompts; and the file of the answers.

A row of a file of prompts has the columns of the training data, with or without the answer, and is read as in the
training. Or it has a `prompt`, which is asked as --prompt is. --columns names columns that are called otherwise.

    questions.jsonl   {"instruction": "..."}                                    yours; .json, .csv and .parquet too
    answers.jsonl     {"instruction": "...", "answer": "...", "ended": true}    a line for each answered row
    answers.run.json  how they were made

Some batches (model/generate.py) of answers are saved at a time, in the order of the questions. The same command resumes
an interrupted run, if model, prompts and options are still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from argparse import Namespace
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Tuple

from common.chat_template import ChatTemplate, Conversation, encode_question, get_chat_template, has_content
from common.dataset_file import held_out_prompts, load_dataset
from common.support.exit import UserError
from common.support.files import Lock, atomic_write, require_writable, weights_fingerprint
from common.support.model_dir import ModelSource, positions_and_embeddings, read_json
from common.tokenization import Example, encode_prompt, max_prompt_tokens
from dataset.columns import (
    apply_template,
    clean_cell,
    join_names,
    question_row,
    rename_columns,
    require_asked,
    to_text,
)
from dataset.messages import parse_arguments, read_messages, read_tools
from dataset.sources import Row, read_rows
from dataset.templates import MESSAGE_COLUMNS, chat, template_of

# No other option changes an answer.
SAME_OPTIONS = ("max_new_tokens", "temperature", "seed", "bits", "system")


class Questions(NamedTuple):
    """Rows as they are asked: Examples of a template, or Conversations without their last answer."""

    asked: list
    places: List[str]  # "questions.jsonl, line 2"
    answers: Optional[AnswersFile] = None  # of a file of prompts

    def encode(self, tokenizer, args, chat_template: Optional[ChatTemplate] = None) -> List[List[int]]:
        """The token ids of the rows that have no answer yet. Conversations need the tokenizer's `chat_template`.

        A single question that is too long for the model is truncated as in training; in a file it is a UserError.
        """
        positions, _ = positions_and_embeddings(args.model_name_or_path)
        room = max_prompt_tokens(positions, args.max_new_tokens)
        limit = sys.maxsize if self.answers else room
        first = self.answers.answered if self.answers else 0
        prompts = []
        for asked, place in zip(self.asked[first:], self.places[first:]):
            try:
                if chat_template:
                    parse_arguments(asked.messages, chat_template)
                    ids = encode_question(chat_template, asked.messages, asked.tools, limit)
                else:
                    ids = encode_prompt(tokenizer, asked, limit)
                if len(ids) > room:
                    raise UserError(
                        f"its prompt takes {len(ids)} tokens, and with --max-new-tokens {args.max_new_tokens} the "
                        f"model has room for {room}. Shorten it, or use fewer new tokens."
                    )
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
            prompts.append(ids)
        return prompts


def load_questions(args, template: Callable, question: dict) -> Questions:
    """`question`, a row without its answer; or with `args.save_path` the rows of `args.prompt_file`.

    In a file, a row's `prompt` stands for the first column of `question` (in a chat for `instruction`), and the other
    columns that a row lacks are those of `question`. UserError for a row that cannot be asked, and for answers that
    cannot be resumed. Ends the script if all rows are answered.
    """
    ask = _conversation if template is chat else _example
    if not args.save_path:
        return Questions([ask(Row(question, "the question"), question, template)], ["the question"])
    rows = read_rows(Path(args.prompt_file))
    if not rows:
        raise UserError(f"--prompt-file {args.prompt_file} is empty. Give a file with at least one row.")
    require_asked(template, rows[0], {name: own for name, own in args.columns.items() if name != "prompt"})
    asked = [ask(rename_columns(row, args.columns), question, template) for row in rows]
    for name in ("answer", "ended"):
        if any(name in row for row in rows):
            raise UserError(f"{args.prompt_file} already has a column {name!r}, the name for its answers. Rename it.")
    answers = AnswersFile(args, rows)
    if answers.answered >= len(rows):
        print(f"All {len(rows)} rows of {args.prompt_file} are answered in {answers.path}.")
        sys.exit()
    return Questions(asked, [row.place for row in rows], answers)


def _find_column(row: Row, *names: str) -> str:
    """The first of these columns that holds something, or else that the row has."""
    present = [name for name in names if name in row]
    if not present:
        raise UserError(
            f"{row.place} has none of the columns {join_names(names)}; it has: {join_names(row)}. Name the question's: "
            "--columns prompt=COLUMN"
        )
    return next((name for name in present if row[name]), present[0])


def _example(row: Row, question: dict, template: Callable) -> Example:
    first = next(iter(question))
    column = _find_column(row, first, "prompt")
    if not str(clean_cell(row[column])).strip():
        raise UserError(f"{row.place}: {column} is empty. Add the question.")
    return apply_template(template, Row({**question, **row, first: row[column]}, row.place))


def _conversation(row: Row, question: dict, template: Callable) -> Conversation:
    column = _find_column(row, *MESSAGE_COLUMNS, "instruction", "prompt")
    row = Row({**row, "system": row.get("system") or question.get("system"), "output": ""}, row.place)
    if column == "prompt":
        row["instruction"] = row["prompt"]
    made = apply_template(template, row)
    try:
        messages, tools = read_messages(made), read_tools(made)
        if column not in MESSAGE_COLUMNS:
            messages.pop()  # the empty answer
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise UserError("the last message must be from the user. Add the question.")
        if not has_content(messages[-1]):
            raise UserError("the last message is empty. Add the question.")
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from None
    return Conversation(messages, tools)


class Asker:
    """Asks a trained model as the inference script of its tutorial does. UserError if its template is not known.

    `ends`: the ids of the tokens at which answers end, apart from those of tokenizer and model.
    """

    def __init__(self, model_dir: str, tokenizer):
        self.model_dir = model_dir
        self.tokenizer = tokenizer
        self.template = template_of(model_dir)
        self.chat_template = get_chat_template(tokenizer) if self.template is chat else None
        self.ends = [self.chat_template.end_of_turn()] if self.chat_template else []

    def encode(self, messages: List[dict], max_new_tokens: int) -> List[int]:
        """The token ids of the prompt: of all messages in a chat, else of the last one, which is the question."""
        messages = [{**message, "content": to_text(message["content"])} for message in messages]
        if not has_content(messages[-1]):
            raise UserError("The question is empty.")
        if self.chat_template:
            positions, _ = positions_and_embeddings(self.model_dir)
            return encode_question(self.chat_template, messages, None, max_prompt_tokens(positions, max_new_tokens))
        args = Namespace(model_name_or_path=self.model_dir, max_new_tokens=max_new_tokens, save_path=None)
        question = question_row(self.template, messages[-1]["content"])
        [ids] = load_questions(args, self.template, question).encode(self.tokenizer, args)
        return ids

    def examples(self, path: str, max_new_tokens: int, rows: int = 64) -> Tuple[bool, List[Tuple[str, str]]]:
        """Whether the held-out rows of a dataset file are new to the model; and (question, the data's answer) of those
        of the first ones that one text asks. What is wrong with the file is printed, and then there are none.

        Left out are those that need more than one text: a chat with earlier turns, in most templates an `input`.
        """

        def encode(text: str) -> List[int]:
            return self.encode([{"role": "user", "content": text}], max_new_tokens)

        try:
            dataset = load_dataset(path, self.tokenizer)
            held_out = held_out_prompts(dataset, path, self.tokenizer, rows)
        except UserError as error:
            print(f"No examples: {error}")
            return False, []
        one, other = (self.tokenizer.decode(encode(letter)) for letter in "ab")
        before = commonprefix([one, other])
        after = one[len(before) + 1 :]
        examples = []
        for ids, answer in held_out:
            prompt = self.tokenizer.decode(ids)
            text = prompt[len(before) : len(prompt) - len(after)]
            with suppress(UserError):  # of more turns: there are control tokens between them
                if encode(text) == ids:
                    examples.append((text, answer))
        return ModelSource(self.model_dir).has_not_seen(dataset["meta"]), examples


class AnswersFile:
    """The answers to `rows`, a line for each answered row, in their order: n complete lines are the first n answers.

    UserError if the file at `args.save_path` was not made with the same model, prompts and options.
    """

    def __init__(self, args, rows: List[Row]):
        self.path = Path(args.save_path)
        self.run_path = self.path.with_suffix(".run.json")
        self.rows = rows
        self.answered = 0
        model = ModelSource(args.model_name_or_path)
        directories = dict.fromkeys([model.path, model.base])  # An adapter's answers depend on its base model too.
        self.made_with = {
            # A model of the hub has no files here, only its name.
            "model": [weights_fingerprint(directory) or directory for directory in directories],
            "prompts": hashlib.sha256(Path(args.prompt_file).read_bytes()).hexdigest(),
            "columns": args.columns or None,
            **{name: vars(args).get(name) for name in SAME_OPTIONS},
        }
        require_writable(self.path.parent, "--save-path")
        Lock(self.path.parent, self.path.name, "writing answers", "--save-path")
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        before = read_json(self.run_path).get("made_with", {})
        if not before:
            raise UserError(
                f"{self.path} exists, but there is no {self.run_path} that says how it was made. Choose another "
                "--save-path."
            )
        changed = [name for name, value in self.made_with.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{self.path} has answers made with another value of: {', '.join(changed)}. Use the same to answer the "
                "other rows, or choose another --save-path."
            )
        content = self.path.read_bytes()
        os.truncate(self.path, content.rfind(b"\n") + 1)  # A run that was killed may have left half a line.
        self.answered = content.count(b"\n")

    def begin(self, facts: dict) -> None:
        """Save how the answers are made: `facts`, and what must be the same when the run is resumed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_path) as new:
            new.write_text(json.dumps({**facts, "made_with": self.made_with}, indent=2, ensure_ascii=False), "utf-8")

    def add(self, answers: List[Tuple[str, bool]]) -> None:
        """Append the answers to the next rows: the text, and whether it ended with a stop token."""
        # backslashreplace writes half of an emoji (a lone surrogate) in JSON's own form.
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for row, (answer, ended) in zip(self.rows[self.answered :], answers):
                line = {**row, "answer": answer, "ended": ended}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self.answered += len(answers)

    def count_ended(self) -> int:
        """The number of answers that ended with a stop token."""
        return sum(json.loads(line)["ended"] for line in self.path.read_bytes().splitlines())
