"""From rows to the dataset file: by however many processes, cut by whatever way, the ids are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import psutil
import pytest

from common.cutting import fit
from common.preparation import Encoder, encoded_chunks
from common.words import encodings
from dataset.templates import alpaca, instruction, summarization
from tests.conftest import start
from tests.helpers import KINDS, PREPARE, SAMPLE, contents, rows_of, tells


def plain_fit(tokenizer, pieces, limit):
    """The rule, one prompt at a time: cut the last cuttable piece where its excess tokens begin, tokenize again."""
    pieces = list(pieces)
    while True:
        (encoding,) = encodings(tokenizer, ["".join(pieces)], True)
        ids = encoding.ids[:-1] if encoding.ids[-1:] == [tokenizer.eos_token_id] else encoding.ids
        place = max((place for place in range(1, len(pieces), 2) if pieces[place]), default=None)
        if len(ids) <= limit or place is None:
            return ids
        start = sum(map(len, pieces[:place]))
        stop, excess = start + len(pieces[place]), len(ids) - limit
        begins = [begin - start for begin, _ in encoding.offsets if start <= begin < stop]
        cut = begins[-excess] if excess < len(begins) else 0
        pieces[place] = pieces[place][: min(cut, len(pieces[place]) - 1)]


ODD = [
    "  ",
    "\n\n",
    "...",
    "😀",
    "\t",
    "한국어" * 3,
    "a" * 80,
    "1234567",
    "</s>",
    "x\0y",
    " \u00a0 ",
    "—",
    "naïve",
    "٣٤",
]


def texts(seed, count):
    """Text of all lengths: words, words among odd ones, and no spaces at all."""
    rng = random.Random(seed)
    words = [word for row in rows_of("train") for word in row["article"].split(" ")]
    for _ in range(count):
        some = rng.choices(words, k=max(1, int(rng.lognormvariate(0, 0.8) * 400)))
        kind = rng.choice(["words", "words", "odd", "no spaces"])
        if kind == "odd":
            some = [rng.choice(ODD) if rng.random() < 0.2 else word for word in some]
        yield ("" if kind == "no spaces" else " ").join(some)


@pytest.mark.parametrize("block", [64, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_prompts_have_the_ids_of_one_at_a_time(kind, block, tokenizers):
    some = list(texts(seed=block, count=60))
    prompts = [
        template({"article": one, "instruction": one, "input": other, "highlights": "", "output": ""}).prompt
        for template in (summarization, alpaca, instruction)
        for one, other in zip(some[:30], some[30:])
    ]
    limits = [block - 1 - number % 40 for number in range(len(prompts))]
    fitted = fit(tokenizers[kind], prompts, limits)
    for prompt, limit, (ids, _) in zip(prompts, limits, fitted):
        assert ids == plain_fit(tokenizers[kind], prompt, limit)


def test_the_file_is_the_same_from_any_number_of_processes(tokenizers, monkeypatch):
    rows = [{"instruction": text, "output": text[:300]} for text in texts(seed=1, count=1300)]
    made = []
    for processes in (1, 2, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=processes: set(range(count)), raising=False)
        chunks = encoded_chunks("train", rows, Encoder(instruction, tokenizers["llama3"], 256, {}))
        made.append([chunk[1:] for chunk in chunks])
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_processes_encode_leaves_nothing_and_no_process(number, ready):
    with open(ready / "many.jsonl", "w", encoding="utf-8") as file:
        some = [json.dumps({"article": text, "highlights": "short"}) + "\n" for text in texts(seed=2, count=100)]
        file.writelines(some * 200)
    before = contents(ready)
    process = start(PREPARE, "--dataset-name-or-path", "many.jsonl", "--save-path", "new.pt", cwd=ready)
    deadline = time.time() + 60
    while not (children := psutil.Process(process.pid).children()) and time.time() < deadline:
        time.sleep(0.05)
    assert children
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number) or process.returncode == 130
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Interrupted"), err
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert contents(ready) == before


def test_an_error_in_a_process_is_one_line(ready, warm):
    rows = [{"article": "a", "highlights": "b"}] * 3000 + [{"article": "a"}]
    (ready / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = warm(PREPARE, "--dataset-name-or-path", "many.jsonl", "--save-path", "new.pt", cwd=ready, ok=None)
    tells(done, "highlights")
    assert not (ready / "new.pt").exists()


def test_columns_of_other_names(ready, warm):
    rows = [{"글": row["article"], "요약": row["highlights"]} for row in rows_of("train")]
    (ready / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (ready / "theirs.jsonl").write_text("\n".join(map(json.dumps, rows_of("train"))))
    words = ["--columns", "article=글", "highlights=요약"]
    warm(PREPARE, "--dataset-name-or-path", "mine.jsonl", "--save-path", "a.pt", *words, cwd=ready)
    warm(PREPARE, "--dataset-name-or-path", "theirs.jsonl", "--save-path", "b.pt", cwd=ready)
    import torch

    one, other = (torch.load(ready / name) for name in ("a.pt", "b.pt"))
    assert one["meta"]["sha256"] == other["meta"]["sha256"]
    done = warm(PREPARE, "--dataset-name-or-path", "mine.jsonl", "--columns", "article=text", cwd=ready, ok=None)
    tells(done, "--columns article=text", "'text'", "글, 요약")
    for wrong in ("article", "article=", "=글"):
        tells(warm(PREPARE, "--columns", wrong, cwd=ready, ok=None), f"--columns {wrong}", "NAME=COLUMN")


def test_rows_are_shown_as_the_model_will_see_them(ready, warm):
    words = ["--dataset-name-or-path", SAMPLE, "--show", "2", "--save-path", "new.pt"]
    said = warm(PREPARE, *words, cwd=ready).stdout
    assert said.count("--- row ") == 2 and "in brackets" in said
    for row in rows_of("train")[:2]:
        assert f"[{row['highlights'].splitlines()[0][:40]}" in said
    assert "<|begin_of_text|>[SUMMARIZE]" in said and "<|end_of_text|>]" in said
    assert (ready / "new.pt").is_file()
