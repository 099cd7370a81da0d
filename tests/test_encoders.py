"""Encoders: names and numbers of torchvision and timm, any width, stems, published weights without a network."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import _api

from stages.models import UnusableBackbone, build_encoder, build_projector, count_parameters
from stages.models.encoders import LibraryEncoder, ResNet

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


@pytest.mark.parametrize("backbone", RESNETS)
def test_resnets_are_those_of_torchvision(backbone: str) -> None:
    with torch.device("meta"):
        theirs = models.get_model(backbone, weights=None)
        ours = build_encoder(backbone, 64, 64, False, 224)
    assert isinstance(theirs.fc, nn.Linear)
    assert ours.embedding_size == theirs.fc.in_features
    theirs.fc = nn.Identity()
    assert shapes(ours.state_dict()) == shapes(theirs.state_dict())
    assert [*ours.state_dict()] == [*theirs.state_dict()]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_a_resnet_computes_what_torchvision_computes(backbone: str) -> None:
    theirs = models.get_model(backbone, weights=None)
    theirs.fc = nn.Identity()
    ours = build_encoder(backbone, 64, 0, False, 64)
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 64, 64)
    for mode in (True, False):
        assert torch.allclose(ours.train(mode)(images), theirs.train(mode)(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backbone", "width", "size"), [("resnet10", 16, 128), ("resnet50", 8, 256)])
def test_thin_resnets(backbone: str, width: int, size: int) -> None:
    encoder = build_encoder(backbone, width, 64, False, 32)
    assert encoder.embedding_size == size
    embeddings = encoder(torch.rand(2, 3, 32, 32))
    assert embeddings.shape == (2, size)
    embeddings.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_the_thin_resnet_for_cpu_has_the_parameters_that_are_stated() -> None:
    assert count_parameters(build_encoder("resnet10", 16, 64, False, 32)) == 307_536


@pytest.mark.parametrize(("image_size", "kernel", "places"), [(32, 3, 32), (64, 3, 64), (65, 7, 17)])
def test_small_images_get_the_small_stem(image_size: int, kernel: int, places: int) -> None:
    encoder = build_encoder("resnet10", 4, 64, False, image_size)
    assert isinstance(encoder, ResNet)
    assert encoder.conv1.kernel_size == (kernel, kernel)
    maps = encoder.maxpool(encoder.conv1(torch.rand(1, 3, image_size, image_size)))
    assert maps.shape == (1, 4, places, places)


def test_initialisation_is_that_of_torchvision() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 64, 0, False, 224)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 4:
            fan_out = parameter.shape[0] * parameter.shape[2] * parameter.shape[3]
            assert parameter.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name


def test_equal_seeds_give_equal_weights() -> None:
    encoders = []
    for _ in range(2):
        torch.manual_seed(7)
        encoders.append(build_encoder("mobilenet_v3_small", 64, 64, False, 32))
    first, second = (encoder.state_dict() for encoder in encoders)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("backbone", "image_size", "embedding_size"),
    [
        ("efficientnet_b0", 32, 1280),
        ("convnext_tiny", 32, 768),
        ("vit_b_32", 64, 768),
        ("mobilenet_v2", 32, 1280),
        ("mobilenet_v3_small", 32, 1024),
        ("densenet121", 32, 1024),
        ("swin_t", 32, 768),
        ("shufflenet_v2_x0_5", 32, 1024),
        ("squeezenet1_1", 32, 512),
        ("regnet_y_400mf", 32, 440),
        ("mnasnet0_5", 32, 1280),
        ("resnext50_32x4d", 32, 2048),
        ("googlenet", 32, 1024),
    ],
)
def test_other_models_of_torchvision_lose_their_classifier(backbone: str, image_size: int, embedding_size: int) -> None:
    encoder = build_encoder(backbone, 64, 64, False, image_size)
    assert isinstance(encoder, LibraryEncoder)
    assert encoder.embedding_size == embedding_size
    assert encoder.training
    embeddings = encoder(torch.rand(2, 3, image_size, image_size))
    assert embeddings.shape == (2, embedding_size)
    embeddings.square().sum().backward()
    unused = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert unused == [], "a part of the classifier is left"
    options: dict[str, Any] = {"image_size": image_size} if backbone.startswith("vit") else {}
    if backbone == "googlenet":
        options["init_weights"] = True
    theirs = models.get_model(backbone, weights=None, **options).state_dict()
    ours = encoder.library_module().state_dict()
    assert all(theirs[name].shape == value.shape for name, value in ours.items())
    left_out = {name.split(".")[0] for name in theirs.keys() - ours.keys()}
    assert left_out <= {"classifier", "heads", "head", "fc", "aux1", "aux2"}


def test_what_is_left_of_a_model_computes_the_input_of_its_classifier() -> None:
    theirs = models.efficientnet_b0(weights=None)
    encoder = build_encoder("efficientnet_b0", 64, 64, False, 32)
    encoder.library_module().load_state_dict(
        {name: value for name, value in theirs.state_dict().items() if not name.startswith("classifier")}
    )
    images = torch.rand(2, 3, 32, 32)
    embeddings = encoder.eval()(images)
    assert torch.allclose(theirs.classifier[1](embeddings), theirs.eval()(images), atol=1e-6)
    dropouts = [module for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == []


@pytest.mark.parametrize(
    ("name", "image_size", "embedding_size"),
    [
        ("resnet10t", 32, 512),
        ("vit_tiny_patch16_224", 64, 192),
        ("swin_tiny_patch4_window7_224", 64, 768),
        ("mobilenetv3_small_050", 32, 1024),
        ("convnext_atto", 32, 320),
    ],
)
def test_models_of_timm(name: str, image_size: int, embedding_size: int) -> None:
    encoder = build_encoder(f"timm:{name}", 64, 64, False, image_size)
    embeddings = encoder(torch.rand(2, 3, image_size, image_size))
    assert encoder.embedding_size == embedding_size
    assert embeddings.shape == (2, embedding_size)
    options: dict[str, Any] = {"img_size": image_size} if name.startswith(("vit", "swin")) else {}
    theirs = timm.create_model(name, num_classes=0, **options)
    assert shapes(encoder.library_module().state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "no backbone 'resnet19'; nearest: resnet18"),
        ({"backbone": "mobilenet_v3_smal"}, "mobilenet_v3_small"),
        ({"backbone": "timm:resnet26x"}, "nearest: timm:resnet26"),
        ({"backbone": "efficientnet_lite0"}, "timm has it: timm:efficientnet_lite0"),
        ({"backbone": "zzzz"}, "another model of torchvision, or timm:NAME"),
        ({"backbone": "timm:resnet18.nowhere"}, "nowhere"),
        ({"backbone": "vgg11", "width": 16}, "only resnet10, .* have a width"),
        ({"backbone": "vit_b_32", "image_size": 50}, "images of 50 pixels"),
        ({"backbone": "alexnet"}, "images of 32 pixels: .*too small"),
        ({"backbone": "resnet10", "pretrained": True}, "nobody published"),
        ({"backbone": "resnet18", "pretrained": True, "width": 16}, "nobody published"),
        ({"backbone": "resnet18", "pretrained": True}, "set small_stem_up_to to 0"),
        ({"backbone": "timm:resnet10t.nowhere", "pretrained": True}, "nowhere"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"width": 64, "small_stem_up_to": 64, "pretrained": False, "image_size": 32}
    with pytest.raises(UnusableBackbone, match=message) as caught:
        build_encoder(**(plain | arguments))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v3_small"])
def test_published_weights_of_torchvision(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    published = models.get_model(backbone, weights=None)
    asked = []

    def download(url: str, *_: Any, **options: Any) -> dict[str, Tensor]:
        asked.append((url, options))
        return published.state_dict()

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    encoder = build_encoder(backbone, 64, 0, True, 32)
    ours = encoder.library_module().state_dict()
    assert len(ours) > 50
    assert all(torch.equal(published.state_dict()[name], value) for name, value in ours.items())
    # torchvision's own functions ask again, for whatever the file holds: by then it was found to hold weights alone.
    assert len(asked) == (1 if backbone == "resnet18" else 2)
    assert asked[0][1]["check_hash"]
    assert asked[0][1]["weights_only"]
    assert encoder.weights.source.startswith("torchvision ")
    assert encoder.weights.source.endswith("_Weights.IMAGENET1K_V1")
    assert encoder.weights.mean == (0.485, 0.456, 0.406)
    assert encoder.weights.std == (0.229, 0.224, 0.225)


def test_published_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = models.resnet34(weights=None).state_dict()
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: other)
    with pytest.raises(RuntimeError, match=r"layer1\.2\.conv1\.weight"):
        build_encoder("resnet18", 64, 0, True, 32)


def test_published_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    published = timm.create_model("resnet10t.c3_in1k").state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(published))
    encoder = build_encoder("timm:resnet10t.c3_in1k", 64, 64, True, 32)
    ours = encoder.library_module().state_dict()
    assert all(torch.equal(published[name], value) for name, value in ours.items())
    assert encoder.weights.source == "timm resnet10t.c3_in1k"
    assert encoder.weights.licence == "apache-2.0"
    assert encoder.weights.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_is_that_of_the_paper(layers: int) -> None:
    projector = build_projector(16, layers, hidden=24, dimension=8)
    linear = [module for module in projector if isinstance(module, nn.Linear)]
    norms = [module for module in projector if isinstance(module, nn.BatchNorm1d)]
    relus = [module for module in projector if isinstance(module, nn.ReLU)]
    assert (len(linear), len(norms), len(relus)) == (layers, layers, layers - 1)
    assert all(module.bias is None for module in linear)
    assert [norm.bias is None for norm in norms] == [False] * (layers - 1) + [True]
    assert isinstance(projector[-1], nn.BatchNorm1d)
    projected = projector(torch.randn(10, 16))
    assert projected.shape == (10, 8)
    assert torch.allclose(projected.mean(0), torch.zeros(8), atol=1e-6)
    assert [*projector.state_dict()][:2] == ["linear1.weight", "norm1.weight"]


def test_weights_that_cannot_be_downloaded_are_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UnusableBackbone, match=r"weights of resnet18 cannot be had: .*no network"):
        build_encoder("resnet18", 64, 0, True, 224)
