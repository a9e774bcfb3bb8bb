"""From the rows of a dataset file to batches: shuffled global batches, each split into micro-batches of like length."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional

import torch

IGNORED = -100  # the label of a position that carries no loss, as torch and transformers have it


class MicroBatch(NamedTuple):
    """Some rows of a batch, right-padded to the longest of them.

    input_ids and labels are int64 [rows, length]; labels are the ids where there is a loss and IGNORED elsewhere (the
    shift by one position is the loss's affair). attention_mask is int64 [rows, length], or None: with causal attention
    a token never sees the padding to its right, and without a mask the fast attention kernels can be taken.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: Optional[torch.Tensor]


def global_batches(rows: int, batch_size: int, seed: int, epoch: int) -> List[List[int]]:
    """The row numbers of each batch of an epoch, shuffled by seed and epoch. A last short batch is dropped."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(rows, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]


def row_lengths(split: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens of each row, int64 [rows]."""
    return split["offsets"][1:] - split["offsets"][:-1]


def label_counts(split: Dict[str, torch.Tensor], train_on_prompt: bool) -> torch.Tensor:
    """Positions of each row that carry a loss, int64 [rows]. A row's first token is never predicted."""
    starts = torch.ones_like(split["answer_starts"]) if train_on_prompt else split["answer_starts"].clamp(min=1)
    return row_lengths(split) - starts


def micro_batches(
    split: Dict[str, torch.Tensor], rows: List[int], micro_batch_tokens: int, train_on_prompt: bool
) -> List[MicroBatch]:
    """Split a batch's rows into micro-batches of at most `micro_batch_tokens` tokens, padding included.

    Rows of like length go together, so that little is padding. A row longer than that is a micro-batch of its own.
    """
    lengths = row_lengths(split)
    groups: List[List[int]] = []
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        # the first row of a group is its longest
        if groups and (len(groups[-1]) + 1) * int(lengths[groups[-1][0]]) <= micro_batch_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_padded(split, group, int(lengths[group[0]]), train_on_prompt) for group in groups]


def static_batch(
    split: Dict[str, torch.Tensor], rows: List[int], batch_size: int, block_size: int, train_on_prompt: bool
) -> List[MicroBatch]:
    """The whole batch at once, padded to [batch_size, block_size], with its attention mask: for a platform that
    compiles a graph for each shape. A short last batch (of the held-out rows) is filled up with rows of padding."""
    ids, labels, _ = _padded(split, rows, block_size, train_on_prompt, batch_size)
    lengths = torch.ones(batch_size, dtype=torch.int64)  # a row of padding still attends to one token: no empty softmax
    lengths[: len(rows)] = row_lengths(split)[rows]
    mask = (torch.arange(block_size) < lengths[:, None]).long()
    return [MicroBatch(ids, labels, mask)]


def _padded(split, rows: List[int], length: int, train_on_prompt: bool, height: int = 0) -> MicroBatch:
    # any id will do as padding: it has no label, and no token of the row sees it
    input_ids = torch.zeros((max(height, len(rows)), length), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for place, row in enumerate(rows):
        begin, end = int(split["offsets"][row]), int(split["offsets"][row + 1])
        ids = split["input_ids"][begin:end].long()
        start = 0 if train_on_prompt else int(split["answer_starts"][row])
        input_ids[place, : len(ids)] = ids
        labels[place, start : len(ids)] = ids[start:]
    return MicroBatch(input_ids, labels, None)
