"""The default of every option that a page or its tables name, as --help tells it; and no option is missing there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT
from tests.tutorials import DEFAULTS

REFERENCE = (ROOT / "tutorial" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults(script, warm, folder):
    """As --help tells them, which argparse makes of the defaults themselves."""
    text = warm(f"python {script} --help", cwd=folder, env={"COLUMNS": "400"}).stdout
    found = {}
    for option in re.split(r"\n  (?=-)", text):
        name, default = re.match(r"--([a-z-]+)", option), re.search(r"\(default: ([^)]*)\)", option)
        if name and default:
            found[name.group(1)], *with_lora = default.group(1).split(", with --use-lora ")
            found.update({f"{name.group(1)} with --use-lora": value for value in with_lora})
    found["load-in"] = "4 bit" if re.search(r"--load-in-4bit .*\(the default here\)", text) else "as it is stored"
    asked = DEFAULTS[script]
    assert {name: type(value)(found[name]) for name, value in asked.items()} == asked
    assert f"python {script}" in text  # the command, as the page has it
    assert [name for name in re.findall(r"(?m)^  (--[\w-]+)", text) if f"`{name}`" not in REFERENCE] == []


def test_every_script_has_its_defaults_checked():
    scripts = {f"{path.parent.name}/{path.name}" for path in (ROOT / "tutorial").glob("*.py")}
    scripts |= {f"dataset/{path.name}" for path in (ROOT / "dataset").glob("prepare_*.py")}
    assert scripts == set(DEFAULTS)
