"""--report-to: the log's numbers as curves, one point a step, however often the training was interrupted."""

from __future__ import annotations

import json
import struct

import pytest

from tests.conftest import ROOT, run
from tests.cuts import KILLED, SAVED, SHORT, TRAIN, checkpoints, killed, went_on
from tests.helpers import contents, first_fast, records, tells, weights
from tests.test_several import needs_fsdp2, torchrun

REPORTERS = ["tensorboard", "wandb"]
OFFLINE = {"WANDB_MODE": "offline"}


def train(warm, folder, words, cut=""):
    """Run the training; cut: SIGNAL PLACE COUNT of tests/killed.py."""
    before = f"{KILLED} {cut} " if cut else ""
    return warm(f"python {before}{TRAIN} {words}", cwd=folder, env=OFFLINE, ok=None if cut else True)


def curves(folder, reporter):
    """{name: [(step, value), ...]} of all that the reporter has written."""
    pytest.importorskip(reporter)
    found = {}
    points = tensorboard_points if reporter == "tensorboard" else wandb_points
    for name, step, value in points(folder / SAVED / reporter):
        found.setdefault(name, []).append((step, value))
    return found


def tensorboard_points(directory):
    """Points that TensorBoard would hide, too."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in directory.iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                yield value.tag, event.step, value.tensor.float_val[0]


def wandb_points(directory):
    """What `wandb sync` would upload. Its file is a log of LevelDB in blocks of 32 KB, each record of it a protobuf
    (https://github.com/google/leveldb/blob/main/doc/log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in directory.glob("offline-run-*/*.wandb"):
        data = file.read_bytes()
        assert data[:4] == b":W&B"
        place = 7
        message = b""
        while place < len(data):
            if 2**15 - place % 2**15 < 7:  # no room for a header: the next block
                place += 2**15 - place % 2**15
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            message += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(message)
                message = b""
                for item in record.history.item:
                    name = item.key or ".".join(item.nested_key)
                    if not name.startswith("_"):  # its own time and step
                        yield name, record.history.step.num, json.loads(item.value_json)


def logged(folder):
    """The same by training_log.jsonl."""
    names, log = ("loss", "held_out_loss", "lr", "tokens_per_second"), records(folder / SAVED)
    return {
        name: [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in log if name in record]
        for name in names
    }


def files(folder, reporter):
    pattern = "events.out.tfevents.*" if reporter == "tensorboard" else "offline-run-*/*.wandb"
    return [path.name for path in (folder / SAVED / reporter).glob(pattern)]


@pytest.mark.parametrize("reporter", REPORTERS)
def test_curves_are_those_of_the_log(reporter, small, warm, never_cut):
    """And the saved model is that of a training without."""
    pytest.importorskip(reporter)
    words = f"{SHORT} --report-to {reporter}"
    train(warm, small, words)
    assert curves(small, reporter) == logged(small)
    assert {name: [step for step, _ in points] for name, points in curves(small, reporter).items()} == {
        "loss": [3, 6, 7], "held_out_loss": [0, 2, 4, 6, 7], "lr": [3, 6, 7], "tokens_per_second": [3, 6, 7],
    }  # fmt: skip
    without = never_cut(SHORT)
    assert weights(small / SAVED) == weights(without / SAVED)
    names = [{path.name for path in (folder / SAVED).iterdir()} for folder in (small, without)]
    assert names[0] == names[1] | {reporter}
    if reporter == "wandb":  # where each training is a run of its own
        return
    before = files(small, reporter)
    train(warm, small, f"{words} --seed 1")  # another training into the same directory
    assert curves(small, reporter) == logged(small)
    assert len(before) == len(files(small, reporter)) == 1 and before != files(small, reporter)


@pytest.mark.slow
def test_a_training_that_was_killed_has_one_curve(small, warm):
    """Killed in step 6, it resumes from step 4, and reports what followed a second time."""
    pytest.importorskip("tensorboard")
    words = f"{SHORT} --report-to tensorboard --log-interval 1 --save-steps 4"
    killed(train(warm, small, words, cut="9 -torch:Tensor.backward 6.1"))
    assert checkpoints(small) == [4]
    assert [step for step, _ in curves(small, "tensorboard")["loss"]] == [1, 2, 3, 4, 5]
    assert went_on(train(warm, small, words)) == 4
    assert curves(small, "tensorboard") == logged(small)
    assert [step for step, _ in curves(small, "tensorboard")["loss"]] == [1, 2, 3, 4, 5, 6, 7]


def test_a_reporter_may_be_asked_for_by_the_run_that_resumes(small, warm):
    pytest.importorskip("tensorboard")
    words = f"{SHORT} --log-interval 1 --save-steps 4"
    killed(train(warm, small, words, cut="9 -torch:Tensor.backward 6.1"))
    assert went_on(train(warm, small, f"{words} --report-to tensorboard")) == 4
    assert curves(small, "tensorboard") == logged(small)


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize("reporter", REPORTERS)
def test_of_several_processes_one_writes(reporter, small):
    pytest.importorskip(reporter)
    words = f"{SHORT} --report-to {reporter} --max-train-steps 2 --log-interval 1"
    done = torchrun(2, *TRAIN.split(), *words.split(), cwd=small, **OFFLINE)
    assert done.returncode == 0, done.stderr
    assert len(files(small, reporter)) == 1
    assert curves(small, reporter) == logged(small)


@pytest.mark.parametrize(
    "reporter, package",
    first_fast(1, [("tensorboard", "tensorboard"), ("tensorboard", "google.protobuf"), ("wandb", "wandb")]),
)
def test_without_its_package(reporter, package, small, tmp_path):
    """One line, before anything is loaded. Who does not ask for it trains without."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys; sys.modules['{package}'] = None\n")
    env, before = {"PYTHONPATH": str(tmp_path / "site")}, contents(small)
    done = run(f"python {TRAIN} {SHORT} --report-to {reporter}", cwd=small, env=env, ok=None)
    requirements = f"requirements/requirements_{reporter}.txt"
    tells(done, f"--report-to {reporter}: {reporter} is not installed: pip install -r {requirements}")
    assert done.stdout == "" and contents(small) == before
    assert (ROOT / requirements).is_file()
    run(f"python {TRAIN} {SHORT} --max-train-steps 1", cwd=small, env=env)
    assert not (small / SAVED / reporter).exists()


@pytest.mark.slow
def test_wandb_without_an_account(small, tmp_path):
    """One line that says what to do, before the training."""
    pytest.importorskip("wandb")
    env = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run(f"python {TRAIN} {SHORT} --report-to wandb", cwd=small, env=env, ok=None)
    tells(done, "--report-to wandb: ", "wandb login", "WANDB_MODE=offline")


def test_another_reporter_is_refused(small, warm):
    done = warm(f"python {TRAIN} {SHORT} --report-to mlflow", cwd=small, ok=None)
    tells(done, "--report-to", "'mlflow'", "tensorboard", "wandb")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tutorial").glob("train_*.py")))
def test_each_train_script_has_it(script, folder, warm):
    assert "--report-to" in warm(f"python tutorial/{script} --help", cwd=folder).stdout
