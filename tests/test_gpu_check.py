"""tests/gpu_check.py with small models, on whatever device is here: it must be right when it meets a GPU."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest
import torch

from tests import gpu_check
from tests.conftest import ROOT, TIMEOUT, run, start
from tests.gpu_check import MEASUREMENTS
from tests.helpers import HAS_LLAMA3_1, HAS_QWEN3, quantizes

CHECK = f"python {ROOT}/tests/gpu_check.py --small"
NEWEST = HAS_QWEN3 and HAS_LLAMA3_1 and quantizes()  # make gpu-check installs the newest set
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NEWEST, reason="not with the older sets of packages")]


def report_in(folder):
    """The JSON of a run, whose rows the table must have as well."""
    report = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    text = (folder / "gpu_check.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [cells[0] for cells in lines] == [f"| {name}" for name in report["rows"]]
    assert all(len(cells) == len(gpu_check.HEADER) for cells in lines), text
    return report


def statuses(report):
    return {name: row["status"] for name, row in report["rows"].items()}


def test_all_are_measured_or_say_why_not(tmp_path):
    done = run(f"{CHECK} --minutes 60", cwd=tmp_path)
    report = report_in(tmp_path)
    rows, machine = report["rows"], report["machine"]
    assert list(rows) == list(MEASUREMENTS) and report["small"]
    assert "models of some MB" in done.stdout and f"torch {machine['versions']['torch']}" in done.stdout
    reasons = {name: row["note"] for name, row in rows.items() if row["status"] != "measured"}
    if machine["platform"] == "CPU":
        assert reasons == {"1b-lora-packed-varlen": "PyTorch has this attention for GPUs alone"}
    else:
        may_be = {"1b-lora-packed-varlen", "1b-lora-float16", "1b-full-2-processes"}
        assert set(reasons) <= may_be, reasons
    for name in rows.keys() - reasons.keys():
        row, kind = rows[name], MEASUREMENTS[name].kind
        assert row["note"]
        if kind == "training":
            figures = ("tokens_per_second", "of_matrix_rate", "matrix_rate", "peak", "plan")
            assert all(0 < row[figure] < 1e18 for figure in figures), row
            assert 7.5 < row["losses"][0] < 9.5 and len(row["step_seconds"]) == 3  # a guess among 4096 has 8.3
        if kind == "generation":
            assert row["tokens_per_second"] > 0
    assert rows["generate-32"]["tokens_per_second"] > rows["generate-1"]["tokens_per_second"]
    assert rows["resume"]["same"] is True
    assert rows["load-4bit"]["bytes"] > 1e6 and rows["load-4bit"]["seconds"] > 0
    for base in ("1b-lora", "1b-full"):  # the same weights and rows, computed in other ways
        for name, row in rows.items():
            if MEASUREMENTS[name].base == base and name not in reasons and MEASUREMENTS[name].processes == 1:
                assert row["losses"] == pytest.approx(rows[base]["losses"], rel=3e-3), name


def test_an_error_is_a_row(tmp_path):
    """A bitsandbytes that was built for another torch."""
    broken = tmp_path / "packages" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol')")
    env = {"PYTHONPATH": str(broken.parent)}
    done = run(f"{CHECK} --only qwen3-4b-qlora 1b-full", cwd=tmp_path, env=env)
    report = report_in(tmp_path)
    assert statuses(report) == {"qwen3-4b-qlora": "failed", "1b-full": "measured"}
    row = report["rows"]["qwen3-4b-qlora"]
    assert "does not work with torch" in row["note"] and any("Memory plan" in line for line in row["said"])
    assert f"failed: {row['note']}" in done.stdout


def test_the_limit_kills_a_measurement():
    before = psutil.Process().children(recursive=True)
    row = gpu_check.measure("resume", MEASUREMENTS["resume"], True, limit=3.0)
    assert (row["status"], row["note"]) == ("killed", "it took longer than 3 s")
    assert psutil.Process().children(recursive=True) == before


def test_what_the_minutes_have_no_room_for_is_a_row(tmp_path):
    done = run(f"{CHECK} --minutes 0.01 --only resume 1b-full", cwd=tmp_path)
    report = report_in(tmp_path)
    assert statuses(report) == {"resume": "not run", "1b-full": "not run"}
    assert done.stdout.count("not run: the 0.01 minutes were over") == 2 * 2  # as they come, and in the table


def test_ctrl_c_ends_with_what_is_there(tmp_path):
    """And ends every process that was started; torchrun's have sessions of their own."""
    names = ["generate-1", "1b-full-2-processes", "load-4bit"]
    process = start(f"{CHECK} --only", *names, cwd=tmp_path)
    started = []
    try:
        while len(started) < 3:  # torchrun, and its two
            if "one card" in (process.stdout.readline() if torch.cuda.device_count() == 1 else ""):
                pytest.skip("needs a second GPU")
            started = psutil.Process(process.pid).children(recursive=True)
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in said + errors, errors
    assert list(statuses(report_in(tmp_path)).values()) == ["measured", "not run", "not run"]
    assert said.count("not run: interrupted") == 2
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started)
