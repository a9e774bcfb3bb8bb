"""A reader's own data, and the dataset file: in every form that is right, and refused in one line where it is not."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch

from tests.helpers import PREPARE, TRAIN, change_dataset, contents, parquet, refusal, rows_of, same_rows, tells


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


@pytest.fixture
def prepare_refuses(ready, refused):
    """A function that writes the data file `name` and checks that `prepare` refuses it in words."""

    def check(name, data, tells_of):
        (ready / name).parent.mkdir(exist_ok=True)
        (ready / name).write_bytes(data.encode() if isinstance(data, str) else data)
        refused(PREPARE, "--dataset-name-or-path", name, tells_of=tells_of)

    return check


ROW = {"article": "A bridge is closed.", "highlights": "Bridge closed."}
LINE = json.dumps(ROW) + "\n"


def test_data_without_the_columns(prepare_refuses):
    prepare_refuses("mine.jsonl", '{"text": "a", "summary": "b"}\n', ["article", "text, summary"])


@pytest.mark.parametrize(
    "script, column", [("mistral", "instruction"), ("gpt", "instruction"), ("llama3_1", "instruction")]
)
def test_data_without_the_columns_of_the_others(script, column, ready, warm):
    row = {"question": "do", "output": "done"}
    (ready / "mine.jsonl").write_text(json.dumps(row))
    before = contents(ready)
    words = "--model-name-or-path ./llama3-8b --dataset-name-or-path mine.jsonl"
    done = warm(f"python dataset/prepare_{script}_dataset.py {words}", cwd=ready, ok=None)
    tells(done, f"'{column}'", ", ".join(row))
    assert contents(ready) == before


def test_data_without_an_answer_column(prepare_refuses):
    prepare_refuses("mine.jsonl", '{"article": "a", "summary": "b"}\n' * 3, ["highlights", "article, summary"])


@pytest.mark.parametrize("name, data", [("m.jsonl", ""), ("m.jsonl", "\n \n"), ("m.json", "[]"), ("m.json", "")])
def test_empty_data(name, data, prepare_refuses):
    prepare_refuses(name, data, [name, "empty"])


def test_empty_table(prepare_refuses):
    prepare_refuses("mine.csv", "article,highlights\r\n", ["mine.csv", "empty"])
    prepare_refuses("mine.parquet", parquet([ROW])[:0], ["mine.parquet"])


def test_data_without_any_answer(prepare_refuses):
    lines = [json.dumps({**ROW, "highlights": answer}) for answer in ("", "  \n", None)]
    prepare_refuses("mine.jsonl", "\n".join(lines), ["mine.jsonl", "All rows of the dataset", "were dropped"])


def test_a_row_that_is_no_json(prepare_refuses):
    prepare_refuses("mine.jsonl", LINE * 3 + LINE[:20] + "\n" + LINE, ["mine.jsonl", "line 4", "not valid JSON"])
    prepare_refuses("late.jsonl", LINE * 1500 + "}\n", ["late.jsonl", "line 1501", "not valid JSON"])


def test_a_row_that_is_no_object(prepare_refuses):
    prepare_refuses("mine.jsonl", LINE + '["a", "b"]\n', ["mine.jsonl", "not a JSON object", "['a', 'b']"])


def test_broken_json(prepare_refuses):
    prepare_refuses("mine.json", f"[{LINE},\n{LINE}", ["mine.json", "line", "not valid JSON"])
    prepare_refuses("text.json", "These are no rows.", ["text.json", "line 1", "not valid JSON"])


def test_broken_csv(prepare_refuses):
    prepare_refuses("mine.csv", 'article,highlights\r\n"one",two\r\n"three,four\r\n', ["mine.csv", "not a valid .csv"])
    prepare_refuses("quote.csv", 'article,highlights\r\n"a" b,two\r\n', ["quote.csv", "not a valid .csv"])


def test_csv_without_the_columns(prepare_refuses):
    prepare_refuses("mine.csv", "text,summary\r\na,b\r\n", ["line 2", "article", "text, summary"])


def test_broken_parquet(prepare_refuses):
    whole = parquet(rows_of("train"))
    for number, data in enumerate((whole[:-100], whole[100:], b"no table", b"")):
        prepare_refuses(f"mine{number}.parquet", data, [f"mine{number}.parquet", "not valid .parquet"])


def test_parquet_damaged_within(prepare_refuses):
    whole = bytearray(parquet(rows_of("train")))
    whole[200:20_000] = bytes(19_800)  # the table of contents, at the end, is whole
    prepare_refuses("mine.parquet", bytes(whole), ["mine.parquet", "not valid .parquet"])


def test_data_in_another_encoding(prepare_refuses):
    prepare_refuses("mine.jsonl", '{"article": "한국", "highlights": "어"}\n'.encode("utf-16"), ["mine.jsonl", "UTF-8"])
    prepare_refuses("mine.csv", "article,highlights\r\n한국,어\r\n".encode("utf-16"), ["mine.csv", "UTF-8"])


def test_folder_without_a_train_file(prepare_refuses, ready, refused):
    (ready / "mine").mkdir()
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["mine", "no train.jsonl", "it has: none"])
    (ready / "mine" / "data.jsonl").write_text(LINE)
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["mine", "no train.jsonl", "data.jsonl"])


def test_folder_with_two_train_files(ready, refused):
    (ready / "mine").mkdir()
    (ready / "mine" / "train.jsonl").write_text(LINE)
    (ready / "mine" / "train.csv").write_text("article,highlights\r\na,b\r\n")
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["train.csv, train.jsonl"])


@pytest.mark.parametrize("name", ["./none.jsonl", "./none", "/none/such"])
def test_no_such_data(name, refused):
    refused(PREPARE, "--dataset-name-or-path", name, tells_of=[f"{Path(name)} does not exist", ".jsonl, .json, .csv"])


def test_data_of_another_kind(prepare_refuses):
    prepare_refuses("mine.txt", "text", ["mine.txt", ".jsonl, .json, .csv or .parquet"])


def test_own_data_in_every_form(ready, warm):
    """The same rows as .jsonl, .json, .csv, .parquet and folder make the same dataset file."""
    rows = [{"article": row["article"], "highlights": row["highlights"]} for row in rows_of("train")]
    rows[1:1] = [
        {"article": 'Quotes ", commas, and a\nnew line\n\n at the end\n', "highlights": "다람쥐 👍\t'"},
        {"article": "", "highlights": "no article"},
        {"article": "no answer", "highlights": ""},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["article", "highlights"])
    writer.writeheader()
    writer.writerows(rows)
    (ready / "folder").mkdir()
    (ready / "mine.jsonl").write_text(lines, encoding="utf-8")
    (ready / "folder" / "train.jsonl").write_text(lines, encoding="utf-8")
    (ready / "mine.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (ready / "lines.json").write_text(lines, encoding="utf-8")
    (ready / "mine.csv").write_bytes(table.getvalue().encode())
    (ready / "excel.csv").write_bytes(table.getvalue().encode("utf-8-sig"))
    (ready / "mine.parquet").write_bytes(parquet(rows))
    made = {}
    for name in ("mine.jsonl", "folder", "mine.json", "lines.json", "mine.csv", "excel.csv", "mine.parquet"):
        done = warm(PREPARE, "--dataset-name-or-path", name, "--save-path", f"of/{name}.pt", cwd=ready)
        assert done.stdout.splitlines()[-1] == f"Dataset saved as of/{name}.pt"
        made[name] = torch.load(ready / "of" / f"{name}.pt")
        assert made[name]["meta"]["dataset"] == name
    for dataset in made.values():
        same_rows(dataset, made["mine.jsonl"])
    counts = made["folder"]["meta"]["counts"]
    assert counts["train"]["rows"] + counts["validation"]["rows"] + counts["train"]["dropped"] == 67
    assert (counts["train"]["dropped"], counts["validation"]["rows"]) == (1, 3)  # every 20th of 67 is held out
    done = warm(TRAIN, "--dataset-name-or-path", "of/mine.csv.pt", cwd=ready)
    assert done.stdout.splitlines()[-1] == "Model saved in ./llama3_summarization"


def test_a_handful_of_rows_is_enough(ready, warm):
    """Too few for a row to be held out: there is training, and no held-out loss."""
    (ready / "mine.jsonl").write_text(LINE * 5)
    warm(PREPARE, "--dataset-name-or-path", "mine.jsonl", cwd=ready)
    done = warm("python tutorial/train_llama3.py", cwd=ready)
    assert "--batch-size 256 exceeds the 5 training rows; using 5." in done.stdout.splitlines()
    assert "Held-out" not in done.stdout
    assert (ready / "llama3_summarization" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ the dataset file


def test_no_dataset_file(ready, refused):
    (ready / "llama3_dataset.pt").unlink()
    refused(TRAIN, tells_of=["./llama3_dataset.pt", "python dataset/prepare_llama3_dataset.py"])
    (ready / "llama3_dataset.pt").mkdir()
    refused(TRAIN, tells_of=["./llama3_dataset.pt", "python dataset/prepare_llama3_dataset.py"])


def test_dataset_file_of_another_tokenizer(ready, warm):
    warm("python tutorial/download_gpt_13b.py --tiny", cwd=ready)
    before = contents(ready)
    done = warm("python tutorial/train_gpt.py --dataset-name-or-path ./llama3_dataset.pt", cwd=ready, ok=None)
    tells(done, "llama3_dataset.pt", "another tokenizer", "./llama3-8b", "python dataset/prepare_gpt_dataset.py")
    assert contents(ready) == before


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.99, -1])
def test_dataset_file_cut_short(kept, ready, refused):
    file = ready / "llama3_dataset.pt"
    data = file.read_bytes()
    file.write_bytes(data[:-1] if kept == -1 else data[: int(len(data) * kept)])
    refused(TRAIN, tells_of=["llama3_dataset.pt", "is truncated", "python dataset/prepare_llama3_dataset.py"])


@pytest.mark.parametrize("content", [b"some text\n", [1, 2], {"train": 1}, torch.zeros(3), torch.nn.Linear(1, 1)])
def test_some_other_file(content, ready, refused):
    file = ready / "llama3_dataset.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(TRAIN, tells_of=["llama3_dataset.pt", "not a dataset file", "python dataset/prepare_llama3_dataset.py"])


def test_other_format_version(ready, refused):
    change_dataset(ready / "llama3_dataset.pt", lambda document: document.update(version=99))
    refused(TRAIN, tells_of=["llama3_dataset.pt", "version 99", "python dataset/prepare_llama3_dataset.py"])


@pytest.mark.parametrize("part", ["train", "validation", "meta"])
def test_dataset_file_without_a_part(part, ready, refused):
    change_dataset(ready / "llama3_dataset.pt", lambda document: document.pop(part))
    refused(TRAIN, tells_of=["llama3_dataset.pt", "python dataset/prepare_llama3_dataset.py"])


def test_rows_longer_than_the_block(refused):
    refused(TRAIN, "--block-size", 127, tells_of=["llama3_dataset.pt", "128 tokens", "--block-size 127"])
