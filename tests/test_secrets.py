"""A token of the hub stands nowhere but where the reader has put it: not on the screen, and in no file."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.helpers import TRAIN, tells

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWx"
# a fault of ours, in whose words the token is
FAULT = """
import sys
sys.path.insert(0, {root!r})
from common.support.exit import run


def main():
    raise RuntimeError("asked with the header Bearer " + {token!r})


run(main)
"""


def found(folder, token):
    """The files in which it stands."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if token.encode() in path.read_bytes()]


def test_a_training_writes_it_nowhere(ready, warm):
    """Neither the token that the environment has, nor a word of the command that looks like one, in run.json."""
    words = f"{TRAIN} --max-train-steps 4 --save-steps 2 --log-interval 1 --save-dir out-{TOKEN}"
    stopped = words.replace("python ", f"python {ROOT}/tests/killed.py 15 +common.trainer:Trainer.train_step 3 ")
    out, env = ready / f"out-{TOKEN}", {"HF_TOKEN": "my-own-mirrors-token"}
    for command, last in ((stopped, "checkpoint-3/checkpoint.json"), (words, "run.json")):
        done = warm(command, cwd=ready, env=env, ok=None)
        assert (out / last).is_file()
        assert not found(ready, env["HF_TOKEN"]) and env["HF_TOKEN"] not in done.stdout + done.stderr
    assert TOKEN not in (out / "run.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [f"--token {TOKEN}", f"--token={TOKEN}", "--token secretsecret"])
def test_an_option_that_a_script_has_not_is_refused_without_it(words, ready, warm):
    done = warm(f"{TRAIN} {words}", cwd=ready, ok=None)
    tells(done, "unrecognized arguments")
    assert TOKEN not in done.stderr and "secretsecret" not in done.stderr


@pytest.mark.parametrize("token, env", [(TOKEN, {}), ("my-own-mirrors-token", {"HF_TOKEN": "my-own-mirrors-token"})])
def test_a_traceback_has_not_got_it(token, env, folder, warm):
    (folder / "fault.py").write_text(FAULT.format(root=str(ROOT), token=token))
    done = warm("python fault.py", cwd=folder, env=env, ok=None)
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: asked with" in done.stderr
    assert token not in done.stderr.replace(f'"Bearer " + {token!r}', "").replace(repr(token), "")
