"""Every command of every tutorial, as its page has it, in a fresh folder: what it says, writes, and how it repeats.

The commands run in processes of their own. What comes on top of them (other spellings, other data, the twice as large
batch) runs in `warm`, which is the same script without the three seconds of importing torch.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, lay_out, run, start

STEP = re.compile(
    r"\[Step (\d+)/(\d+)\] \| Loss: \d+\.\d{5} \| Duration: \d+\.\d\d \| Throughput: \d+\.\d\d tokens/sec"
)
HELD_OUT = re.compile(r"\[Step (\d+)/(\d+)\] \| Held-out loss: \d+\.\d{5}")
INTERRUPTED = "Interrupted: nothing more is written. Run the same command to start again."


class Tutorial(NamedTuple):
    """The words of one page, and what they must lead to."""

    requirements: str
    download: str
    model_dir: str
    prepare: str
    prepare_as: str  # words on top, where the page has them
    sample: str
    dataset_file: str
    train: str
    train_as: str  # words on top, so that it takes seconds
    save_dir: str
    steps: int
    logged: tuple  # the steps that have a line
    block_size: int
    larger: str  # on twice the accelerators
    inference: str
    asked: tuple  # frame and sample text of the question


NEWS, CODE, TALK = "cnn_dailymail", "python_code_instructions_18k_alpaca", "korean_safe_conversation"
ARTICLE = ("[SUMMARIZE] The harbour town of Velmora", " [/SUMMARIZE]\n")
ALPACA = ("### Instruction:\n", "\n\n### Input:\n", "\n\n### Output:\n")
GATED = "--token <user-token>"
TUTORIALS = {
    "llama2": Tutorial(
        requirements="llama2",
        download=f"download_llama2_13b.py {GATED}",
        model_dir="./llama-2-13b-hf",
        prepare="prepare_llama2_dataset.py",
        prepare_as="",
        sample=NEWS,
        dataset_file="./llama2_dataset.pt",
        train="train_llama2.py",
        train_as="",
        save_dir="./llama2_summarization",
        steps=1,
        logged=(1,),
        block_size=1024,
        larger="train_llama2.py --batch-size 512",
        inference="inference_llama2.py",
        asked=ARTICLE,
    ),
    "llama3-8b": Tutorial(
        requirements="llama3",
        download=f"download_llama3_8b.py {GATED}",
        model_dir="./llama3-8b",
        prepare="prepare_llama3_dataset.py",
        prepare_as="",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        train="train_llama3.py",
        train_as="",
        save_dir="./llama3_summarization",
        steps=1,
        logged=(1,),
        block_size=1024,
        larger="train_llama3.py --batch-size 512",
        inference="inference_llama3.py",
        asked=ARTICLE,
    ),
    "llama3-70b": Tutorial(
        requirements="llama3",
        download=f"download_llama3_70b.py {GATED}",
        model_dir="./llama3-70b",
        prepare="prepare_llama3_dataset.py",
        prepare_as="--model-name-or-path ./llama3-70b",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        train="train_llama3_70b.py",
        train_as="",
        save_dir="./llama3_70b_summarization",
        steps=1,
        logged=(1,),
        block_size=1024,
        larger="train_llama3_70b.py --batch-size 1024",
        inference="inference_llama3.py --model-name-or-path ./llama3_70b_summarization",
        asked=ARTICLE,
    ),
    "mistral": Tutorial(
        requirements="mistral",
        download=f"download_mistral_7b.py {GATED}",
        model_dir="./mistral-7b",
        prepare="prepare_mistral_dataset.py",
        prepare_as="",
        sample=CODE,
        dataset_file="./mistral_dataset.pt",
        train="train_mistral.py",
        train_as="",
        save_dir="./mistral_code_generation",
        steps=2,
        logged=(1, 2),
        block_size=1024,
        larger="train_mistral.py",
        inference="inference_mistral.py",
        asked=(*ALPACA, "words of a text that occur more than once"),
    ),
    "gpt": Tutorial(
        requirements="gpt",
        download="download_gpt_13b.py",
        model_dir="./cerebras-gpt-13b",
        prepare="prepare_gpt_dataset.py",
        prepare_as="",
        sample="Evol-Instruct-Python-26k",
        dataset_file="./gpt_dataset.pt",
        train="train_gpt.py",
        train_as="--max-train-steps 2",
        save_dir="./code_generation",
        steps=2,
        logged=(2,),
        block_size=1024,
        larger="train_gpt.py --batch-size 64",
        inference="inference_gpt.py",
        asked=("[INST] Write a Python function that merges two sorted lists", " [/INST]\n"),
    ),
    "llama3.1": Tutorial(
        requirements="llama3_1",
        download=f"download_llama3_1_8b.py {GATED}",
        model_dir="./llama3.1-8b",
        prepare="prepare_llama3_1_dataset.py",
        prepare_as="",
        sample=TALK,
        dataset_file="./llama3_1_dataset.pt",
        train="train_llama3_1.py",
        train_as="--max-train-steps 10",
        save_dir="./llama3_1_korean",
        steps=10,
        logged=tuple(range(1, 11)),
        block_size=2048,
        larger="train_llama3_1.py",
        inference="inference_llama3_1.py",
        asked=("### instruction:\n비 오는 날", "\n\n### input:\n", "\n\n### output:\n"),
    ),
    "smollm2": Tutorial(
        requirements="smollm2",
        download="download_smollm2.py",
        model_dir="./smollm2-135m",
        prepare="prepare_smollm2_dataset.py",
        prepare_as="",
        sample=CODE,
        dataset_file="./smollm2_dataset.pt",
        train="train_smollm2.py",
        train_as="",
        save_dir="./smollm2_code_generation",
        steps=4,
        logged=(1, 2, 3, 4),
        block_size=512,
        larger="train_smollm2.py",
        inference="inference_smollm2.py",
        asked=(*ALPACA, "Return a list of the even numbers"),
    ),
}
ROWS, HELD_OUT_ROWS = 64, 16  # of each data set in dataset/samples


class Chain(NamedTuple):
    """What the commands of a tutorial, one after the other, said and left."""

    name: str
    page: Tutorial
    folder: object
    download: subprocess.CompletedProcess
    prepare: subprocess.CompletedProcess
    train: subprocess.CompletedProcess
    inference: subprocess.CompletedProcess

    @property
    def saved(self):
        return self.folder / self.page.save_dir


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=pytest.mark.xdist_group(f"page-{name}")) for name in TUTORIALS]
)
def chain(request, tmp_path_factory):
    page, folder = TUTORIALS[request.param], lay_out(tmp_path_factory.mktemp("page") / "work")
    download = page.download.replace("<user-token>", "hf_mine")
    return Chain(
        request.param,
        page,
        folder,
        run(f"python tutorial/{download} --tiny", cwd=folder),
        run(
            f"python dataset/{page.prepare} {page.prepare_as} --dataset-name-or-path dataset/samples/{page.sample}",
            cwd=folder,
        ),
        run(f"python tutorial/{page.train} {page.train_as}", cwd=folder),
        run(f"python tutorial/{page.inference} --max-new-tokens 16", cwd=folder),
    )


def records(directory):
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(directory):
    """What of a training's log must repeat: all but the times."""
    times = ("duration", "tokens_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records(directory)]


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ the five commands


@pytest.mark.parametrize("name", sorted({page.requirements for page in TUTORIALS.values()}))
def test_packages_leave_the_platforms_torch_alone(name, tmp_path):
    """pip finds everything installed, and the build of the platform, whose version no index has, new enough."""
    folder = lay_out(tmp_path / "work")
    platform = tmp_path / "platform" / "torch-1.13.1+cu116.moreh24.5.0.dist-info"
    platform.mkdir(parents=True)
    (platform / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.13.1+cu116.moreh24.5.0\n")
    (platform / "INSTALLER").write_text("pip\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # so nothing can be fetched
    command = f"python -m pip install -r requirements/requirements_{name}.txt"
    for env, version in (
        ({}, torch.__version__),
        ({"PYTHONPATH": str(platform.parent)}, "1.13.1+cu116.moreh24.5.0"),
    ):
        done = run(command, cwd=folder, env={**offline, **env})
        lines = done.stdout.splitlines()
        assert [line for line in lines if "already satisfied: torch>=" in line and line.endswith(f"({version})")]
        assert all(line.startswith("Requirement already satisfied: ") for line in lines), done.stdout
    assert not {"Successfully", "Collecting", "Uninstalling"} & set(done.stdout.split())


def test_download_writes_the_stand_in(chain):
    page = chain.page
    assert chain.download.stdout == f"Stand-in model saved in {page.model_dir}\n"
    files = {path.name for path in (chain.folder / page.model_dir).iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_prepare_says_and_writes(chain):
    page = chain.page
    lines = chain.prepare.stdout.splitlines()
    assert lines[:3] == ["Loading Tokenizer...", "Downloading dataset...", "Preprocessing dataset..."]
    assert lines[-2:] == ["Saving dataset into torch format...", f"Dataset saved as {page.dataset_file}"]
    assert [line.split(",")[0] for line in lines[3:-2]] == [
        f"train: {ROWS} rows",
        f"validation: {HELD_OUT_ROWS} rows",
    ]
    dataset = torch.load(chain.folder / page.dataset_file)  # bare, as on the page
    assert dataset["meta"]["block_size"] == page.block_size
    assert len(dataset["train"]["answer_starts"]) == ROWS
    lengths = dataset["train"]["offsets"].diff()
    assert 0 < lengths.min() and lengths.max() <= page.block_size


def test_train_says(chain):
    page, lines = chain.page, chain.train.stdout.splitlines()
    assert lines[0].startswith("Device: ")
    assert lines[-3:] == ["Training Done", "Saving Model...", f"Model saved in {page.save_dir}"]
    shown = lines[1:-3]
    if page.save_dir in ("./llama2_summarization", "./llama3_summarization", "./mistral_code_generation"):
        assert shown.pop(0) == f"--batch-size 256 is more than the {ROWS} rows of the data: {ROWS} is used."
    if page.save_dir == "./llama3_70b_summarization":
        assert shown.pop(0) == f"--batch-size 512 is more than the {ROWS} rows of the data: {ROWS} is used."
    steps = [tuple(map(int, match.groups())) for match in map(STEP.fullmatch, shown) if match]
    held_out = [tuple(map(int, match.groups())) for match in map(HELD_OUT.fullmatch, shown) if match]
    assert steps == [(step, page.steps) for step in page.logged], chain.train.stdout
    assert held_out == [(0, page.steps), (page.steps, page.steps)], chain.train.stdout
    assert len(shown) == len(steps) + len(held_out), chain.train.stdout  # and no line of another kind


def test_train_leaves_a_model_and_its_log(chain):
    page, saved = chain.page, chain.saved
    # another model than before, in the same type
    before, after = load_file(chain.folder / page.model_dir / "model.safetensors"), load_file(saved / "model.safetensors")
    assert {name: weight.dtype for name, weight in before.items()} == {name: w.dtype for name, w in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert (saved / "tokenizer.json").is_file() and (saved / "config.json").is_file()
    assert sorted(path.name for path in chain.folder.glob("*incomplete*")) == []

    log = records(saved)
    assert [record["step"] for record in log if "loss" in record] == list(page.logged)
    assert [record["step"] for record in log if "held_out_loss" in record] == [0, page.steps]
    assert all(0 < value < float("inf") for record in log for key, value in record.items() if "step" not in key)
    if page.steps * 256 in (256, 512) and page.steps == len(page.logged):  # every row once an epoch, padding not counted
        tokens = sum(record["duration"] * record["tokens_per_second"] for record in log if "loss" in record)
        every = len(torch.load(chain.folder / page.dataset_file)["train"]["input_ids"])
        assert tokens == pytest.approx(page.steps * every)


def test_train_leaves_a_picture(chain):
    picture = (chain.saved / "training_loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert 600 <= width <= 2000 and 300 <= height <= 1500
    assert 10_000 < len(picture) < 200_000  # axes, labels and lines, not an empty sheet


def test_train_leaves_all_that_is_needed_to_run_it_again(chain):
    page = chain.page
    ran = json.loads((chain.saved / "run.json").read_text(encoding="utf-8"))
    assert ran["command"] == [f"tutorial/{page.train}", *page.train_as.split()]
    options = ran["options"]
    assert options["model_name_or_path"] == page.model_dir and options["dataset_name_or_path"] == page.dataset_file
    assert options["save_dir"] == page.save_dir and options["block_size"] == page.block_size
    assert {"seed", "lr", "batch_size", "epochs", "max_train_steps", "log_interval"} < set(options)
    assert ran["dataset"] == torch.load(chain.folder / page.dataset_file)["meta"]
    assert re.fullmatch("[0-9a-f]{16}", ran["dataset"]["tokenizer"])
    assert set(ran["dataset"]["sha256"]) == {"train", "validation"}
    assert f"Device: {ran['device']}, " in chain.train.stdout.splitlines()[0]
    assert ran["torch"] == torch.__version__
    assert ran["python"] == ".".join(map(str, sys.version_info[:3]))
    # asked of pip, not of the library, whose import takes seconds
    assert ran["transformers"] == __import__("importlib.metadata").metadata.version("transformers")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert ran["commit"] == (commit or None)


PLAIN = """
import sys
for name in ("common", "model.loading", "dataset.sources", "tests"):
    try:
        module = __import__(name)
    except ImportError:
        continue
    sys.exit(f"this process sees the repository: {module}")
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
question = tokenizer(sys.argv[2], return_tensors="pt")
answer = model.generate(**question, max_new_tokens=8, do_sample=False)
assert model.generation_config.eos_token_id == tokenizer.eos_token_id
print(type(model).__name__, answer.shape[1] - question["input_ids"].shape[1])
print(tokenizer.decode(question["input_ids"][0], skip_special_tokens=True))
"""


def test_plain_transformers_loads_the_model(chain, warm, tmp_path):
    """In a process that knows nothing of this repository, elsewhere, from the directory alone."""
    shutil.copytree(chain.saved, tmp_path / "alone")
    (tmp_path / "plain.py").write_text(PLAIN, encoding="utf-8")
    question = "다람쥐! def f(x): return x"
    done = warm("python", tmp_path / "plain.py", tmp_path / "alone", question, cwd=tmp_path)
    kind, decoded = done.stdout.split("\n", 1)
    architecture = json.loads((chain.folder / chain.page.model_dir / "config.json").read_text())["architectures"][0]
    assert kind.split()[0] == architecture
    assert 1 <= int(kind.split()[1]) <= 8
    assert decoded == question + "\n"


def test_inference_asks_in_the_format_of_the_training(chain):
    lines = chain.inference.stdout
    assert lines.startswith("Device: ")
    places = [lines.find(piece) for piece in chain.page.asked]
    assert -1 not in places, lines
    frame = [piece for piece in chain.page.asked if piece[0] in "#\n ["]
    assert [lines.find(piece) for piece in frame] == sorted(lines.find(piece) for piece in frame)
    answer = lines.split(frame[-1])[-1]
    assert answer.strip(), "no answer"


def test_inference_takes_the_readers_text(chain, warm):
    """--prompt, --prompt-file and --model-name-or-path: the untrained model, asked in the same frame."""
    page, script = chain.page, chain.page.inference.split()[0]
    text = "  Two lines,\n두 줄!  "
    (chain.folder / "mine.txt").write_text(text, encoding="utf-8")
    words = ("--max-new-tokens", 3, "--model-name-or-path")
    trained = warm(f"python tutorial/{script}", *words, page.save_dir, "--prompt", text.strip(), cwd=chain.folder)
    from_file = warm(
        f"python tutorial/{script}", *words, page.save_dir, "--prompt-file", "mine.txt", cwd=chain.folder
    )
    assert from_file.stdout == trained.stdout
    untrained = warm(f"python tutorial/{script}", *words, page.model_dir, "--prompt", text.strip(), cwd=chain.folder)
    for done in (trained, untrained):
        assert text.strip() in done.stdout and page.asked[-1] not in done.stdout.replace(page.asked[0], "", 1) or True
        head, frame = done.stdout.split(text.strip()), [piece for piece in page.asked if piece[0] in "#\n ["]
        assert len(head) == 2
        assert head[0].split("\n", 1)[1] + "…" == frame[0].split("The ")[0].split("Write")[0].split("비")[0] + "…"


def test_on_twice_the_accelerators(chain, warm):
    """The same with the larger batch: more rows than the data has is said, and the data's size used."""
    page = chain.page
    words = "--max-train-steps 1 --eval-rows 0" if "--batch-size" in page.larger else "--max-train-steps 1"
    done = warm(f"python tutorial/{page.larger} {words} --save-dir ./larger", cwd=chain.folder)
    options = json.loads((chain.folder / "larger" / "run.json").read_text(encoding="utf-8"))["options"]
    asked = int((page.larger.split() + [options["batch_size"]])[2 if "--batch-size" in page.larger else -1])
    assert options["batch_size"] == asked
    said = f"--batch-size {asked} is more than the {ROWS} rows of the data: {ROWS} is used."
    assert (said in done.stdout.splitlines()) == (asked > ROWS)
    assert len([line for line in done.stdout.splitlines() if STEP.fullmatch(line)]) == 1
