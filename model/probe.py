"""Asks a model what it does, with a few tokens: what a class or a config says is not always so."""

from __future__ import annotations

import torch
from torch import nn

from common.trainer import eval_mode


def probe_ids(model: nn.Module, count: int) -> torch.Tensor:
    """[1, count] token ids of ordinary text: special tokens are at the beginning or at the end of a vocabulary."""
    vocabulary = len(model.get_input_embeddings().weight)
    return (torch.arange(count, device=model.device)[None] + vocabulary // 2) % vocabulary


def logits_of(model: nn.Module, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """The logits of `input_ids`, float32 [rows, tokens, vocabulary]."""
    with eval_mode(model):
        return model(input_ids=input_ids, use_cache=False, **inputs).logits.float()


def largest_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two tensors of logits, as a part of the largest logit."""
    return float((logits.cpu() - expected.cpu()).abs().max() / expected.abs().max())
