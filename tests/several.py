"""Trainings one after another in the same processes, and what each process has seen of them.

    python tests/several.py cases.json
    torchrun --standalone --nproc-per-node 2 tests/several.py cases.json

cases.json: [{"name", "words": a train script and its options, "cut": the step in which the training is cut, "file":
bytes of a file of weights at most}, ...]. Each process N writes into the directory NAME: seen-N.json, the rows that it
has trained on in each step, how many micro-batches it ran, the error that ended it; loaded-N.pt, all that was loaded;
and weights-N.pt, what was trained. Products are in float32, so that a sum in another order is all that may differ.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import model.load
import model.save
from common import device, distributed
from common.batches import Batches
from common.support.exit import UserError
from common.trainer import Trainer

device._cpu_has_bf16 = lambda: False
case: dict = {}
seen: dict = {}
rows_of_now: list = []


def micro_batches(self, rows, real=Batches.micro_batches):
    rows_of_now.clear()
    found = real(self, rows)
    if self is case.get("training"):
        seen["rows"].append(sorted(rows_of_now))
        seen["micro_batches"].append(len(found))
    return found


def padded(self, rows, *size, real=Batches._padded, **more):
    rows_of_now.extend(rows)
    return real(self, rows, *size, **more)


def packed(self, rows, real=Batches._packed):
    rows_of_now.extend(rows)
    return real(self, rows)


def gradients(self, *args, real=Trainer.backward):
    if self.state.step + 1 == case.get("cut"):
        raise UserError("cut")
    case["training"] = self.batches
    try:
        return real(self, *args)
    finally:
        del case["training"]


def write_whole(tensors, name):
    whole = {key: tensor.detach() for key, tensor in tensors}
    whole = {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in whole.items()}
    torch.save({key: tensor.clone() for key, tensor in whole.items()}, f"{case['name']}/{name}-{distributed.rank()}.pt")


def load(*args, real=model.load.load_for_training):
    torch.rand(distributed.rank())  # the others stand elsewhere in their random numbers: a new adapter must not differ
    module = real(*args)
    write_whole((*module.named_parameters(), *module.named_buffers()), "loaded")
    return module


def save(module, *args, real=model.save.save_model, **options):
    write_whole(((name, weight) for name, weight in module.named_parameters() if weight.requires_grad), "weights")
    real(module, *args, **options)


Batches.micro_batches, Batches._padded, Batches._packed, Trainer.backward = micro_batches, padded, packed, gradients
model.load.load_for_training = load
model.save.save_model = save
if __name__ == "__main__":
    if distributed.rank() > 0:  # as common.support.exit.run does it
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        case.clear()
        case.update(one)
        seen.update(rows=[], micro_batches=[], error="")
        model.save.MAX_FILE_BYTES = one.get("file", 10**9)
        Path(one["name"]).mkdir(exist_ok=True)
        script, *words = one["words"].split()
        sys.argv = [str(ROOT / script), *words, "--save-dir", f"{one['name']}/saved"]
        try:
            runpy.run_path(sys.argv[0])["main"]()
        except UserError as error:
            seen["error"] = str(error)
        Path(one["name"], f"seen-{distributed.rank()}.json").write_text(json.dumps(seen))
