"""LARS against a plain loop and timm's, the two parameter groups, and the learning rate of each step."""

import math
from typing import Literal, get_args

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import Tensor, nn

from stages.models import Lars, build_encoder, build_optimiser, learning_rate_at, scaled_learning_rate
from stages.models.optimisers import split_parameters

RATES = [0.1, 0.3, 0.2, 0.05]
OptimiserName = Literal["lars", "sgd", "adamw", "muon"]
NAMES: tuple[OptimiserName, ...] = get_args(OptimiserName)


def make_parameters() -> list[nn.Parameter]:
    """A kernel, a matrix, a bias, a matrix of zeros, and one whose gradient is zero; float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 2, 2), (5, 4), (5,), (3, 3), (2, 2)]
    values = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    values[3].zero_()
    return [nn.Parameter(value) for value in values]


def make_gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in make_parameters()]
    gradients[4].zero_()
    return gradients


def loop_of_lars(decay: float, momentum: float) -> list[Tensor]:
    """You et al. 2017, algorithm 1, one tensor after the other; the bias (third) neither decayed nor scaled."""
    found = [parameter.detach().clone() for parameter in make_parameters()]
    velocities = [torch.zeros_like(value) for value in found]
    for step, rate in enumerate(RATES):
        for index, gradient in enumerate(make_gradients(step)):
            local_rate = rate
            if index != 2:
                gradient = gradient + decay * found[index]
                norm, gradient_norm = math.sqrt(found[index].square().sum()), math.sqrt(gradient.square().sum())
                if norm > 0 and gradient_norm > 0:
                    local_rate = rate * 0.001 * norm / gradient_norm
            velocities[index] = momentum * velocities[index] + local_rate * gradient
            found[index] = found[index] - velocities[index]
    return found


@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_is_the_algorithm(decay: float, momentum: float) -> None:
    parameters = make_parameters()
    groups = [
        {"params": [parameter for index, parameter in enumerate(parameters) if index != 2], "weight_decay": decay},
        {"params": [parameters[2]], "weight_decay": 0.0, "adapted": False},
    ]
    optimiser = Lars(groups, lr=1.0, momentum=momentum, weight_decay=decay)
    for step, rate in enumerate(RATES):
        for group in optimiser.param_groups:
            group["lr"] = rate
        gradients = make_gradients(step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
    for parameter, wanted in zip(parameters, loop_of_lars(decay, momentum), strict=True):
        assert torch.allclose(parameter, wanted, rtol=1e-12, atol=1e-14)


def test_lars_is_that_of_timm_where_both_mean_the_same() -> None:
    """Without decay and at one rate; timm's momentum leaves the rate out."""
    ours, theirs = make_parameters()[:2], make_parameters()[:2]
    one = Lars([{"params": ours}], lr=0.3, momentum=0.9, weight_decay=0.0)
    other = TimmLars(theirs, lr=0.3, momentum=0.9, weight_decay=0.0, always_adapt=True, eps=0.0)
    for step in range(4):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, make_gradients(step)[:2], strict=True):
                parameter.grad = gradient
        one.step()
        other.step()
    for parameter, wanted, initial in zip(ours, theirs, make_parameters()[:2], strict=True):
        assert torch.allclose(parameter, wanted, rtol=1e-12)
        assert not torch.allclose(parameter, initial, rtol=1e-4)


def test_a_parameter_without_gradient_stays() -> None:
    parameters = make_parameters()
    optimiser = Lars([{"params": parameters}], lr=0.3, momentum=0.9, weight_decay=0.1)
    optimiser.step()
    parameters[0].grad = make_gradients(0)[0]
    optimiser.step()
    for index, (parameter, initial) in enumerate(zip(parameters, make_parameters(), strict=True)):
        assert torch.equal(parameter, initial) == (index != 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_continues_exactly(name: OptimiserName) -> None:
    def train(steps: list[int], parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        for step in steps:
            for parameter, gradient in zip(parameters, make_gradients(step), strict=True):
                parameter.grad = gradient
            optimiser.step()

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimiser(name, [([nn.ParameterList(parameters)], 1.0)], 0.1, 0.9, 1e-3)

    straight = make_parameters()
    train([0, 1, 2, 3], straight, build(straight))
    halted = make_parameters()
    first = build(halted)
    train([0, 1], halted, first)
    second = build(halted)
    second.load_state_dict(first.state_dict())
    train([2, 3], halted, second)
    assert all(torch.equal(one, other) for one, other in zip(straight, halted, strict=True))


def test_biases_and_norms_stand_apart() -> None:
    head = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm([4, 2]))
    frozen = nn.Linear(3, 3).requires_grad_(False)
    encoder = build_encoder("resnet10", 4, 64, False, 32)
    weights, plain = split_parameters([encoder, head, frozen, head])
    names = {id(value): name for name, value in [*encoder.named_parameters(), *head.named_parameters()]}
    assert len(weights) + len(plain) == len(names)
    for parameter in weights:
        assert "conv" in names[id(parameter)] or names[id(parameter)].endswith(("downsample.0.weight", "0.weight"))
    for parameter in plain:
        assert "bn" in names[id(parameter)] or names[id(parameter)].startswith("1.") or parameter.ndim == 1


@pytest.mark.parametrize("name", NAMES)
def test_decay_acts_on_weights_only(name: OptimiserName) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    before = {key: value.detach().clone() for key, value in layer.named_parameters()}
    optimiser = build_optimiser(name, [([layer], 1.0)], learning_rate=0.5, momentum=0.9, weight_decay=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    changed = {key for key, value in layer.named_parameters() if not torch.equal(before[key], value)}
    assert changed == {"0.weight"}


@pytest.mark.parametrize("name", ["lars", "muon"])
def test_nothing_is_read_back_from_an_accelerator(name: OptimiserName) -> None:
    """On torch's device without memory, where reading a number is an error. SGD and AdamW are torch's own."""
    with torch.device("meta"):
        encoder = build_encoder("resnet10", 8, 64, False, 16)
    optimiser = build_optimiser(name, [([encoder], 1.0)], learning_rate=0.1, momentum=0.9, weight_decay=0.1)
    for parameter in encoder.parameters():
        parameter.grad = torch.empty_like(parameter)
    for _ in range(2):
        optimiser.step()
    with pytest.raises(RuntimeError):
        next(encoder.parameters()).sum().item()


@pytest.mark.parametrize("name", NAMES)
def test_modules_without_biases_or_without_weights(name: OptimiserName) -> None:
    for module in (nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)):
        before = [parameter.detach().clone() for parameter in module.parameters()]
        optimiser = build_optimiser(name, [([module], 1.0)], learning_rate=0.1, momentum=0.9, weight_decay=0.1)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        assert all(not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


def test_warm_up_then_cosine_to_zero() -> None:
    rates = [learning_rate_at(step, total_steps=100, base=2.0, warmup_steps=9) for step in range(101)]
    assert rates[:9] == pytest.approx([0.2 * (step + 1) for step in range(9)])
    assert rates[9] == max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(1 + math.cos(math.pi * 45 / 91))
    assert rates[99] > 0
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_rates_of_short_runs() -> None:
    assert learning_rate_at(0, total_steps=1, base=1.0, warmup_steps=0) == 1.0
    assert learning_rate_at(3, total_steps=4, base=1.0, warmup_steps=4) == pytest.approx(0.8)
    assert learning_rate_at(9, total_steps=4, base=1.0, warmup_steps=0) == 0.0


def test_scaling_by_the_batch() -> None:
    assert scaled_learning_rate(0.3, "linear", 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(0.075, "square_root", 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(0.03, "none", 4096) == 0.03
