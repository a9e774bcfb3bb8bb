"""A file or a directory is written whole or not at all, wherever the writing is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from common.support.exit import UserError
from common.support.files import atomic_write, require_disk_space, require_writable
from tests.conftest import ROOT

# A process that writes is killed at each line of common/files.py in turn, by fork, and what it leaves is looked at.
KILLED = """
import json, os, shutil, sys
from pathlib import Path

sys.path.insert(0, {root!r})
from common import files

what, place = sys.argv[1], Path(sys.argv[2])
target = place / ("model" if what != "file" else "data.pt")


def content(version):
    return {{"config.json": f"config {{version}}", "weights": f"weights {{version}}" * 100}}


def begin():
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    if what == "file":
        target.write_text("old")
    else:
        target.mkdir()
        for name, text in content("old").items():
            (target / name).write_text(text)
        (target / "of the old one alone").write_text("stale")
        (target / "log.jsonl").write_text("kept")
        (target / "checkpoint").mkdir()
        (target / "checkpoint" / "part").write_text("kept")


def write():
    with files.atomic_write(target, stale=("of the old*",)) as new:
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
    if (target / "log.jsonl").read_text() != "kept" or (target / "checkpoint" / "part").read_text() != "kept":
        return "something that was to stay is gone"
    if not (target / "config.json").exists():
        return "no model"
    for version in ("old", "new"):
        there = {{name: (target / name).read_text() for name in content(version) if (target / name).exists()}}
        if there == content(version) and (target / "of the old one alone").exists() == (version == "old"):
            return version
    return "a mixture"


def refuse(*_):
    raise OSError("this file system can't")


if what == "one by one":
    files._exchange = refuse
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


@pytest.mark.parametrize("what", ["file", "directory", "one by one"])
def test_killed_at_each_line_it_leaves_the_old_or_the_new(what, tmp_path):
    words = [sys.executable, "-c", KILLED.format(root=str(ROOT)), what, str(tmp_path / "place")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 20 and found[0] == "old" and found[-1] == "new"
    # where a directory can't be swapped, it is for a moment no model at all, and never a mixture of two
    assert set(found) <= ({"old", "new", "no model"} if what == "one by one" else {"old", "new"})
    changes = [state for state, before in zip(found[1:], found) if state != before]
    assert changes == (["no model", "new"] if what == "one by one" else ["new"])


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


def test_what_stays_is_the_same_file_open_or_not(tmp_path):
    """A log that is being written goes on in the new directory; a link stays a link."""
    target = tmp_path / "out"
    target.mkdir(mode=0o750)
    (target / "elsewhere").symlink_to("/dev/null")
    with open(target / "log", "a", encoding="utf-8") as log:
        log.write("one\n")
        log.flush()
        with atomic_write(target) as new:
            new.mkdir()
            (new / "weights").write_text("new")
        log.write("two\n")
    assert (target / "log").read_text() == "one\ntwo\n" and (target / "elsewhere").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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


def test_a_directory_that_can_only_be_written_inside(tmp_path, monkeypatch):
    """As where it is a disk of its own: nothing can be made beside it."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    with atomic_write(target, stale=("config.json",)) as new:
        new.mkdir()
        (new / "config.json").write_text("new")
        assert target in new.parents
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "new"


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("flush") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda one, other: events.append("replace") or replace(one, other))
    with atomic_write(tmp_path / "file.json") as new:
        new.write_text("{}")
    assert events == ["flush", "replace", "flush"]


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file, so nothing can be saved in .*--save-dir"):
        require_writable(tmp_path / "file" / "below", "--save-dir")
    with pytest.raises(UserError, match=r"The model takes \d+\.\d GB in .*, and that disk has \d+\.\d GB free"):
        require_disk_space(10**18, tmp_path / "not" / "there", "The model")
    require_writable(tmp_path / "not" / "there", "--save-dir")
    require_disk_space(1, tmp_path / "not" / "there", "The model")
