"""Steps of an optimiser with its schedule, and rates that rise from layer to layer."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models import BottleneckedEncoder, Optimisation, build_bottleneck, build_encoder
from stages.models.encoders import Encoder, set_pooling
from stages.models.freezing import freeze
from stages.models.neck import NeckedEncoder, build_neck
from stages.models.optimisation import layers_with_multiples
from stages.models.optimisers import build_optimiser, learning_rate_at, set_learning_rate
from stages.settings.training import Optimiser

SHAPE = {"layers": 2, "hidden": 8, "dimension": 4, "kept": 1}


def make_encoder(kind: str) -> Encoder:
    torch.manual_seed(0)
    if kind.startswith("timm:"):
        return build_encoder(kind, 64, 64, False, 32)
    if kind == "vit_b_16":
        return build_encoder(kind, 64, 64, False, 32)
    encoder = build_encoder("resnet10", 4, 64, False, 8)
    if kind == "gem":
        set_pooling(encoder, "gem")
    if kind in ("necked", "both"):
        encoder = NeckedEncoder(encoder, build_neck(encoder.embedding_size, **SHAPE), SHAPE)
    if kind in ("bottlenecked", "both"):
        encoder = BottleneckedEncoder(encoder, build_bottleneck(encoder.embedding_size))
    return encoder


KINDS = ["resnet", "gem", "necked", "bottlenecked", "both", "timm:test_vit", "timm:test_convnext", "timm:test_resnet"]


def multiples_of(encoder: Encoder, decay: float) -> dict[str, float]:
    """By name of the parameter."""
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    found: dict[str, float] = {}
    for modules, multiple in layers_with_multiples(encoder, decay):
        for parameter in {id(one): one for module in modules for one in module.parameters()}.values():
            name = names[id(parameter)]
            assert name not in found, f"{name} comes twice"
            found[name] = multiple
    return found


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_comes_once_and_rates_rise_to_one(kind: str, decay: float) -> None:
    encoder = make_encoder(kind)
    found = multiples_of(encoder, decay)
    assert found.keys() == {name for name, _ in encoder.named_parameters()}
    parts = layers_with_multiples(encoder, decay)
    multiples = [multiple for _, multiple in parts]
    assert multiples == [decay ** (len(parts) - 1 - number) for number in range(len(parts))]
    assert multiples[-1] == 1
    assert (len(parts) > 3) == (decay < 1)
    # Nothing is in two groups of an optimiser, which torch would refuse, and nothing is left out.
    optimiser = build_optimiser("sgd", parts, 1.0, 0.9, 1e-4)
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(found)


def test_parts_of_a_resnet() -> None:
    found = multiples_of(make_encoder("gem"), 0.5)
    depth = {"conv1": 4, "bn1": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0, "pool": 0}
    assert found == {name: 0.5 ** depth[name.split(".")[0]] for name in found}


def test_what_stands_on_top_is_the_last_part() -> None:
    found = multiples_of(make_encoder("both"), 0.5)
    top = {name for name, multiple in found.items() if multiple == 1}
    assert top == {name for name in found if name.startswith(("inner.neck.", "norm."))}
    assert found["inner.backbone.layer4.0.conv1.weight"] == 0.5
    assert found["inner.backbone.conv1.weight"] == 0.5**5


def test_parts_of_a_vision_transformer() -> None:
    encoder = make_encoder("timm:test_vit")
    found = multiples_of(encoder, 0.5)
    blocks = len([*encoder.library_module().get_submodule("blocks").children()])
    parts = len(layers_with_multiples(encoder, 0.5))
    assert found["model.cls_token"] == found["model.pos_embed"] == 0.5 ** (parts - 1), "in front of all layers"
    assert found["model.patch_embed.proj.weight"] == 2 * found["model.cls_token"]
    for block in range(blocks):
        of_block = {multiple for name, multiple in found.items() if name.startswith(f"model.blocks.{block}.")}
        assert of_block == {found["model.patch_embed.proj.weight"] * 2 ** (block + 1)}
    assert found["model.norm.weight"] == found[f"model.blocks.{blocks - 1}.norm1.weight"] == 1


def test_frozen_parts_are_not_moved() -> None:
    encoder = make_encoder("resnet")
    freeze(encoder, "layer2")
    optimiser = build_optimiser("sgd", layers_with_multiples(encoder, 0.5), 1.0, 0.9, 1e-4)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    moved = {names[id(one)].split(".")[0] for group in optimiser.param_groups for one in group["params"]}
    assert moved == {"layer3", "layer4"}
    assert {group["multiple"] for group in optimiser.param_groups} == {0.5, 1.0}


# Steps


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """An encoder, a head, and rows."""
    torch.manual_seed(1)
    rows = torch.randn(16, 5, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).to(dtype), nn.Linear(7, 3).to(dtype), rows


def set_gradients(encoder: nn.Module, head: nn.Module, rows: Tensor, step: int) -> None:
    for parameter in (*encoder.parameters(), *head.parameters()):
        parameter.grad = None
    F.cross_entropy(head(encoder(rows.roll(step, 1))), torch.arange(16) % 3).backward()


def loop_of_sgd(
    settings: dict[str, Any], batch_size: int, steps: int, clip: float | None, multiple: float
) -> list[Tensor]:
    """Every parameter by itself, as the docstrings say; the rate as google-research/simclr has it."""
    encoder, head, rows = problem()
    parameters = [*encoder.parameters(), *head.parameters()]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    base = {
        "linear": settings["learning_rate"] * batch_size / 256,
        "square_root": settings["learning_rate"] * math.sqrt(batch_size),
        "none": settings["learning_rate"],
    }[settings["scaling"]]
    warmup = min(round(settings["warmup_epochs"] * 4), steps // 10)
    for step in range(steps):
        set_gradients(encoder, head, rows, step)
        if step < warmup:
            rate = base * (step + 1) / (warmup + 1)
        else:
            rate = base * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if clip is not None and norm > clip:
                gradient = gradient * clip / (norm + 1e-6)  # as torch does
            if parameter.ndim > 1:
                gradient = gradient + settings["weight_decay"] * parameter.detach()
            velocities[number] = settings["momentum"] * velocities[number] + gradient
            of_head = number >= 4
            parameter.data -= rate * (multiple if of_head else 1) * velocities[number]
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("scaling", ["linear", "square_root", "none"])
@pytest.mark.parametrize(("steps", "clip", "multiple"), [(12, None, 1.0), (45, 0.05, 10.0), (3, 1e9, 0.1)])
def test_steps_are_those_of_a_plain_loop(
    scaling: Literal["linear", "square_root", "none"], steps: int, clip: float | None, multiple: float
) -> None:
    settings: dict[str, Any] = {
        "name": "sgd", "learning_rate": 0.05, "scaling": scaling, "momentum": 0.8, "weight_decay": 0.1,
        "warmup_epochs": 0.9,
    }  # fmt: skip
    encoder, head, rows = problem()
    optimisation = Optimisation(
        Optimiser(**settings), [([encoder], 1.0), ([head], multiple)], batch_size=64, steps=steps, steps_per_epoch=4,
        gradient_clip=clip,
    )  # fmt: skip
    rates, norms = [], []
    for step in range(steps):
        set_gradients(encoder, head, rows, step)
        norms.append(float(optimisation.clip_gradient()))
        rates.append(optimisation.step(step))
    wanted = loop_of_sgd(settings, 64, steps, clip, multiple)
    for found, one in zip((*encoder.parameters(), *head.parameters()), wanted, strict=True):
        torch.testing.assert_close(found.detach(), one, rtol=1e-6, atol=1e-8)
    assert rates == [learning_rate_at(step, steps, optimisation.rate, min(4, steps // 10)) for step in range(steps)]
    assert all(norm > 0 for norm in norms), "that before it was clipped"


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_it_moves_as_what_it_is_made_of(name: Literal["lars", "sgd", "adamw", "muon"]) -> None:
    """As the stages did before they shared it: build, then for each step clip, set the rate, step."""
    settings = Optimiser(name=name, learning_rate=0.3, weight_decay=0.01, warmup_epochs=1.0)
    one, other = problem(torch.float32), problem(torch.float32)
    optimisation = Optimisation(
        settings, [(one[:1], 1.0), (one[1:2], 3.0)], batch_size=128, steps=30, steps_per_epoch=2, gradient_clip=0.5
    )  # type: ignore[arg-type]
    plain = build_optimiser(name, [(other[:1], 1.0), (other[1:2], 3.0)], 0.15, 0.9, 0.01)  # type: ignore[list-item]
    for step in range(8):
        set_gradients(*one, step)
        optimisation.clip_gradient()
        optimisation.step(step)
        set_gradients(*other, step)
        nn.utils.clip_grad_norm_([p for group in plain.param_groups for p in group["params"]], 0.5)
        set_learning_rate(plain, learning_rate_at(step, 30, 0.15, 2))
        plain.step()
    for found, wanted in zip(
        (*one[0].parameters(), *one[1].parameters()), (*other[0].parameters(), *other[1].parameters()), strict=True
    ):
        assert torch.equal(found, wanted)
