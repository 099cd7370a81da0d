"""What makes one vector of maps: each kind by its formula, on disk, and where it may leave to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.encoders.export import Unexportable, export
from stages.encoders.ready import STORED, ReadyEncoder, load_folder
from stages.models import ArchitectureCard, UnusableBackbone, build_encoder, load_encoder, make_card, save_model
from stages.models.encoders import Encoder, ResNet, pooling_of, set_pooling
from stages.models.pooling import POOLINGS, AverageAndMaximum, AveragePooling, GeneralisedMean, PoolingKind
from stages.views import Policy, preset

POLICY = Policy.model_validate(preset("natural", 32) | {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)})
SMALL = ArchitectureCard(backbone="resnet10", width=4, small_stem_up_to=64, pretrained=False)
PUBLISHED = ArchitectureCard(backbone="resnet18", width=64, small_stem_up_to=0, pretrained=False)
OTHERS: tuple[PoolingKind, ...] = ("gem", "average_max")


def make_maps() -> Tensor:
    """Of a ReLU: many zeros."""
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps[1, 2] = -1  # one is nothing but zeros
    return maps.clamp_min(0)


def loops(maps: Tensor, kind: PoolingKind, power: float = 3.0) -> Tensor:
    found = torch.zeros(maps.shape[:2], dtype=maps.dtype)
    for image, channels in enumerate(maps):
        for channel, places in enumerate(channels):
            values = [max(1e-6, value) if kind == "gem" else value for value in places.flatten().tolist()]
            mean = sum(values) / len(values)
            match kind:
                case "average":
                    found[image, channel] = mean
                case "gem":  # Radenovic et al. 2018, equation 3
                    powers = [value**power for value in values]
                    found[image, channel] = (sum(powers) / len(powers)) ** (1 / power)
                case "average_max":
                    found[image, channel] = (mean + max(values)) / 2
    return found


@pytest.mark.parametrize("kind", list(POOLINGS))
def test_each_kind_is_its_formula(kind: PoolingKind) -> None:
    found = POOLINGS[kind]().double()(make_maps())
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, loops(make_maps(), kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.5, 8.0])
def test_a_generalised_mean_of_any_power(power: float) -> None:
    pool = GeneralisedMean().double()
    pool.power.data.fill_(power)
    torch.testing.assert_close(pool(make_maps()), loops(make_maps(), "gem", power), rtol=1e-12, atol=1e-12)


def test_a_generalised_mean_lies_between_mean_and_maximum() -> None:
    maps, pool = make_maps(), GeneralisedMean().double()
    pool.power.data.fill_(1.0)
    torch.testing.assert_close(pool(maps), AveragePooling()(maps), rtol=1e-5, atol=2e-6)
    before = pool(maps)
    for power in (1.5, 3.0, 10.0, 100.0):
        pool.power.data.fill_(power)
        assert (pool(maps)[maps.amax(dim=(2, 3)) > 0] > before[maps.amax(dim=(2, 3)) > 0]).all()
        before = pool(maps)
    torch.testing.assert_close(before, maps.amax(dim=(2, 3)), rtol=0.04, atol=2e-6)


def test_its_power_is_learned_and_zeros_do_no_harm() -> None:
    pool = GeneralisedMean().double()
    assert [name for name, _ in pool.named_parameters()] == ["power"]
    assert torch.autograd.gradcheck(pool, make_maps().add(0.1).requires_grad_())
    maps = make_maps().float().requires_grad_()
    single = GeneralisedMean()
    single(maps).sum().backward()
    for one in (maps, single.power):
        assert one.grad is not None
        assert one.grad.isfinite().all()
        assert one.grad.any()


# In an encoder


def make_encoder(kind: PoolingKind, architecture: ArchitectureCard = SMALL) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(**architecture.model_dump(), image_size=32)
    set_pooling(encoder, kind)
    encoder(torch.rand(4, 3, 32, 32))  # statistics off their zeros
    return encoder.eval()


def save(folder: Path, encoder: Encoder, architecture: ArchitectureCard = SMALL) -> ReadyEncoder:
    card = make_card("finetune", encoder, architecture, POLICY)
    folder.mkdir()
    save_model(folder, card, encoder, None)
    return ReadyEncoder(encoder, card, replace(STORED), "toy/tuned@v1")


def test_a_resnet_may_have_any_and_nothing_else() -> None:
    encoder = build_encoder("resnet10", 4, 64, False, 32)
    assert isinstance(encoder, ResNet)
    assert pooling_of(encoder) == "average"
    images = torch.rand(2, 3, 32, 32)
    found = {}
    for kind in POOLINGS:
        set_pooling(encoder, kind)
        assert pooling_of(encoder) == kind
        found[kind] = encoder.eval()(images)
        assert found[kind].shape == (2, 32)
    assert (found["average_max"] >= found["average"]).all()
    assert (found["average_max"] > found["average"] + 0.1).any()
    with pytest.raises(
        UnusableBackbone, match=r"pooling: only resnet10, .*resnet152 can have another \(gem\)"
    ) as caught:
        set_pooling(build_encoder("timm:test_resnet", 64, 64, False, 32), "gem")
    assert "\n" not in str(caught.value)


def test_the_same_kind_again_keeps_what_was_learned() -> None:
    encoder = make_encoder("gem")
    power = encoder.get_parameter("pool.power")
    power.data.fill_(4.5)
    set_pooling(encoder, "gem")
    assert encoder.get_parameter("pool.power") is power
    set_pooling(encoder, "average")
    set_pooling(encoder, "gem")
    assert encoder.get_parameter("pool.power").item() == 3


@pytest.mark.parametrize("kind", list(POOLINGS))
def test_it_comes_back_from_disk(tmp_path: Path, kind: PoolingKind) -> None:
    encoder = make_encoder(kind)
    if kind == "gem":
        encoder.get_parameter("pool.power").data.fill_(2.2)
    ready = save(tmp_path / "model", encoder)
    found, card = load_encoder(tmp_path / "model")
    assert (card, card.pooling) == (ready.card, kind)
    assert ("pooling" in (tmp_path / "model/model.json").read_text()) == (kind != "average")
    images = torch.rand(3, 3, 32, 32)
    assert torch.equal(found(images), encoder(images))


@pytest.mark.parametrize("kind", OTHERS)
def test_no_library_has_it_and_safetensors_works(tmp_path: Path, kind: PoolingKind) -> None:
    ready = save(tmp_path / "model", make_encoder(kind, PUBLISHED), PUBLISHED)
    for library in ("torchvision", "timm"):
        with pytest.raises(Unexportable) as caught:
            export(ready, tmp_path / library, library)
        assert str(caught.value) == (
            f"toy/tuned@v1 cannot be a model of {library}: its pooling is {kind}; --format safetensors works"
        )
        assert not (tmp_path / library).exists()
    export(ready, tmp_path / "out", "safetensors")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_folder(tmp_path / "out")(images), ready.encoder(images))


def test_the_mean_and_the_maximum_keep_their_length() -> None:
    maps = torch.full((1, 2, 3, 3), 0.7)
    for pool in (AveragePooling(), GeneralisedMean(), AverageAndMaximum()):
        torch.testing.assert_close(pool(maps), torch.full((1, 2), 0.7))
