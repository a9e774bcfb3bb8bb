"""What a template finds in a row; and where it doesn't find it, which columns there are and how to name them."""

from __future__ import annotations

import json
from datetime import date

import pytest
import torch

from common.dataset_file import label_counts
from common.support.exit import UserError
from common.tokenization import Example
from dataset.columns import apply_template, rename_columns, require_asked
from dataset.prepare import RowEncoder
from dataset.sources import Part, Row, read_rows
from dataset.templates import alpaca, instruction, korean_alpaca, short_alpaca, summarization
from tests.helpers import KINDS, contents, encode_rows, tells

ALPACA = "python dataset/prepare_smollm2_dataset.py --model-name-or-path ./llama3-8b --save-path new.pt"


def complaint(row, template=alpaca):
    with pytest.raises(UserError) as caught:
        apply_template(template, Row(row, "my.jsonl, line 7"))
    line = str(caught.value)
    assert line.startswith("my.jsonl, line 7") and "\n" not in line
    return line[len("my.jsonl, line 7") :]


# ------------------------------------------------------------------------------------------------ a column is missing


@pytest.mark.parametrize(
    "row, missing, option",
    [
        ({"질문": "a", "output": "b"}, "column 'instruction'", "instruction=COLUMN"),
        ({"rejected": "a", "chosen": "b"}, "columns 'instruction', 'output'", "instruction=COLUMN output=COLUMN"),
        ({"instruction": "a", "input": "", "A": "b"}, "column 'output'", "output=COLUMN"),
        ({}, "columns 'instruction', 'output'", "instruction=COLUMN output=COLUMN"),
    ],
)
def test_a_missing_column_is_said_with_the_option_that_names_it(row, missing, option):
    """Which column it is, is not guessed."""
    assert complaint(row) == f" has no {missing}; it has: {', '.join(row) or 'none'}. Name yours: --columns {option}"


# ------------------------------------------------------------------------------------------------ --columns


def test_a_column_is_moved_to_its_new_name():
    row = Row({"input": "q", "target": "a", "n": 1}, "here")
    new = rename_columns(row, {"instruction": "input", "output": "target"})
    assert new == {"instruction": "q", "output": "a", "n": 1} and new.place == "here"
    assert "".join(apply_template(alpaca, new).prompt).count("q") == 1  # not as the input as well
    assert rename_columns(row, {"input": "target", "target": "input"}) == {"input": "a", "target": "q", "n": 1}
    assert rename_columns(row, {"a": "n", "b": "n"}) == {"input": "q", "target": "a", "a": 1, "b": 1}
    assert row == {"input": "q", "target": "a", "n": 1}


def by_kind(row):
    return Example(["", row["question"] if row["kind"] == "qa" else row["text"]], row["answer"])


def if_there(row):
    pieces = ["", row["context"], "\n"] if "context" in row else [""]
    return Example(pieces, row["answer"])


def unsteady(row):
    return Example(["", row["messages"][0]["content"], "", row.get("system")], row["answer"])


@pytest.mark.parametrize(
    "template, names",
    [
        (alpaca, ["instruction", "input", "output"]),
        (korean_alpaca, ["instruction", "input", "output"]),
        (short_alpaca, ["instruction", "input", "output"]),
        (instruction, ["instruction", "output"]),
        (summarization, ["article", "highlights"]),
        (by_kind, ["kind", "question", "text", "answer"]),
        (if_there, ["context", "answer"]),
    ],
)
def test_a_name_for_which_no_template_asks_is_refused(template, names):
    row = Row({"kind": "qa", "own": "x"}, "here")
    for name in names:
        require_asked(template, row, {name: "own"})
    with pytest.raises(UserError, match=f"--columns outptu=own: .* asks for no 'outptu', it asks for: .*{names[-1]}"):
        require_asked(template, row, {"outptu": "own"})


def test_names_behind_what_is_in_a_row_are_found():
    row = Row({"messages": [{"content": "a"}], "own": "x"}, "here")
    for name in ("messages", "system", "answer"):
        require_asked(unsteady, row, {name: "own"} if name != "messages" else {name: "messages"})


def test_mistakes_of_columns_are_said_before_the_work(ready, warm):
    (ready / "mine.jsonl").write_text('{"질문": "q", "답변": "a"}\n' * 5000, encoding="utf-8")
    before = contents(ready)
    for words, said in {
        "instrction=질문 output=답변": ["--columns instrction=질문", "asks for: instruction, input, output"],
        "instruction=질의 output=답변": ["--columns instruction=질의", "line 1", "질문, 답변"],
        "질문=instruction": ["--columns 질문=instruction", "'instruction'", "질문, 답변"],
        "instruction=질문 instruction=답변": ["instruction=질문 instruction=답변", "twice"],
        "instruction=질문 --columns instruction=답변": ["twice"],
    }.items():
        done = warm(f"{ALPACA} --dataset-name-or-path mine.jsonl --columns {words}", cwd=ready, ok=None)
        tells(done, *said)
    assert contents(ready) == before
    warm(f"{ALPACA} --dataset-name-or-path mine.jsonl --columns instruction=질문 --columns output=답변", cwd=ready)


# ------------------------------------------------------------------------------------------------ cells


def test_a_template_that_writes_cells_into_text_finds_text():
    def template(row):
        return Example(["", f"{row['a']}|{row.get('b')}|{row['c']}|%s" % row["d"]], "{}".format(row["e"]))

    nan = float("nan")
    assert apply_template(template, {"a": None, "b": nan, "c": "한".encode(), "d": float("inf"), "e": 1.5}) == (
        ["", "||한|"],
        "1.5",
    )
    assert apply_template(template, {"a": 3, "b": True, "c": date(2024, 1, 2), "d": 0, "e": ["x"]})[0] == [
        "",
        "3|True|2024-01-02|0",
    ]


def test_numbers_lists_and_objects_stay_as_they_are():
    def template(row):
        assert row["n"] + 1 == 4 and row["list"] == [None, {"b": b"c"}] and row["list"] is cells["list"]
        assert row["object"] is cells["object"] and {**row}["none"] == "" and dict(row.items())["bytes"] == "b"
        return Example(["", row["list"][1]["b"], "", row["list"][0]], row["n"] * 2)

    cells = {"n": 3, "list": [None, {"b": b"c"}], "object": {"a": None}, "none": None, "bytes": b"b"}
    assert apply_template(template, cells) == (["", "c", "", ""], "6")


BAD = "한".encode("cp949")


def test_bytes_that_are_no_text_fail_where_they_are_used_and_only_there():
    row = Row({"image": BAD, "text": "a"}, "here")
    assert apply_template(lambda row: Example(["", row["text"]], "b"), row).answer == "b"
    with pytest.raises(UserError, match="here: column 'image' holds bytes that are not UTF-8"):
        apply_template(lambda row: Example(["", row["image"]], "b"), row)


def test_a_template_that_fails_is_said_with_its_row():
    def of_number(row):
        return Example(["", "n: " + row["n"]], "b")

    def of_table(row):
        return Example(["", {"a": "A"}[row["n"]]], "b")

    for template, said in {
        of_number: "the template of_number fails in test_columns.py, line ",
        of_table: "(KeyError: 3)",
        lambda row: None: "NoneType",
        lambda row: Example(["", row["n"].strip()], "b"): "AttributeError",
    }.items():
        assert said in complaint({"n": 3}, template)


def test_a_template_takes_text_out_of_a_list(tmp_path, tokenizers):
    def chat(row):
        return Example(["", row["messages"][0]["content"], "\n"], row["messages"][1]["content"])

    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [json.dumps({"messages": some}) + "\n" for some in (talk, [talk[0], {"content": None}], talk[:1])]
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    rows = read_rows(tmp_path / "chat.jsonl")
    assert encode_rows(rows[:2], chat, tokenizers["smollm2"], 64)[1]["dropped"] == 1
    with pytest.raises(UserError, match=r"chat\.jsonl, line 3: the template chat fails in .*IndexError"):
        encode_rows(rows, chat, tokenizers["smollm2"], 64)


# ------------------------------------------------------------------------------------------------ nothing to learn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["a", " a", "\u200b", "\x00", "\u00ad", "\ufe0f", "👍", "\n.\n"])
def test_every_row_has_a_token_with_a_loss(kind, answer, tokenizers):
    """Whatever the answer is, and where there is no prompt at all: as common.dataset_file wants it."""
    for pieces in ([], [""], ["", ""], ["Q: ", "x" * 300, "\n"]):
        for block_size in (2, 3, 64):
            encoder = RowEncoder(lambda row, pieces=pieces: Example(pieces, row["a"]), tokenizers[kind], block_size, {})
            try:
                [row] = encoder.encode([Row({"a": answer}, "here")])
            except UserError as error:
                assert "leaves no room for an answer" in str(error) and block_size < 64
                continue
            [encoded] = row.encoded
            mask, length = torch.tensor(list(encoded.mask), dtype=torch.bool), len(encoded.ids)
            assert 2 <= length <= block_size and int(label_counts(mask, torch.tensor([0, length]))) >= 1


@pytest.mark.parametrize("answer", ["", " ", "\n\t", None, "\u3000"])
def test_an_answer_of_white_space_is_none(answer, tokenizers):
    rows = [{"instruction": "", "output": answer}]
    encoded, counts = encode_rows(rows, instruction, tokenizers["smollm2"], 64)
    assert not encoded and counts["dropped"] == 1


def test_an_answer_without_a_token_is_refused_with_its_row(tokenizers):
    from copy import deepcopy

    from tokenizers import normalizers

    tokenizer = deepcopy(tokenizers["smollm2"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    rows = [
        Row({"instruction": "q", "output": answer}, f"my.jsonl, line {n}") for n, answer in enumerate(["a", "", "~~"])
    ]
    assert len(encode_rows(rows[:2], instruction, tokenizer, 64)[0]) == 1
    with pytest.raises(UserError, match=r"^my\.jsonl, line 2: its answer is empty after tokenization"):
        encode_rows(rows, instruction, tokenizer, 64)


# ------------------------------------------------------------------------------------------------ how many rows


@pytest.mark.parametrize("count", [1, 19, 20, 700, 6000])
def test_held_out_rows_and_the_others(count):
    rows = list(range(1, count + 1))
    held_out, others = Part(rows, True), Part(rows, False)
    assert list(held_out) == rows[19 : 20 * 256 : 20]
    assert list(others) == sorted({*rows} - {*held_out})
    assert (len(held_out), len(others)) == (len(list(held_out)), len(list(others)))


def test_how_long_it_takes_is_said_without_a_terminal(tmp_path, monkeypatch, capsys, tokenizers):
    import common.train_log

    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 1000)
    monkeypatch.setattr(common.train_log, "SECONDS", 0)
    encode_rows(read_rows(tmp_path / "a.jsonl"), instruction, tokenizers["smollm2"], 64)
    assert capsys.readouterr().out.startswith("train: 250 rows of 1000, 0 minutes left, ")
