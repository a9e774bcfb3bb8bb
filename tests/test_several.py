"""torchrun: several processes train as one does, save what one saves, and say what one would say."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.fsdp
import transformers

from common.support.model_dir import ModelSource
from tests import plan_tables
from tests.conftest import ROOT, TIMEOUT, environment, lay_out
from tests.helpers import adapter_weights, contents, error_of, quantizes, records

HAS_FSDP2 = hasattr(getattr(torch.distributed, "fsdp", None), "fully_shard")
needs_fsdp2 = pytest.mark.skipif(not HAS_FSDP2, reason="torch before 2.6 can't shard so")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
STEPS = 20
WORDS = "--batch-size 7 --log-interval 1 --eval-step 10 --eval-rows 9 --micro-batch-tokens 200 --lr 1e-3"
LORA = "--use-lora --lora-r 4"
KINDS = {"llama3": "llama3-8b", "mistral": "mistral-7b", "gpt": "cerebras-gpt-13b", "smollm2": "smollm2-135m"}
CASES = {
    "llama": "llama3",
    "llama-lora": f"llama3 {LORA} --gradient-checkpointing",
    "mistral": "mistral --gradient-checkpointing",
    "gpt": "gpt",  # its embeddings are its output layer, like the next one's
    "tied": "smollm2 --gradient-checkpointing",
    "tied-lora": f"smollm2 {LORA}",
}
if quantizes():
    CASES["4-bit"] = f"llama3 {LORA} --load-in-4bit"
CUT = {"cut": "llama3 --save-steps 4", "cut-lora": f"llama3 {LORA} --save-steps 4"}  # in the tenth step
REFUSED = {"mixtral": "hold each expert by itself", "of-bin": r"in \.bin files"}


def case(name, words, **more):
    kind, _, options = words.partition(" ")
    own = WORDS if kind != "llama3" else f"{WORDS} --block-size 128"
    return {"name": name, "words": f"tutorial/train_{kind}.py {own} --max-train-steps {STEPS} {options}", **more}


def torchrun(processes, *words, cwd, timeout=TIMEOUT, **env):
    """What `torchrun --nproc-per-node` has ended with; to be called with what stands behind it."""
    command = [*TORCHRUN, "--nproc-per-node", str(processes), *map(str, words)]
    env = environment(HF_HOME=str(cwd / ".hf_home"), **env)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def prepared(warm, tmp_path_factory):
    """A working directory with the stand-ins and their data, in rows of unequal length."""
    folder = lay_out(tmp_path_factory.mktemp("several") / "work")
    for kind, directory in KINDS.items():
        sample = "cnn_dailymail" if kind == "llama3" else "python_code_instructions_18k_alpaca"
        sample = "Evol-Instruct-Python-26k" if kind == "gpt" else sample
        download = {"llama3": "llama3_8b", "mistral": "mistral_7b", "gpt": "gpt_13b"}.get(kind)
        if download:
            warm(f"python tutorial/download_{download}.py --tiny", cwd=folder)
        else:
            from model.tiny import write_tiny

            write_tiny(kind, folder / directory)
        words = f"--dataset-name-or-path dataset/samples/{sample} --block-size 128"
        warm(f"python dataset/prepare_{kind}_dataset.py {words}", cwd=folder)
    return folder


def copy_of(prepared, target):
    shutil.copytree(prepared, target, symlinks=True)
    return target


@pytest.fixture(scope="module")
def one(prepared, warm, tmp_path_factory):
    """The directory in which one process has run all cases."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("one") / "work")
    cases = [case(name, words) for name, words in CASES.items()]
    cases += [case(name, words, cut=10) for name, words in CUT.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    warm(f"python {ROOT}/tests/several.py cases.json", cwd=folder)
    return folder


def made_by(processes, one, prepared, folder):
    """The same by several processes; they also go on from where one process was cut, and meet what they refuse."""
    copy_of(prepared, folder)
    write_mixtral(folder)
    write_bin(folder)
    for name in CUT:
        (folder / f"{name}-of-1").mkdir()
        shutil.copytree(one / name / "saved", folder / f"{name}-of-1" / "saved")
    cases = [case(name, words, file=200_000 if name == "llama" else 10**9) for name, words in CASES.items()]
    cases += [case(name, words, cut=10) for name, words in CUT.items()]
    cases += [case(f"{name}-of-1", words) for name, words in CUT.items()]
    cases += [case(name, f"llama3 --model-name-or-path ./{name}") for name in REFUSED]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = torchrun(processes, ROOT / "tests" / "several.py", "cases.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "printed").write_text(done.stdout)
    (folder / "errors").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def two(one, prepared, tmp_path_factory):
    return made_by(2, one, prepared, tmp_path_factory.mktemp("two") / "work")


@pytest.fixture(scope="module")
def four(one, prepared, tmp_path_factory):
    return made_by(4, one, prepared, tmp_path_factory.mktemp("four") / "work")


FOLDERS = [pytest.param(name, marks=[needs_fsdp2, pytest.mark.slow]) for name in ("two", "four")]


@pytest.fixture(params=FOLDERS)
def several(request):
    return request.getfixturevalue(request.param)


def write_mixtral(folder):
    """A mixture of experts with the tokenizer of Llama 3's stand-in."""
    shutil.copytree(folder / "llama3-8b", folder / "mixtral")
    tokens = json.loads((folder / "llama3-8b" / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=tokens, num_key_value_heads=2, num_local_experts=2, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "mixtral")


def write_bin(folder):
    shutil.copytree(folder / "llama3-8b", folder / "of-bin")
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder / "of-bin").state_dict()
    torch.save(weights, folder / "of-bin" / "pytorch_model.bin")
    (folder / "of-bin" / "model.safetensors").unlink()


def seen(folder, name):
    """What each process has seen, the first one's first."""
    files = sorted((folder / name).glob("seen-*.json"))
    return [json.loads(file.read_text()) for file in files]


def weights(folder, name, process=0, what="weights"):
    return torch.load(folder / name / f"{what}-{process}.pt", weights_only=True)


def same_losses(folder, other, name, other_name=""):
    """Assert that two logs tell of the same steps, and of losses that differ in the order of a sum at most."""
    logs = records(folder / name / "saved"), records(other / (other_name or name) / "saved")
    keys = ("loss", "held_out_loss")
    one, several = ([(line["step"], key, line[key]) for line in log for key in keys if key in line] for log in logs)
    assert [line[:2] for line in one] == [line[:2] for line in several]
    assert [line[2] for line in one] == pytest.approx([line[2] for line in several], abs=2e-5)  # logs have six digits
    return [line[2] for line in one if line[1] == "loss"]


def near(one, other, limit=1e-4):
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < limit


@pytest.mark.parametrize("name", CASES)
def test_they_train_as_one_does(name, one, several):
    """The same rows in each step, each once; the same losses; the same weights, which all hold alike."""
    of_one, of_all = seen(one, name)[0], seen(several, name)
    assert len(of_all) == (2 if "two" in str(several) else 4) and not any(process["error"] for process in of_all)
    for step, rows in enumerate(of_one["rows"]):
        assert sorted(row for process in of_all for row in process["rows"][step]) == rows and len(rows) == 7
        assert len({process["micro_batches"][step] for process in of_all}) == 1
        assert all(process["rows"][step] for process in of_all)
    assert len(of_one["rows"]) == STEPS
    losses = same_losses(one, several, name)
    assert losses[-1] < losses[0] - 0.01
    trained, before = weights(one, name), weights(one, name, what="loaded")
    near(trained, weights(several, name))
    assert max(float((trained[weight] - before[weight]).abs().max()) for weight in trained) > 0.005
    for process in range(1, len(of_all)):
        alike = weights(several, name, process)
        assert all(torch.equal(weight, alike[other]) for other, weight in weights(several, name).items())


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_in_slices_is_the_model(name, one, several):
    """To the last bit: weights, RoPE's frequencies, a new adapter."""
    if name == "4-bit":
        pytest.skip("each process holds it whole, as one does")
    loaded, expected = weights(several, name, what="loaded"), weights(one, name, what="loaded")
    assert loaded.keys() == expected.keys()
    assert any("inv_freq" in key or "wpe" in key for key in expected)
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in expected.items())


@pytest.mark.parametrize("name", [name for name, words in CASES.items() if "--use-lora" not in words])
def test_the_saved_model_is_what_one_process_saves(name, one, several):
    saved, expected = several / name / "saved", one / name / "saved"
    assert ModelSource(saved).tensors and not list(saved.glob("sharded")) and not list(saved.parent.glob(".*"))
    of_both = [{key: (e["dtype"], e["shape"]) for key, e in ModelSource(d).tensors.items()} for d in (saved, expected)]
    assert of_both[0] == of_both[1]
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((saved / file).read_text()) == json.loads((expected / file).read_text())
    opened = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype="auto")
    trained = {key[len("model.") :]: weight for key, weight in weights(several, name).items()}
    assert all(torch.equal(dict(opened.named_parameters())[key], w.to(opened.dtype)) for key, w in trained.items())
    files = {path.name for path in saved.glob("model*")}
    if name == "llama":
        index = json.loads((saved / "model.safetensors.index.json").read_text())
        assert {*index["weight_map"].values(), "model.safetensors.index.json"} == files and len(files) > 2
        assert index["weight_map"].keys() == ModelSource(saved).tensors.keys()
    else:
        assert files == {"model.safetensors"}


@pytest.mark.parametrize("name", [name for name, words in CASES.items() if "--use-lora" in words])
def test_the_saved_adapter_is_the_one_in_all_memories(name, one, several):
    saved, expected = adapter_weights(several / name / "saved"), adapter_weights(one / name / "saved")
    near(saved, expected)
    live = {key.replace("model.", "", 1): weight for key, weight in weights(several, name).items()}
    live = {key.replace(".default", ""): weight for key, weight in live.items()}
    assert live.keys() == saved.keys() and all(torch.equal(weight, saved[key]) for key, weight in live.items())
    assert all(bool(weight.any()) for key, weight in saved.items() if "lora_B" in key)


@pytest.mark.parametrize("name", CUT)
def test_several_go_on_where_one_was_cut(name, one, several):
    kind = {"cut": "llama", "cut-lora": "llama-lora"}[name]
    assert [len(process["rows"]) for process in seen(several, f"{name}-of-1")] == [STEPS - 8] * len(seen(several, name))
    same_losses(one, several, kind, f"{name}-of-1")
    near(weights(one, kind), weights(several, f"{name}-of-1"))


@pytest.mark.parametrize("name", CUT)
def test_one_goes_on_where_several_were_cut(name, one, several, warm, prepared, tmp_path):
    folder = copy_of(prepared, tmp_path / "work")
    (folder / name).mkdir()
    shutil.copytree(several / name / "saved", folder / name / "saved")
    (folder / "cases.json").write_text(json.dumps([case(name, CUT[name])]))
    warm(f"python {ROOT}/tests/several.py cases.json", cwd=folder)
    kind = {"cut": "llama", "cut-lora": "llama-lora"}[name]
    [process] = seen(folder, name)
    assert process["rows"] == seen(one, kind)[0]["rows"][8:]
    same_losses(one, folder, kind, name)
    near(weights(one, kind), weights(folder, name))


@pytest.mark.parametrize("name", REFUSED)
def test_weights_of_which_none_can_read_a_part(name, several):
    for process in seen(several, name):
        assert re.search(REFUSED[name], process["error"]) and "\n" not in process["error"]
        assert process["rows"] == []


def test_the_first_one_alone_prints(several):
    """Each line once, and nothing on the way of errors but the bars and torchrun's own."""
    text = (several / "printed").read_text()
    total = len(CASES) * STEPS + len(CUT) * (9 + STEPS - 8)
    assert len(re.findall(r"^\[Step \d+/\d+\] \| Loss:", text, re.M)) == total
    assert text.count("Model saved in") == len(CASES) + len(CUT)
    assert f"maximum over {len(seen(several, 'llama'))} processes" in text
    errors = [
        line for line in re.split(r"[\n\r]", (several / "errors").read_text()) if not re.search("step/s|s/step", line)
    ]
    errors = [line for line in errors if line.strip() and "torch/distributed/run.py" not in line]
    assert not [line for line in errors if "Writing model shards" not in line and "Loading weights" not in line], errors


# ------------------------------------------------------------------------------------------------ what goes over wires


WIRES = {"full": "--gradient-checkpointing on", "lora": f"{LORA} --gradient-checkpointing on"}
if quantizes():
    WIRES["lora_4bit"] = f"{LORA} --load-in-4bit"


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("method", WIRES)
def test_what_moves_is_what_the_page_computes(method, work):
    """The bytes that a process receives in a step: the formula of the table in tutorial/multi_gpu.md."""
    words = f"tutorial/train_llama3.py {WORDS} --block-size 128 --max-train-steps 3 {WIRES[method]}"
    done = torchrun(2, ROOT / "tests" / "received.py", *words.split(), cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads((work / "received.json").read_text())
    assert len(counted["steps"]) == 3
    for received, micro_batches in counted["steps"]:
        expected = plan_tables.received(method, 2, micro_batches, counted["weights"], counted["adapter"])
        assert micro_batches > 1 and received == pytest.approx(expected, rel=0.01)


# ------------------------------------------------------------------------------------------------ what goes wrong

TRAIN = f"tutorial/train_llama3.py {WORDS} --block-size 128 --max-train-steps {STEPS} --save-steps 4"
APART = ROOT / "tests" / "apart.py"


def ours(done):
    """Assert that torchrun has ended for an error; our lines of it."""
    assert done.returncode == 1 and done.stderr.count("Traceback (most") == 1, done.stdout + done.stderr  # its own
    return re.findall(r"(?:^|[\r\n]|step/s\])(error: .*|Stopped.*|Interrupted.*)", done.stderr)


def copy_to(folder, prepared):
    for name in ("llama3-8b", "llama3_dataset.pt"):
        path = prepared / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
    return folder


@pytest.fixture
def work(folder, prepared):
    """A fresh working directory with Llama 3's stand-in and its data."""
    return copy_to(folder, prepared)


@needs_fsdp2
def test_fewer_rows_than_processes(work):
    before = contents(work)
    [line] = ours(torchrun(2, *TRAIN.split(), "--batch-size", "1", cwd=work))
    assert (
        line.startswith("error: --batch-size 1 has fewer examples than there are processes (2)")
        and contents(work) == before
    )


@needs_fsdp2
@pytest.mark.parametrize(
    "what", ["./llama3-8b", pytest.param("./llama3_dataset.pt", marks=pytest.mark.slow)], ids=["model", "data"]
)
def test_processes_that_see_different_files(what, work, warm):
    """Before anything is loaded, by the first, though the second one is the one to blame."""
    if what == "./llama3-8b":
        shutil.copytree(work / "llama3-8b", work / "other")
        content = bytearray((work / "other" / "model.safetensors").read_bytes())
        content[-4096:] = bytes(4096)
        (work / "other" / "model.safetensors").write_bytes(content)
    else:
        sample = "--dataset-name-or-path dataset/samples/cnn_dailymail --save-path ./other --block-size 127"
        warm(f"python dataset/prepare_llama3_dataset.py {sample}", cwd=work)
    given = f"--model-name-or-path ./llama3-8b --dataset-name-or-path ./llama3_dataset.pt --save-dir {work}/saved"
    done = torchrun(2, APART, 1, f"word {what} ./other", *TRAIN.split(), *given.split(), cwd=work)
    [line] = ours(done)
    assert line.startswith("error: The processes read different files: the") and what in line
    assert "Memory:" not in done.stdout and not (work / "saved").exists()


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1])
def test_a_mistake_that_one_process_alone_meets(alone, work):
    began = time.monotonic()
    words = [*TRAIN.split(), "--model-name-or-path", "./llama3-8b"]
    done = torchrun(2, APART, alone, "word ./llama3-8b ./nothing", *words, cwd=work)
    assert ours(done) == [
        "error: The model directory ./nothing does not exist: Run python tutorial/download_llama3_8b.py first."
    ]
    assert time.monotonic() - began < 300


# A script on a machine of which something is said.
SAID = """
import runpy, sys, types
import torch
import torch.distributed.fsdp

_, what, *sys.argv = sys.argv
if what == "moai":
    torch.moreh = sys.modules["torch.moreh"] = types.ModuleType("torch.moreh")
elif what == "old":
    torch.distributed.fsdp.__dict__.pop("fully_shard", None)
else:
    torch.cuda.device_count = lambda: 1
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "what, line",
    [
        ("moai", r"MoAI Platform splits the work by itself: start one process, python tutorial/train_llama3\.py, with"),
        (
            "old",
            r"torchrun with several processes needs torch 2\.6 or newer, and \S+ is installed\. Start one process, ",
        ),
        pytest.param("gpu", r"2 processes on a machine with 1 GPUs, .*--nproc-per-node 1\.", marks=needs_fsdp2),
    ],
)
def test_where_several_processes_can_not_train(what, line, work, warm):
    """The first of two: it is told by what torchrun tells it, and has not yet met the other."""
    (work / "said.py").write_text(SAID)
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = warm(f"python said.py {what} {TRAIN}", cwd=work, env=env, ok=None)
    assert re.search(line, error_of(done)) and "Device" not in done.stdout
    assert not (work / "llama3_summarization").exists()


def checkpoints(folder):
    return sorted(path.name for path in (folder / "llama3_summarization").glob("*checkpoint-*"))


def goes_on_as_one(processes, step, work, one, words=TRAIN):
    """The same command, on other processes, ends as one process does that was never cut."""
    done = torchrun(processes, APART, "none", "x", *words.split(), cwd=work)
    assert done.returncode == 0 and f"Resuming from step {step} of {STEPS}: " in done.stdout, done.stderr
    (work / "cut").mkdir()
    (work / "cut" / "saved").symlink_to(work / "llama3_summarization")
    same_losses(one, work, "llama", "cut")
    files = [directory / "model.safetensors" for directory in (one / "llama" / "saved", work / "llama3_summarization")]
    from safetensors.torch import load_file

    near(*map(load_file, files), 1e-2)  # in bfloat16


@needs_fsdp2
@pytest.mark.slow
def test_what_is_left_over_of_the_group_does_not_change_the_status(work):
    """Nothing of C's own end is run: in it a thread that is still there makes a process abort."""
    words = [*TRAIN.split(), "--max-train-steps", "1", "--eval-rows", "0"]
    done = torchrun(2, APART, "all", "abort", *words, cwd=work)
    assert done.returncode == 0 and "Model saved in" in done.stdout, done.stderr


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["-torch:Tensor.backward 10.1", "-torch.distributed.checkpoint.filesystem:_write_item 12.2"]
)
def test_one_of_four_is_killed(place, work, one):
    """In a micro-batch, or while it writes its part of a checkpoint: no process writes one any more."""
    began = time.monotonic()
    done = torchrun(4, APART, 2, f"9 {place}", *TRAIN.split(), cwd=work)
    lines = ours(done)
    assert time.monotonic() - began < 300 and len(lines) <= 1, done.stderr
    assert re.search(r"Root Cause.*\n\[0\]:\n(.*\n)*? *rank *: 2 .*\n *exitcode *: -9 ", done.stderr)
    assert checkpoints(work) == ["checkpoint-8"] and "Training Done" not in done.stdout
    goes_on_as_one(2, 8, work, one)
    assert not list((work / "llama3_summarization").glob(".*"))


@needs_fsdp2
@pytest.mark.slow
def test_sigterm_to_the_whole_group(work, one):
    """Twice to each process, as a scheduler sends it, while torchrun sends its own as well."""
    psutil = pytest.importorskip("psutil")
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        "4",
        str(APART),
        "none",
        "x",
        *TRAIN.replace("--save-steps 4", "").split(),
    ]
    env = environment(PYTHONUNBUFFERED="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=work, env=env, **pipes)
    try:
        while "[Step 5/" not in process.stdout.readline():
            assert process.poll() is None
        workers = [
            worker for worker in psutil.Process(process.pid).children() if "apart.py" in " ".join(worker.cmdline())
        ]
        assert len(workers) == 4
        began = time.monotonic()
        for _ in range(2):
            for worker in (*workers, process):
                worker.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 1 and time.monotonic() - began < 300
    [name] = checkpoints(work)
    step = int(name[len("checkpoint-") :])
    line = (
        f"Stopped after step {step}; checkpoint saved in llama3_summarization/{name}. Run the same command to resume."
    )
    assert 5 <= step <= 8 and err.count("Stopped") == 1 and line in err
    assert "error:" not in err and "Interrupted" not in err
    goes_on_as_one(2, step, work, one)


@needs_fsdp2
@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process(work):
    done = torchrun(2, APART, 1, "nan 6", *TRAIN.split(), cwd=work)
    [line] = ours(done)
    assert line.startswith("error: The loss is nan at step 6. Try a smaller --lr")
    assert "(llama3_summarization/checkpoint-4 is from before it)" in line and checkpoints(work) == ["checkpoint-4"]


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1])
def test_memory_that_gives_out_in_one_process(alone, work, one):
    """No process can go on in mid-step without the others: all end, and say what the next start should be given."""
    words = f"{TRAIN} --micro-batch-tokens 400"
    done = torchrun(2, APART, alone, "memory 6", *words.split(), cwd=work)
    [line] = ours(done)
    advice = r"Run the same command again with --micro-batch-tokens (\d+)\."
    found = re.fullmatch(rf"error: Rank {alone} is out of memory\. {advice}", line)
    assert found and 100 <= int(found[1]) <= 200, line
    goes_on_as_one(2, 4, work, one, words.replace("--micro-batch-tokens 400", f"--micro-batch-tokens {found[1]}"))
    run = json.loads((work / "llama3_summarization" / "run.json").read_text())
    assert run["options"]["micro_batch_tokens"] == int(found[1])
    assert not list((work / "llama3_summarization").glob(".*"))


@needs_fsdp2
@pytest.mark.slow
def test_each_process_drops_something_else_and_goes_on_with_it(work):
    """Dropout: a run of two that is cut ends, on two, as if it had never been cut, to the last bit."""
    words = f"{TRAIN.replace(f'--max-train-steps {STEPS}', '--max-train-steps 9')} {LORA} --lora-dropout 0.2".split()
    assert torchrun(2, APART, "none", "x", *words, "--save-dir", "whole", cwd=work).returncode == 0
    ours(torchrun(2, APART, 1, "9 -torch:Tensor.backward 7.1", *words, "--save-dir", "cut", cwd=work))
    states = {name: {"cpu": torch.empty_like(torch.get_rng_state())} for name in ("random_0", "random_1")}
    from torch.distributed.checkpoint import load

    load(states, checkpoint_id=str(work / "cut" / "checkpoint-4"))
    assert not torch.equal(states["random_0"]["cpu"], states["random_1"]["cpu"])
    done = torchrun(2, APART, "none", "x", *words, "--save-dir", "cut", cwd=work)
    assert "Resuming from step 4 of 9" in done.stdout, done.stderr
    whole, cut = adapter_weights(work / "whole"), adapter_weights(work / "cut")
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())
    logs = [[line.get("loss", line.get("held_out_loss")) for line in records(work / name)] for name in ("whole", "cut")]
    assert logs[0] == logs[1]
