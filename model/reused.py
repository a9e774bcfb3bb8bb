"""Memory for the vocabulary-sized pieces of a training on a CPU, used again by each micro-batch.

The system clears new memory page by page when it is first written to. For pieces of this size (50 MB and more) that
takes longer than most of what is calculated in them.
"""

from __future__ import annotations

import contextlib
from typing import Dict, Tuple

import torch
from torch import nn


class Reused:
    """Pieces of memory by name; new ones each time until `on` is set."""

    def __init__(self):
        self.on = False
        self.pieces: Dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor with whatever numbers, which lasts until the same name is asked for again."""
        if not self.on:
            return torch.empty(shape, dtype=dtype, device=device)
        piece, size = self.pieces.get(name), torch.Size(shape).numel()
        if piece is None or len(piece) < size or piece.dtype != dtype:
            piece = self.pieces[name] = torch.empty(size, dtype=dtype, device=device)
        return piece[:size].view(shape)

    @contextlib.contextmanager
    def gradients_in_place(self, head: nn.Module, embeddings: nn.Module):
        """Inside a forward pass: what its backward pass has for both weights is added where their gradients are, zeros
        at first. That of the embeddings is sparse, the rows of the tokens that came, and autograd adds these alone."""
        sparse = getattr(embeddings, "sparse", False)
        if self.on and torch.is_grad_enabled():
            for name, weight in (("of the output layer", head.weight), ("of the embeddings", embeddings.weight)):
                if weight.requires_grad and weight.grad is None:
                    weight.grad = self.empty(name, weight.shape, weight.dtype, weight.device).zero_()
            embeddings.sparse = embeddings.weight.requires_grad
        try:
            yield
        finally:
            embeddings.sparse = sparse
