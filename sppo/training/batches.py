"""From a training set to batches: which rows share a micro-batch, and what a network is given of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from sppo.training.data import TrainingSet


class MicroBatch(NamedTuple):
    """Rows that go through the network together, B of them."""

    rows: list[int]  # their numbers in the training set
    counted: bool = True  # False for a filler: it keeps a rank busy, and its loss does not count
    step_rows: int = 1  # rows of the whole optimiser step, on all ranks


class Batch(TypedDict):
    """A micro-batch as integers: its S sequences (a prompt and a response each), those of a row one after another.

    Win rates and reference log-probs are looked up by the sequences' numbers, because DeepSpeed in bfloat16 would round
    every float of a batch.
    """

    input_ids: torch.Tensor  # (S, T), padded on the right
    attention_mask: torch.Tensor  # (S, T)
    positions: torch.Tensor  # (P,), places in the flattened (S, T) whose next token is a response's
    groups: list[torch.Tensor]  # which of the S go through the network together, by length, the longest first
    widths: list[int]  # tokens of each group's longest sequence
    sequences: torch.Tensor  # (S,), their numbers in the training set
    row_of: torch.Tensor  # (S,), which of the batch's B rows each belongs to
    pair: torch.Tensor  # (B, 2), which of the S are the chosen and the rejected one of each row
    rows: torch.Tensor  # (B,), the rows' numbers in the training set
    counted: int  # how many of the B rows count: all or none
    step_rows: int  # rows of the whole optimiser step


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return cast(Batch, send_to_device(batch, device))


class Batches(Dataset):
    """The batches of a training set, made as a DataLoader asks for them, a whole micro-batch at a time.

    The sequences of a micro-batch seldom have one length, so they go through the network in up to `groups` groups by
    length, each of about group_tokens tokens or more and only as wide as its longest sequence. With `original_context`
    no group has sequences on both sides of it.
    """

    def __init__(
        self,
        data: TrainingSet,
        pad_id: int,
        groups: int = 1,
        group_tokens: int = 1,
        original_context: int | None = None,
    ) -> None:
        self.data, self.pad_id, self.groups, self.group_tokens = data, pad_id, groups, group_tokens
        self.original_context = original_context

    def __len__(self) -> int:
        """Rows, as the Trainer expects of a data set."""
        return len(self.data)

    def shortest(self) -> Batch:
        """The batch of the shortest row, on which a network is tried."""
        return self.make(MicroBatch([int(self.data.lengths().argmin())]))

    def make(self, micro_batch: MicroBatch) -> Batch:
        """The batch of these rows."""
        data, rows = self.data, micro_batch.rows
        sequences = []  # [(prompt, response)], S of them
        for row in rows:
            sequences += zip(data.prompts[row], data.responses[row], strict=True)
        lengths = np.array([len(prompt) + len(response) for prompt, response in sequences])  # (S,)
        width = int(lengths.max())

        input_ids = torch.full((len(sequences), width), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        positions = []
        for n, (prompt, response) in enumerate(sequences):
            input_ids[n, : lengths[n]] = torch.from_numpy(np.concatenate([prompt, response]))
            attention_mask[n, : lengths[n]] = 1
            positions.append(torch.arange(len(prompt) - 1, lengths[n] - 1) + n * width)

        longest_first = np.argsort(-lengths, kind="stable")
        count = min(self.groups, max(1, int(lengths.sum()) // self.group_tokens))
        groups = [longest_first[list(part)] for part in even_parts(lengths[longest_first], count) if len(part)]
        if self.original_context:
            sides = [(group[lengths[group] > self.original_context], group) for group in groups]
            groups = [part for long, group in sides for part in (long, group[len(long) :]) if len(part)]

        responses = [len(data.responses[row]) for row in rows]  # of each row
        starts = np.concatenate([[0], np.cumsum(responses)[:-1]])  # (B,), each row's first sequence
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.cat(positions),
            "groups": [torch.from_numpy(group) for group in groups],
            "widths": [int(lengths[group[0]]) for group in groups],
            "sequences": torch.cat([data.sequences(row) for row in rows]),
            "row_of": torch.arange(len(rows)).repeat_interleave(torch.tensor(responses)),
            "pair": torch.from_numpy(starts[:, None] + np.array([data.pair[row] for row in rows])),
            "rows": torch.tensor(rows),
            "counted": len(rows) if micro_batch.counted else 0,
            "step_rows": micro_batch.step_rows,
        }

    __getitems__ = make  # what a DataLoader calls with what its sampler gives


@dataclass(eq=False)
class MicroBatches(Sampler):
    """One rank's micro-batches of an epoch: each row once, in an order that seed and epoch decide.

    A step's rows are `global_batch` neighbours of a plain random permutation, whatever the number of ranks. Only which
    of the step's micro-batches a row sits in, and how many sit there, goes by length, and a step's gradient is a sum
    over its rows, so grouping changes no step's gradient at all. (Not so for `kto_pair`, which couples the rows of a
    micro-batch: `group` is False there.) The ranks get neighbours in length at the same time, so that none waits long
    for another. The epoch's last step has the rows that are left; a rank without rows gets the shortest one, which does
    not count.
    """

    lengths: np.ndarray  # (N,), tokens of each row
    batch: int  # rows of a micro-batch, on average where they go by length
    accumulate: int
    seed: int
    ranks: int
    rank: int
    group: bool
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.accumulate * -(-len(self.lengths) // (self.batch * self.accumulate * self.ranks))

    def steps(self) -> Iterator[np.ndarray]:
        """The rows of each step of the epoch, on all ranks."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        size = self.batch * self.accumulate * self.ranks
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def __iter__(self) -> Iterator[MicroBatch]:
        shortest = int(self.lengths.argmin())
        count = self.accumulate * self.ranks  # micro-batches of a step
        for rows in self.steps():
            if self.group:
                rows = rows[np.argsort(-self.lengths[rows], kind="stable")]  # longest first: too long shows early
                parts = [rows[list(part)] for part in even_parts(self.lengths[rows], count)]
            else:
                parts = np.array_split(rows, count)
            for part in parts[self.rank :: self.ranks]:
                if len(part):
                    yield MicroBatch(part.tolist(), True, len(rows))
                else:
                    yield MicroBatch([shortest], False, len(rows))


class Loader(DataLoader):
    """Batches, one a micro-batch. It hands on the epoch, which the Trainer tells its loader."""

    def __init__(self, batches: Batches, micro_batches: MicroBatches, pin_memory: bool) -> None:
        self.micro_batches = micro_batches
        super().__init__(batches, batch_sampler=micro_batches, collate_fn=default_convert, pin_memory=pin_memory)

    def set_epoch(self, epoch: int) -> None:
        self.micro_batches.set_epoch(epoch)


def even_parts(lengths: np.ndarray, count: int) -> list[range]:
    """`count` runs of neighbours whose sizes, padding included, are as even as can be: rows times the first's length.

    lengths: (n,), longest first. A part of short rows has more of them, so that no micro-batch leaves a GPU waiting,
    and the largest is smaller than with as many rows in each. Parts are empty where there are more of them than rows.
    """
    # the smallest size that makes do with `count` parts, by bisection
    low, high = 1, int(lengths[0]) * -(-len(lengths) // count)  # the latter is enough: that many rows in each
    while low < high:
        middle = (low + high) // 2
        if len(_parts_up_to(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = _parts_up_to(lengths, low)

    # fewer parts would do, but nobody shall idle: halve the one with most rows
    while len(parts) < min(count, len(lengths)):
        most = max(range(len(parts)), key=lambda i: len(parts[i]))
        whole = parts[most]
        parts[most : most + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return parts + [range(0)] * (count - len(parts))


def _parts_up_to(lengths: np.ndarray, size: int) -> list[range]:
    """Neighbours in parts of at most `size` tokens, padding included; a row that is longer has one of its own."""
    parts, start = [], 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, size // int(lengths[start])))
        parts.append(range(start, stop))
        start = stop
    return parts
