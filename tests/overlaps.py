"""Queries and galleries that have images in common, in every way that the commands allow."""

import torch
from torch import Tensor

OVERLAPS = ["none", "one set", "queries in the gallery", "some of both"]


def overlapping(overlap: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries [q, 4] and a gallery [26, 4], labels of both (-1 is unknown), and where each query stands in the gallery
    (-1: nowhere) [q].
    """
    random = torch.Generator().manual_seed(2)
    gallery, labels = torch.randn(26, 4, generator=random), torch.randint(-1, 4, (26,), generator=random)
    other, others = torch.randn(17, 4, generator=random), torch.randint(-1, 4, (17,), generator=random)
    same = {
        "none": torch.full((17,), -1),
        "one set": torch.arange(26),
        "queries in the gallery": torch.randperm(26, generator=random)[:9],
        "some of both": torch.cat([torch.tensor([3, 0, 25]), torch.full((14,), -1)]),
    }[overlap]
    inside = same >= 0
    queries, wanted = gallery[same].clone(), labels[same].clone()
    queries[~inside], wanted[~inside] = other[: int((~inside).sum())], others[: int((~inside).sum())]
    return queries, gallery, wanted, labels, same
