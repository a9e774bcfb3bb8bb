"""A model that the hub has as .bin files only: the GPT tutorial's download turns them into safetensors."""

from __future__ import annotations

import io
import json
import shutil
import signal

import pytest
import torch
import transformers

from common.support.model_dir import ModelSource
from tests.conftest import ROOT, lay_out
from tests.helpers import tells

REPO = "cerebras/Cerebras-GPT-13B"
DOWNLOAD = "python tutorial/download_gpt_13b.py"
BINS = [f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3)]
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def torch_file(weights):
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def on_hub(stand_ins):
    """The files of the stand-in as the hub has them; two names of one tensor, a mask that is no weight."""
    weights = transformers.AutoModelForCausalLM.from_pretrained(stand_ins["gpt"]).state_dict()
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
    names = sorted(weights)
    parts = [names[:9], names[9:15], names[15:]]
    files = {path.name: path.read_bytes() for path in stand_ins["gpt"].iterdir() if path.suffix != ".safetensors"}
    files.update({name: torch_file({key: weights[key] for key in part}) for name, part in zip(BINS, parts)})
    places = {key: name for name, part in zip(BINS, parts) for key in part}
    index = {"metadata": {"total_size": 7}, "weight_map": places}
    files["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    return files, weights


@pytest.fixture
def hub(warm_hub, on_hub):
    warm_hub.repos["models"][REPO] = dict(on_hub[0])
    yield warm_hub
    del warm_hub.repos["models"][REPO]
    warm_hub.requests.clear()


def fetched(hub):
    return [request.path for request in hub.requests if request.method == "GET" and request.path.endswith(".bin")]


def converted(folder, on_hub):
    """Assert that the directory holds the model's weights, as safetensors with an index and in no other form."""
    directory = folder / "cerebras-gpt-13b"
    assert sorted(path.name for path in directory.glob("*model*")) == sorted(
        [*SHARDS, "model.safetensors.index.json", "pytorch_model.bin.index.json"]
    )
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == on_hub[1].keys() == ModelSource(directory).tensors.keys()
    assert index["metadata"] == {"total_size": 7}
    assert (directory / SHARDS[0]).stat().st_mode & 0o044
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, on_hub[1][name])


def test_bins_become_safetensors_and_do_not_come_again(folder, warm, hub, on_hub):
    done = warm(DOWNLOAD, cwd=folder)
    assert f"Converting {BINS[0]} to {SHARDS[0]}..." in done.stdout and "Model saved in" in done.stdout
    converted(folder, on_hub)
    hub.requests.clear()
    warm(DOWNLOAD, cwd=folder)
    converted(folder, on_hub)
    assert not fetched(hub)


@pytest.mark.parametrize(
    "place",
    [
        f"open:{SHARDS[1][: -len('safetensors')]}part 1",
        f"os.rename:{SHARDS[1]} 1",
        "+common.support.hub:_convert 3",
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_cut_while_it_converts(place, number, folder, warm, hub, on_hub):
    """The same command goes on: what is converted is not fetched, or converted, again."""
    command = f"python {ROOT}/tests/killed.py {int(number)} {place} {DOWNLOAD[len('python ') :]}"
    done = warm(command, cwd=folder, ok=None)
    assert done.returncode == (-9 if number == signal.SIGKILL else 143), done.stderr
    hub.requests.clear()
    done = warm(DOWNLOAD, cwd=folder)
    assert f"Converting {BINS[0]}" not in done.stdout and not [path for path in fetched(hub) if BINS[0] in path]
    shutil.rmtree(folder / ".hf_home", ignore_errors=True)
    converted(folder, on_hub)


def test_a_stand_in_is_still_a_stranger(folder, warm, hub):
    """A safetensors file that was made of none of the hub's."""
    warm(f"{DOWNLOAD} --tiny", cwd=folder)
    tells(warm(DOWNLOAD, cwd=folder, ok=None), "model.safetensors, which is not a file of cerebras/Cerebras-GPT-13B")


def test_a_training_takes_them(warm, hub, tmp_path):
    folder = lay_out(tmp_path / "work")
    warm(DOWNLOAD, cwd=folder)
    sample = "--dataset-name-or-path dataset/samples/Evol-Instruct-Python-26k --block-size 64"
    warm(f"python dataset/prepare_gpt_dataset.py {sample}", cwd=folder)
    done = warm("python tutorial/train_gpt.py --batch-size 4 --max-train-steps 1 --eval-rows 0", cwd=folder)
    assert "Model saved in" in done.stdout
