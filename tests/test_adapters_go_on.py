"""An adapter that is trained further: its own matrices, on its own base, and the result says of what it was made."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from common.support.model_dir import ModelSource
from common.tokenization import load_tokenizer
from tests.helpers import adapter_weights, first_fast, needs_bitsandbytes, records, refusal, rows_of, tells
from tests.test_card import read
from tests.test_chat_files import write
from tests.test_several import needs_fsdp2, torchrun

TRAIN = "python tutorial/train_llama3.py --block-size 128 --batch-size 8 --lr 5e-3 --log-interval 1 --eval-rows 8"
OWN = "--use-lora --lora-r 4 --lora-alpha 12 --lora-target-modules q_proj v_proj down_proj"
GO_ON = "--model-name-or-path ./adapter --use-lora --max-train-steps 3"


@pytest.fixture(scope="module")
def trained(base, warm, tmp_path_factory):
    """A folder with an adapter of the base, and other rows than those that it has learned from."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("trained") / "work", symlinks=True)
    warm(f"{TRAIN} {OWN} --max-train-steps 4 --save-dir ./adapter", cwd=folder)
    write(folder / "other.jsonl", rows_of("validation") * 4)
    words = "--dataset-name-or-path other.jsonl --block-size 128 --save-path other.pt"
    warm(f"python dataset/prepare_llama3_dataset.py {words}", cwd=folder)
    return folder


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work", symlinks=True)


def held_out(folder):
    return [record["held_out_loss"] for record in records(folder) if "held_out_loss" in record]


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------ what goes on


def test_it_begins_where_the_adapter_had_come(work, warm):
    """By its held-out loss, and the loss of its first step, which a new adapter would not have."""
    said = warm(f"{TRAIN} {GO_ON} --save-dir ./further", cwd=work).stdout
    assert "LoRA: continuing to train adapter ./adapter" in said
    assert re.search(r"LoRA: [\d,]+ trainable parameters, r=4, on down_proj, q_proj, v_proj\n", said)
    before, after = held_out(work / "adapter"), held_out(work / "further")
    assert after[0] == before[-1] != before[0]
    assert after[-1] < after[0]
    warm(f"{TRAIN} {OWN} --max-train-steps 3 --save-dir ./new", cwd=work)
    assert held_out(work / "new")[0] == before[0]
    first = {name: records(work / name)[1]["loss"] for name in ("further", "new", "adapter")}
    assert first["new"] == first["adapter"] > first["further"]  # of the same rows
    weights = {name: adapter_weights(work / name) for name in ("adapter", "further")}
    assert weights["adapter"].keys() == weights["further"].keys()
    assert not [key for key, weight in weights["adapter"].items() if torch.equal(weight, weights["further"][key])]
    for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "peft_type"):
        assert config_of(work / "adapter")[key] == config_of(work / "further")[key]
    assert config_of(work / "further")["inference_mode"] is True


def test_a_step_of_no_size_leaves_the_matrices_as_they_were(work, warm):
    """To the last bit, in a file of its own, with the adapter's directory as it was."""
    came = {path.name: path.read_bytes() for path in (work / "adapter").iterdir() if path.is_file()}
    warm(f"{TRAIN} {GO_ON} --max-train-steps 1 --lr 0 --dataset-name-or-path other.pt --save-dir ./same", cwd=work)
    one, other = adapter_weights(work / "adapter"), adapter_weights(work / "same")
    assert one.keys() == other.keys() and all(torch.equal(weight, other[key]) for key, weight in one.items())
    assert {path.name: path.read_bytes() for path in (work / "adapter").iterdir() if path.is_file()} == came


def test_the_result_says_of_what_it_was_made_and_can_go_on_too(work, warm):
    """Asked, compared, evaluated, merged, and trained once more."""
    other = "--dataset-name-or-path other.pt"
    warm(f"{TRAIN} {GO_ON} {other} --save-dir ./further", cwd=work)
    run = json.loads((work / "further" / "run.json").read_text(encoding="utf-8"))
    assert run["made_of"] == {"base": "./llama3-8b", "adapter": "./adapter"}
    assert (run["options"]["lora_r"], run["options"]["lora_alpha"]) == (4, 12)
    table = read(work / "further")[1]
    assert (table["Base model"], table["Adapter"]) == ("`llama3-8b`", "`adapter`, trained further")
    assert table["Method"].startswith("LoRA, r 4, alpha 12, dropout 0.0, on ")
    more = GO_ON.replace("./adapter", "./further")
    warm(f"{TRAIN} {more} {other} --save-dir ./more", cwd=work)
    assert held_out(work / "more")[0] == held_out(work / "further")[-1]
    assert ModelSource(work / "more").base == "./llama3-8b"
    ask = "--model-name-or-path ./more --max-new-tokens 2"
    said = warm(f"python tutorial/inference_llama3.py {ask}", cwd=work).stdout
    assert "Loading adapter ./more on base model ./llama3-8b" in said
    warm(f"python tutorial/compare_adapter.py {ask} {other} --rows 1", cwd=work)
    words = "--base-model-name-or-path ./adapter --rows 2"
    assert "Perplexity" in warm(f"python tutorial/evaluate.py {ask} {words}", cwd=work).stdout
    warm("python tutorial/merge_adapter.py --model-name-or-path ./more --save-dir ./merged", cwd=work)
    run = json.loads((work / "merged" / "run.json").read_text(encoding="utf-8"))
    assert run["made_of"] == {"base": "./llama3-8b", "adapter": "./more", "merged": True}
    assert read(work / "merged")[1]["Adapter"] == "`more`, merged into it"
    # of the merged model a training starts as of any other
    warm(f"{TRAIN} --model-name-or-path ./merged --max-train-steps 1 {other} --save-dir ./whole", cwd=work)
    assert held_out(work / "whole")[0] == pytest.approx(held_out(work / "more")[-1], abs=0.02)


@pytest.mark.parametrize("given", first_fast(1, ["", "--lora-dropout 0.2"]))
def test_dropout_is_as_it_was_where_no_other_is_given(given, work, warm):
    warm(f"{TRAIN} {OWN} --lora-dropout 0.5 --max-train-steps 1 --save-dir ./dropped", cwd=work)
    words = GO_ON.replace("./adapter", "./dropped")
    warm(f"{TRAIN} {words} {given} --save-dir ./further", cwd=work)
    assert config_of(work / "further")["lora_dropout"] == (0.2 if given else 0.5)


def test_an_adapter_of_plain_peft_goes_on(work, warm):
    """With no facts in its file, no run.json, and its weights in 16 bit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "llama3-8b", torch_dtype=torch.bfloat16)
    config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["k_proj"], use_rslora=True)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.peft_config["default"].base_model_name_or_path = "./llama3-8b"
    model.save_pretrained(work / "plain")
    load_tokenizer(str(work / "llama3-8b")).save_pretrained(work / "plain")
    words = GO_ON.replace("./adapter", "./plain")
    warm(f"{TRAIN} {words} --max-train-steps 1 --lr 0 --save-dir ./further", cwd=work)
    one, other = adapter_weights(work / "plain"), adapter_weights(work / "further")
    assert one.keys() == other.keys()
    assert all(torch.equal(weight.float(), other[key]) for key, weight in one.items())
    assert config_of(work / "further")["use_rslora"] is True


@pytest.mark.slow
@needs_bitsandbytes
def test_a_base_in_4_bit_stays_in_4_bit(work, warm):
    warm(f"{TRAIN} {OWN} --load-in-4bit --max-train-steps 3 --save-dir ./adapter", cwd=work)
    said = warm(f"{TRAIN} {GO_ON} --save-dir ./further", cwd=work).stdout
    assert "Memory plan: LoRA on a 4-bit base" in said
    assert held_out(work / "further")[0] == held_out(work / "adapter")[-1]
    said = warm(f"{TRAIN} {GO_ON} --no-quantization --save-dir ./whole", cwd=work).stdout
    assert "Memory plan: LoRA, " in said
    assert held_out(work / "whole")[0] != held_out(work / "adapter")[-1]
    # and a script whose own base is in 4 bit takes the adapter's 16 bit
    shutil.rmtree(work / "adapter")
    warm(f"{TRAIN} {OWN} --max-train-steps 3 --save-dir ./adapter", cwd=work)
    words = f"{GO_ON} --dataset-name-or-path ./llama3_dataset.pt --save-dir ./korean --restart"
    said = warm(TRAIN.replace("llama3.py", "llama3_1.py"), *words.split(), cwd=work).stdout
    assert "Memory plan: LoRA, " in said and held_out(work / "korean")[0] == held_out(work / "adapter")[-1]


@pytest.mark.slow
def test_gpt_2_whose_layers_are_transposed(folder, warm):
    warm("python tutorial/download_gpt_13b.py --tiny", cwd=folder)
    sample = "--dataset-name-or-path dataset/samples/Evol-Instruct-Python-26k --block-size 128"
    warm(f"python dataset/prepare_gpt_dataset.py {sample}", cwd=folder)
    train = TRAIN.replace("llama3.py", "gpt.py")
    warm(f"{train} --use-lora --lora-r 4 --max-train-steps 4 --save-dir ./adapter", cwd=folder)
    warm(f"{train} {GO_ON} --save-dir ./further", cwd=folder)
    assert held_out(folder / "further")[0] == held_out(folder / "adapter")[-1] != held_out(folder / "adapter")[0]


# ------------------------------------------------------------------------------------------------ cut, and shared


def test_a_cut_run_goes_on_with_the_same_command(work, warm):
    """Of the checkpoint, not once more of the adapter."""
    words = f"{TRAIN} {GO_ON} --max-train-steps 4 --save-steps 2"
    warm(f"{words} --save-dir ./whole", cwd=work)
    shutil.copytree(work / "adapter", work / "moved")
    cut = f"{words} --save-dir ./cut"
    script = "python tests_cut.py"
    (work / "tests_cut.py").write_text(CUT)
    done = warm(f"{script} {cut.partition('train_llama3.py ')[2]}", cwd=work, ok=None)
    assert done.returncode and (work / "cut" / "checkpoint-2").is_dir(), done.stderr
    for words, said in {
        "--model-name-or-path ./llama3-8b": "--model-name-or-path ./llama3-8b has different weights",
        "--lora-dropout 0.1": "--lora-dropout was 0.0 and is 0.1",
    }.items():
        tells(warm(f"{cut} {words}", cwd=work, ok=None), said)
    said = warm(f"{cut} --model-name-or-path ./moved", cwd=work).stdout  # the same weights in another place
    assert "Resuming from step 2 of 4" in said
    one, other = adapter_weights(work / "whole"), adapter_weights(work / "cut")
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


CUT = """
import runpy, sys
sys.path.insert(0, ".")
from common.support.exit import UserError
from common.trainer import Trainer
step = Trainer.train_step
def cut(self):
    if self.state.step == 3:
        raise UserError("cut")
    step(self)
Trainer.train_step = cut
sys.argv[0] = "tutorial/train_llama3.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@needs_fsdp2
@pytest.mark.parametrize("bits", ["", pytest.param("--load-in-4bit", marks=needs_bitsandbytes)])
def test_two_processes_go_on_as_one_does(bits, work, warm):
    words = f"{GO_ON} {bits} --micro-batch-tokens 300"
    warm(f"{TRAIN} {words} --save-dir ./one", cwd=work)
    done = torchrun(2, *f"{TRAIN[len('python ') :]} {words} --save-dir ./two".split(), cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA: continuing to train adapter ./adapter" in done.stdout
    losses = [
        [record.get("loss", record.get("held_out_loss")) for record in records(work / name)] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    if not bits:
        assert losses[1][0] == pytest.approx(held_out(work / "adapter")[-1], abs=2e-3)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def refused(work, warm):
    return refusal(work, warm)


@pytest.mark.parametrize(
    ("words", "tells_of"),
    [
        ("--lora-r 4", ["--lora-r is for a new adapter", "./adapter", "Leave the option out"]),
        ("--lora-alpha 16", ["--lora-alpha is for a new adapter", "Leave the option out"]),
        ("--lora-target-modules q_proj", ["--lora-target-modules is for a new adapter", "Leave the option out"]),
        ("--no-use-lora", ["./adapter is an adapter", "--use-lora", "python tutorial/merge_adapter.py"]),
        ("--save-dir ./adapter", ["--save-dir ./adapter is the model directory", "Choose another"]),
        ("--save-dir ./llama3-8b", ["--save-dir ./llama3-8b is the model directory", "Choose another"]),
    ],
)
def test_options_that_contradict(words, tells_of, refused):
    refused(f"{TRAIN} {GO_ON} --save-dir ./further {words}", tells_of=tells_of)


def test_an_adapter_of_another_kind(work, refused):
    file = work / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**config_of(work / "adapter"), "peft_type": "IA3"}))
    refused(f"{TRAIN} {GO_ON}", tells_of=["adapter_config.json is not of LoRA", "train the adapter again"])
    file.write_text(json.dumps({**config_of(work / "adapter"), "peft_type": "LORA", "r": "many"}))
    refused(f"{TRAIN} {GO_ON}", tells_of=["adapter_config.json", "is damaged: train the adapter again"])


def test_a_base_of_other_weights_and_one_that_is_gone(work, refused):
    from model.tiny import write_tiny

    write_tiny("llama3", work / "llama3-8b", seed=1)
    refused(f"{TRAIN} {GO_ON}", tells_of=["./adapter was trained on other weights than those in ./llama3-8b"])
    shutil.rmtree(work / "llama3-8b")
    refused(f"{TRAIN} {GO_ON}", tells_of=["./llama3-8b does not exist", "base model of the adapter ./adapter"])


def test_rows_of_another_tokenizer(work, refused):
    from tests.helpers import change_dataset

    change_dataset(work / "other.pt", lambda document: document["meta"].update(tokenizer="0" * 16))
    refused(f"{TRAIN} {GO_ON} --dataset-name-or-path other.pt", tells_of=["other.pt", "another tokenizer"])
