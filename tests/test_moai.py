"""MoAI Platform, by a stand-in for its build of torch: parallelization comes first, and every pass has one shape."""

from __future__ import annotations

import json

from tests.conftest import run
from tests.helpers import weights

# What the platform's build of torch brings, and a record of what happens: the call, models being built, shapes.
MOAI = """
import json, os, sys, types

import torch


def record(*event):
    with open(os.environ["EVENTS"], "a") as file:
        file.write(json.dumps(event) + "\\n")


moreh = types.ModuleType("torch.moreh")
moreh.option = types.ModuleType("torch.moreh.option")
moreh.option.enable_advanced_parallelization = lambda: record("parallel")
torch.moreh = sys.modules["torch.moreh"] = moreh
sys.modules["torch.moreh.option"] = moreh.option

build, call = torch.nn.Module.__init__, torch.nn.Module.__call__


def __init__(self, *args, **kwargs):
    record("built", type(self).__name__)
    build(self, *args, **kwargs)


def __call__(self, *args, **kwargs):
    if type(self).__name__.endswith(("ForCausalLM", "LMHeadModel")) or type(self).__module__ == "model.loss":
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        shapes = [list(tensor.shape) for tensor in tensors]
        record("forward", type(self).__name__, self.training, torch.is_grad_enabled(), shapes)
    return call(self, *args, **kwargs)


torch.nn.Module.__init__, torch.nn.Module.__call__ = __init__, __call__
"""


def test_moai_platform(ready, tmp_path):
    """Automatic parallelization is turned on once, before the model is built; every pass has one and the same shape."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MOAI)
    env = {"PYTHONPATH": str(tmp_path / "site"), "EVENTS": str(tmp_path / "events")}
    # the 16 held-out rows are no multiple of the batch, and the rows of 128 tokens are shorter than the block
    words = "--batch-size 6 --block-size 160 --epochs 1 --max-train-steps 3 --eval-step 1"
    said = run(f"python tutorial/train_llama3.py {words}", cwd=ready, env=env).stdout
    assert "Memory plan:" not in said  # the platform splits a model by itself
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event[0] for event in events].count("parallel") == 1
    assert events[0] == ["parallel"]
    built = [event[1] for event in events if event[0] == "built"]
    assert built.count("LlamaForCausalLM") == 1
    for name in ("LlamaForCausalLM", "CausalLMLoss"):
        passes = [event for event in events if event[:2] == ["forward", name]]
        training = [event for event in passes if event[2] and event[3]]
        held_out = [event for event in passes if not event[2] and not event[3]]
        assert len(training) == 3 and len(held_out) == 4 * 3 and len(passes) == 15
        tensors = 2 if name == "LlamaForCausalLM" else 3  # ids and mask; ids, labels and mask
        assert all(event[4] == [[6, 160]] * tensors for event in passes), passes
    assert weights(ready / "llama3_summarization")
