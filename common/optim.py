"""AdamW as this device and this torch can do it, and the learning rate of each step."""

from __future__ import annotations

import math
from functools import partial
from typing import List

import torch
from torch import nn

from common.checkpoint import dcp
from common.device import Device


def make_optimizer(model: nn.Module, args, device: Device) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) over the trainable weights; norms and biases don't decay.

    On a quantized base its states are in 8 bit (https://arxiv.org/abs/2110.02861), where bitsandbytes has that. To be
    called when the model is as it will be trained: an optimizer holds on to the very tensors that it is given.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    matrices, vectors = [w for w in trainable if w.dim() >= 2], [w for w in trainable if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # torch's checkpoints don't take an empty one
    if args.bits:
        from bitsandbytes.optim import AdamW8bit

        if _can_step(AdamW8bit, device.torch_device):
            return AdamW8bit(groups, lr=args.lr)
    fused = partial(torch.optim.AdamW, fused=True)  # one kernel for all weights: torch 2.0 on CUDA, 2.4 on a CPU
    kind = fused if not device.static_shapes and _can_step(fused, device.torch_device) else torch.optim.AdamW
    return kind(groups, lr=args.lr)


def learning_rate(step: int, total_steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """The learning rate of `step`, from 1 to `total_steps`: it rises to `lr` in the warm-up, then stays, or falls
    towards 0 along a line or a half cosine (https://arxiv.org/abs/1608.03983)."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def clip_gradients(weights: List[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of `max_norm`, 0: not at all; what their norm was, float32 []."""
    norm = nn.utils.clip_grad_norm_(weights, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of slices it is a sum over all processes


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """The optimizer's state by reference; a new one's is made first. Where torch can (2.2 and newer), by the names of
    the weights, so that another number of processes finds its part (torch.distributed.checkpoint.state_dict)."""
    by_name = _state_by_name()
    if by_name:
        made = not optimizer.state
        state = by_name.get_optimizer_state_dict(model, optimizer)
        for one in optimizer.state.values() if made else ():  # it is made by a step, which must not count
            one["step"] = one["step"] * 0
        return by_name.get_optimizer_state_dict(model, optimizer) if made else state
    return {"state": optimizer.state_dict()["state"]}  # tensors only: torch 1.13 reads nothing else as safely


def set_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict) -> None:
    """Give the optimizer a state as `state_of` returns it."""
    by_name = _state_by_name()
    if by_name:
        by_name.set_optimizer_state_dict(model, optimizer, state)
    else:
        optimizer.load_state_dict({**optimizer.state_dict(), **state})


def _state_by_name():
    if not dcp():
        return None
    from torch.distributed.checkpoint import state_dict

    return state_dict


def _can_step(make, device: torch.device) -> bool:
    """Whether the optimizer that `make` makes can update a weight on this device: an older one tells in a step."""
    weight = torch.zeros(4096, device=device, requires_grad=True)  # bitsandbytes keeps smaller ones in 32 bit
    weight.grad = torch.zeros_like(weight)
    try:
        make([weight]).step()
    except Exception:  # by version a TypeError, an AttributeError, a NotImplementedError, a RuntimeError, ...
        return False
    return True
