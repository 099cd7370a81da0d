"""SimCLR as lightly 1.6 does it, from its own parts: transform, projection head, loss; torchvision reads the files.

What lightly leaves to its user is what its examples for CIFAR-10 do: a DataLoader, SGD with a cosine. Encoder, batch
size and learning rate are given, so that both sides train the same.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from stages.models import build_encoder


@dataclass(frozen=True)
class Recipe:
    """What is the same on both sides."""

    image_size: int
    batch_size: int
    learning_rate: float
    temperature: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    momentum: float = 0.9
    weight_decay: float = 1e-4
    hidden: int = 512
    dimension: int = 128
    smallest_crop: float = 0.08
    colour_strength: float | None = None
    """None: the usual one of the size, 0.5 up to 64 pixels."""


@dataclass(frozen=True)
class Way:
    """How lightly's side runs."""

    workers: int
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.workers} workers, {'channels_last' if self.channels_last else 'contiguous'}"


WAYS = tuple(Way(workers, channels_last) for channels_last in (True, False) for workers in (0, 1, 2))


def fastest_way(architecture: Mapping[str, Any], folder: Path, recipe: Recipe, steps: int = 20) -> Way:
    """lightly's best way on this machine, by the later two thirds of some steps of each.

    Args:
        architecture: arguments of `build_encoder`.
    """
    seconds = {}
    for way in WAYS:
        encoder = build_encoder(**architecture)
        batches = loader(folder, recipe, way.workers)
        clock = [*train(encoder, encoder.embedding_size, batches, recipe, way, steps, lambda _: recipe.learning_rate)]
        seconds[way] = clock[-1] - clock[steps // 3]
    return min(seconds, key=lambda way: seconds[way])


def loader(folder: Path, recipe: Recipe, workers: int) -> DataLoader:
    """Batches of both views of the images in `folder`/<class>/."""
    small = recipe.image_size <= 64
    transform = SimCLRTransform(
        input_size=recipe.image_size,
        cj_strength=recipe.colour_strength or (0.5 if small else 1.0),
        min_scale=recipe.smallest_crop,
        gaussian_blur=0.0 if small else 0.5,
        normalize={"mean": [*recipe.mean], "std": [*recipe.std]},
    )
    return DataLoader(
        ImageFolder(str(folder), transform),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def train(
    encoder: nn.Module,
    embedding_size: int,
    batches: DataLoader,
    recipe: Recipe,
    way: Way,
    steps: int,
    rate_at: Callable[[int], float],
) -> Iterator[float]:
    """Train `encoder` in place; yields the clock after each step, and before the first batch is asked for."""
    head = SimCLRProjectionHead(embedding_size, recipe.hidden, recipe.dimension)
    network = nn.Sequential(encoder, head)
    memory_format = torch.channels_last if way.channels_last else torch.contiguous_format
    network.to(memory_format=memory_format)
    criterion = NTXentLoss(recipe.temperature)
    optimiser = torch.optim.SGD(
        network.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    network.train()
    yield time.perf_counter()
    step = 0
    while step < steps:
        for (view_a, view_b), _ in batches:
            pair = torch.cat([view_a, view_b]).contiguous(memory_format=memory_format)
            loss = criterion(*network(pair).chunk(2))
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step)
            optimiser.step()
            yield time.perf_counter()
            step += 1
            if step == steps:
                break
