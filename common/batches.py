"""From the rows of a dataset file to micro-batches: shuffled for each epoch, padded or packed."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch

from common import distributed

IGNORE_INDEX = -100  # the label of a position without a loss, as in torch and transformers


class MicroBatch(NamedTuple):
    """Some rows of a batch, padded to one length, or packed: one after the other in a single row.

    input_ids and labels are int64 [rows, length]. labels are the ids where there is a loss and IGNORE_INDEX elsewhere;
    the loss shifts them by one position. attention_mask is int64 [rows, length] or None: with causal attention no token
    sees the padding to its right, and without a mask the fast attention kernels can be used. cu_seq_lens is int32
    [rows + 1] for packed rows, where each row begins and the last one ends; else None. positions is int64 [labels]: the
    positions of the flattened input_ids that predict a token with a label; None if each batch must have the same
    shapes. They are found here, because the training would have to wait until a GPU has counted them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: Optional[torch.Tensor] = None
    cu_seq_lens: Optional[torch.Tensor] = None
    positions: Optional[torch.Tensor] = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`, without waiting until a GPU has finished its earlier work."""
        return MicroBatch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))


class Batches:
    """The batches of a split (`dataset["train"]` of a dataset file).

    `lengths` and `label_counts`, int32 [rows], are the tokens of each row, and those of them with a loss. With
    static_length > 0 every batch is padded to [batch_size, static_length], for a platform that compiles a graph for
    each shape. With packed, rows are packed: only for a model that can attend inside of each row. With several ranks
    each takes its share of a batch.
    """

    def __init__(
        self,
        split: dict,
        batch_size: int,
        micro_batch_tokens: int,
        static_length: int = 0,
        train_on_prompt: bool = False,
        packed: bool = False,
    ):
        self.split = split
        self.micro_batch_tokens = micro_batch_tokens
        self.static_length = static_length
        self.train_on_prompt = train_on_prompt
        self.packed = packed
        self.lengths = split["lengths"]
        # Nothing predicts the first token of a row.
        self.label_counts = self.lengths - 1 if train_on_prompt else split["label_counts"]
        self.batch_size = min(batch_size, max(1, len(self.lengths)))
        self.steps_per_epoch = len(self.lengths) // self.batch_size
        self._epoch_key: Optional[tuple] = None
        self._epoch_order: List[int] = []

    def rows_for_step(self, step: int, seed: int) -> List[int]:
        """The row numbers of `step`, from 1. They follow from step and seed alone, so a resumed run gets the same.

        The last rows of an epoch that do not fill a batch are left out.
        """
        epoch, batch = divmod(step - 1, self.steps_per_epoch)
        if self._epoch_key != (epoch, seed):
            generator = torch.Generator().manual_seed(seed + epoch)
            self._epoch_order = torch.randperm(len(self.lengths), generator=generator).tolist()
            self._epoch_key = (epoch, seed)
        return self._epoch_order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def num_labels(self, rows: List[int]) -> int:
        """The number of tokens with a loss in these rows."""
        return int(self.label_counts[rows].sum())

    def num_tokens(self, rows: List[int]) -> int:
        """The number of tokens in these rows, without padding."""
        return int(self.lengths[rows].sum())

    def micro_batches(self, rows: List[int]) -> List[MicroBatch]:
        """This rank's share of the rows in micro-batches of at most `micro_batch_tokens` tokens, padding included.

        A row that is longer gets a micro-batch of its own. Every rank has the same number of micro-batches, because a
        sharded model runs on all ranks at once: a rank that has fewer gets empty ones.
        """
        if self.static_length:
            return [self._static(rows)]
        groups_of_ranks = [self._groups(share) for share in self.split_over_ranks(rows)]
        most = max(len(groups) for groups in groups_of_ranks)
        groups = groups_of_ranks[distributed.rank()]
        make = self._packed if self.packed else self._padded
        micro_batches = [make(group) for group in groups]
        return micro_batches + [pad_rows([], 2, height=1)] * (most - len(groups))

    def split_over_ranks(self, rows: List[int]) -> List[List[int]]:
        """The rows of each rank: about as many tokens for each, so that no rank waits long for the others."""
        if distributed.world_size() == 1:
            return [rows]
        shares: List[List[int]] = [[] for _ in range(distributed.world_size())]
        tokens = [0] * distributed.world_size()
        for row in self._longest_first(rows):
            smallest = tokens.index(min(tokens))
            shares[smallest].append(row)
            tokens[smallest] += int(self.lengths[row])
        return shares

    def halve_micro_batches(self, rows: List[int]) -> bool:
        """Halve `micro_batch_tokens` for these rows; False where each row is a micro-batch of its own already."""
        share = self.split_over_ranks(rows)[distributed.rank()]
        if self.static_length or len(self._groups(share)) == len(share):
            return False
        largest = max(micro_batch.input_ids.numel() for micro_batch in self.micro_batches(rows))
        self.micro_batch_tokens = largest // 2
        return True

    def _longest_first(self, rows: List[int]) -> List[int]:
        lengths = dict(zip(rows, self.lengths[rows].tolist()))
        return sorted(rows, key=lambda row: (-lengths[row], row))

    def _groups(self, rows: List[int]) -> List[List[int]]:
        """The row numbers of each micro-batch, its longest row first."""
        rows = self._longest_first(rows)
        lengths = self.lengths[rows].tolist()
        if self.packed:
            return group_for_packing(rows, lengths, self.micro_batch_tokens)
        return group_for_padding(rows, lengths, self.micro_batch_tokens)

    def _row(self, row: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """The input ids and labels of a row, int64 [tokens]."""
        begin = int(self.split["offsets"][row])
        end = int(self.split["offsets"][row + 1])
        input_ids = self.split["input_ids"][begin:end].long()
        if self.train_on_prompt:
            return input_ids, input_ids
        return input_ids, torch.where(self.split["loss_mask"][begin:end], input_ids, IGNORE_INDEX)

    def _padded(self, rows: List[int]) -> MicroBatch:
        return pad_rows([self._row(row) for row in rows], int(self.lengths[rows].max()))

    def _packed(self, rows: List[int]) -> MicroBatch:
        return pack_rows([self._row(row) for row in rows])

    def _static(self, rows: List[int]) -> MicroBatch:
        """The batch padded to [batch_size, static_length]; a short last batch (of held-out rows) gets empty rows."""
        batch = pad_rows([self._row(row) for row in rows], self.static_length, self.batch_size)
        lengths = torch.ones(self.batch_size, dtype=torch.int64)  # one visible token keeps the softmax defined
        lengths[: len(rows)] = self.lengths[rows]
        mask = (torch.arange(self.static_length) < lengths[:, None]).long()
        return batch._replace(attention_mask=mask, positions=None)


def group_for_padding(rows: List[int], lengths: List[int], max_tokens: int) -> List[List[int]]:
    """Rows of like length together, so that there is little padding. rows: the longest first, with their lengths."""
    groups: List[List[int]] = []
    longest = 0
    for row, length in zip(rows, lengths):
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = length
    return groups


def group_for_packing(rows: List[int], lengths: List[int], max_tokens: int) -> List[List[int]]:
    """Each row into the first group with room for it. rows: the longest first, with their lengths."""
    groups: List[List[int]] = []
    tokens: List[int] = []
    for row, length in zip(rows, lengths):
        with_room = [index for index, used in enumerate(tokens) if used + length <= max_tokens]
        if with_room:
            groups[with_room[0]].append(row)
            tokens[with_room[0]] += length
        else:
            groups.append([row])
            tokens.append(length)
    return groups


def pad_rows(rows: List[Tuple[torch.Tensor, torch.Tensor]], length: int, height: int = 0) -> MicroBatch:
    """Rows of (input ids, labels), padded to the right to [max(rows, height), length].

    The padding id does not matter: the loss ignores it, and it stands behind all tokens of its row.
    """
    input_ids = torch.zeros((max(height, len(rows)), length), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for index, (ids, row_labels) in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = row_labels
    return MicroBatch(input_ids, labels, positions=predicting_positions(labels))


def pack_rows(rows: List[Tuple[torch.Tensor, torch.Tensor]]) -> MicroBatch:
    """Rows of (input ids, labels), one after the other as a single row [1, tokens], without padding."""
    labels = []
    for _, row_labels in rows:
        row_labels = row_labels.clone()
        row_labels[0] = IGNORE_INDEX  # the token in front of it belongs to another row
        labels.append(row_labels)
    lengths = torch.tensor([0] + [len(ids) for ids, _ in rows])
    cu_seq_lens = torch.cumsum(lengths, 0).int()
    input_ids = torch.cat([ids for ids, _ in rows])[None]
    labels = torch.cat(labels)[None]
    return MicroBatch(input_ids, labels, cu_seq_lens=cu_seq_lens, positions=predicting_positions(labels))


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """The positions in front of those with a label, int64 [labels], in the flattened `labels` [rows, length].

    Nothing predicts the first token of a row, whether it has a label or not.
    """
    has_label = labels != IGNORE_INDEX
    has_label[:, 0] = False
    return has_label.flatten().nonzero().squeeze(1) - 1
