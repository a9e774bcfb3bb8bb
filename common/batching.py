"""From the rows of a dataset file to batches: shuffled for each epoch, each split into micro-batches of like length."""

from __future__ import annotations

from typing import List, NamedTuple, Optional

import torch

from common import processes

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


class Batches:
    """The batches of a split (`dataset["train"]` of a dataset file), as the device wants them.

    `lengths` and `label_counts`, int32 [rows]: the tokens of each row, and those that carry a loss. static_length: the
    length of all rows on a platform that compiles a graph for each shape, else 0. Of several processes each takes its
    share of a batch.
    """

    def __init__(self, split: dict, batch_size: int, micro_batch_tokens: int, static_length=0, train_on_prompt=False):
        self.split, self.micro_batch_tokens, self.static_length = split, micro_batch_tokens, static_length
        self.train_on_prompt = train_on_prompt
        self.lengths = split["lengths"]
        # a row's first token is never predicted
        self.label_counts = self.lengths - 1 if train_on_prompt else split["label_counts"]
        self.batch_size = min(batch_size, max(1, len(self.lengths)))  # of fewer rows a batch is all of them
        self.steps_an_epoch = len(self.lengths) // self.batch_size
        self._ordered, self._order = None, []  # by which (epoch, seed), and how

    def rows_of(self, step: int, seed: int) -> List[int]:
        """The row numbers of `step`, from 1: any step's, in any order. An epoch's rows that fill no batch are left."""
        epoch, place = divmod(step - 1, self.steps_an_epoch)
        if (epoch, seed) != self._ordered:
            shuffled = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(seed + epoch))
            self._ordered, self._order = (epoch, seed), shuffled.tolist()
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def of(self, rows: List[int]) -> List[MicroBatch]:
        """The micro-batches of this process's share of the rows: of at most `micro_batch_tokens` tokens, padding
        included. Every process has the same number of them, for a model that is shared out runs in all at once.

        Rows of like length go together, so that little is padding. A row longer than that is a micro-batch of its own.
        """
        if self.static_length:
            return [self._static(rows)]
        of_all = [self._groups(share) for share in self.shares(rows)]
        groups = of_all[processes.number()]
        found = [self._padded(group, int(self.lengths[group[0]])) for group in groups]
        return found + [self._padded([], 2, height=1)] * (max(map(len, of_all)) - len(groups))

    def shares(self, rows: List[int]) -> List[List[int]]:
        """The rows of each process."""
        parts = processes.count()
        return _balanced(self.lengths[rows].tolist(), rows, parts) if parts > 1 else [rows]

    def make_smaller(self, rows: List[int]) -> bool:
        """Halve this process's largest micro-batch of these rows; False where each row is one of its own already."""
        share = self.shares(rows)[processes.number()]
        groups = [] if self.static_length else self._groups(share)
        if self.static_length or len(groups) == len(share):
            return False
        self.micro_batch_tokens = max(len(group) * int(self.lengths[group[0]]) for group in groups) // 2
        return True

    def _groups(self, rows: List[int]) -> List[List[int]]:
        """The row numbers of each micro-batch, the longest row first."""
        lengths = self.lengths[rows].tolist()
        groups: List[List[int]] = []
        longest = 0
        for length, row in sorted(zip(lengths, rows), key=lambda pair: (-pair[0], pair[1])):
            if groups and (len(groups[-1]) + 1) * longest <= self.micro_batch_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
                longest = length
        return groups

    def _static(self, rows: List[int]) -> MicroBatch:
        """The whole batch at once, padded to [batch_size, static_length], with its attention mask. A short last batch
        (of the held-out rows) is filled up with rows of padding."""
        ids, labels, _ = self._padded(rows, self.static_length, self.batch_size)
        lengths = torch.ones(self.batch_size, dtype=torch.int64)  # padding attends to one token: no empty softmax
        lengths[: len(rows)] = self.lengths[rows]
        mask = (torch.arange(self.static_length) < lengths[:, None]).long()
        return MicroBatch(ids, labels, mask)

    def _padded(self, rows: List[int], length: int, height: int = 0) -> MicroBatch:
        # any id will do as padding: it has no label, and no token of the row sees it
        input_ids = torch.zeros((max(height, len(rows)), length), dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        for place, row in enumerate(rows):
            begin, end = int(self.split["offsets"][row]), int(self.split["offsets"][row + 1])
            ids = self.split["input_ids"][begin:end].long()
            input_ids[place, : len(ids)] = ids
            with_loss = self.train_on_prompt or self.split["loss_mask"][begin:end]
            labels[place, : len(ids)] = torch.where(torch.as_tensor(with_loss), ids, IGNORED)
        return MicroBatch(input_ids, labels, None)


def _balanced(lengths: List[int], rows: List[int], parts: int) -> List[List[int]]:
    """Parts of about as many tokens, so that no process waits long for the others; of the same rows the same ones."""
    found: List[List[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for length, row in sorted(zip(lengths, rows), key=lambda pair: (-pair[0], pair[1])):  # the longest first
        least = tokens.index(min(tokens))
        found[least].append(row)
        tokens[least] += length
    return found
