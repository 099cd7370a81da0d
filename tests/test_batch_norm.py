"""Batch norm across processes: torch's own in one process, and two processes equal to one."""

import copy

import pytest
import timm
import torch
from processes import run_in_processes
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from stages.models import BatchNorm, build_encoder, build_projector, convert_batch_norm

STEPS = 3


class Squashed(nn.BatchNorm2d):
    """A batch norm with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


def make_layers() -> dict[str, nn.Module]:
    """Batch norms of each kind, in float64, with parameters off their initial values."""
    torch.manual_seed(1)
    layers = {
        "maps": nn.BatchNorm2d(3),
        "vectors": nn.BatchNorm1d(3),
        "cumulative": nn.BatchNorm2d(3, momentum=None),
        "untracked": nn.BatchNorm2d(3, track_running_stats=False),
        "bare": nn.BatchNorm2d(3, affine=False),
        "with_activation": BatchNormAct2d(3, act_layer=nn.SiLU),
        "without_shift": build_projector(3, layers=1, hidden=1, dimension=3),
        "encoder": build_encoder("resnet10", 4, 64, False, 8),
    }
    for layer in layers.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return {name: layer.double() for name, layer in layers.items()}


def make_batch(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Inputs whose halves differ in mean and spread, and weights that make a loss of the outputs."""
    generator = torch.Generator().manual_seed(step)
    rows = 8
    shape = (rows, 3) if name in ("vectors", "without_shift") else (rows, 3, 8, 8)
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values[rows // 2 :] = values[rows // 2 :] * 3 + 7
    return values, torch.randn(rows, 32, dtype=torch.float64, generator=generator)


def train(name: str, layer: nn.Module, half: slice) -> dict[str, Tensor]:
    """Forward and backward on `half` of some batches; outputs, gradients and buffers after each."""
    found = {}
    for step in range(STEPS):
        values, weights = make_batch(name, step)
        values = values[half].contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values[half]
        values.requires_grad_()
        layer.zero_grad()
        output = layer(values)
        weighted = output.flatten(1)[:, :32].sin() * weights[half, : output.flatten(1).shape[1]]
        weighted.sum().backward()
        assert values.grad is not None
        found |= {f"{step}.output": output.detach(), f"{step}.gradient": values.grad}
    gradients = {f"gradient.{key}": value.grad for key, value in layer.named_parameters() if value.grad is not None}
    buffers = {f"buffer.{key}": value.clone() for key, value in layer.named_buffers()}
    layer.eval()
    after = layer(make_batch(name, STEPS)[0]).detach()
    return {**found, **gradients, **buffers, "evaluated": after}


def train_rank(rank: int) -> dict[str, Tensor]:
    found = {}
    for name, layer in make_layers().items():
        half = slice(0, 4) if rank == 0 else slice(4, 8)
        mine = train(name, convert_batch_norm(layer), half)
        found |= {f"{name}/{key}": value for key, value in mine.items()}
    found["halves"] = train_half_precision(convert_batch_norm(nn.BatchNorm2d(3)), slice(4 * rank, 4 * rank + 4))
    return found


def train_half_precision(layer: nn.Module, half: slice) -> Tensor:
    """Output and gradient of bfloat16 maps under a float32 batch norm: [2, N, 3, 8, 8]"""
    values, _ = make_batch("maps", 0)
    values = values[half].bfloat16().requires_grad_()
    output = layer(values)
    output.float().sin().sum().backward()
    assert output.dtype == torch.bfloat16
    assert values.grad is not None
    return torch.stack([output.detach(), values.grad])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_in_processes(train_rank, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", list(make_layers()))
def test_two_processes_equal_one(name: str, of_two: list[dict[str, Tensor]]) -> None:
    wanted = train(name, make_layers()[name], slice(0, 8))
    for key, value in wanted.items():
        first, second = (found[f"{name}/{key}"] for found in of_two)
        if key[0].isdigit():
            found = torch.cat([first, second])
        elif key.startswith("gradient"):
            found = first + second
        else:
            assert torch.equal(first, second)
            found = first
        assert (found - value).double().norm() <= 1e-10 * value.double().norm(), key


def test_two_processes_equal_one_in_half_precision(of_two: list[dict[str, Tensor]]) -> None:
    found = torch.cat([found["halves"] for found in of_two], dim=1).float()
    wanted = train_half_precision(nn.BatchNorm2d(3), slice(0, 8)).float()
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("name", list(make_layers()))
def test_one_process_runs_torch(name: str) -> None:
    layer = make_layers()[name]
    ours = convert_batch_norm(copy.deepcopy(layer))
    found = train(name, ours, slice(0, 8))
    for key, value in train(name, layer, slice(0, 8)).items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("model", ["resnet10t", "efficientnet_lite0", "densenet121"])
def test_every_batch_norm_of_a_backbone_is_replaced(model: str) -> None:
    backbone = timm.create_model(model, num_classes=0)
    parameters = dict(backbone.named_parameters())
    state = backbone.state_dict()
    kinds = [type(module) for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert convert_batch_norm(backbone) is backbone
    converted = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(converted) == len(kinds) > 0
    assert all(isinstance(module, BatchNorm) for module in converted)
    assert list(backbone.state_dict()) == list(state)
    assert all(value is parameters[name] for name, value in backbone.named_parameters())


def test_conversion_keeps_mode_and_is_done_once() -> None:
    layer = nn.BatchNorm2d(3).eval()
    converted = convert_batch_norm(layer)
    assert isinstance(converted, BatchNorm)
    assert not converted.training
    assert convert_batch_norm(converted) is converted


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Squashed"):
        convert_batch_norm(nn.Sequential(Squashed(3)))


def test_a_tensor_without_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="1 dimensions"):
        BatchNorm(3)(torch.ones(3))
