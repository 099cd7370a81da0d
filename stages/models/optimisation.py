"""The optimiser of a training with its schedule: what the stages that train have in common."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stages.models.encoders import Encoder
from stages.models.optimisers import (
    build_optimiser,
    clip_gradient,
    learning_rate_at,
    scaled_learning_rate,
    set_learning_rate,
)

LISTS = (nn.Sequential, nn.ModuleList)


class OptimiserSettings(Protocol):
    """As a recipe says it: see stages/settings/training.py."""

    @property
    def name(self) -> Literal["lars", "sgd", "adamw", "muon"]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def scaling(self) -> Literal["linear", "square_root", "none"]: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_epochs(self) -> float: ...


class Optimisation:
    """Steps of an optimiser: a linear warm-up to the scaled rate (over a tenth of the steps at most), then half a
    cosine to zero.

    Attributes:
        optimiser: whose state belongs into checkpoints.
        rate: at the end of the warm-up, of what has a multiple of 1.
    """

    def __init__(
        self,
        settings: OptimiserSettings,
        modules: Sequence[tuple[Sequence[nn.Module], float]],
        *,
        batch_size: int,
        steps: int,
        steps_per_epoch: int,
        gradient_clip: float | None,
    ):
        """Args:
        modules: what is trained, with the multiple of the rate that it is trained at.
        batch_size: of the global batch.
        gradient_clip: largest norm of the whole gradient.
        """
        self.rate = scaled_learning_rate(settings.learning_rate, settings.scaling, batch_size)
        self._steps, self._gradient_clip = steps, gradient_clip
        self._warmup_steps = min(round(settings.warmup_epochs * steps_per_epoch), steps // 10)
        self.optimiser: torch.optim.Optimizer = build_optimiser(
            settings.name, modules, self.rate, settings.momentum, settings.weight_decay
        )

    def clip_gradient(self) -> Tensor:
        """Scale the gradients that are there down to the largest norm, if there is one; the norm they had before."""
        return clip_gradient(self.optimiser, self._gradient_clip)

    def step(self, step: int) -> float:
        """Move by the gradients that are there; the learning rate of the step, counted from 0."""
        rate = learning_rate_at(step, self._steps, self.rate, self._warmup_steps)
        set_learning_rate(self.optimiser, rate)
        self.optimiser.step()
        return rate


def layers_with_multiples(encoder: Encoder, decay: float) -> list[tuple[list[nn.Module], float]]:
    """The parts of an encoder from the first to the last, each with decay ** (parts that follow it) (layer-wise rates:
    Clark et al. 2020, "ELECTRA", section 3.1).

    Parts are those of the library's module, the members of a list of blocks each by itself; norms belong to what stands
    before them. What the encoder has on top (a neck) is the last part.
    """
    if decay == 1:
        return [([encoder], 1.0)]
    library = encoder.library_module()
    parts: list[list[nn.Module]] = []
    for name, child in library.named_children():
        is_blocks = isinstance(child, LISTS) and name in ("blocks", "layers", "stages", "features")
        for module in child.children() if is_blocks else [child]:
            if not any(True for _ in module.parameters()):
                continue
            if parts and not isinstance(module, nn.Conv2d | nn.Linear) and _is_flat(module):
                parts[-1].append(module)
            else:
                parts.append([module])
    known = {id(parameter) for part in parts for module in part for parameter in module.parameters()}
    first = _Loose([one for one in library.parameters(recurse=False) if id(one) not in known])
    if first.loose:
        parts.insert(0, [first])
    below = {id(module) for module in library.modules()}
    top = [
        one for one in encoder.modules() if id(one) not in below and any(True for _ in one.parameters(recurse=False))
    ]
    if top:
        parts.append(top)
    return [(part, decay ** (len(parts) - 1 - depth)) for depth, part in enumerate(parts)]


class _Loose(nn.Module):
    """Parameters that belong to no layer (a class token, positions)."""

    def __init__(self, loose: Sequence[nn.Parameter]):
        super().__init__()
        self.loose = nn.ParameterList(loose)


def _is_flat(module: nn.Module) -> bool:
    """Whether it is one layer of vectors only: a norm."""
    return all(parameter.ndim <= 1 for parameter in module.parameters())
