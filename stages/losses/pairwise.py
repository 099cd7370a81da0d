"""What losses of pairs and triplets share: a process's rows against those of all, and against batches before."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.labels import ANY_SHARED, LabelRelation, is_labelled
from stages.losses.draws import Draws
from stages.losses.figures import distance_figures
from stages.losses.gather import gather_rows, mean_over_processes, world
from stages.losses.loss import Loss, Measured, Task
from stages.losses.memory import CrossBatchMemory

CHUNK_ROWS = 1024
"""Rows whose similarities to all columns are in memory at once: 16 MiB for a global batch of 4,096."""
CHUNK_PAIRS_ON_ACCELERATORS = 2**26
"""There few chunks count more than small ones: 256 MiB."""

LEAST_LOG = -1e4
"""In place of the logarithm of nothing: its exponential is 0, and so is its derivative."""


class Pairs(NamedTuple):
    """Unit vectors, and which of them belong together.

    Attributes:
        rows: [N, D], this process's.
        columns: [M, D], those of all processes, then those of the memory.
        labels: of the rows, int64 [N] or bool [N, classes].
        column_labels: in the same form.
        own: int64 [N], the column that is the row itself.
        relation: of several labels.
    """

    rows: Tensor
    columns: Tensor
    labels: Tensor
    column_labels: Tensor
    own: Tensor
    relation: LabelRelation = ANY_SHARED

    def chunks(self) -> Iterator["Pairs"]:
        """The same for some rows at a time."""
        count = CHUNK_ROWS
        if self.rows.device.type != "cpu":
            count = max(1, CHUNK_PAIRS_ON_ACCELERATORS // len(self.columns))
        split = (one.split(count) for one in (self.rows, self.labels, self.own))
        for rows, labels, own in zip(*split, strict=True):
            yield Pairs(rows, self.columns, labels, self.column_labels, own, self.relation)


class Block(NamedTuple):
    """All pairs of some rows with all columns, [n, M] each; a row is no pair with itself.

    Attributes:
        similarities: cosines.
        positive, negative: bool.
    """

    similarities: Tensor
    positive: Tensor
    negative: Tensor


def block_of(pairs: Pairs) -> Block:
    """Without a label a row belongs to nothing: it has no pairs, and as a column it is everybody's negative."""
    positive = pairs.relation.between(pairs.labels, pairs.column_labels)
    negative = ~positive
    negative &= is_labelled(pairs.labels)[:, None]
    positive.scatter_(1, pairs.own[:, None], False)
    return Block(pairs.rows @ pairs.columns.T, positive, negative)


def distances_of(similarities: Tensor) -> Tensor:
    """Euclidean distances of unit vectors; below rounding the derivative, which has no bound there, is 0."""
    return (2 - 2 * similarities).clamp_min(4 * torch.finfo(similarities.dtype).eps).sqrt()


def padded(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is in the mask, row by row and side by side: [n, M] -> [n, K], and which of these places are taken.

    Of a row's positives, which are few, this is little beside the row.
    """
    counts = mask.sum(dim=1)
    is_there = torch.arange(max(1, int(counts.max())), device=counts.device) < counts[:, None]
    return values.new_zeros(is_there.shape).masked_scatter(is_there, values[mask]), is_there


class PairwiseLoss(Loss):
    """A loss of pairs, on unit vectors.

    Every row of the global batch is an anchor; its partners are all rows of the global batch and, with a memory, those
    of batches before (Wang et al. 2020, "Cross-batch memory for embedding learning"), which have no gradient.

    Args:
        memory: rows that are remembered; 0 for none.
        memory_start: share of the steps before the memory counts: until then embeddings drift too fast.
        mining: which pairs count; what is drawn at random (`distance_weighted`) has `draws`.
    """

    takes_several_labels = True

    def __init__(self, task: Task, memory: int, memory_start: float, mining: str = "all"):
        super().__init__()
        self.relation = task.relation or ANY_SHARED
        self.draws = Draws(task.embedding_size) if mining == "distance_weighted" else None
        classes = None if task.relation is None else task.classes
        self.memory = CrossBatchMemory(memory, task.embedding_size, classes) if memory else None
        self.memory_start = memory_start

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        rows = F.normalize(embeddings, dim=1)
        columns, column_labels = gather_rows(rows), gather_rows(labels)
        own = world()[0] * len(rows) + torch.arange(len(rows), device=rows.device)
        pairs = Pairs(rows, columns, labels, column_labels, own, self.relation)
        if self.memory is not None:
            if progress >= self.memory_start:
                before, before_labels = self.memory.rows()
                pairs = pairs._replace(
                    columns=torch.cat([columns, before.to(columns.dtype)]),
                    column_labels=torch.cat([column_labels, before_labels]),
                )
            self.memory.add(columns.detach(), column_labels)
        if self.draws is not None:
            self.draws.advance()  # before: the backward pass may mine again, and finds the same
        loss, figures = self.measure_pairs(pairs)
        return loss, figures | distance_figures(embeddings, labels, self.relation)

    @abstractmethod
    def measure_pairs(self, pairs: Pairs) -> Measured: ...


class SummedLoss(PairwiseLoss):
    """A loss that is made of sums over rows, each of its own pairs; the matrix [N, M] exists a chunk at a time."""

    def measure_pairs(self, pairs: Pairs) -> Measured:
        chunks = [*pairs.chunks()]
        if len(chunks) == 1:
            return self.conclude(mean_over_processes(self.sums(pairs)))
        # Computed again in the backward pass, so that memory is that of one chunk.
        sums = [checkpoint(self.sums, chunk, use_reentrant=False) for chunk in chunks]
        return self.conclude(mean_over_processes(torch.stack(sums).sum(dim=0)))

    @abstractmethod
    def sums(self, pairs: Pairs) -> Tensor:
        """Sums over some rows, [k]."""

    @abstractmethod
    def conclude(self, sums: Tensor) -> Measured:
        """The loss, from the sums over all rows [k], as means over the processes: ratios of them are what is meant."""


def at_least_one(count: Tensor) -> Tensor:
    """A number of things in all, as its mean over the processes, to divide by."""
    return count.detach().clamp_min(1 / world()[1])
