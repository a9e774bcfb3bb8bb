"""From the rows of a dataset file to batches: shuffled for each epoch, each split into micro-batches."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch

from common import distributed

IGNORE_INDEX = -100  # the label of a position that carries no loss, as in torch and transformers


class MicroBatch(NamedTuple):
    """Some rows of a batch, right-padded to the longest of them, or packed: one after the other, as a single row.

    input_ids and labels are int64 [rows, length]; labels are the ids where there is a loss and IGNORE_INDEX elsewhere
    (the loss shifts them by one position). attention_mask is int64 [rows, length], or None: with causal attention a token never sees the padding to its right, and without a mask the fast attention kernels can be taken. Of packed
    rows it is the tokens of each, int64 [1, 1, 1, rows] (model/packing.py).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: Optional[torch.Tensor]


class Batches:
    """The batches of a split (`dataset["train"]` of a dataset file), as the device wants them.

    `lengths` and `label_counts`, int32 [rows]: the tokens of each row, and those that carry a loss. static_length: the
    length of all rows on a platform that compiles a graph for each shape, else 0. packed: for a model that takes packed
    rows. Of several processes each takes its share of a batch.
    """

    def __init__(
        self,
        split: dict,
        batch_size: int,
        micro_batch_tokens: int,
        static_length=0,
        train_on_prompt=False,
        packed=False,
    ):
        self.split, self.micro_batch_tokens, self.static_length = split, micro_batch_tokens, static_length
        self.train_on_prompt, self.packed = train_on_prompt, packed
        self.lengths = split["lengths"]
        # a row's first token is never predicted
        self.label_counts = self.lengths - 1 if train_on_prompt else split["label_counts"]
        self.batch_size = min(batch_size, max(1, len(self.lengths)))  # of fewer rows a batch is all of them
        self.steps_an_epoch = len(self.lengths) // self.batch_size
        self._ordered, self._order = None, []  # by which (epoch, seed), and how

    def rows_for_step(self, step: int, seed: int) -> List[int]:
        """The row numbers of `step`, from 1: any step's, in any order. An epoch's rows that fill no batch are left."""
        epoch, place = divmod(step - 1, self.steps_an_epoch)
        if (epoch, seed) != self._ordered:
            shuffled = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(seed + epoch))
            self._ordered, self._order = (epoch, seed), shuffled.tolist()
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def of(self, rows: List[int]) -> List[MicroBatch]:
        """The micro-batches of this process's share of the rows: of at most `micro_batch_tokens` tokens, padding
        included. Every process has the same number of them, for a model that is shared out runs in all at once.

        A row longer than that is a micro-batch of its own.
        """
        if self.static_length:
            return [self._static(rows)]
        of_all = [self._groups(share) for share in self.shares(rows)]
        groups = of_all[distributed.rank()]
        found = [
            self._packed(group) if self.packed else self._padded(group, int(self.lengths[group[0]])) for group in groups
        ]
        return found + [self._padded([], 2, height=1)] * (max(map(len, of_all)) - len(groups))

    def shares(self, rows: List[int]) -> List[List[int]]:
        """The rows of each process."""
        parts = distributed.world_size()
        return _balanced(self.lengths[rows].tolist(), rows, parts) if parts > 1 else [rows]

    def halve_micro_batches(self, rows: List[int]) -> bool:
        """Halve this process's largest micro-batch of these rows; False where each row is one of its own already."""
        share = self.shares(rows)[distributed.rank()]
        groups = [] if self.static_length else self._groups(share)
        if self.static_length or len(groups) == len(share):
            return False
        self.micro_batch_tokens = max(micro_batch.input_ids.numel() for micro_batch in self.of(rows)) // 2
        return True

    def _groups(self, rows: List[int]) -> List[List[int]]:
        """The row numbers of each micro-batch, its longest row first."""
        lengths = dict(zip(rows, self.lengths[rows].tolist()))
        groups: List[List[int]] = []
        for row in sorted(rows, key=lambda row: (-lengths[row], row)):
            # packed, a row goes to the first micro-batch with room; padded, to rows of like length, for little padding
            for group in groups if self.packed else groups[-1:]:
                tokens = sum(map(lengths.get, [*group, row])) if self.packed else (len(group) + 1) * lengths[group[0]]
                if tokens <= self.micro_batch_tokens:
                    group.append(row)
                    break
            else:
                groups.append([row])
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
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for place, row in enumerate(rows):
            ids, row_labels = self._row(row)
            input_ids[place, : len(ids)], labels[place, : len(ids)] = ids, row_labels
        return MicroBatch(input_ids, labels, None)

    def _packed(self, rows: List[int]) -> MicroBatch:
        ids, labels = zip(*map(self._row, rows))
        for of_row in labels:
            of_row[0] = IGNORE_INDEX  # before it stands another row's last token, which does not predict it
        return MicroBatch(torch.cat(ids)[None], torch.cat(labels)[None], self.lengths[rows].long()[None, None, None])

    def _row(self, row: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Its ids and labels, int64 [tokens]."""
        begin, end = int(self.split["offsets"][row]), int(self.split["offsets"][row + 1])
        ids = self.split["input_ids"][begin:end].long()
        with_loss = torch.as_tensor(self.train_on_prompt or self.split["loss_mask"][begin:end])
        return ids, torch.where(with_loss, ids, IGNORE_INDEX)


def _balanced(lengths: List[int], rows: List[int], parts: int) -> List[List[int]]:
    """Parts of about as many tokens, so that no process waits long for the others; of the same rows the same ones."""
    found: List[List[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for length, row in sorted(zip(lengths, rows), key=lambda pair: (-pair[0], pair[1])):  # the longest first
        least = tokens.index(min(tokens))
        found[least].append(row)
        tokens[least] += length
    return found
