"""A training that is cut at any time goes on by the same command, and ends as if it had never been cut."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoint import Checkpoint, Checkpoints, find_checkpoint, restore, training_tensors
from common.device import Device
from common.optim import make_optimizer
from common.support.exit import StopRequest, UserError
from common.support.files import Lock
from model.memory_plan import plan_memory
from tests.conftest import ROOT, TIMEOUT, start
from tests.cuts import (
    KINDS,
    SAVED,
    SHORT,
    checkpoints,
    copy_of,
    killed,
    losses,
    same_result,
    same_weights,
    scratch,
    train,
    went_on,
)
from tests.helpers import (
    STEP,
    contents,
    error_of,
    first_fast,
    needs_bitsandbytes,
    needs_float16,
    records,
    tells,
)

BY_PARTS = hasattr(
    torch.utils, "deterministic"
)  # torch 2.2: torch.distributed.checkpoint works without a process group
FULL = f"{KINDS['full']} --save-steps 2"
TENSORS = ".distcp" if BY_PARTS else "tensors.pt"
METADATA = ".metadata" if BY_PARTS else "tensors.pt"

# where: (the place and the step of the kill, the step from which the run then goes on, checkpoints that it left)
PHASES = {
    "before-the-first-checkpoint": ("-torch:Tensor.backward 2.2", 0, []),
    "in-a-micro-batch": ("-torch:Tensor.backward 5.2", 4, [4]),
    "in-a-micro-batch-of-the-second-epoch": ("-torch:Tensor.backward 4.2", 2, [2]),
    "before-the-optimizer's-step": ("+torch.nn.utils:clip_grad_norm_ 5.1", 4, [4]),
    "after-the-optimizer's-step": ("-common.device:Device.random_states 5.1", 4, [4]),
    "in-the-held-out-loss": ("-common.trainer:forward 6.5", 4, [4]),
    "between-the-log-lines": ("-common.train_log:TrainLog.log_eval 6.1", 4, [4]),
    "between-a-checkpoint's-parts": ("open:checkpoint.json 4.1", 2, [2]),
    "before-the-rename": ("os.rename:checkpoint-4 4.1", 2, [2]),
    "after-the-rename": ("shutil.rmtree:checkpoint-4 4.1", 4, [2, 4]),
    "before-the-old-one-is-renamed": ("os.rename:checkpoint-2 4.1", 4, [2, 4]),
    "while-the-old-one-is-removed": ("os.remove:checkpoint.json 4.1", 4, [4]),
    "in-the-last-step's-checkpoint": ("open:checkpoint.json 7.1", 6, [6]),
    "before-the-model-is-saved": ("-model.save:save_model 1", 7, [7]),
    "when-the-model-is-written": ("open:/run.json 7.1", 7, [7]),
    "before-the-model-takes-its-place": ("-common.support.files:_move_files 7.1", 7, [7]),
    "before-the-model-has-its-config": ("os.rename:/config.json 7.1", 7, [7]),
    "before-the-checkpoint-goes": ("os.rename:/removed/checkpoint-7 7.1", 7, [7]),
    "after-the-model-has-taken-its-place": ("+common.support.files:_move_files 7.1", 0, []),
}
if BY_PARTS:
    PHASES["while-tensors-are-written"] = ("-torch.distributed.checkpoint.filesystem:_write_item 4.9", 2, [2])


def cut_and_finish(warm, folder, words, place, step, left):
    """Kill the training at `place`, assert what it has left, and give the same command again."""
    killed(train(warm, folder, words, cut=f"9 {place}"))
    assert checkpoints(folder) == left
    done = train(warm, folder, words)
    assert went_on(done) == step
    return done


FAST = (
    "in-a-micro-batch", "before-the-rename", "while-the-old-one-is-removed", "before-the-model-is-saved",
    "before-the-model-has-its-config",
)  # fmt: skip


@pytest.mark.parametrize("phase", first_fast(len(FAST), sorted(PHASES, key=lambda phase: phase not in FAST)))
def test_killed_and_continued(phase, small, warm, never_cut):
    cut_and_finish(warm, small, FULL, *PHASES[phase])
    same_result(small, never_cut(KINDS["full"]))


SOME = {
    "lora": ["in-a-micro-batch", "in-the-held-out-loss", "before-the-old-one-is-renamed", "before-the-model-is-saved"],
    "4-bit": ["in-a-micro-batch", "before-the-old-one-is-renamed", "before-the-model-is-saved"],
    "8-bit-states": ["in-a-micro-batch", "in-the-held-out-loss", "before-the-model-is-saved"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, phase",
    [
        pytest.param(kind, phase, marks=[needs_bitsandbytes] * (kind != "lora"))
        for kind, phases in SOME.items()
        for phase in phases
    ],
)
def test_killed_and_continued_with_an_adapter(kind, phase, small, warm, never_cut):
    cut_and_finish(warm, small, f"{KINDS[kind]} --save-steps 2", *PHASES[phase])
    same_result(small, never_cut(KINDS[kind]))


# what a process knows only of the live optimizer, told when it ends
TELLS_ITS_STATES = """
import atexit, runpy, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + "/tutorial")
import common.optim, common.checkpoint

real = common.checkpoint.set_optimizer_state


def looked(optimizer, model, state):
    real(optimizer, model, state)
    states = [value for of_one in optimizer.state.values() for value in of_one.values()]
    types = {{str(value.dtype) for value in states if hasattr(value, "dtype")}}
    print("states:", type(optimizer).__name__, sorted(types))


common.checkpoint.set_optimizer_state = looked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@needs_bitsandbytes
def test_states_in_8_bit_are_kept_in_8_bit(small, warm, never_cut):
    """In the file, and in the optimizer that goes on."""
    words = f"{KINDS['8-bit-states']} --save-steps 2"
    killed(train(warm, small, words, cut="9 -torch:Tensor.backward 3.1"))
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(str(small / SAVED / "checkpoint-2")).read_metadata().state_dict_metadata
    types = {str(entry.properties.dtype) for name, entry in stored.items() if ".state1" in name}
    assert types == {"torch.uint8", "torch.float32"}  # of large tensors and of small ones
    (small / "tells.py").write_text(TELLS_ITS_STATES.format(root=str(ROOT)))
    done = warm(f"python tells.py tutorial/train_llama3.py {words}", cwd=small)
    assert went_on(done) == 2
    [line] = [line for line in done.stdout.splitlines() if line.startswith("states:")]
    assert "AdamW8bit" in line and "torch.uint8" in line
    same_result(small, never_cut(KINDS["8-bit-states"]))


@pytest.mark.slow
def test_killed_in_every_third_step(small, warm, never_cut):
    """Each process does two steps and a bit: on the way sums of a log line go through two checkpoints."""
    begins = []
    while True:
        done = train(warm, small, FULL, cut="9 -torch:Tensor.backward 3.2")
        begins.append(went_on(done))
        if done.returncode == 0:
            break
        killed(done)
    assert begins == [0, 2, 4, 6]
    same_result(small, never_cut(KINDS["full"]))


def test_the_seconds_of_a_log_line_go_on(cut_copy, warm):
    """Those of the steps before the cut count too, and no others."""
    path = cut_copy / SAVED / "checkpoint-4" / "checkpoint.json"
    shutil.rmtree(cut_copy / SAVED / "checkpoint-6")
    state = json.loads(path.read_text())["state"]
    assert 0 < state["seconds"] < 60 and state["num_tokens"] > 0
    sign(path, state={**state, "seconds": 1000.0})
    assert went_on(train(warm, cut_copy, FULL)) == 4
    durations = {record["step"]: record["duration"] for record in records(cut_copy / SAVED) if "duration" in record}
    assert 1000 < durations[6] < 1060 and 0 < durations[7] < 60


@pytest.mark.slow
def test_checkpoints_of_each_step_change_nothing(small, warm, never_cut):
    train(warm, small, f"{KINDS['full']} --save-steps 1 --save-total-limit 2")
    same_result(small, never_cut(KINDS["full"]))


# ------------------------------------------------------------------------------------------------ told to stop


def stopped(done, number, step):
    """One line says where it goes on, after the bar; the status is that of the signal."""
    # After Ctrl-C it dies by the signal itself, so that a shell loop around it stops as well.
    assert done.returncode in (128 + number, -signal.SIGINT), f"{done.returncode}\n{done.stderr}"
    text = done.stdout + done.stderr
    assert not [word for word in ("Traceback", "Exception", "Error", "error:", "Saving", "Interrupted") if word in text]
    where = f"Stopped after step {step}; checkpoint saved in {SAVED}/checkpoint-{step}. Run the same command to resume."
    assert done.stderr.splitlines()[-1] == where and done.stderr.count("Stopped") == 1, done.stderr


STOPS = {
    "in-a-micro-batch": ("-torch:Tensor.backward 6.2", 5),
    "after-the-optimizer's-step": ("-common.device:Device.random_states 5.1", 5),
    "in-the-held-out-loss": ("-common.trainer:forward 4.5", 4),
}


@pytest.mark.parametrize(
    "number, phase, kind",
    first_fast(
        2,
        [
            (signal.SIGTERM, "in-a-micro-batch", "lora"),
            (signal.SIGINT, "after-the-optimizer's-step", "full"),
            (signal.SIGINT, "in-a-micro-batch", "full"),
            (signal.SIGTERM, "after-the-optimizer's-step", "lora"),
            (signal.SIGTERM, "in-the-held-out-loss", "lora"),
            (signal.SIGINT, "in-the-held-out-loss", "full"),
        ],
    ),
)
def test_stopped_and_continued(number, phase, kind, small, warm, never_cut):
    """The step under way is dropped, with what it has drawn for dropout; no --save-steps asks for a checkpoint."""
    place, step = STOPS[phase]
    done = train(warm, small, KINDS[kind], cut=f"{int(number)} {place}")
    stopped(done, number, step)
    assert checkpoints(small) == [step] and not scratch(small)
    assert went_on(train(warm, small, KINDS[kind])) == step
    same_result(small, never_cut(KINDS[kind]))


@pytest.mark.parametrize("number", first_fast(1, [signal.SIGTERM, signal.SIGINT]))
def test_stopped_while_a_checkpoint_is_written(number, small, warm, never_cut):
    stopped(train(warm, small, FULL, cut=f"{int(number)} open:checkpoint.json 4.1"), number, 4)
    assert checkpoints(small) == [4] and not scratch(small)
    assert went_on(train(warm, small, FULL)) == 4
    same_result(small, never_cut(KINDS["full"]))


def test_stopped_before_the_first_step(small, warm):
    """In the held-out loss of the untrained model."""
    done = train(warm, small, FULL, cut="15 -common.trainer:forward 2")
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "Stopped; nothing was saved."
    assert not checkpoints(small) and not scratch(small)


@pytest.mark.slow
def test_stopped_again_before_the_next_step(small, warm, never_cut):
    """A run that has just gone on, in the held-out loss that the first one had dropped: nothing is written twice."""
    stopped(train(warm, small, KINDS["full"], cut="15 -common.trainer:forward 4.5"), signal.SIGTERM, 4)
    before = contents(small / SAVED / "checkpoint-4")
    again = train(warm, small, KINDS["full"], cut="15 -common.trainer:forward 1")
    stopped(again, signal.SIGTERM, 4)
    assert went_on(again) == 4 and contents(small / SAVED / "checkpoint-4") == before
    train(warm, small, KINDS["full"])
    same_result(small, never_cut(KINDS["full"]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_last_checkpoint(number, small, warm):
    done = train(warm, small, FULL, cut=f"{int(number)} open:checkpoint.json 7.1")
    stopped(done, number, 7)


@pytest.mark.parametrize("number", first_fast(1, [signal.SIGTERM, signal.SIGINT]))
def test_stopped_while_the_model_is_saved(number, small, warm, never_cut):
    """What was there stays, the last step's checkpoint too, and the line says where it goes on."""
    done = train(warm, small, FULL, cut=f"{int(number)} open:/run.json 7.1")
    assert done.returncode in (128 + number, -2) and "Traceback" not in done.stderr
    last = "Interrupted. Run the same command again to continue."
    assert done.stderr.splitlines()[-1] == last
    assert checkpoints(small) == [7] and not scratch(small) and not (small / SAVED / "run.json").exists()
    assert went_on(train(warm, small, FULL)) == 7
    same_result(small, never_cut(KINDS["full"]))


def test_sigterm_twice(small, warm, never_cut):
    """The second comes while the checkpoint for the first one is written."""
    again = "15 open:checkpoint.json 6.1 15 shutil.rmtree:checkpoint-5 6.1"
    done = train(warm, small, KINDS["full"], cut=f"15 -torch:Tensor.backward 6.2 {again}")
    stopped(done, signal.SIGTERM, 5)
    assert checkpoints(small) == [5] and not scratch(small)
    assert went_on(train(warm, small, KINDS["full"])) == 5
    same_result(small, never_cut(KINDS["full"]))


def until(process, happened):
    """Read what a process prints until a line of it is the one."""
    printed = []
    while not happened(printed[-1] if printed else ""):
        line = process.stdout.readline()
        assert line, (printed, process.communicate())
        printed.append(line.strip())


@pytest.mark.slow
def test_sigterm_to_the_whole_process_group_twice(small, warm):
    """As `timeout` and the schedulers do; then the continued run goes on from the step that the line names."""
    words = f"{KINDS['full']} --max-train-steps 100000 --log-interval 1"
    process = start(f"python tutorial/train_llama3.py {words}", cwd=small, own_group=True)
    try:
        until(process, lambda line: STEP.fullmatch(line))
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    [step] = checkpoints(small)
    line = f"Stopped after step {step}; checkpoint saved in {SAVED}/checkpoint-{step}. Run the same command to resume."
    assert process.returncode == 143 and err.splitlines()[-1] == line and not scratch(small)
    again = f"{KINDS['full']} --max-train-steps {step + 1}"
    assert went_on(train(warm, small, again)) == step


@pytest.mark.parametrize("place", first_fast(1, ["open:checkpoint.json 6.1", "tensors"]))
def test_a_second_ctrl_c_while_the_checkpoint_is_written(place, small, warm, never_cut):
    """It ends at once, and loses that one; the one before it is whole."""
    if place == "tensors":
        if not BY_PARTS:
            pytest.skip("torch.save writes them in one call")
        place = "-torch.distributed.checkpoint.filesystem:_write_item 6.3"
    done = train(warm, small, FULL, cut=f"2 -torch:Tensor.backward 6.2 2 {place}")
    assert done.returncode in (130, -2), f"{done.returncode}\n{done.stderr}"
    assert not [word for word in ("Traceback", "Exception", "Error", "error:") if word in done.stderr], done.stderr
    last = "Interrupted. Run the same command again to continue."
    assert done.stderr.splitlines()[-1] == last
    assert checkpoints(small) == [4] and not scratch(small)
    assert went_on(train(warm, small, FULL)) == 4
    same_result(small, never_cut(KINDS["full"]))


# ------------------------------------------------------------------------------------------------ what is restored


@needs_float16
def test_the_scaler_goes_on_as_it_was(tmp_path):
    """float16, whose scale halves at an overflow and doubles after a while: both numbers are restored."""
    device = Device(torch.device("cpu"), "test", torch.float16, False)
    first = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**20, growth_interval=3)
    assert type(device.gradient_scaler()) is type(first) and device.gradient_scaler().is_enabled()
    checkpoints_of_run, _, model, optimizer = begun(tmp_path, device, first)
    for factor in (1.0, 1e38, 1.0, 1.0):  # the second one overflows
        first.scale(model(torch.ones(2, 4)).sum() * factor).backward()
        first.step(optimizer)
        first.update()
        optimizer.zero_grad()
    assert (first.get_scale(), first._get_growth_tracker()) == (2.0**19, 2)
    assert saved(checkpoints_of_run, model, optimizer, device, first, step=4)
    second = torch.amp.GradScaler("cpu", enabled=True)
    _, resume, other, _ = begun(tmp_path, device, second)
    assert resume.state["step"] == 4 and second.state_dict() == first.state_dict()
    assert (second.get_scale(), second._get_growth_tracker()) == (2.0**19, 2)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))


@needs_float16
def test_a_checkpoint_before_the_optimizer_has_stepped_changes_nothing(tmp_path):
    """float16 often skips the very first steps, --skip-nonfinite may: the optimizer then has no state yet."""
    device = Device(torch.device("cpu"), "test", torch.float32, False)
    weights = []
    for writes in (False, True):
        scaler = device.gradient_scaler()
        checkpoints_of_run, _, model, optimizer = begun(tmp_path / str(writes), device, scaler)
        assert not writes or saved(checkpoints_of_run, model, optimizer, device, scaler, step=1)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([weight.detach().clone() for weight in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights))


@pytest.mark.slow
@pytest.mark.parametrize("given, tokens", [(384, 96), (200, 200)])
def test_micro_batches_that_had_to_become_smaller_stay_so(given, tokens):
    """The memory was too small for those of the option; given another number, that one is taken."""
    device = Device(torch.device("cpu"), "test", torch.float32, False)
    before = {"micro_batch_tokens": 96, "gradient_checkpointing": False}
    resume = Checkpoint(Path("checkpoint-1"), {"state": before, "options": {"micro_batch_tokens": 384}})
    args = argparse.Namespace(**{**OPTIONS, "micro_batch_tokens": given})
    assert plan_memory(args, device, {}, resume).micro_batch_tokens == tokens


OPTIONS = {
    "model_name_or_path": "nowhere", "dataset_name_or_path": "data.pt", "restart": False, "use_lora": False, "bits": 0,
    "micro_batch_tokens": 0, "save_steps": 1, "save_total_limit": 1, "keep_best": False, "lr": 0.1,
    "weight_decay": 0.0, "lr_scheduler": "constant", "gradient_checkpointing": False,
}  # fmt: skip


def begun(tmp_path, device, scaler):
    """A training of a small model that has just begun, or resumed."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    model.bits = 0
    args = argparse.Namespace(**OPTIONS, save_dir=str(tmp_path / "out"))
    resume = find_checkpoint(args)
    optimizer = make_optimizer(model, args, device)
    checkpoints_of_run = Checkpoints(args, resume, model, optimizer, device, "digest", 9)
    if resume:
        restore(resume, model, optimizer, scaler, device)
    return checkpoints_of_run, resume, model, optimizer


def saved(checkpoints_of_run, model, optimizer, device, scaler, step):
    state = {"step": step, "best_step": 0}
    tensors = training_tensors(model, optimizer, device)
    return checkpoints_of_run.save(tensors, state, scaler.state_dict(), StopRequest(), print)


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="session")
def cut(small_base, warm, tmp_path_factory):
    """A working directory, to be read only, whose training was killed in step 7, with checkpoints 4 and 6."""
    folder = copy_of(small_base, tmp_path_factory.mktemp("cut") / "work")
    killed(train(warm, folder, f"{FULL} --save-total-limit 2", cut="9 -torch:Tensor.backward 7.2"))
    assert checkpoints(folder) == [4, 6]
    remove_lock(folder)
    return folder


def remove_lock(folder):
    """Remove what a process that was killed has left of its lock."""
    for path in (folder / SAVED).glob(".training.*"):
        path.unlink()


@pytest.fixture
def find(monkeypatch):
    """find_checkpoint, which releases its lock as the end of a process would."""
    locks = []
    monkeypatch.setattr("common.checkpoint.Lock", lambda directory: locks.append(Lock(directory)))

    def find(args):
        try:
            return find_checkpoint(args)
        finally:
            locks.pop().release()

    return find


@pytest.fixture
def cut_copy(cut, tmp_path):
    return copy_of(cut, tmp_path / "cut")


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def file_of(checkpoint, part):
    [path] = [path for path in checkpoint.iterdir() if path.name.endswith(part)]
    return path


@pytest.mark.parametrize("part", first_fast(1, sorted({TENSORS, METADATA, "checkpoint.json"})))
def test_one_flipped_byte(part, cut_copy, warm, never_cut):
    """The one before it is taken, and the end is the same; where there is none, nothing is loaded."""
    newest = cut_copy / SAVED / "checkpoint-6"
    flip(file_of(newest, part))
    words = f"{FULL} --save-total-limit 2"
    alone = copy_of(cut_copy, cut_copy.parent / "alone")
    done = train(warm, cut_copy, words, cut="9 -torch:Tensor.backward 1.1")
    [line] = [line for line in done.stdout.splitlines() if "using the older checkpoint" in line]
    assert f"{SAVED}/checkpoint-6 " in line and f"{SAVED}/checkpoint-4." in line
    killed(done)
    shutil.rmtree(alone / SAVED / "checkpoint-4")
    before = contents(alone)
    refused = train(warm, alone, words, ok=None)
    tells(refused, "checkpoint-6", "damaged" if part != "checkpoint.json" else "", "--restart")
    assert "Plan" not in refused.stdout and contents(alone) == before
    assert went_on(train(warm, cut_copy, words)) == 4
    same_result(cut_copy, never_cut(KINDS["full"]))


def options_of(folder):
    """Those of its training, as a checkpoint has them."""
    return json.loads((folder / SAVED / "checkpoint-4" / "checkpoint.json").read_text())["options"]


def sign(path, **facts):
    facts = {**json.loads(path.read_text()), **facts, "sha256": ""}
    text = json.dumps(facts, sort_keys=True)
    path.write_text(json.dumps({**facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


DAMAGE = {
    "an empty checkpoint.json": (
        lambda path: (path / "checkpoint.json").write_text(""),
        "has no readable checkpoint.json",
    ),
    "no tensors": (lambda path: file_of(path, TENSORS).unlink(), "is damaged"),
    "no metadata": (lambda path: file_of(path, METADATA).unlink(), "is damaged"),
    "half of the tensors": (lambda path: os.truncate(file_of(path, TENSORS), 5000), "is damaged"),
    "another file": (lambda path: (path / "more").write_text(""), "is damaged"),
    "another version": (lambda path: sign(path / "checkpoint.json", version=1), "the format version 1"),
    "by another torch": (lambda path: sign(path / "checkpoint.json", stored_by="torch.other"), "torch.other"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_continued(damage, cut_copy, find, monkeypatch, capsys):
    """The one before it is taken, and where there is none one line says why, and what to do."""
    harm, why = DAMAGE[damage]
    monkeypatch.chdir(cut_copy)
    args = argparse.Namespace(**options_of(cut_copy))
    harm(cut_copy / SAVED / "checkpoint-6")
    assert find(args).path.name == "checkpoint-4"
    lines = capsys.readouterr().out.splitlines()
    assert why in lines[0] and lines[0].endswith(f"; using the older checkpoint {SAVED}/checkpoint-4.")
    assert lines[1:] == [f"Resuming from step 4 of 7: {SAVED}/checkpoint-4"]
    shutil.rmtree(cut_copy / SAVED / "checkpoint-4")
    with pytest.raises(UserError, match="--restart") as refused:
        find(args)
    assert why in str(refused.value) and "\n" not in str(refused.value)


def test_any_word_of_the_facts(cut_copy, find, monkeypatch, capsys):
    """Whichever name or number becomes another one: the other checkpoint is taken."""
    monkeypatch.chdir(cut_copy)
    args = argparse.Namespace(**options_of(cut_copy))
    path = cut_copy / SAVED / "checkpoint-6" / "checkpoint.json"
    whole, failed = path.read_bytes(), []
    for word in re.finditer(rb"(?<![\w.])\w", whole):
        flip(path, word.start())
        try:
            found = find(args)
            if found.path.name != "checkpoint-4":
                failed.append((word.start(), found.path.name))
        except Exception as error:
            failed.append((word.start(), repr(error)))
        path.write_bytes(whole)
    capsys.readouterr()
    assert not failed


@pytest.mark.parametrize("step", [2, 500])
def test_another_program_s_checkpoint_is_refused_and_stays(step, small, warm):
    directory = small / SAVED / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text('{"global_step": 500}')
    before = contents(small)
    tells(train(warm, small, FULL, ok=None), f"checkpoint-{step}", "was not written by these scripts", "--save-dir")
    assert contents(small) == before


def test_what_killed_runs_have_left_is_removed_at_the_next_start(small, warm):
    """Before anything is loaded, and no more than that."""
    saved = small / SAVED
    ours = [saved / ".checkpoint-2.abcd_123", small / f".{SAVED}.zzzzzzz9", saved / f".{SAVED}.abcdefgh"]
    theirs = [saved / ".checkpoint-2.other", saved / ".checkpoint-x.abcdefgh", small / ".other.abcdefgh"]
    for directory in ours + theirs:
        directory.mkdir(parents=True)
        (directory / "file").write_text("")
    killed(train(warm, small, FULL, cut="9 -common.tokenization:load_tokenizer 1"))
    assert not [path for path in ours if path.exists()] and all(path.exists() for path in theirs)


def test_a_run_within_the_directory_of_another_one_leaves_its_scratch(small, warm):
    """--save-dir runs, and beside it --save-dir runs/second: the first one is writing a checkpoint."""
    under_way = small / "runs" / ".checkpoint-2.abcdefgh"
    under_way.mkdir(parents=True)
    train(warm, small, f"{FULL} --save-dir runs/second", cut="9 -common.tokenization:load_tokenizer 1")
    assert under_way.is_dir()


@pytest.mark.slow
def test_restart_keeps_the_old_checkpoints_until_the_first_new_one_is_whole(cut_copy, warm, never_cut):
    anew = f"{FULL} --seed 1 --save-total-limit 2"
    kept = contents(cut_copy / SAVED / "checkpoint-4"), contents(cut_copy / SAVED / "checkpoint-6")
    done = killed(train(warm, cut_copy, f"{anew} --restart", cut="9 os.rename:checkpoint-2 2.1"))
    assert went_on(done) == 0 and checkpoints(cut_copy) == [4, 6]
    assert kept == (contents(cut_copy / SAVED / "checkpoint-4"), contents(cut_copy / SAVED / "checkpoint-6"))
    other = copy_of(cut_copy, cut_copy.parent / "other")
    assert went_on(train(warm, other, f"{FULL} --save-total-limit 2")) == 6
    same_result(other, never_cut(KINDS["full"]))
    # killed when the new one has its name, and the old ones have theirs: the new one is that of the last run
    killed(train(warm, cut_copy, f"{anew} --restart", cut="9 os.rename:checkpoint-6 2.1"))
    assert checkpoints(cut_copy) == [2, 4, 6]
    killed(train(warm, cut_copy, f"{anew} --restart", cut="9 -torch:Tensor.backward 3.1"))
    assert checkpoints(cut_copy) == [2]
    assert went_on(train(warm, cut_copy, anew)) == 2
    same_result(cut_copy, never_cut(f"{KINDS['full']} --seed 1"))


@pytest.mark.slow
def test_a_restart_that_was_killed_between_the_new_one_and_the_old_ones(cut_copy, warm, never_cut):
    """Without --restart the newest goes on, and it is of the new run, though its step is smaller."""
    anew = f"{FULL} --seed 1"
    killed(train(warm, cut_copy, f"{anew} --restart", cut="9 os.rename:checkpoint-6 2.1"))
    assert checkpoints(cut_copy) == [2, 4, 6]
    done = train(warm, cut_copy, anew, cut="9 -torch:Tensor.backward 3.1")
    assert went_on(done) == 2 and checkpoints(cut_copy) == [4]
    train(warm, cut_copy, anew)
    same_result(cut_copy, never_cut(f"{KINDS['full']} --seed 1"))


# ------------------------------------------------------------------------------------------------ options

REFUSED = {
    "seed": (0, 1), "lr": (1e-05, 0.5), "lr_scheduler": ("constant", "linear"), "warmup_steps": (0, 3),
    "batch_size": (20, 10), "weight_decay": (0.01, 0.5), "max_grad_norm": (1.0, 2.0), "use_lora": (False, True),
    "train_on_prompt": (False, True), "block_size": (1024, 512), "keep_best": (False, True),
}  # fmt: skip
REFUSED_OF_LORA = {
    "lora_r": (8, 4), "lora_alpha": (16, 8.0), "lora_dropout": (0.1, 0.2), "bits": (0, 4), "use_lora": (True, False),
    "lora_target_modules": (["all-linear"], ["q_proj"]),
}  # fmt: skip
FREE = {
    "log_interval": 1, "save_steps": 3, "micro_batch_tokens": 192, "eval_step": 1, "eval_rows": 3,
    "gradient_checkpointing": True, "save_total_limit": 3, "epochs": 5, "max_train_steps": 9,
    "dataset_name_or_path": "moved.pt", "report_to": "tensorboard",
}  # fmt: skip


@pytest.fixture(scope="session")
def cut_lora(small_base, warm, tmp_path_factory):
    """As `cut`, of an adapter, killed in step 5."""
    folder = copy_of(small_base, tmp_path_factory.mktemp("cut-lora") / "work")
    killed(train(warm, folder, f"{KINDS['lora']} --save-steps 2", cut="9 -torch:Tensor.backward 5.1"))
    remove_lock(folder)
    return folder


@pytest.mark.parametrize("name", first_fast(4, REFUSED))
def test_an_option_that_makes_another_run(name, cut, find, monkeypatch):
    refused_option(cut, find, monkeypatch, name, *REFUSED[name])


@pytest.mark.parametrize("name", first_fast(2, REFUSED_OF_LORA))
def test_an_option_of_lora_that_makes_another_run(name, cut_lora, find, monkeypatch):
    refused_option(cut_lora, find, monkeypatch, name, *REFUSED_OF_LORA[name])


def refused_option(folder, find, monkeypatch, name, was, now):
    """Both values in one line, and nothing is changed."""
    monkeypatch.chdir(folder)
    before, options = contents(folder), options_of(folder)
    assert options[name] == was
    with pytest.raises(UserError) as refusal:
        find(argparse.Namespace(**{**options, name: now}))
    line = str(refusal.value)
    assert f"--{name.replace('_', '-')} was {was} and is {now}" in line and "--restart" in line and "\n" not in line
    assert contents(folder) == before


@pytest.mark.parametrize("name", first_fast(4, FREE))
def test_an_option_that_makes_the_same_run(name, cut, find, monkeypatch, capsys):
    monkeypatch.chdir(cut)
    options = options_of(cut)
    assert options[name] != FREE[name]
    resume = find(argparse.Namespace(**{**options, name: FREE[name]}))
    assert resume.path.name == "checkpoint-6" and "Resuming from step 6 of 7" in capsys.readouterr().out


def refused(warm, folder, words, *told):
    before = contents(folder)
    done = train(warm, folder, words, ok=None)
    tells(done, "checkpoint-", "--restart", *told)
    assert contents(folder) == before
    return done


def test_all_options_that_differ_are_named(cut, warm):
    done = refused(warm, cut, f"{FULL} --seed 1 --lr 0.5", "--seed was 0 and is 1", "--lr was 1e-05 and is 0.5")
    assert "Plan" not in done.stdout  # before anything is loaded


def test_steps_that_fit_no_more(cut, cut_lora, warm):
    refused(warm, cut, f"{FULL} --max-train-steps 5", "it had 7 steps with --lr-scheduler constant, now 5")
    refused(warm, cut_lora, f"{KINDS['lora']} --max-train-steps 9", "it had 7 steps with --lr-scheduler cosine, now 9")


def test_another_dataset_model_or_device_under_the_same_name(cut_copy, base, warm):
    shutil.copy(cut_copy / "llama3_dataset.pt", cut_copy / "kept.pt")
    shutil.copy(base / "llama3_dataset.pt", cut_copy)
    refused(warm, cut_copy, FULL, "--dataset-name-or-path", "has different rows")
    shutil.copy(cut_copy / "kept.pt", cut_copy / "llama3_dataset.pt")
    from safetensors.torch import load_file, save_file

    path = cut_copy / "llama3-8b" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    refused(warm, cut_copy, FULL, "--model-name-or-path", "has different weights")
    save_file({name: weight / 2 for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    # Whatever a GPU's checkpoint has that a CPU lacks (its random states): it is refused before it is read.
    sign(cut_copy / SAVED / "checkpoint-6" / "checkpoint.json", device="cuda")
    refused(warm, cut_copy, FULL, "this run used cuda; this device uses cpu")


def test_options_that_change_only_the_log_and_the_checkpoints(cut_copy, warm, never_cut):
    """The run goes on, and its weights are those of the run that was never cut."""
    words = f"{FULL} --log-interval 1 --save-steps 3 --eval-step 1 --eval-rows 3 --save-total-limit 3"
    assert went_on(train(warm, cut_copy, words)) == 6
    same_weights(cut_copy, never_cut(KINDS["full"]))
    assert not checkpoints(cut_copy) and not scratch(cut_copy)


@pytest.mark.parametrize("option", first_fast(1, ["--micro-batch-tokens 192", "--gradient-checkpointing"]))
def test_options_of_the_memory(option, cut_copy, warm):
    """A run that was cut by a full memory goes on with them, its sums in another order."""
    done = train(warm, cut_copy, f"{FULL} {option}")
    assert went_on(done) == 6 and "Model saved" in done.stdout


def test_a_model_and_a_dataset_that_were_moved(cut_copy, warm, never_cut):
    (cut_copy / "llama3-8b").rename(cut_copy / "elsewhere")
    (cut_copy / "llama3_dataset.pt").rename(cut_copy / "data.pt")
    words = f"{FULL} --model-name-or-path ./elsewhere --dataset-name-or-path data.pt"
    assert went_on(train(warm, cut_copy, words)) == 6
    same_result(cut_copy, never_cut(KINDS["full"]))


LONGER = SHORT.replace("--max-train-steps 7", "--max-train-steps 9")


@pytest.mark.parametrize("more", first_fast(1, ["--max-train-steps 9", "--epochs 3"]))
def test_more_steps_at_a_constant_learning_rate(more, cut_copy, warm, never_cut):
    words = FULL.replace("--max-train-steps 7", more)
    assert went_on(train(warm, cut_copy, words)) == 6
    same_result(cut_copy, never_cut(LONGER))


@pytest.mark.slow
def test_more_steps_after_the_last_one(small, warm, never_cut):
    """Killed while the model was saved: the old end has its lines, all else is that of the longer run."""
    killed(train(warm, small, FULL, cut="9 -model.save:save_model 1"))
    assert went_on(train(warm, small, f"{FULL} --max-train-steps 9")) == 7
    same_weights(small, never_cut(LONGER))
    longer = [record for record in losses(never_cut(LONGER)) if record["step"] not in (7, 9)]
    assert [record for record in losses(small) if record["step"] not in (7, 9)] == longer
    assert losses(small)[-1] == losses(never_cut(LONGER))[-1]


def test_a_finished_run_begins_anew(small, warm, never_cut):
    train(warm, small, FULL)
    assert not checkpoints(small) and not scratch(small)
    for name in ("evaluation.json", "evaluation.png"):
        (small / SAVED / name).write_text("of the first model")
    done = train(warm, small, FULL)
    assert f"{SAVED} contains a finished run; starting a new one." in done.stdout and went_on(done) == 0
    same_result(small, never_cut(KINDS["full"]))


# ------------------------------------------------------------------------------------------------ the best weights

# of so large a learning rate the held-out loss falls at first, and then rises
BEST = "--batch-size 20 --log-interval 3 --eval-step 1 --eval-rows 9 --micro-batch-tokens 384 --lr 0.02"
KEEP = f"{BEST} --max-train-steps 9 --keep-best"


def best_step(folder):
    held_out = {record["step"]: record["held_out_loss"] for record in losses(folder) if "held_out_loss" in record}
    held_out.pop(0)
    return min(held_out, key=held_out.get), held_out


@pytest.mark.parametrize("cut", first_fast(1, ["-torch:Tensor.backward LATER.2", "", "-model.save:save_model 1"]))
def test_the_best_weights_are_saved(cut, small, warm, never_cut):
    best, held_out = best_step(never_cut(KEEP))
    assert 1 < best < 8, held_out  # else this test says nothing
    if cut:
        killed(train(warm, small, KEEP, cut=f"9 {cut.replace('LATER', str(best + 2))}"))
        assert best in checkpoints(small)
    done = train(warm, small, KEEP)
    assert went_on(done) == (0 if not cut else best if "LATER" in cut else 9)
    assert f"[Step {best}/9] | Best held-out loss: {held_out[best]:.5f}, saving these weights" in done.stdout
    assert records(small / SAVED)[-1] == {"step": best, "best_held_out_loss": held_out[best]}
    same_weights(small, never_cut(f"{BEST} --max-train-steps {best}"))
    same_result(small, never_cut(KEEP))


@pytest.mark.slow
def test_the_best_weights_are_kept_beside_newer_ones(small, warm, never_cut):
    """--save-total-limit 1 and --save-steps 1: the best one, and the newest."""
    best, _ = best_step(never_cut(KEEP))
    killed(train(warm, small, f"{KEEP} --save-steps 1", cut=f"9 -torch:Tensor.backward {best + 3}.2"))
    assert checkpoints(small) == [best, best + 2]
    assert went_on(train(warm, small, f"{KEEP} --save-steps 1")) == best + 2
    same_result(small, never_cut(KEEP))


@pytest.mark.parametrize("lacks", ["--eval-step 0", "--eval-rows 0"])
def test_the_best_weights_need_held_out_losses(lacks, small, warm):
    done = train(warm, small, f"{KEEP} {lacks}", ok=None)
    tells(done, "--keep-best", "--eval-step", "--eval-rows")
    assert not (small / SAVED).exists()


# ------------------------------------------------------------------------------------------------ one at a time


def test_two_runs_into_one_directory(small, warm):
    """The second one names the first; a lock that a killed run has left stops nobody."""
    process = start(f"python tutorial/train_llama3.py {FULL} --max-train-steps 100000 --log-interval 1", cwd=small)
    try:
        until(process, lambda line: STEP.fullmatch(line))
        second = train(warm, small, FULL, ok=None)
        line = error_of(second)
    finally:
        process.kill()
        process.communicate()
    since = (small / SAVED / ".training.holder").read_text().split("there since ")[1]
    holder = f"process {process.pid} on {socket.gethostname()}, which has been training there since {since}"
    assert f"{SAVED} is locked by {holder}." in line and "--save-dir" in line
    assert ".training.lock" in scratch(small)
    third = train(warm, small, f"{FULL} --restart")
    assert "Model saved" in third.stdout and not scratch(small) and not checkpoints(small)
