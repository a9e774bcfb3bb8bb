"""AdamW, the learning rate of each step, and gradient clipping."""

from __future__ import annotations

import math
from functools import partial
from typing import List

import torch
from torch import nn

from common.device import Device


def make_optimizer(model: nn.Module, args, device: Device) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) over the trainable parameters; norms and biases have no weight decay.

    On a quantized base its states are in 8 bit (https://arxiv.org/abs/2110.02861), where bitsandbytes can do that. Call
    it after the model is in its final form: the optimizer keeps references to the parameters.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": args.weight_decay})
    if vectors:  # an empty group would break torch's distributed checkpoints
        groups.append({"params": vectors, "weight_decay": 0.0})
    if model.bits:
        from bitsandbytes.optim import AdamW8bit

        if supports_device(AdamW8bit, device.torch_device):
            return AdamW8bit(groups, lr=args.lr)
    # One kernel for all parameters: since torch 2.0 on CUDA, since 2.4 on a CPU.
    fused = partial(torch.optim.AdamW, fused=True)
    if not device.static_shapes and supports_device(fused, device.torch_device):
        return fused(groups, lr=args.lr)
    return torch.optim.AdamW(groups, lr=args.lr)


def supports_device(make_optimizer, device: torch.device) -> bool:
    """Whether this optimizer can update a parameter on `device`: an older version fails in its first step."""
    parameter = torch.zeros(4096, device=device, requires_grad=True)  # bitsandbytes keeps smaller ones in 32 bit
    parameter.grad = torch.zeros_like(parameter)
    try:
        make_optimizer([parameter]).step()
    except Exception:  # a TypeError, AttributeError, NotImplementedError or RuntimeError, depending on the version
        return False
    return True


def learning_rate(step: int, total_steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """The learning rate of `step`, from 1 to `total_steps`.

    It rises to `lr` in the warm-up. Then it is constant, or falls towards 0 linearly or along half a cosine
    (https://arxiv.org/abs/1608.03983).
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return lr * (1.0 - progress)
    if schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return lr


def clip_gradients(parameters: List[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of `max_norm` (0: not at all); their norm before that, float32 []."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2: the norm over all ranks
