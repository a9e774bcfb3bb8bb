"""The dataset file: plain tensors, whole or not at all, and refused where training on it would teach nonsense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from common.batches import Batches
from common.dataset_file import held_out_prompts, load_dataset
from common.support.exit import UserError
from common.tokenization import load_tokenizer
from dataset.prepare import ROWS_PER_CHUNK, RowEncoder, prepare_dataset, write_rows
from dataset.sources import HOLD_OUT_AT_MOST, load_splits
from dataset.standard_library import standard_library_splits
from dataset.templates import instruction, summarization
from model.tiny import write_tiny
from tests.helpers import PARTS

SAMPLES = Path(__file__).resolve().parents[1] / "dataset" / "samples"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_tiny("llama3", root / "llama3-8b")
    tokenizer = load_tokenizer(str(root / "llama3-8b"))
    args = Namespace(
        block_size=512,
        save_path=str(root / "dataset.pt"),
        model_name_or_path=str(root / "llama3-8b"),
        show=0,
        columns={},
    )
    splits, source = load_splits(str(SAMPLES / "cnn_dailymail"))
    prepare_dataset(splits, source, summarization, tokenizer, args)
    return tokenizer, root / "dataset.pt"


def test_layout_is_that_of_the_docstring(prepared):
    tokenizer, path = prepared
    document = torch.load(path, weights_only=True)
    assert set(document) == {"format", "version", "sha256", "meta", "train", "validation"}
    for name, rows in (("train", 64), ("validation", 16)):
        split = document[name]
        assert {part: (str(tensor.dtype), tensor.dim()) for part, tensor in split.items()} == PARTS
        assert len(split["lengths"]) == rows == len(split["offsets"]) - 1
        assert document["meta"]["counts"][name]["tokens"] == len(split["input_ids"]) == split["offsets"][-1]
        assert (Batches(split, 8, 4096).label_counts > 0).all()
        ends = split["input_ids"][split["offsets"][1:] - 1]
        assert (ends == tokenizer.eos_token_id).all()
    meta = document["meta"]
    assert meta["template"] == "summarization" and meta["block_size"] == 512 and meta["dataset"].endswith("dailymail")
    assert type(meta["torch"]) is str
    assert not list(path.parent.glob(".dataset*"))


def test_opens_by_a_bare_load_without_this_repository(prepared, tmp_path):  # fault 6
    _, path = prepared
    alone = tmp_path / "elsewhere" / "moved.pt"
    alone.parent.mkdir()
    shutil.copy(path, alone)
    program = (
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('common') is None and importlib.util.find_spec('dataset') is None\n"
        "dataset = torch.load('moved.pt')\n"
        "print(dataset['train']['input_ids'].sum().item(), len(dataset['validation']['lengths']))"
    )
    # -I: neither this repository nor any environment variable; HF_HOME does not exist, so no cache is there to point to
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=alone.parent,
        env={"HF_HOME": str(tmp_path / "deleted"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    expected = torch.load(path)["train"]["input_ids"].sum().item()
    assert done.stdout.split() == [str(expected), "16"], done.stderr


def test_same_rows_same_file(prepared, tmp_path):
    tokenizer, path = prepared
    args = Namespace(block_size=512, save_path=str(tmp_path / "dataset.pt"), model_name_or_path="x", show=0, columns={})
    prepare_dataset(*load_splits(str(SAMPLES / "cnn_dailymail")), summarization, tokenizer, args)
    first, second = torch.load(path), torch.load(args.save_path)
    assert first["meta"]["sha256"] == second["meta"]["sha256"]
    assert torch.equal(first["train"]["offsets"], second["train"]["offsets"])


def test_a_mistake_half_way_leaves_the_old_file_and_no_scratch(prepared, tmp_path):
    tokenizer, path = prepared
    target = tmp_path / "dataset.pt"
    shutil.copy(path, target)
    before = target.read_bytes()
    bad = tmp_path / "bad.jsonl"
    rows = [json.dumps({"instruction": "a", "output": "b"})] * 2500 + ["{broken"]
    bad.write_text("\n".join(rows), encoding="utf-8")
    args = Namespace(block_size=512, save_path=str(target), model_name_or_path="x", show=0, columns={})
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2501 is not valid JSON"):
        prepare_dataset(*load_splits(str(bad)), instruction, tokenizer, args)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.jsonl", "dataset.pt"]


def test_rows_are_read_a_chunk_at_a_time(prepared):
    """One chunk is in memory, and not the whole data set."""
    total = 3 * ROWS_PER_CHUNK
    read, written, ahead = 0, 0, 0

    def rows():
        nonlocal read
        for _ in range(total):
            read += 1
            yield {"instruction": "a", "output": "b"}

    def add(row, kind):
        nonlocal written, ahead
        ahead = max(ahead, read - written)
        written += 1

    write_rows("train", rows(), RowEncoder(instruction, prepared[0], 64, {}), Namespace(add=add))
    assert written == read == total and ahead <= ROWS_PER_CHUNK


def test_held_out_questions_are_the_first_held_out_rows(prepared):
    tokenizer, path = prepared
    dataset = load_dataset(str(path), tokenizer)
    questions = held_out_prompts(dataset, str(path), tokenizer, 3)
    assert len(questions) == 3 and len(held_out_prompts(dataset, str(path), tokenizer, 1000)) == 16
    rows = [json.loads(line) for line in open(SAMPLES / "cnn_dailymail" / "validation.jsonl", encoding="utf-8")]
    for (prompt, reference), row in zip(questions, rows):
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        assert text.startswith("[SUMMARIZE] " + row["article"][:200]) and text.endswith(" [/SUMMARIZE]\n")
        assert reference == row["highlights"].strip()
    empty = {name: tensor[: name == "offsets"] for name, tensor in dataset["validation"].items()}
    with pytest.raises(UserError, match="no held-out rows"):
        held_out_prompts({**dataset, "validation": empty}, str(path), tokenizer, 3)


def test_loading_checks_tokenizer_and_block(prepared, tmp_path):
    tokenizer, path = prepared
    assert load_dataset(str(path), tokenizer, 512)["meta"]["block_size"] == 512
    with pytest.raises(UserError, match="up to 512 tokens, more than --block-size 511"):
        load_dataset(str(path), tokenizer, 511)
    write_tiny("gpt", tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        load_dataset(str(path), load_tokenizer(str(tmp_path)), 512)


def test_rows_are_held_out_where_there_is_no_validation_split(tmp_path):
    for rows in (1, 19, 20, 6000):
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(rows)), encoding="utf-8")
        splits, _ = load_splits(str(file))
        train, held_out = ([row["n"] for row in splits[name]] for name in ("train", "validation"))
        assert sorted(train + held_out) == list(range(rows))
        assert len(held_out) == min(rows // 20, HOLD_OUT_AT_MOST)


@pytest.mark.slow
def test_standard_library_holds_out_modules_without_twins():
    splits = standard_library_splits()
    train, held_out = splits["train"], splits["validation"]
    assert len(train) > 4000 and 150 < len(held_out) < len(train) / 8
    for column in ("instruction", "output"):
        assert not {row[column] for row in train} & {row[column] for row in held_out}
    for row in train[:50] + held_out[:50]:
        assert "def " in row["output"] and '"""' + row["instruction"] not in row["output"]
        assert row["output"].startswith(row["input"]) and ("self" in row["input"] or "self" not in row["output"][:30])
        compile(row["output"].replace("await ", ""), "row", "exec")
    assert splits == standard_library_splits()
