"""The loss of micro-batches, and of rows that are held out."""

from __future__ import annotations

import contextlib
from typing import List

import torch
from torch import nn

from common import processes
from common.accelerator import Accelerator
from common.batching import Batches


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Inside, the model is in evaluation: without dropout, without gradients. Whatever comes, it is as before after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def total_loss(model: nn.Module, batches: Batches, rows: List[int], accelerator, after_each=lambda: None) -> float:
    """The loss over all label tokens of these rows, in evaluation. `after_each` micro-batch something is called, which
    may raise. Of several processes each takes its share of the rows, and all get the sum."""
    total = 0.0
    with evaluating(model):
        for start in range(0, len(rows), batches.batch_size):
            for micro_batch in batches.of(rows[start : start + batches.batch_size]):
                total += forward(model, micro_batch, accelerator).item()
                after_each()
    return processes.total(torch.tensor(total, dtype=torch.float64)).item()


def forward(model: nn.Module, micro_batch, accelerator: Accelerator) -> torch.Tensor:
    """The sum of the loss over the label tokens of a micro-batch, float32 []."""
    on_device = [None if tensor is None else tensor.to(accelerator.device) for tensor in micro_batch]
    with accelerator.autocast():
        return model(*on_device)
