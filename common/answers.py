"""The file of answers to a file of prompts: it grows as rows are answered, and goes on where it was cut.

    questions.jsonl   {"instruction": "..."}                                    the reader's
    answers.jsonl     {"instruction": "...", "answer": "...", "ended": true}    a line each row that is answered
    answers.run.json  how they were made; a file of answers goes on only by the same model, prompts and options

A batch's answers are on the disk as soon as it is done, in the order in which rows are answered: the longest first.
When the work ends, by an interrupt too, they are put into the order of the prompts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Dict, List, Tuple

from common.support.exit import UserError
from common.support.files import atomic_write, fsync, require_writable, weights_fingerprint
from common.support.model_dir import ModelSource

ADDED = ("answer", "ended")  # beside a row's own fields: the text, and whether it came to its end by itself
# what makes other answers; --batch-rows is not among these
COMPARED = ("max_new_tokens", "temperature", "seed", "bits", "system")


class Answers:
    """Answers to `rows`, the fields of each row of a file of prompts, whose bytes have the digest `sha256`.

    What the file at `args.save_path` has is kept, in `done`: {row: (answer, whether it ended by itself)}. UserError
    where it has answers of another model, of other prompts or options, or is no file of answers.
    """

    def __init__(self, args, rows: List[dict], sha256: str):
        self.path, self.rows = Path(args.save_path), rows
        self.run = self.path.with_suffix(".run.json")
        self.done: Dict[int, Tuple[str, bool]] = {}
        base = ModelSource(args.model_name_or_path).base
        directories = dict.fromkeys([args.model_name_or_path, base])  # an adapter, its base
        model = [weights_fingerprint(directory) or directory for directory in directories]  # of a hub id its name
        self.facts = {"options": vars(args), "model": model, "sha256": sha256}
        for path in (self.path, self.run):
            if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
                raise UserError(f"{path} can't be written, or is a directory. Give another --save-path.")
        require_writable(self.path.parent, "--save-path")
        if self.path.exists():
            self._require_same()
            self._read()

    def missing(self) -> List[int]:
        """The rows that have no answer yet."""
        return [row for row in range(len(self.rows)) if row not in self.done]

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_) -> None:
        if self.done:
            self._put_in_order()

    def begin(self, facts: dict) -> None:
        """Write down how the answers are made: `facts`, and what has to be the same when they go on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.done:
            self._put_in_order()
        else:
            self.path.unlink(missing_ok=True)  # it has half a line at most
        with atomic_write(self.run) as new:
            new.write_text(json.dumps({**facts, **self.facts}, indent=2, ensure_ascii=False), encoding="utf-8")

    def add(self, answers: Dict[int, Tuple[str, bool]]) -> None:
        """Save the answers to some rows, all or none of them."""
        self.done.update(answers)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(self._lines(answers))
            fsync(self.path)
        except BaseException:  # of a full disk or an interrupt: no half line stays
            os.truncate(self.path, before)
            raise

    def _put_in_order(self) -> None:
        with atomic_write(self.path) as new:
            new.write_bytes(self._lines(sorted(self.done)))

    def _lines(self, rows) -> bytes:
        lines = [{**self.rows[row], **dict(zip(ADDED, self.done[row]))} for row in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return text.encode("utf-8", "backslashreplace")  # half an emoji, which JSON writes so

    def _require_same(self) -> None:
        try:
            before = json.loads(self.run.read_bytes())
            options = before["options"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path} is there already, and no {self.run} tells how it was made. Give another --save-path."
            ) from None
        now = self.facts["options"]
        differ = []
        if before.get("model") != self.facts["model"]:
            names = options.get("model_name_or_path"), now["model_name_or_path"]
            differ.append(f"--model-name-or-path was {names[0]} and is {names[1]}, whose weights are others")
        if before.get("sha256") != self.facts["sha256"]:
            names = options.get("prompt_file"), now["prompt_file"]
            differ.append(f"--prompt-file was {names[0]} and is {names[1]}, whose content is another")
        for name in COMPARED:
            was, is_now = options.get(name), now.get(name)
            if was != is_now and not (name == "seed" and not now["temperature"]):
                differ.append(f"--{name.replace('_', '-')} was {was} and is {is_now}")
        if differ:
            raise UserError(
                f"{self.path} has answers that were made otherwise: {'; '.join(differ)}. Give the same to go on, or "
                "another --save-path to begin anew."
            )

    def _read(self) -> None:
        """Find the row of each line, by the row's own fields."""
        rows: Dict[str, List[int]] = {}
        for row in reversed(range(len(self.rows))):
            rows.setdefault(_key(self.rows[row]), []).append(row)
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # cut while it was written, by a machine that went off
                break
            try:
                fields = json.loads(line)
                answer = tuple(fields.pop(name) for name in ADDED)
                self.done[rows[_key(fields)].pop()] = answer
            except (ValueError, TypeError, AttributeError, KeyError, IndexError):
                raise UserError(
                    f"{self.path}, line {number} is no answer to a row of {self.facts['options']['prompt_file']}. "
                    "Delete that line, and its row is answered anew, or give another --save-path."
                ) from None


def _key(fields: dict) -> str:
    return json.dumps(fields, sort_keys=True)
