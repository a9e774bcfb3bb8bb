"""tutorial/check_accelerator.py: this machine, stand-ins for others, and the rule for what they can run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from importlib.metadata import version
from time import perf_counter, sleep
from types import SimpleNamespace

import huggingface_hub.constants
import peft  # noqa: F401  bitsandbytes can't be imported while torch believes in a GPU that is not there
import pytest
import torch

from common.support.hub import ask_hub
from model.tutorials import TUTORIALS as ALL
from model.tutorials import Machine, recommend
from tests.conftest import FOLDERS, NOWHERE, ROOT, TIMEOUT, lay_out, run
from tests.helpers import HAS_LLAMA3_1, HAS_QWEN3, first_fast, tells
from tests.hub_server import HubServer
from tutorial import check_accelerator as check

COMMAND = "python tutorial/check_accelerator.py"
TUTORIALS = {tutorial.name.split(",")[0]: tutorial for tutorial in ALL}
METHODS = ["rehearsal", "lora_4bit", "lora", "full"]  # from the least to the best
OPTIONS = {"full": "", "lora": "--use-lora", "lora_4bit": "--use-lora --load-in-4bit"}


def row_of(name, platform, memory, devices=1, disk_free=1e12):
    """What --json says of a tutorial; memory in GB."""
    dtype = torch.float32 if platform == "CPU" else torch.bfloat16
    return recommend(TUTORIALS[name], Machine(platform, 1e9 * memory, dtype, devices), disk_free)


def method_of(name, platform, memory, devices=1):
    """The method, whose options the train command has."""
    row = row_of(name, platform, memory, devices)
    start, _, options = row["commands"][-1].partition(".py")
    runner = f"torchrun --nproc-per-node {devices}" if row["devices"] > 1 else "python"
    assert start == f"{runner} tutorial/train_{TUTORIALS[name].kind}"
    if row["method"] != "rehearsal":
        korean = {"full": "--no-use-lora --no-quantization", "lora": "--no-quantization", "lora_4bit": ""}
        qwen3 = {"full": "--no-use-lora", "lora": "", "lora_4bit": "--load-in-4bit"}
        assert options.strip() == {"Llama 3.1 8B": korean, "Qwen3 4B": qwen3}.get(name, OPTIONS)[row["method"]]
        assert 0 < row["memory"] <= 0.95e9 * memory
    return row["method"]


# ------------------------------------------------------------------------------------------------ this machine


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What --json prints here, without a hub."""
    done = run(f"{COMMAND} --json", cwd=lay_out(tmp_path_factory.mktemp("check") / "work"))
    assert done.stderr == ""
    return json.loads(done.stdout)  # and nothing else is there


@pytest.mark.slow
def test_json_tells_the_truth(found):
    parts = [found, found["devices"][0], found["hub"], found["tutorials"][0]]
    assert [
        key for part in parts for key in part if f'"{key}"' not in check.__doc__ and f"{key}  " not in check.__doc__
    ] == []
    assert found["platform"] == ("CUDA" if torch.cuda.is_available() else "CPU")
    assert found["versions"]["python"] == "{}.{}.{}".format(*sys.version_info)
    for name in ("torch", "transformers", "datasets"):
        assert found["versions"][name] == version(name)
    assert torch.__version__.startswith(found["versions"]["torch"])  # older wheels name their CUDA (+cu121) only here
    assert abs(found["disk_free"] - shutil.disk_usage(ROOT).free) < 20e9  # other programs write meanwhile
    assert found["hub"] == {"endpoint": NOWHERE, "reachable": False, "token": "none"}
    assert [row["name"].split(",")[0] for row in found["tutorials"]] == list(TUTORIALS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cpu(found):
    psutil = pytest.importorskip("psutil")
    (device,) = found["devices"]
    assert device["name"] == "CPU, 1 threads"  # as in tests.conftest.environment
    assert device["memory_total"] == psutil.virtual_memory().total > device["memory_used"] > 1e8
    assert 0 <= device["utilization"] <= 100
    assert found["precision"] in ("bfloat16", "float32")
    assert {row["method"] for row in found["tutorials"][1:]} == {"rehearsal"}


@pytest.mark.slow
def test_tables_into_a_pipe(found, folder):
    done = run(COMMAND, cwd=folder)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert done.stderr == "" and "\x1b" not in done.stdout
    assert max(len(line) for line in lines if not line.startswith("  python ")) <= 100
    assert f"0: {found['devices'][0]['name']} " in done.stdout
    assert f"Platform   {found['platform']}, {found['precision']}" in lines
    assert f"torch {version('torch')}, " in done.stdout
    assert f"Model hub  {NOWHERE} does not answer (--tiny rehearses without it)" in lines
    for name in TUTORIALS:
        row = rf"{re.escape(name)}\W.* [\d.]+   (full|LoRA|rehearsal)"
        assert len([line for line in lines if re.match(row, line)]) == 1
    for command in found["tutorials"][0]["commands"][-1:] + found["tutorials"][1]["commands"]:
        assert f"  {command}" in lines


# ------------------------------------------------------------------------------------------------ the hub


@pytest.mark.parametrize(
    "token, status, reachable, said",
    [
        (None, None, True, "none"),
        ("hf_good", 200, True, "accepted"),
        ("hf_bad", None, True, "refused"),
        ("hf_\u20ac", None, True, "refused"),  # no HTTP header can carry it
        ("hf_good", None, True, "not verified"),  # 404: a mirror that has no accounts
        ("hf_good", 503, False, "not verified"),
    ],
)
def test_hub_and_token(token, status, reachable, said, found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "HUB_TIMEOUT", TIMEOUT)  # the machine may be busy
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))  # not the tester's own
    with HubServer(tokens=["hf_good"]) as hub:
        hub.failing = {"^/api/whoami-v2$": status} if status else {}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        answer = ask_hub(check.HUB_TIMEOUT)
        deadline = perf_counter() + TIMEOUT
        while not hub.requests and perf_counter() < deadline:  # it is written down when the answer has gone out
            sleep(0.01)
        asked = [(request.path, request.token) for request in hub.requests]
    assert answer == {"endpoint": hub.url, "reachable": reachable, "token": said}
    assert asked == [("/api/whoami-v2", token if token and token.isascii() else "")]
    check.show({**found, "hub": answer})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert f"Token      {check.TOKENS[said]}" in lines
    answers = "answers" if reachable else "does not answer (--tiny rehearses without it)"
    assert f"Model hub  {hub.url} {answers}" in lines


@pytest.mark.slow
def test_the_token_is_never_shown(folder):
    with HubServer(tokens=["hf_secret"]) as hub:
        done = run(f"{COMMAND} --json", cwd=folder, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"})
        assert [request.token for request in hub.requests] == ["hf_secret"]
    assert json.loads(done.stdout)["hub"] == {"endpoint": hub.url, "reachable": True, "token": "not verified"}
    assert "secret" not in done.stdout + done.stderr


def test_hub_that_never_answers(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel connects, nobody reads
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = perf_counter()
        assert ask_hub(check.HUB_TIMEOUT)["reachable"] is False
        assert 1 < perf_counter() - start < 300


# ------------------------------------------------------------------------------------------------ other machines

GPU = {"name": "Tesla T4", "capability": (7, 5), "total": 15_828_320_256, "free": 15_500_000_000, "count": 1}
MOAI = """
import sys, types

import torch


def refuse(*_):
    raise RuntimeError("not on this platform")


torch.moreh = sys.modules["torch.moreh"] = types.ModuleType("torch.moreh")
torch.moreh.option = types.SimpleNamespace(enable_advanced_parallelization=lambda: print("parallel"))
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_name = lambda *_: "MoAI Device"
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=512 * 2**30)
torch.cuda.mem_get_info = torch.cuda.utilization = refuse
"""


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes torch believe in the GPU it is given, and returns what --json prints then."""

    def look(capsys, **changes):
        card = SimpleNamespace(**{**GPU, **changes})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: card.count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: f"{card.name} ({index})")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: card.capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index=0: (card.free, card.total))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
        monkeypatch.setattr(sys, "argv", ["check_accelerator.py", "--json"])
        check.main()
        return json.loads(capsys.readouterr().out)

    return look


@pytest.mark.slow
def test_t4(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "utilization", lambda index: 37)
    found = gpu(capsys)
    assert (found["platform"], found["precision"]) == ("CUDA", "float16")
    used = GPU["total"] - GPU["free"]
    values = {"memory_used": used, "memory_total": GPU["total"], "utilization": 37}
    assert found["devices"] == [{"name": "Tesla T4 (0)", **values}]
    methods = {row["name"].split(",")[0]: row["method"] for row in found["tutorials"]}
    assert methods["SmolLM2 135M"] == "full"
    assert methods["Mistral 7B"] == methods["Llama3 8B"] == methods["Llama 3.1 8B"] == "lora_4bit"
    assert methods["Llama3 70B"] == "rehearsal"


@pytest.mark.slow
def test_two_gpus_whose_driver_does_not_tell_the_utilization(gpu, capsys, monkeypatch):
    def utilization(index):
        raise ModuleNotFoundError("pynvml module not found, please install nvidia-ml-py")

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    found = gpu(capsys, count=2, capability=(9, 0), total=85_000_000_000, free=84_000_000_000)
    assert [device["name"] for device in found["devices"]] == ["Tesla T4 (0)", "Tesla T4 (1)"]
    assert [device["utilization"] for device in found["devices"]] == [None, None]
    assert found["precision"] == "bfloat16"
    assert {row["devices"] for row in found["tutorials"] if row["method"] != "rehearsal"} == {2}
    check.show(found)
    assert re.search(r"^1: Tesla T4 \(1\) +1\.0 GB +85\.0 GB +- *$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_moai_platform(folder, tmp_path, capsys):
    (tmp_path / "sitecustomize.py").write_text(MOAI)
    env = {"PYTHONPATH": str(tmp_path)}
    found = json.loads(run(f"{COMMAND} --json", cwd=folder, env=env).stdout)
    assert (found["platform"], found["precision"]) == ("MoAI", "bfloat16")
    values = {"memory_used": None, "memory_total": 512 * 2**30, "utilization": None}
    assert found["devices"] == [{"name": "MoAI Device", **values}]
    assert {row["method"] for row in found["tutorials"]} == {"full", "lora"}
    check.show(found)
    shown = capsys.readouterr().out
    assert "Monitor    moreh-smi, " in shown and "nvidia-smi" not in shown
    assert re.search(r"^0: MoAI Device +- +549\.8 GB +- *$", shown, re.MULTILINE)
    assert "  python tutorial/train_llama2.py\n" in shown


def test_notes(found, monkeypatch, tmp_path):
    row, device = found["tutorials"][0], found["devices"][0]
    idle = {**found, "platform": "CPU", "devices": [{**device, "memory_used": 0}]}
    idle["tutorials"] = [{**row, "memory": 1000, "disk_enough": True}]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.notes(idle) == []

    busy = {**idle, "devices": [{**device, "memory_used": device["memory_total"] - 999}]}
    assert check.notes(busy) == [f"Too little memory is free now for {row['name']}."]
    full = {**idle, "tutorials": [{**row, "memory": 1000, "disk_enough": False}]}
    assert check.notes(full) == [f"Too little disk is free here for {row['name']}."]

    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    os.chmod(tmp_path / "nvidia-smi", 0o755)
    (line,) = check.notes(idle)  # the wrong build of torch
    assert "nvidia-smi is here, but this torch sees no GPU" in line
    assert check.notes({**idle, "platform": "CUDA"}) == []


# ------------------------------------------------------------------------------------------------ the rule

PLANS = {  # GB of a device
    ("CUDA", 8.4, 1): {
        "Qwen3 4B": "lora_4bit",
        "SmolLM2 135M": "full",
        "Mistral 7B": "lora_4bit",
        "Llama2 13B": "rehearsal",
    },
    ("CUDA", 15.8, 1): {
        "SmolLM2 135M": "full",
        "Mistral 7B": "lora_4bit",
        "Llama3 8B": "lora_4bit",
        "Llama2 13B": "lora_4bit",
        "Llama 3.1 8B": "lora_4bit",
        "Llama3 70B": "rehearsal",
    },
    ("ROCm", 25.3, 1): {"Qwen3 4B": "lora", "Mistral 7B": "lora", "Llama2 13B": "lora_4bit", "Llama3 70B": "rehearsal"},
    ("CUDA", 85.0, 1): {"Mistral 7B": "lora", "Llama2 13B": "lora", "Llama3 70B": "lora_4bit"},
    ("CUDA", 150.0, 1): {"Mistral 7B": "full", "Llama3 8B": "lora"},
    ("CUDA", 85.0, 8): {"Mistral 7B": "full", "Llama2 13B": "full", "Llama3 70B": "lora", "Llama 3.1 8B": "full"},
    ("CUDA", 25.3, 8): {"Mistral 7B": "full", "Llama2 13B": "lora"},
    ("MoAI", 549.8, 1): {"Llama2 13B": "full", "Llama3 70B": "lora", "Llama 3.1 8B": "full"},
    ("MoAI", 68.7, 1): {"Mistral 7B": "lora"},
    ("CPU", 16.0, 1): {"SmolLM2 135M": "full", "Mistral 7B": "rehearsal"},
    ("CPU", 1000.0, 1): {"Mistral 7B": "rehearsal", "Llama 3.1 8B": "rehearsal"},
    ("CPU", 2.0, 1): {"SmolLM2 135M": "rehearsal"},
}


@pytest.mark.parametrize("platform, memory, devices", first_fast(1, PLANS))
def test_best_method(platform, memory, devices):
    expected = PLANS[platform, memory, devices]
    assert {name: method_of(name, platform, memory, devices) for name in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["MoAI", "CUDA", "CPU"])
@pytest.mark.parametrize("name", ["SmolLM2 135M", "Llama 3.1 8B", "Qwen3 4B"])
def test_more_memory_is_never_worse(name, platform):
    best = 0
    for memory in [*range(1, 60), *range(60, 3000, 30)]:
        method = method_of(name, platform, memory)
        assert METHODS.index(method) >= best
        best = METHODS.index(method)
    assert METHODS[best] == ("rehearsal" if platform == "CPU" and name != "SmolLM2 135M" else "full")


def test_disk():
    """Model, result and two checkpoints, of which the second is there while it is written."""
    lora, full = (row_of("Mistral 7B", "CUDA", memory)["disk"] for memory in (85.0, 1000.0))
    assert lora == pytest.approx(16e9 + 7 * 4 * 41_943_040, rel=0.01)
    assert full == pytest.approx(16e9 + 7_241_732_096 * (2 + 2 * 12), rel=0.01)
    enough = [row_of("Mistral 7B", "CUDA", 1000.0, disk_free=size)["disk_enough"] for size in (full - 1, full)]
    assert enough == [False, True]
    assert row_of("Mistral 7B", "CPU", 16.0, disk_free=1e9)["disk_enough"]  # a stand-in is small


# ------------------------------------------------------------------------------------------------ machines asked for


@pytest.mark.slow
def test_a_machine_that_is_not_here(folder, warm):
    words = "--devices 8 --device-memory 80"
    found = json.loads(warm(COMMAND, *words.split(), "--json", cwd=folder).stdout)
    assert [device["memory_total"] for device in found["devices"]] == [80_000_000_000] * 8
    assert (found["platform"], found["precision"]) == ("CUDA", "bfloat16")
    assert found["rate"] is None and found["disk_free"] is None and {*found["versions"].values()} == {None}
    llama2 = found["tutorials"][1]
    assert (llama2["method"], llama2["devices"], llama2["disk_enough"]) == ("full", 8, None)
    assert llama2["commands"][-1] == "torchrun --nproc-per-node 8 tutorial/train_llama2.py"
    shown = warm(COMMAND, *words.split(), cwd=folder).stdout
    assert "Llama2 13B" in shown and not any(name in shown for name in ("Packages", "Free disk", "Note"))


def test_a_model_of_ones_own(folder, warm):
    warm("python tutorial/download_mistral_7b.py --tiny --save-dir ./own", cwd=folder)
    words = "--model-name-or-path ./own --device-memory 24"
    (row,) = json.loads(warm(COMMAND, *words.split(), "--json", cwd=folder).stdout)["tutorials"]
    assert (row["name"], row["method"]) == ("./own", "full") and row["memory"] < 3e9
    commands = [
        "python dataset/prepare_llama2_dataset.py --model-name-or-path ./own",
        "python tutorial/train_llama2.py --model-name-or-path ./own",
    ]
    assert row["commands"] == commands
    assert warm(COMMAND, *words.split(), cwd=folder).stdout.splitlines()[-3:] == [
        "Commands:",
        *(f"  {c}" for c in commands),
    ]

    config = json.loads((folder / "own" / "config.json").read_text(encoding="utf-8"))
    (folder / "my large one").mkdir()
    large = {**config, "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    (folder / "my large one" / "config.json").write_text(json.dumps(large), encoding="utf-8")
    words = ["--model-name-or-path", "./my large one", "--device-memory"]
    done = warm(COMMAND, *words, 8, cwd=folder)
    assert done.stdout.splitlines()[-1].startswith("./my large one") and done.stdout.splitlines()[-1].endswith("none")
    fits = warm(COMMAND, *words, 80, cwd=folder).stdout
    assert "  python dataset/prepare_llama2_dataset.py --model-name-or-path './my large one'\n" in fits


@pytest.mark.parametrize(
    "words, said",
    [
        ("--devices 0 --device-memory 80", "--devices"),
        ("--devices -1 --device-memory 80", "--devices"),
        ("--device-memory 0", "--device-memory"),
        ("--device-memory -3", "--device-memory"),
        ("--device-memory nan", "--device-memory"),
        ("--device-memory many", "--device-memory"),
        ("--devices 8", "--device-memory 80"),
        ("--model-name-or-path llama9", "llama2, llama3, llama3_70b, mistral, gpt, llama3_1, qwen3"),
        ("--model-name-or-path ./empty", "./empty has no config.json"),
        ("--model-name-or-path ./damaged", "damaged"),
        ("--model-name-or-path ./unheard", "unheard"),
        ("--model-name-or-path ./impossible", "transformers"),
    ],
)
def test_bad_input(words, said, folder, warm):
    contents = {"empty": None, "damaged": "{", "unheard": '{"model_type": "unheard-of"}'}
    contents["impossible"] = '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3, "vocab_size": -5}'
    for name, text in contents.items():
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "config.json").write_text(text)
    tells(warm(COMMAND, *words.split(), cwd=folder, ok=None), said)


# ------------------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize("name", first_fast(1, TUTORIALS))
def test_commands_are_there(name, warm, folder):
    """Every script that may be named, and every option of it."""
    machines = [("CPU", 64.0), ("CPU", 0.5), ("MoAI", 9000.0), ("CUDA", 9000.0)]
    machines += [("CUDA", 1.5**n) for n in range(20)] if name in ("SmolLM2 135M", "Llama 3.1 8B") else []
    rows = [row_of(name, *machine) for machine in machines]
    commands = {command for row in rows for command in row["commands"]}
    assert len(commands) >= 4
    options = {}
    for command in commands:
        _, script, *words = command.split()
        options.setdefault(script, set()).update(word for word in words if word.startswith("--"))
        assert all((ROOT / word).exists() for word in words if word.startswith("dataset/"))
    assert len(options) == 3
    for script, names in options.items():
        text = warm(f"python {script} --help", cwd=folder).stdout
        assert names <= set(re.findall(r"--[\w-]+", text)), script


@pytest.mark.parametrize("name", first_fast(1, ["Llama3 8B", "Llama 3.1 8B", "Qwen3 4B"]))
def test_rehearsal(name, warm, folder):
    """The commands for a machine on which nothing fits, with one epoch of ten: they touch nothing of a real model."""
    tutorial = TUTORIALS[name]
    commands = row_of(name, "CPU", 0.5)["commands"]
    if name == "Llama 3.1 8B" and not HAS_LLAMA3_1:
        tells(warm(commands[0], cwd=folder, ok=None), "too old for this model", "transformers>=4.43")
        return
    if name == "Qwen3 4B" and not HAS_QWEN3:
        tells(warm(commands[0], cwd=folder, ok=None), "too old for this model", "transformers>=4.51")
        return
    for command in commands:
        said = warm(command.replace("--epochs 10", "--epochs 1"), cwd=folder).stdout
    assert said.splitlines()[-1] == f"Model saved in ./rehearsal/{tutorial.kind}/trained"
    losses = [float(loss) for loss in re.findall(r"Held-out loss: (.*)", said)]
    assert losses[-1] < losses[0]
    assert {path.name for path in folder.iterdir()} == {*FOLDERS, "rehearsal"}


@pytest.mark.slow
def test_rehearsals_share_no_directory():
    commands = [row_of(name, "CPU", 0.1)["commands"] for name in TUTORIALS]
    places = [re.findall(r"\./rehearsal/\w+/", " ".join(each)) for each in commands]
    assert all(len({*each}) == 1 for each in places) and len({each[0] for each in places}) == len(TUTORIALS)
