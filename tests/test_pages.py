"""The Korean pages and the README: each is followed as tests/page_runner.py says, and tells the truth."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import contextmanager

import pytest

from tests import plan_tables
from tests.conftest import ROOT
from tests.page_runner import TOKEN, Shell, commands, mistakes, prepared, read
from tests.record import RECORDED, read_record

TUTORIALS = sorted(f"tutorial/{path.name}" for path in (ROOT / "tutorial").glob("*.md"))
PAGES = ["README.md", "tests/benchmarks/README.md", *TUTORIALS]
SAMPLES = ROOT / "dataset" / "samples"
# on the real hub only the news have held-out rows; they come in several versions
CONFIGS = """---
configs:
- config_name: 3.0.0
  data_files: [{split: train, path: 3.0.0/train.jsonl}, {split: validation, path: 3.0.0/validation.jsonl}]
- config_name: 1.0.0
  data_files: [{split: train, path: 1.0.0/train.jsonl}]
---
"""


def sample(name, split, rows=64):
    return b"".join((SAMPLES / name / f"{split}.jsonl").read_bytes().splitlines(keepends=True)[:rows])


DATASETS = {
    "abisee/cnn_dailymail": {
        "README.md": CONFIGS.encode(),
        "1.0.0/train.jsonl": json.dumps({"article": "another version", "highlights": "another"}).encode(),
        "3.0.0/train.jsonl": sample("cnn_dailymail", "train", rows=32),  # they are long
        "3.0.0/validation.jsonl": sample("cnn_dailymail", "validation"),
    },
    **{
        f"{owner}/{name}": {"train.jsonl": sample(name, "train")}
        for owner, name in (
            ("iamtarun", "python_code_instructions_18k_alpaca"),
            ("mlabonne", "Evol-Instruct-Python-26k"),
            ("jojo0217", "korean_safe_conversation"),
        )
    },
}


def models_of(text, stand_in):
    """({name of a model that a page downloads: files}, {name of a gated one of them: token}).

    Another model that the page names is a stand-in by the script that the page named last.
    """
    repos, gated, files = {}, {}, {}
    for script, name in re.findall(r"tutorial/(download_\w+)\.py|(?:--model-name |model_name=\")([^\s\"]+)", text):
        path = ROOT / "tutorial" / f"{script}.py"
        if name:
            repos.setdefault(name, files)
        elif path.is_file():  # not one that the page tells to write
            source, files = path.read_text(encoding="utf-8"), stand_in(path)
            for name in re.findall(r'model_name="(.*?)"', source):
                repos[name] = files
                if "It is gated" in source:
                    gated[name] = TOKEN
    return repos, gated


@contextmanager
def what_it_downloads(text, warm, hub, stand_in):
    """Inside, the hub has the data, and stand-ins for the models that a page downloads."""
    models, hub.gated = models_of(text, stand_in)
    hub.repos = {"models": models, "datasets": DATASETS}
    hub.accounts, hub.tokens = {TOKEN: "reader"}, {TOKEN}
    shutil.rmtree(warm.hf_home, ignore_errors=True)  # what the page before it downloaded
    try:
        yield
    finally:
        hub.repos = {"models": {}, "datasets": {}}


SHORT = ("README.md",)  # the others take a minute or two each


@pytest.mark.parametrize(
    "page", [page if page in SHORT else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_page(page, tmp_path, warm, warm_hub, stand_in):
    text = (ROOT / page).read_text(encoding="utf-8")
    downloads = what_it_downloads(text, warm, warm_hub, stand_in)
    with downloads, Shell(tmp_path, warm, warm_hub.url, warm.hf_home, prepared(text)) as shell:
        found = mistakes(text, ROOT / page, shell)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


NOT_RUN = 4  # blocks that need MoAI Platform, or hours; it may only become less


def test_nearly_all_is_run(capfd):
    """And what is not is printed, with its reason (on standard error, which pytest-xdist lets through)."""
    total, not_run = 0, []
    for page in PAGES:
        blocks = read((ROOT / page).read_text(encoding="utf-8"))[0]
        total += len(commands(blocks))
        not_run += [
            f"  {page}:{block.line - 1}: {block.marks['not run']}" for block in blocks if "not run" in block.marks
        ]
    with capfd.disabled():
        print("", f"{total - len(not_run)} of {total} blocks run; not run:", *not_run, sep="\n", file=sys.stderr)
    assert len(not_run) <= NOT_RUN


def test_each_record_is_shown():
    """And tells where its output comes from."""
    shown = [
        block.marks["recorded"]
        for page in PAGES
        for block in read((ROOT / page).read_text(encoding="utf-8"))[0]
        if "recorded" in block.marks
    ]
    assert sorted(set(shown)) == sorted(path.stem for path in RECORDED.glob("*.json"))
    for name in shown:
        record = read_record(name)
        assert all(record[key] for key in ("command", "commit", "date", "machine", "packages", "output")), name


# ------------------------------------------------------------------------------------------------ memory and disk


def test_figures_of_memory_and_disk_are_the_plans():
    """python tests/plan_tables.py --write writes them."""
    assert plan_tables.differences() == []


def test_each_place_of_a_figure_is_found():
    """None is left out because its marker is mistyped, or never closed; each model has its table of memory."""
    for page in plan_tables.pages():
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- plan: ") == text.count("<!-- /plan -->") == len(plan_tables.MARKED.findall(text)), page
    text = "".join(page.read_text(encoding="utf-8") for page in plan_tables.pages())
    kinds = [kind for kind in plan_tables.KINDS if f"tutorial/{kind.replace('_70b', '')}.md" in PAGES]
    tables = {f"memory {kind}" for kind in kinds} | {"memory", "disk", "scale llama3_70b"}
    assert len(kinds) >= 8
    assert tables <= {words for _, words, _, _ in plan_tables.MARKED.findall(text)}


def test_the_table_of_several_nodes():
    """Its parts add up to the peak; what moves and the seconds are those of a calculation by hand."""
    cells = {name: re.findall(r"[\d.,]+", cell) for name, cell in plan_tables.on_nodes("llama3_70b", 16).items()}
    numbers = {name: [float(number.replace(",", "")) for number in cell] for name, cell in cells.items()}
    weights, others = list(numbers.values())[:2]
    assert sum(weights + others) == pytest.approx(numbers["전체 파라미터: 최대"][0], abs=0.5)
    moves = 70.55e9 * (2 + 2 + 4) * 8 * 15 / 16  # 8 micro-batches on 16 GPUs
    expected = [moves / 1e9, moves / 450e9, moves / 12.5e9]
    assert numbers["전체 파라미터: 한 step에 받는 양 / NVLink / 100 Gb/s"] == pytest.approx(expected, rel=0.01)
    assert numbers["QLoRA: 한 step에 받는 양 / NVLink / 100 Gb/s"][0] == pytest.approx(2 * 0.828 * 15 / 16, rel=0.05)
    assert plan_tables.on_nodes("llama3_70b", 8)["전체 파라미터: 최대"].endswith("(부족)")


def test_a_wrong_figure_is_found(monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- plan: smollm2 full state -->9.9 GB<!-- /plan --> b", encoding="utf-8")
    monkeypatch.setattr(plan_tables, "ROOT", tmp_path)
    (line,) = plan_tables.differences()
    assert line.startswith("README.md:2: plan: smollm2 full state:2.2 GB")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert plan_tables.with_figures(text) == text.replace("9.9", "2.2")
