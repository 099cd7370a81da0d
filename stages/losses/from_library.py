"""Losses that pytorch-metric-learning (MIT) has, over the global batch.

Its own gather drops gradients; here each process computes the loss of the whole batch, whose rows it has with
gradients. That is the same work on every process: what is here grows with classes or with the batch, not with pairs of
pairs.
"""

from pytorch_metric_learning import losses
from torch import Tensor, nn

from stages.losses.figures import distance_figures
from stages.losses.gather import gather_rows
from stages.losses.loss import Loss, Measured, Task


class FromLibrary(Loss):
    """A loss of the library on all labelled rows of the global batch."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        rows, row_labels = gather_rows(embeddings), gather_rows(labels)
        known = row_labels >= 0
        if known.any():
            loss = self.loss(rows[known], row_labels[known])
        else:  # which the library has no number for; 0, as a function of all that is trained
            loss = sum(((one * 0).sum() for one in self.parameters()), (rows * 0).sum())
        return loss, distance_figures(embeddings, labels)


class ProxyAnchor(FromLibrary):
    """Proxy anchor loss (Kim et al. 2020, equation 4): each class's proxy is an anchor for all rows of the batch."""

    def __init__(self, task: Task, margin: float, alpha: float):
        super().__init__(
            losses.ProxyAnchorLoss(len(task.class_counts), task.embedding_size, margin=margin, alpha=alpha)
        )


class SoftTriple(FromLibrary):
    """SoftTriple loss (Qian et al. 2019, equations 4 and 5, no regulariser): several centres a class, softly chosen."""

    def __init__(self, task: Task, centres: int, scale: float, gamma: float, margin: float):
        super().__init__(
            losses.SoftTripleLoss(
                len(task.class_counts), task.embedding_size, centers_per_class=centres, la=scale, gamma=gamma,
                margin=margin,
            )
        )  # fmt: skip


class LiftedStructure(FromLibrary):
    """Generalised lifted structure loss (Hermans et al. 2017, equation 7), by distances of unit vectors."""

    def __init__(self, task: Task, margin: float):
        super().__init__(losses.GeneralizedLiftedStructureLoss(neg_margin=margin, pos_margin=0))
