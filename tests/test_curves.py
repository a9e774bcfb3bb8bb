"""--report-to tensorboard: the log's numbers as curves, one point a step, however often the training was cut."""

from __future__ import annotations

import pytest

from common.train_log import PLACE
from tests.conftest import ROOT, run
from tests.cuts import SAVED, SHORT, TRAIN, checkpoints, killed, train, went_on
from tests.helpers import contents, records, tells, weights
from tests.test_several import needs_fsdp2, torchrun

WORDS = f"{SHORT} --report-to tensorboard"


def curves(folder):
    """{name: [(step, value), ...]} of all that is in the directory, points that TensorBoard would hide too."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = {}
    for file in (folder / SAVED / PLACE).iterdir():
        for event in loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def of_log(folder):
    """The same by training_log.jsonl."""
    names, log = ("loss", "held_out_loss", "lr", "tokens_per_second"), records(folder / SAVED)
    return {
        name: [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in log if name in record]
        for name in names
    }


def test_curves_are_those_of_the_log(small, warm, never_cut):
    """And the saved model, which has taken its place in one step, is that of a training without."""
    pytest.importorskip("tensorboard")
    train(warm, small, WORDS)
    assert curves(small) == of_log(small)
    assert {name: [step for step, _ in points] for name, points in curves(small).items()} == {
        "loss": [3, 6, 7], "held_out_loss": [0, 2, 4, 6, 7], "lr": [3, 6, 7], "tokens_per_second": [3, 6, 7],
    }  # fmt: skip
    without = never_cut(SHORT)
    assert weights(small / SAVED) == weights(without / SAVED)
    names = [{path.name for path in (folder / SAVED).iterdir()} for folder in (small, without)]
    assert names[0] == names[1] | {PLACE}
    before = [path.name for path in (small / SAVED / PLACE).iterdir()]
    train(warm, small, f"{WORDS} --seed 1")  # another training into the same place
    assert curves(small) == of_log(small) and len(before) == len([*(small / SAVED / PLACE).iterdir()]) == 1


@pytest.mark.parametrize("first", [WORDS, SHORT], ids=["asked from the beginning", "asked when it goes on"])
def test_a_training_that_was_cut_has_one_curve(first, small, warm):
    """Killed in step 6, it goes on from step 4, and writes what followed a second time."""
    pytest.importorskip("tensorboard")
    killed(train(warm, small, f"{first} --log-interval 1 --save-steps 4", cut="9 -torch:Tensor.backward 6.1"))
    assert checkpoints(small) == [4]
    if first == WORDS:
        assert [step for step, _ in curves(small)["loss"]] == [1, 2, 3, 4, 5]
    assert went_on(train(warm, small, f"{WORDS} --log-interval 1 --save-steps 4")) == 4
    assert curves(small) == of_log(small)
    assert [step for step, _ in curves(small)["loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_an_adapter_has_curves_too(small, warm):
    pytest.importorskip("tensorboard")
    pytest.importorskip("peft")
    train(warm, small, f"{WORDS} --use-lora --max-train-steps 2 --log-interval 1")
    assert curves(small) == of_log(small)
    assert (small / SAVED / "adapter_model.safetensors").is_file()


@needs_fsdp2
def test_of_several_processes_one_writes(small):
    pytest.importorskip("tensorboard")
    words = f"{WORDS} --max-train-steps 2 --log-interval 1"
    done = torchrun(2, *TRAIN.split(), *words.split(), cwd=small)
    assert done.returncode == 0, done.stderr
    assert len([*(small / SAVED / PLACE).iterdir()]) == 1
    assert curves(small) == of_log(small)


# one that is not there, and one that lacks what it needs
@pytest.mark.parametrize("package", ["tensorboard", "google.protobuf"])
def test_without_tensorboard(package, small, tmp_path):
    """One line, before anything is loaded; and whoever does not ask for it trains without."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    env, before = {"PYTHONPATH": str(tmp_path / "site")}, contents(small)
    done = run(f"python {TRAIN} {WORDS}", cwd=small, env=env, ok=None)
    tells(done, "--report-to tensorboard: tensorboard is not installed: pip install -r", "requirements_tensorboard.txt")
    assert done.stdout == "" and contents(small) == before
    assert (ROOT / "requirements" / "requirements_tensorboard.txt").is_file()
    run(f"python {TRAIN} {SHORT} --max-train-steps 1", cwd=small, env=env)
    assert not (small / SAVED / PLACE).exists()


def test_another_place_to_report_to_is_refused(small, warm):
    done = warm(f"python {TRAIN} {SHORT} --report-to wandb", cwd=small, ok=None)
    tells(done, "--report-to", "'wandb' is not known", "there is tensorboard")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tutorial").glob("train_*.py")))
def test_each_train_script_has_it(script, folder, warm):
    assert "--report-to tensorboard" in warm(f"python tutorial/{script} --help", cwd=folder).stdout
