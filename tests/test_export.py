"""Exported encoders: loaded back strictly where they belong, and by the code that their README prints."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models

from stages.encoders import export as exporting
from stages.encoders.export import Unexportable, export
from stages.encoders.ready import STORED, NotAnEncoder, ReadyEncoder, load_folder
from stages.models import ArchitectureCard, ModelCard, ProjectorCard, WeightsCard, build_encoder
from stages.models.card import NeckCard
from stages.models.neck import NeckedEncoder, build_neck


def ready_encoder(
    backbone: str, image_size: int = 32, width: int = 64, small_stem_up_to: int = 0, channels: int = 3, neck: int = 0
) -> ReadyEncoder:
    """An untrained encoder whose batch norms have seen something, so that no two of its layers are alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(backbone, width, small_stem_up_to, False, image_size, channels)
        shape = {"layers": 2, "hidden": 8, "dimension": 4, "kept": neck}
        if neck:
            encoder = NeckedEncoder(encoder, build_neck(encoder.embedding_size, **shape), shape)
        encoder.train()(torch.randn(4, channels, image_size, image_size))
    card = ModelCard(
        kind="pretrain",
        architecture=ArchitectureCard(
            backbone=backbone, width=width, small_stem_up_to=small_stem_up_to, pretrained=False
        ),
        embedding_size=encoder.embedding_size,
        image_size=image_size,
        channels=channels,
        mean=(0.5, 0.4, 0.3, 0.2)[:channels],
        std=(0.2, 0.25, 0.3, 0.2)[:channels],
        interpolation="bilinear",
        antialias=True,
        projector=ProjectorCard(layers=2, hidden=8, dimension=4),
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        weights=WeightsCard(source="initialised", licence=None),
        neck=NeckCard(**shape) if neck else None,
    )
    return ReadyEncoder(encoder, card, replace(STORED, channels=channels), "toy/simclr@v1")


def equal_outputs(ready: ReadyEncoder, model: torch.nn.Module) -> None:
    images = torch.randn(3, len(ready.card.mean), ready.card.image_size, ready.card.image_size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), ready(images), rtol=1e-5, atol=1e-5)


def test_a_resnet_becomes_torchvisions(tmp_path: Path) -> None:
    ready = ready_encoder("resnet18")
    files = export(ready, tmp_path / "out", "torchvision")
    assert files == ["README.md", "model.safetensors", "preprocessing.json"]
    model = models.resnet18()
    model.fc = torch.nn.Identity()  # type: ignore[assignment]
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)
    facts = json.loads((tmp_path / "out" / "preprocessing.json").read_bytes())
    assert (facts["size"], facts["mean"], facts["std"]) == (32, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert facts["crop"] == {"kind": "central square", "share_of_short_side": 1.0}


def test_another_model_of_torchvision_goes_back_to_it(tmp_path: Path) -> None:
    ready = ready_encoder("mobilenet_v3_small")
    export(ready, tmp_path / "out", "torchvision")
    model = models.mobilenet_v3_small()
    model.classifier[3] = torch.nn.Identity()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)


def test_a_resnet_becomes_timms(tmp_path: Path) -> None:
    ready = ready_encoder("resnet18")
    export(ready, tmp_path / "out", "timm")
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)


def test_resnet10_and_the_small_stem_become_timms(tmp_path: Path) -> None:
    ready = ready_encoder("resnet10", small_stem_up_to=64)
    export(ready, tmp_path / "out", "timm")
    model = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1))
    model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = torch.nn.Identity()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)


def test_a_model_of_timm_goes_back_to_it(tmp_path: Path) -> None:
    ready = ready_encoder("timm:test_vit", image_size=48)
    export(ready, tmp_path / "out", "timm")
    model = timm.create_model("test_vit", num_classes=0, img_size=48)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)


def test_safetensors_loads_here_whatever_the_architecture(tmp_path: Path) -> None:
    ready = ready_encoder("resnet10", image_size=16, width=4, small_stem_up_to=64)
    files = export(ready, tmp_path / "out", "safetensors")
    assert files == ["README.md", "encoder.safetensors", "model.json", "preprocessing.json"]
    back = load_folder(tmp_path / "out")
    assert not back.training
    assert back.storage == ready.storage
    equal_outputs(ready, back)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert torch.equal(back.preprocess(image), ready.preprocess(image))


def test_other_channels_become_timms(tmp_path: Path) -> None:
    ready = ready_encoder("resnet18", channels=1)
    export(ready, tmp_path / "out", "timm")
    model = timm.create_model("resnet18", num_classes=0, in_chans=1)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    equal_outputs(ready, model)


def test_layers_of_the_projector_go_with_safetensors(tmp_path: Path) -> None:
    ready = ready_encoder("resnet10", 16, 4, neck=1)
    files = export(ready, tmp_path / "out", "safetensors")
    assert "neck.safetensors" in files
    equal_outputs(ready, load_folder(tmp_path / "out"))


@pytest.mark.parametrize(
    ("encoder", "kind", "words"),
    [
        (("resnet10",), "torchvision", r"no resnet10; --format timm or safetensors works"),
        (("resnet18", 32, 8), "torchvision", r"width 8, published is 64; --format safetensors works"),
        (("resnet18", 32, 64, 64), "torchvision", r"no small stem.*32 pixels.*--format timm or safetensors works"),
        (("timm:test_resnet",), "torchvision", r"a model of timm; --format timm or safetensors works"),
        (("resnet18", 32, 64, 0, 1), "torchvision", r"3 channels, and this encoder takes 1; --format timm or safe"),
        (("resnet18", 32, 64, 0, 3, 1), "timm", r"ends with layers of its projector; --format safetensors works"),
        (("resnet18", 32, 8), "timm", r"width 8, published is 64; --format safetensors works"),
        (("mobilenet_v3_small",), "timm", r"a model of torchvision; --format torchvision or safetensors works"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_library_has_not_is_refused_with_what_works(
    tmp_path: Path, encoder: tuple[Any, ...], kind: str, words: str
) -> None:
    with pytest.raises(Unexportable, match=words) as caught:
        export(ready_encoder(*encoder), tmp_path / "out", kind)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_a_window_is_not_lost(tmp_path: Path, kind: str) -> None:
    ready = ready_encoder("resnet18")
    deep = ReadyEncoder(ready.encoder, ready.card, replace(STORED, window=(0, 3000)), "toy/simclr@v1")
    with pytest.raises(Unexportable, match=rf"window \[0, 3000\], which {kind} knows nothing of; --format safetensors"):
        export(deep, tmp_path / "out", kind)
    export(deep, tmp_path / "out", "safetensors")
    assert load_folder(tmp_path / "out").storage.window == (0, 3000)


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    ready, folder = ready_encoder("resnet10", 16, 4), tmp_path / "out"
    folder.mkdir()
    export(ready, folder, "safetensors")
    export(ready, folder, "safetensors")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(Unexportable, match=r"holds other things \(notes\.txt\)"):
        export(ready, folder, "safetensors")
    own = tmp_path / "own"
    own.mkdir()
    (own / "README.md").write_text("mine")
    with pytest.raises(Unexportable, match=r"holds other things \(README\.md\)"):
        export(ready, own, "safetensors")
    assert (own / "README.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]


def test_a_failure_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, folder = ready_encoder("resnet18"), tmp_path / "out"
    export(ready, folder, "timm")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        export(ready, folder, "timm")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_holds_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAnEncoder, match="no encoder was exported there"):
        load_folder(tmp_path)
    export(ready_encoder("resnet18"), tmp_path / "out", "timm")
    with pytest.raises(NotAnEncoder, match=r"exported for another library; its README\.md says how"):
        load_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [
        ("torchvision", ("resnet18", 96)),
        ("timm", ("resnet10", 32, 64, 64)),
        ("safetensors", ("resnet10", 16, 4)),
        ("timm", ("resnet18", 32, 64, 0, 1)),
    ],
)
def test_the_code_in_the_readme_runs_as_printed(
    tmp_path: Path,
    kind: str,
    encoder: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready, folder = ready_encoder(*encoder), tmp_path / "out"
    export(ready, folder, kind)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (150, 111, 4), dtype=np.uint8)  # with an alpha that matters
    Image.fromarray(pixels).save(folder / "image.jpg", "PNG")
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert found is not None
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(found[1], names)
    assert capsys.readouterr().out == f"torch.Size([1, {ready.embedding_size}])\n"
    with torch.no_grad():
        expected = ready(ready.preprocess(folder / "image.jpg")[None])
    torch.testing.assert_close(names["embedding"], expected, rtol=1e-4, atol=1e-5)
