"""Options that make no sense, and places where nothing can be saved: one line, exit status 2, nothing half-written.

Most of them run in `warm` (tests/conftest.py): the same scripts, without the three seconds of importing torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from common.support.cli import train_arguments
from common.support.exit import UserError
from tests.conftest import run
from tests.helpers import DOWNLOAD, INFERENCE, PREPARE, SAMPLE, SCRIPTS, TRAIN, contents, refusal, tells

LORA = f"{TRAIN} --use-lora"
HAS_FUSED_ADAMW = tuple(map(int, version("torch").split(".")[:2])) >= (2, 4)  # on a CPU


@pytest.fixture
def refused(ready, warm):
    return refusal(ready, warm)


@pytest.mark.parametrize("value, why", [("0", "1 or more"), ("-1", "1 or more"), ("many", "many"), ("1.5", "1.5")])
@pytest.mark.parametrize("command", [TRAIN, PREPARE])
def test_block_size_that_is_none(command, value, why, refused):
    refused(command, "--block-size", value, tells_of=["--block-size", why])


def test_block_size_beyond_the_models_positions(ready, refused):
    refused(TRAIN, "--block-size", 8193, tells_of=["--block-size 8193", "8192 positions", "./llama3-8b"])


def test_block_without_room_for_an_answer(refused):
    words = ("--dataset-name-or-path", SAMPLE, "--block-size", 4)
    refused(PREPARE, *words, tells_of=["--block-size 4 leaves no room for an answer"])


@pytest.mark.parametrize(
    "option, value",
    [("--lr", "nan"), ("--lr", "inf"), ("--lr", "-1"), ("--lr", "small"), ("--batch-size", "0"), ("--epochs", "0")]
    + [("--weight-decay", "inf"), ("--warmup-steps", "-1"), ("--log-interval", "0"), ("--lr-scheduler", "none")]
    + [("--max-grad-norm", "nan"), ("--micro-batch-tokens", "-1"), ("--max-train-steps", "-1")],
)
def test_number_that_makes_no_sense(option, value, refused):
    refused("python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1", option, value, tells_of=[option])


@pytest.mark.parametrize("command", [*SCRIPTS.values(), DOWNLOAD])
def test_unknown_option(command, refused):
    refused(command, "--bach-size", 3, tells_of=["unrecognized arguments: --bach-size 3"])


@pytest.mark.parametrize("words", ["--prompt-file none.txt", "--prompt-file llama3_dataset.pt", "--prompt-file ."])
def test_prompt_file_that_is_no_text(words, refused):
    refused(SCRIPTS["inference"], *words.split(), tells_of=[words, "can't be read"])


def test_two_prompts(refused):
    refused(SCRIPTS["inference"], "--prompt", "a", "--prompt-file", "b", tells_of=["--prompt-file", "not allowed"])


def test_learning_rate_that_destroys_the_model(ready, warm):
    """No model is saved, and the line says what to change."""
    words = "--batch-size 8 --max-train-steps 6 --lr 1e30 --log-interval 1"
    done = warm(f"python tutorial/train_llama3.py {words}", cwd=ready, ok=None)
    tells(done, "loss is nan at step", "smaller --lr")
    assert "Saving" not in done.stdout
    assert {path.name for path in (ready / "llama3_summarization").iterdir()} == {"training_log.jsonl"}


@pytest.mark.skipif(not HAS_FUSED_ADAMW, reason="an older AdamW refuses a step that is larger than float32")
def test_learning_rate_that_destroys_the_model_in_the_last_step(ready, warm):
    """The loss of the last step is that of the weights before it; the held-out loss after it tells."""
    done = warm("python tutorial/train_llama3.py --batch-size 8 --max-train-steps 1 --lr 3e38", cwd=ready, ok=None)
    tells(done, "Training diverged", "smaller --lr")
    assert not (ready / "llama3_summarization" / "model.safetensors").exists()


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
    places = {"model_name_or_path": "./model", "dataset_name_or_path": "./data.pt", "save_dir": "./saved"}
    with pytest.raises(UserError) as error:
        train_arguments("", lr=1.0, batch_size=1, log_interval=1, **places)
    line = str(error.value)
    assert line.endswith(". The options: python train.py --help") and capsys.readouterr().err == ""
    assert not [word for word in tells_of if word not in line], line


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
