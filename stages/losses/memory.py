"""Embeddings of batches before, as further partners of this one's."""

import torch
from torch import Tensor, nn


class CrossBatchMemory(nn.Module):
    """The last rows of the global batch and their labels (Wang et al. 2020), the same on every process.

    Part of the loss's state: a resumed run remembers what an uninterrupted one does.

    Args:
        size: rows; older ones are written over.
        dimension: of a row.
        classes: of rows with several labels; None: each has one.
    """

    def __init__(self, size: int, dimension: int, classes: int | None = None):
        super().__init__()
        none = torch.zeros(size, dtype=torch.int64) if classes is None else torch.zeros(size, classes, dtype=torch.bool)
        self.register_buffer("embeddings", torch.zeros(size, dimension))
        self.register_buffer("labels", none)
        self.register_buffer("added", torch.zeros((), dtype=torch.int64, device="cpu"))

    def rows(self) -> tuple[Tensor, Tensor]:
        """What is there: copies of rows [m, D] and their labels [m, ...]; m grows up to the size."""
        embeddings, labels = self.get_buffer("embeddings"), self.get_buffer("labels")
        there = min(int(self.get_buffer("added")), len(labels))
        return embeddings[:there].clone(), labels[:there].clone()

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Remember the rows [n, D] of all processes; of more than the size, the last."""
        embeddings, known = self.get_buffer("embeddings"), self.get_buffer("labels")
        size, added = len(known), int(self.get_buffer("added"))
        rows, labels = rows[-size:], labels[-size:]
        places = (added + torch.arange(len(rows), device=known.device)) % size
        embeddings[places], known[places] = rows.to(embeddings.dtype), labels
        self.get_buffer("added").add_(len(rows))
