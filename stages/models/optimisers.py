"""Optimisers with their two parameter groups, LARS, and the learning rate of each step."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.models.momentum import MomentumOptimiser
from stages.models.muon import Muon

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


class Lars(MomentumOptimiser):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1, as in google-research/simclr).

    With decay b and momentum m, a tensor w with gradient g moves by
        g' = g + b w;  v = m v + rate x trust x g';  w = w - v
    where trust = coefficient |w| / |g'|, and 1 where either norm is 0. The rate is inside the momentum: a change of
    rate acts on new gradients only. Everything runs over lists of tensors and reads nothing back to the host.

    Parameter groups have `adapted`: False leaves trust at 1 (biases and norms).
    """

    def __init__(
        self,
        parameters: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapted": True,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            parameters, gradients, velocities = self._moving(group["params"])
            if not parameters:
                continue
            if group["weight_decay"]:
                gradients = [*torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])]
            if group["adapted"]:
                rates = group["lr"] * _trust(parameters, gradients, group["trust_coefficient"])
                moves = torch._foreach_mul(gradients, rates.unbind())
            else:
                moves = torch._foreach_mul(gradients, group["lr"])
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, moves)
            torch._foreach_sub_(parameters, velocities)


def build_optimiser(
    name: Literal["lars", "sgd", "adamw", "muon"],
    modules: Iterable[tuple[Iterable[nn.Module], float]],
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Optimise the trainable parameters of modules, in two groups for each multiple of the rate.

    The first of the two holds the weights. The second holds biases and the parameters of norms (everything of one
    dimension or none), which are neither decayed nor, by LARS, scaled (Chen et al. 2020, B.1) nor, by Muon, made
    orthogonal. Before each step call `set_learning_rate`.

    Args:
        modules: with the multiple of the rate that each is trained at.
        momentum: of LARS, SGD and Muon; AdamW keeps its betas of 0.9 and 0.999.
        weight_decay: on the gradient for LARS and SGD, on the weights for AdamW and Muon.
    """
    groups: list[dict[str, Any]] = []
    for parts, multiple in modules:
        weights, plain = split_parameters(parts)
        for parameters, decay, is_weights in ((weights, weight_decay, True), (plain, 0.0, False)):
            if parameters:
                group = {"params": parameters, "weight_decay": decay, "multiple": multiple}
                own = {"lars": {"adapted": is_weights}, "muon": {"orthogonal": is_weights}}
                groups.append(group | own.get(name, {}))
    if name == "lars":
        return Lars(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if name == "muon":
        return Muon(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def split_parameters(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters, each once, in the order of the modules: (weights, biases and parameters of norms)."""
    weights: dict[nn.Parameter, None] = {}
    plain: dict[nn.Parameter, None] = {}
    for root in modules:
        for module in root.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    is_plain = parameter.ndim <= 1 or isinstance(module, _NORMS)
                    (plain if is_plain else weights)[parameter] = None
    return list(weights), list(plain)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step for every group, times the group's own multiple."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["multiple"]


def clip_gradient(optimiser: torch.optim.Optimizer, largest: float | None) -> Tensor:
    """Scale the whole gradient down to a norm of `largest`, if one is given; the norm that it had before."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if largest is not None:
        return nn.utils.clip_grad_norm_(parameters, largest)
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def learning_rate_at(step: int, total_steps: int, base: float, warmup_steps: int) -> float:
    """Rate of step 0 ... total_steps - 1: linear warm-up to `base`, then half a cosine that ends at zero.

    Nothing but the global step enters, so a resumed run and any number of processes have the same rates. The warm-up
    is (step + 1) / (warmup_steps + 1) of the base, so that the first step is not lost on a rate of zero.
    """
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def scaled_learning_rate(rate: float, scaling: Literal["linear", "square_root", "none"], batch_size: int) -> float:
    """The rate for a global batch of `batch_size` images (Chen et al. 2020, section 2.2 and B.1)."""
    if scaling == "linear":
        return rate * batch_size / 256
    if scaling == "square_root":
        return rate * math.sqrt(batch_size)
    return rate


def _trust(parameters: list[Tensor], gradients: list[Tensor], coefficient: float) -> Tensor:
    """[number of tensors]: the factor that brings each tensor's move into proportion to its norm."""
    parameter_norms = torch.stack(torch._foreach_norm(parameters))
    gradient_norms = torch.stack(torch._foreach_norm(gradients))
    usable = (parameter_norms > 0) & (gradient_norms > 0)
    return torch.where(usable, coefficient * parameter_norms / gradient_norms, 1.0)
