"""The model card beside each result: what was measured, what is known, and code that runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from common.support.model_dir import read_origin, write_origin
from common.tokenization import encode_prompt, load_tokenizer
from dataset.sources import load_splits
from dataset.templates import summarization
from model.generate import generate_answers
from model.load import load_model
from tests.conftest import ROOT, environment
from tests.helpers import first_fast, parquet, records, rows_of
from tests.test_chat_files import give_template, talk, write

TRAIN = "python tutorial/train_llama3.py --max-train-steps 2 --batch-size 8 --lr 1e-3 --eval-rows 4"
MERGE = "python tutorial/merge_adapter.py --model-name-or-path ./adapter --save-dir ./merged"


def read(folder):
    """(its head, the rows of its table, all of it) of a card, as the hub reads it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))
    assert ModelCard.load(folder / "README.md").data.to_dict() == head
    table = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))
    table.pop("---")
    return head, table, text


@pytest.fixture(scope="module")
def results(base, warm, tmp_path_factory):
    """What was trained of a base that came from the hub."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("cards") / "work", symlinks=True)
    write_origin(str(folder / "llama3-8b"), "meta-llama/Meta-Llama-3-8B", "revision 0123abc")
    (folder / "llama3-8b" / "README.md").write_text("of the base")
    warm(f"{TRAIN} --save-dir ./full", cwd=folder)
    warm(f"{TRAIN} --use-lora --lora-r 4 --lora-dropout 0.1 --eval-step 1 --keep-best --save-dir ./adapter", cwd=folder)
    warm(MERGE, cwd=folder)
    return folder


@pytest.mark.parametrize("name", ["full", "adapter", "merged"])
def test_it_says_what_was_measured_and_what_is_known(name, results):
    head, table, text = read(results / name)
    assert head == {
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "base_model_relation": "adapter" if name == "adapter" else "finetune",
        "language": ["en"],
        "library_name": "peft" if name == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        **({} if name == "full" else {"tags": ["lora"]}),
    }
    log = records(results / ("full" if name == "full" else "adapter"))
    before, *_, after = (record["held_out_loss"] for record in log if "held_out_loss" in record)
    after = next((record["best_held_out_loss"] for record in log if "best_held_out_loss" in record), after)
    assert before != after
    run = json.loads((results / name / "run.json").read_text(encoding="utf-8"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lora = "LoRA, r 4, alpha 16, dropout 0.1, on all-linear"
    expected = {
        "Base model": "meta-llama/Meta-Llama-3-8B, revision 0123abc",
        "Adapter": "`adapter`, merged into it",
        "Data": "`cnn_dailymail`, 64 rows (train), 16 rows (validation), template summarization, licence apache-2.0",
        "Method": "full fine-tuning" if name == "full" else lora,
        "Training": "2 steps, batches of 8 rows, at most 1024 tokens a row, learning rate 0.001 "
        "(constant, 0 warm-up steps), weight decay 0.01, seed 0",
        "Held-out loss": f"{before:.4f} before, {after:.4f} after, of 4 rows",
        "Made with": f"{run['device']}, torch {run['torch']}, transformers {run['transformers']}, "
        f"python {run['python']}",
        "Commit of the training scripts": commit,
    }
    if name != "merged":
        del expected["Adapter"]
    if not commit:  # not in a checkout
        del expected["Commit of the training scripts"]
    assert table == expected
    assert text.count(f"# {name}\n") == 1 and "of the base" not in text
    assert str(results) not in text and str(results.parent) not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(1, ["adapter", "full", "merged"]))
def test_its_code_runs_and_answers_as_ours_does(name, results, monkeypatch):
    monkeypatch.chdir(results)  # from where the adapter's base is found
    _, _, text = read(results / name)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"..."', '"The bridge is shut."').replace("max_new_tokens=256", "max_new_tokens=12")
    code = code.replace("from_pretrained(path)\ntok", "from_pretrained(path).float()\ntok")
    env = environment(HF_HOME=str(results / ".hf_home"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=results, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(f"./{name}")
    model = load_model(f"./{name}", torch.device("cpu"), torch.float32)
    prompt = encode_prompt(tokenizer, summarization({"article": "The bridge is shut.", "highlights": ""}), 1000)
    (answer,) = generate_answers(model, tokenizer, [prompt], 12)
    assert done.stdout == answer.text + "\n"


def test_each_training_writes_its_own(results, warm, tmp_path):
    """An adapter over a whole model; and of other data than the hub's."""
    folder = shutil.copytree(results, tmp_path / "work", symlinks=True)
    write(folder / "my rows.jsonl", rows_of("train"))
    prepare = "python dataset/prepare_llama3_dataset.py --block-size 128 --save-path new.pt --dataset-name-or-path"
    warm(prepare, str(folder / "my rows.jsonl"), cwd=folder)
    shutil.rmtree(folder / "llama3-8b" / ".cache")
    warm(f"{TRAIN} --use-lora --dataset-name-or-path new.pt --eval-rows 0 --save-dir ./full", cwd=folder)
    head, table, text = read(folder / "full")
    assert head["library_name"] == "peft" and not {"base_model", "language", "datasets"} & set(head)
    assert table["Base model"] == "`llama3-8b`" and "Held-out loss" not in table
    assert table["Data"].startswith("`my rows.jsonl`, 61 rows") and "licence" not in table["Data"]
    assert str(tmp_path) not in text


def test_a_readers_own_readme_stays(results, warm, tmp_path):
    folder = shutil.copytree(results, tmp_path / "work", symlinks=True)
    (folder / "full" / "README.md").write_text("mine")
    said = warm(f"{TRAIN} --eval-rows 0 --save-dir ./full", cwd=folder).stdout
    assert (folder / "full" / "README.md").read_text() == "mine"
    assert [line for line in said.splitlines() if "is your own and stays" in line]


def test_names_that_yaml_and_markdown_would_read(results, warm, tmp_path):
    folder = shutil.copytree(results, tmp_path / "work", symlinks=True)
    name = 'a: [b] | c\'s "d" # e'
    (folder / "llama3-8b").rename(folder / "llama | 3")
    warm(TRAIN, "--model-name-or-path", "./llama | 3", "--save-dir", f"./{name}", cwd=folder)
    head, table, text = read(folder / name)
    assert head["base_model"] == "meta-llama/Meta-Llama-3-8B" and f"\n# {name}\n" in text
    shutil.rmtree(folder / "llama | 3" / ".cache")
    warm(TRAIN, "--model-name-or-path", "./llama | 3", "--save-dir", "./other", cwd=folder)
    assert read(folder / "other")[1]["Base model"] == r"`llama \| 3`"


CARD = b"""---
license: [cc-by-4.0, mit]
language: [ko, en]
configs: [{config_name: default, data_files: [{split: train, path: train.parquet}]}]
---
"""


def test_what_the_hub_says_of_data(ready, warm, warm_hub):
    files = {"train.parquet": parquet(rows_of("train")), "README.md": CARD}
    warm_hub.repos["datasets"] = {"owner/news": files}
    words = "--block-size 128 --dataset-name-or-path owner/news"
    try:
        warm(f"python dataset/prepare_llama3_dataset.py {words}", cwd=ready)
    finally:
        warm_hub.repos["datasets"] = {}
    warm(f"{TRAIN} --save-dir ./full", cwd=ready)
    head, table, _ = read(ready / "full")
    assert head["datasets"] == ["owner/news"]
    assert re.match(r"owner/news at \w+, \d+ rows \(train\), .*, licence cc-by-4.0, mit$", table["Data"])


def test_what_a_folder_says_of_its_data(tmp_path):
    write(tmp_path / "train.jsonl", [{"a": "b"}])
    cards = {
        CARD.decode(): {"license": "cc-by-4.0, mit", "language": ["ko", "en"]},
        "---\nlanguage: ko\n---\n": {"language": ["ko"]},
        "no head": {}, "---\nlicense: [\n---\n": {}, "": {}, "---\nlicense: {a: b}\nlanguage: 3\n---\n": {},
    }  # fmt: skip
    assert load_splits(str(tmp_path))[1].card == {}
    for text, known in cards.items():
        (tmp_path / "README.md").write_text(text)
        splits, source = load_splits(str(tmp_path))
        assert (source.name, source.card) == (str(tmp_path), known) and [*splits["train"]] == [{"a": "b"}]


def test_our_samples_have_a_licence_and_a_language():
    for folder in (path for path in (ROOT / "dataset" / "samples").iterdir() if path.is_dir()):
        korean = "korean" in folder.name
        expected = {"license": "apache-2.0", "language": ["ko" if korean else "en"]}
        assert load_splits(str(folder))[1].card == expected


def test_a_chat_models_card_asks_by_its_template(ready, warm):
    tokenizer = give_template(ready)
    write(ready / "talks.jsonl", [{"messages": talk("a", "b")}] * 20)
    prepare = "python dataset/prepare_llama3_dataset.py --block-size 128 --save-path new.pt --dataset-name-or-path"
    warm(f"{prepare} talks.jsonl", cwd=ready)
    warm(f"{TRAIN} --use-lora --dataset-name-or-path new.pt --save-dir ./chat", cwd=ready)
    text = read(ready / "chat")[2]
    assert "apply_chat_template" in text and "The chat template writes the form" not in text
    ends = [tokenizer.convert_tokens_to_ids("<|eot_id|>"), tokenizer.eos_token_id]
    assert f"eos_token_id={ends})" in text


def test_where_a_model_came_from(tmp_path):
    assert read_origin(str(tmp_path)) == {} and read_origin("./here") == {} and read_origin("one/two/three") == {}
    assert read_origin("owner/name") == {"name": "owner/name"}
    write_origin(str(tmp_path), "owner/name", "revision 1")
    assert read_origin(str(tmp_path)) == {"name": "owner/name", "revision": "revision 1"}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert read_origin(str(tmp_path)) == {}
    for text in ("[1", "[1]", "1", "{}", '{"weights": 3}'):
        (tmp_path / ".cache" / "huggingface" / "origin.json").write_text(text)
        assert read_origin(str(tmp_path)) == {}
