"""What makes one vector of an encoder's last maps."""

from typing import Literal

import torch
from torch import Tensor, nn

PoolingKind = Literal["average", "gem", "average_max"]


class AveragePooling(nn.Module):
    """[B, C, h, w] -> [B, C], the mean over places."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


class GeneralisedMean(nn.Module):
    """GeM (Radenovic et al. 2018, "Fine-tuning CNN image retrieval with no human annotation", equation 3): the p-th
    root of the mean of p-th powers, p learned, 3 at the start. 1 is the mean, and large p come near to the maximum.
    """

    LEAST = 1e-6
    """Values below it are taken for it: powers of 0 have no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([3.0]))

    def forward(self, maps: Tensor) -> Tensor:
        return maps.clamp_min(self.LEAST).pow(self.power).mean(dim=(2, 3)).pow(1 / self.power)


class AverageAndMaximum(nn.Module):
    """The sum of mean and maximum over places, halved so that lengths stay."""

    def forward(self, maps: Tensor) -> Tensor:
        return (maps.mean(dim=(2, 3)) + maps.amax(dim=(2, 3))) / 2


POOLINGS: dict[PoolingKind, type[nn.Module]] = {
    "average": AveragePooling,
    "gem": GeneralisedMean,
    "average_max": AverageAndMaximum,
}
