"""SupCon, the contrastive loss with several positives: all images of the own class (Khosla et al. 2020)."""

import math

import torch
from torch import Tensor

from stages.labels import ANY_SHARED, LabelRelation
from stages.losses.figures import distance_figures
from stages.losses.gather import gather_rows, mean_over_processes
from stages.losses.label_groups import group_numbers
from stages.losses.loss import Loss, Measured, Task
from stages.losses.similarity_tiles import bits_at, log2_sum_of_others, views_in_bits


def sup_con(
    view_a: Tensor, view_b: Tensor, labels: Tensor, temperature: float, relation: LabelRelation = ANY_SHARED
) -> Tensor:
    """Supervised contrastive loss L_out (Khosla et al. 2020, equation 2), the mean over the 2N rows.

    The positives of a row are its other view and both views of the other images of its class, its negatives all other
    rows. Where no two images are of one class it is `nt_xent`, and what is said there of processes, precision and
    memory is true here.

    Args:
        view_a, view_b: [N, D], of any length; row i of one and row i of the other are views of one image.
        labels: int64 [N], any numbers; below 0: without a label, the other view is the only positive. Or bool
            [N, classes], several labels an image; what belongs together is then found by pairs, [N, N] numbers.
        temperature: above 0.
        relation: of several labels.

    Returns:
        A scalar.

    Raises:
        ValueError: views that are not two of one shape, labels of another number, or a temperature that is not above 0.
    """
    if labels.shape[:1] != view_a.shape[:1] or labels.ndim > 2:
        raise ValueError(f"labels are [N] or [N, classes], not {[*labels.shape]} for views {[*view_a.shape]}")
    bits = bits_at(temperature)
    with torch.autocast(view_a.device.type, enabled=False):
        views = views_in_bits(view_a, view_b, bits)  # [2, N, D], N of all processes from here
        to_all = log2_sum_of_others(views.flatten(0, 1), bits)  # [2N]
        first, second = views
        pairs = first + second
        others, images = _sums_of_others(pairs, gather_rows(labels), relation)
        # The mean over both rows of an image of the mean over their 2 images - 1 positives each.
        to_positives = (first * second + pairs * others / 2).sum(dim=1) / (2 * images - 1)
        return mean_over_processes((to_all.mean() - to_positives.mean()) * math.log(2))


def _sums_of_others(pairs: Tensor, labels: Tensor, relation: LabelRelation) -> tuple[Tensor, Tensor]:
    """For each image the sum over the other images that belong to it, [N, D], and how many there are with itself, [N].

    A sum over positives is a product with their sum: of one label each no pair of images is looked at.
    """
    if labels.ndim > 1:
        together = relation.between(labels, labels).fill_diagonal_(False)
        return together.to(pairs.dtype) @ pairs, together.sum(dim=1) + 1
    groups = group_numbers(labels)
    sums = torch.zeros_like(pairs).index_add(0, groups, pairs)  # [N, D], a row for each group
    others = sums[groups] - pairs  # exactly 0 where an image is alone in its group
    return others, torch.zeros_like(groups).index_add(0, groups, torch.ones_like(groups))[groups]


class SupCon(Loss):
    """`sup_con` as a loss of training: the first half of a process's rows are one view of its images, the second half
    the other.
    """

    takes_several_labels = True

    def __init__(self, task: Task, temperature: float):
        super().__init__()
        self.temperature, self.relation = temperature, task.relation or ANY_SHARED

    def measure(self, embeddings: Tensor, labels: Tensor, progress: float) -> Measured:
        view_a, view_b = embeddings.chunk(2)
        images = labels[: len(view_a)]
        loss = sup_con(view_a, view_b, images, self.temperature, self.relation)
        return loss, distance_figures(embeddings, labels, self.relation)
