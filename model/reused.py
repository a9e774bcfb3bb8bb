"""Memory for the vocabulary-sized pieces of a training on a CPU, used again by each micro-batch.

The system clears new memory page by page when it is first written to. For pieces of this size (50 MB and more) that
takes longer than most of what is calculated in them.
"""

from __future__ import annotations

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

    def gradient_in_place(self, name: str, layer: nn.Module) -> None:
        """Let the gradient of the layer's weight be added to what is there: without one it gets zeros. That of an
        embedding is sparse from here on, the rows of the tokens that came, and autograd adds these alone."""
        weight = layer.weight
        if self.on and weight.requires_grad:
            layer.sparse = True
            if weight.grad is None:
                weight.grad = self.empty(name, weight.shape, weight.dtype, weight.device).zero_()
