"""A file or a directory is written completely or not at all, wherever the writing is cut; a directory has a lock."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from common.support.exit import UserError
from common.support.files import Lock, atomic_write, require_disk_space, require_writable
from tests.conftest import ROOT, TIMEOUT

# A process that writes is killed at each line of common/support/files.py in turn, and what it leaves is looked at.
KILLED = """
import json, os, shutil, sys
from pathlib import Path

sys.path.insert(0, {root!r})
from common.support import files

what, place = sys.argv[1], Path(sys.argv[2])
target = place / ("data.pt" if what == "file" else "model")


def content(version):
    return {{"config.json": f"config {{version}}", "weights": f"weights {{version}}" * 100}}


def begin():
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if what == "file":
        target.write_text("old")
    elif what == "directory":
        target.mkdir()
        for name, text in content("old").items():
            (target / name).write_text(text)
        (target / "of the old one alone").write_text("stale")
        (target / "log.jsonl").write_text("kept")
        for name in ("checkpoint-4", "checkpoint-6", "mine"):
            (target / name).mkdir()
            for part in "ab":
                (target / name / part).write_text(part)


def write():
    with files.atomic_write(target, stale=("of the old*", "checkpoint-*")) as new:
        if what == "file":
            new.write_text("new")
        else:
            new.mkdir()
            for name, text in content("new").items():
                (new / name).write_text(text)


def look():
    if what == "file":
        return target.read_text() if target.is_file() else "nothing"
    if not target.is_dir():
        return "nothing"
    checkpoints = list(target.glob("checkpoint-*"))
    if not all(len(list(path.iterdir())) == 2 for path in checkpoints):
        return "half of a checkpoint"
    if what == "directory" and not ((target / "log.jsonl").exists() and len(list((target / "mine").iterdir())) == 2):
        return "something that was to stay is gone"
    found = {{name: (target / name).read_text() for name in content("old") if (target / name).exists()}}
    if "config.json" not in found:
        return f"no model, {{len(checkpoints)}} checkpoints"
    for version in ("old", "new"):
        if found == content(version) and (version == "old") == (target / "of the old one alone").exists():
            return f"{{version}}, {{len(checkpoints)}} checkpoints"
    return "a mixture"


found, number = [], 0
while True:
    number += 1
    begin()
    child = os.fork()
    if not child:
        lines = 0

        def trace(frame, event, arg):
            global lines
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == number:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        write()
        sys.settrace(None)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found.append(look())
    if os.WEXITSTATUS(status) == 0:
        break
print(json.dumps(found))
"""
STATES = {
    "file": ["old", "new"],
    "new directory": ["nothing", "new, 0 checkpoints"],
    # A run that is killed while there is no model resumes from a checkpoint: they go when the model is there.
    "directory": ["old, 2 checkpoints", "no model, 2 checkpoints", "new, 2 checkpoints", "new, 1 checkpoints"]
    + ["new, 0 checkpoints"],
}


@pytest.mark.parametrize("what", STATES)
def test_killed_at_each_line_it_leaves_the_old_or_the_new(what, tmp_path):
    words = [sys.executable, "-c", KILLED.format(root=str(ROOT)), what, str(tmp_path / "place")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 20
    assert [state for state, before in zip(found, [None, *found]) if state != before] == STATES[what]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, UserError])
def test_an_error_inside_changes_nothing_and_leaves_nothing(error, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    for target in (tmp_path / "model", tmp_path / "new" / "deep" / "file.pt"):
        with pytest.raises(error), atomic_write(target) as new:
            (new.parent / "scratch").write_text("bytes")
            new.write_text("half") if target.suffix else new.mkdir()
            raise error("stopped")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "model",
        "model/config.json",
    ]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_it_goes_through_a_link_and_makes_the_directories_above(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with atomic_write(tmp_path / "out" / "a" / "b.json") as new:
        new.write_text("{}")
    with atomic_write(tmp_path / "out") as new:
        new.mkdir()
        (new / "c").write_text("c")
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").rglob("*")) == ["a", "b.json", "c"]


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("flush") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda one, other: events.append("replace") or replace(one, other))
    with atomic_write(tmp_path / "file.json") as new:
        new.write_text("{}")
    assert events == ["flush", "replace", "flush"]
    events.clear()
    (tmp_path / "model").mkdir()
    with atomic_write(tmp_path / "model") as new:
        new.mkdir()
        (new / "config.json").write_text("{}")
        (new / "weights").write_text("")
    assert events.index("replace") >= 3  # after both files and their directory
    replaced = [number for number, event in enumerate(events) if event == "replace"]
    assert len(replaced) == 2 and replaced[1] - replaced[0] > 1  # the weights' name is on the disk before config.json


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file, so nothing can be saved in .*--save-dir"):
        require_writable(tmp_path / "file" / "below", "--save-dir")
    with pytest.raises(UserError, match=r"The model takes \d+\.\d GB in .*, and that disk has \d+\.\d GB free"):
        require_disk_space(10**18, tmp_path / "not" / "there", "The model")
    require_writable(tmp_path / "not" / "there", "--save-dir")
    require_disk_space(1, tmp_path / "not" / "there", "The model")


# ------------------------------------------------------------------------------------------------ the lock

HOLD = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
from common.support.files import Lock

lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
if sys.argv[2] == "wait":
    time.sleep(900)
"""


def hold(directory, how):
    """A process that locks `directory`, and waits or ends."""
    words = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(directory), how]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_lock_names_its_holder_and_ends_with_the_process(tmp_path):
    process = hold(tmp_path, "wait")
    try:
        with pytest.raises(UserError, match=f"is locked by process {process.pid} on .*, which has been training there"):
            Lock(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.iterdir())  # what a process that is killed leaves locks nobody out
    Lock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_second_training_of_the_same_process_is_no_stranger(tmp_path):
    """As in a notebook, where the first one holds the lock until the process ends."""
    first, second = Lock(tmp_path), Lock(tmp_path)
    second.release()
    with pytest.raises(AssertionError):
        hold(tmp_path, "end")
    first.release()
    hold(tmp_path, "end").wait()


@pytest.mark.parametrize("used", [False, True])
def test_a_directory_that_was_made_for_the_lock_alone_goes_again(used, tmp_path):
    lock = Lock(tmp_path / "new" / "saved")
    if used:
        (tmp_path / "new" / "saved" / "log").touch()
    lock.release()
    assert (tmp_path / "new" / "saved").exists() == used


@pytest.mark.filterwarnings("ignore")  # of newer releases of filelock
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    """It locks nobody out. Here, the system call says what such a file system says."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        Lock(tmp_path).release()
    assert {path.name for path in tmp_path.iterdir()} <= {".training.lock"}
