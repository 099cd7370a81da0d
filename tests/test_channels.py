"""Images of any number of channels, from shard to encoder."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import timm
import torch
from conftest import RunStage
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import BadData, UsageError
from stages.evaluation import read_features
from stages.images import open_shards, packing_processes
from stages.images.decode import decode
from stages.images.display import displayed
from stages.images.encode import Storage, encode
from stages.images.index import DamagedShard
from stages.images.reading import Reading
from stages.models import UnusableBackbone, build_encoder, inflate_stem, load_card, load_encoder, match_channels
from stages.reports.thumbnails import thumbnail
from stages.views import OtherChannels, Policy, draw, evaluation_view, load, preset, read_policy
from stages.views.kornia_engine import jitter_colours

TINY = {"backbone": "resnet10", "width": 4}


def pixels_of(channels: int, height: int = 14, width: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def tiff_file(values: np.ndarray, path: Path | io.BytesIO) -> None:
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")


def write_images(folder: Path, channels: int, count: int = 24) -> Path:
    """Two classes, train and test, of several sizes; `count` images."""
    for number in range(count):
        path = folder / ("test" if number % 3 == 0 else "train") / "ab"[number % 2] / f"{number:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = pixels_of(channels, 10 + number % 5, 12, number)
        if channels in (1, 3):
            Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path.with_suffix(".png"))
        else:
            tiff_file(pixels, path.with_suffix(".tif"))
    return folder


# Stored


@pytest.mark.parametrize(("channels", "kind"), [(1, "png"), (2, "npy"), (3, "png"), (4, "npy"), (7, "npy")])
def test_pixels_survive_the_way_through_shards(tmp_path: Path, run_stage: RunStage, channels: int, kind: str):
    folder = write_images(tmp_path / "images", channels)
    files = run_stage("shard", {"source": f"folder:{folder}", "channels": channels, "images_per_shard": 5})
    facts = json.loads((files / "shards.json").read_text())
    assert (facts["channels"], facts["groups"], facts["several_labels"], facts["tile"]) == (channels, None, False, None)
    assert {row["format"] for row in pq.read_table(files / "index.parquet").to_pylist()} == {kind}
    shards = open_shards(files, "train")
    assert shards.channels == channels
    assert shards.canvas == (14, 12)
    batch = shards.batch([5, 0, 11], workers=2)
    assert batch.images.shape == (3, channels, 14, 12)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for place, image in zip([5, 0, 11], batch.images, strict=True):
        expected = pixels_of(channels, shards[place].image.shape[1], 12, int(shards.keys[place][-6:-4]))
        assert np.array_equal(shards[place].image.permute(1, 2, 0).numpy(), expected)
        assert torch.equal(image[:, : expected.shape[0]], shards[place].image)
        assert not image[:, expected.shape[0] :].any()
    everything = np.concatenate([shards[place].image.reshape(channels, -1).numpy() for place in range(len(shards))], 1)
    assert np.allclose(facts["statistics"]["mean"], everything.mean(1) / 255, rtol=0, atol=1e-12)
    assert np.allclose(facts["statistics"]["std"], everything.std(1) / 255, rtol=0, atol=1e-9)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_caps_scale_every_channel_by_itself(channels: int):
    pixels = pixels_of(channels, 60, 90)
    file = io.BytesIO()
    if channels == 1:
        Image.fromarray(pixels[..., 0]).save(file, "PNG")
    else:
        tiff_file(pixels, file)
    stored = encode(file.getvalue(), Storage(20, 25, 95, (0, 0, 0), channels))
    planes = [
        np.asarray(Image.fromarray(pixels[..., channel]).resize((25, 17), Image.Resampling.LANCZOS))
        for channel in range(channels)
    ]
    assert np.array_equal(stored.pixels, np.stack(planes, axis=2))


def test_grey_is_the_luma_of_colours_and_never_a_jpeg():
    pixels = pixels_of(3, 32, 32) // 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    luma = pixels.astype(float) @ [0.299, 0.587, 0.114]
    stored = encode(file.getvalue(), Storage(64, 64, 95, (255, 255, 255), 1))
    assert stored.format == "png"
    assert np.abs(stored.pixels[..., 0] - luma).max() <= 0.51

    smooth = np.asarray(Image.fromarray(pixels_of(3, 4, 4)).resize((32, 32), Image.Resampling.BILINEAR))
    jpeg = io.BytesIO()
    Image.fromarray(smooth).save(jpeg, "JPEG", quality=98, subsampling=0)
    from_jpeg = encode(jpeg.getvalue(), Storage(64, 64, 95, (255, 255, 255), 1))
    assert (from_jpeg.format, from_jpeg.is_copied) == ("png", False)
    assert np.abs(from_jpeg.pixels[..., 0] - smooth.astype(float) @ [0.299, 0.587, 0.114]).mean() < 2

    glass = np.dstack([pixels, np.zeros((32, 32), np.uint8)])
    clear = io.BytesIO()
    Image.fromarray(glass).save(clear, "PNG")
    assert (decode(clear.getvalue(), Reading((255, 255, 255), channels=1)).pixels == 255).all()


def test_a_damaged_array_is_named(tmp_path: Path, run_stage: RunStage):
    files = run_stage("shard", {"source": f"folder:{write_images(tmp_path / 'images', 4)}", "channels": 4})
    facts = json.loads((files / "shards.json").read_text())
    (files / "shards.json").write_text(json.dumps(facts | {"channels": 5}))
    with pytest.raises(DamagedShard, match=r"it is 12 x 1\d pixels large, of 4 channels"):
        open_shards(files, "train").batch([0])


# Views


def policy_of(channels: int, **chosen: Any) -> Policy:
    colours = {} if channels == 3 else {"saturation": 0.0, "hue": 0.0, "grey": 0.0}
    numbers = {"mean": (0.4,) * channels, "std": (0.2,) * channels}
    return Policy.model_validate(preset("natural", 32) | colours | numbers | chosen)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_geometry_and_blur_are_those_of_rgb(channels: int):
    """Channels in threes through the RGB engine, its colours off: every operator but the jitter looks at one alone."""
    images = torch.from_numpy(pixels_of(channels, 40, 50)).permute(2, 0, 1)[None].repeat(4, 1, 1, 1)
    ids, sizes = torch.arange(4), torch.tensor([[40, 50], [30, 50], [40, 20], [33, 44]])
    plain = {"colour_jitter": 0.0, "grey": 0.0, "blur": 0.5, "quarter_turns": 0.5}
    views = load(policy_of(channels, **plain), seed=3)(images, ids, 2, sizes)
    evaluated = evaluation_view(images, sizes, 24, (0.4,) * channels, (0.2,) * channels)
    assert views.shape == (2, 4, channels, 32, 32)
    for channel in range(channels):
        three = images[:, channel : channel + 1].repeat(1, 3, 1, 1)
        expected = load(policy_of(3, **plain), seed=3)(three, ids, 2, sizes)
        torch.testing.assert_close(views[:, :, channel], expected[:, :, 0], rtol=0, atol=1e-6)
        square = evaluation_view(three, sizes, 24, (0.4,) * 3, (0.2,) * 3)
        torch.testing.assert_close(evaluated[:, channel], square[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_brightness_and_contrast_by_the_formula(channels: int):
    policy = policy_of(channels, colour_jitter=1.0, colour_strength=1.0)
    images = torch.from_numpy(pixels_of(channels, 32, 32)).permute(2, 0, 1)[None].repeat(6, 1, 1, 1)
    whole = torch.full((6, 2), 32)
    parameters = draw(policy, 1, torch.arange(6), 0, whole)
    views = torch.rand(12, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = views.clone()
    jitter_colours(ours, parameters, policy)
    for view, result, order, brightness, contrast in zip(
        views, ours, parameters.order.tolist(), parameters.brightness, parameters.contrast, strict=True
    ):
        for operator in order:
            if operator == 0:
                view = (view * brightness).clamp(0, 1)
            elif operator == 1:
                view = (view.mean() + contrast * (view - view.mean())).clamp(0, 1)
        torch.testing.assert_close(result, view, rtol=0, atol=1e-5)
    assert load(policy, seed=1)(images, torch.arange(6), 0, whole).shape == (2, 6, channels, 32, 32)


def test_a_policy_of_other_channels_is_named():
    with pytest.raises(OtherChannels, match="the images have 4 channels, and the view is for 3") as error:
        load(policy_of(3))(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1), 0)
    assert error.value.exit_code == 2
    with pytest.raises(ValueError, match=r"saturation, hue: for RGB images only, and mean has 4 channels"):
        policy_of(4, saturation=0.1, hue=0.1)
    with pytest.raises(ValueError, match="mean has 4 channels and std 2"):
        policy_of(4, std=(1.0, 1.0))


def test_augment_leaves_colours_out_and_says_so(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    shards = run_stage("shard", {"source": f"folder:{write_images(tmp_path / 'images', 4)}", "channels": 4})
    views = run_stage("augment", {"image_size": 16, "preset": "aerial"}, {"shards": shards})
    policy = read_policy(views)
    assert (policy.saturation, policy.hue, policy.grey, policy.channels) == (0.0, 0.0, 0.0, 4)
    assert policy.brightness == 0.8
    assert "images of 4 channels have no colours: saturation, hue, grey are 0" in capsys.readouterr().err
    run_stage("augment", {"image_size": 16, "hue": 0.0}, {"shards": shards})
    with pytest.raises(UsageError, match=r"augment\.hue: only RGB images have colours, and these have 4") as error:
        run_stage("augment", {"image_size": 16, "hue": 0.1}, {"shards": shards})
    assert error.value.exit_code == 2


def test_a_channel_that_never_changes_is_named(tmp_path: Path, run_stage: RunStage):
    for number in range(4):
        pixels = pixels_of(4, seed=number)
        pixels[..., 2] = 7
        (tmp_path / "images/train").mkdir(parents=True, exist_ok=True)
        tiff_file(pixels, tmp_path / f"images/train/{number}.tif")
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}", "channels": 4})
    with pytest.raises(BadData, match=r"channels \(0 to 3\) these never change: 2$"):
        run_stage("augment", {"image_size": 16}, {"shards": shards})


@pytest.mark.parametrize(("channels", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (7, (0, 1, 2))])
def test_what_is_shown(channels: int, shown: tuple[int, ...]):
    pixels = pixels_of(channels)
    assert np.array_equal(displayed(pixels), pixels[..., list(shown)])
    assert thumbnail(pixels.transpose(2, 0, 1)) == thumbnail(pixels[..., list(shown)].transpose(2, 0, 1))


# Encoders


def stem_of(encoder: nn.Module) -> nn.Conv2d:
    return next(layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d))


BACKBONES = [
    "resnet10",
    "mobilenet_v3_small",
    "squeezenet1_1",
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_convnext",
]


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_route_takes_any_number_of_channels(backbone: str, channels: int):
    torch.manual_seed(0)
    width = 4 if backbone == "resnet10" else 64
    size = 160 if backbone.startswith("timm:") else 64
    encoder = build_encoder(backbone, width, 64, False, size, channels)
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, encoder.embedding_size)
    rgb = build_encoder(backbone, width, 64, False, size)
    assert stem_of(encoder).weight.shape[1] == channels
    # As spread as the library makes it for so many inputs.
    ratio = float(stem_of(encoder).weight.detach().std() / stem_of(rgb).weight.detach().std())
    assert 0.7 * min(1, (3 / channels) ** 0.5) < ratio < 1.3 * max(1, (3 / channels) ** 0.5)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_inflated_stem_answers_grey_images_as_before(backbone: str, channels: int):
    torch.manual_seed(0)
    width = 4 if backbone == "resnet10" else 64
    size = 160 if backbone.startswith("timm:") else 64
    encoder = build_encoder(backbone, width, 64, False, size).eval()
    grey = torch.rand(2, 1, size, size)
    weight = stem_of(encoder).weight.detach().clone()
    with torch.no_grad():
        expected = encoder(grey.expand(-1, 3, -1, -1))
        inflate_stem(encoder, channels)
        torch.testing.assert_close(encoder(grey.expand(-1, channels, -1, -1)), expected, rtol=1e-3, atol=1e-4)
    for channel in range(channels):
        for out in range(len(weight)):
            mean = sum(weight[out, colour] for colour in range(3)) / 3
            torch.testing.assert_close(stem_of(encoder).weight[out, channel], mean * 3 / channels)
    again = build_encoder(backbone, width, 64, False, size, channels)
    again.load_state_dict(encoder.state_dict())


def test_channels_are_matched_from_rgb_only():
    encoder = build_encoder("resnet10", 4, 64, False, 16, 4)
    assert not match_channels(encoder, 4, 4)
    with pytest.raises(UnusableBackbone, match="the encoder takes images of 4 channels and the shards have 3") as error:
        match_channels(encoder, 4, 3)
    assert error.value.exit_code == 2
    assert match_channels(build_encoder("resnet10", 4, 64, False, 16), 3, 4)


def test_published_weights_are_inflated_and_their_normalisation_forgotten(monkeypatch: pytest.MonkeyPatch):
    """As if the published weights were these."""
    create = timm.create_model

    def create_untrained(name: str, pretrained: bool, **options: Any) -> nn.Module:
        assert "in_chans" not in options
        torch.manual_seed(0)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)
    rgb = build_encoder("timm:test_resnet", 64, 64, True, 64)
    four = build_encoder("timm:test_resnet", 64, 64, True, 64, 4)
    assert rgb.weights.mean == (0.5, 0.5, 0.5)
    assert (four.weights.source, four.weights.mean, four.weights.std) == (rgb.weights.source, None, None)
    expected = stem_of(rgb).weight.mean(1, keepdim=True).mul(0.75).repeat(1, 4, 1, 1)
    torch.testing.assert_close(stem_of(four).weight, expected)


# The whole way


def write_deep_png(path: Path, seed: int) -> None:
    """Like an X-ray: 12 of 16 bits, low values."""
    noise = np.random.default_rng(seed).normal(1200, 300, (20, 16))
    Image.fromarray(noise.clip(0, 4095).astype(np.uint16)).save(path.with_suffix(".png"))


def write_four_channels(path: Path, seed: int) -> None:
    """Like red, green, blue and near infrared of 16 bits."""
    tiff_file(np.random.default_rng(seed).integers(200, 9000, (20, 16, 4), dtype=np.uint16), path.with_suffix(".tif"))


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (write_deep_png, {"channels": 1, "window": [0, 4095]}),
        (write_deep_png, {"window": [0, 4095]}),
        (write_four_channels, {"channels": 4, "window": [0, 10_000]}),
    ],
    ids=["16-bit PNG as grey", "16-bit PNG as RGB", "4-channel TIFF"],
)
def test_from_shard_to_embed(
    tmp_path: Path, run_stage: RunStage, write: Callable[[Path, int], None], settings: dict[str, Any]
):
    for number in range(30):
        folder = tmp_path / "images" / ("train" if number % 3 else "test") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / str(number), number)
    channels = settings.get("channels", 3)
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}", **settings})
    views = run_stage("augment", {"image_size": 12, "contact_sheet_images": 2}, {"shards": shards})
    training = {"architecture": TINY, "batch_size": 10, "epochs": 1, "max_steps": 2, "device": "cpu"}
    model = run_stage("pretrain", training, {"shards": shards, "views": views})
    statistics = json.loads((shards / "shards.json").read_text())["statistics"]
    encoder, card = load_encoder(model)
    assert (card.channels, list(card.mean)) == (channels, statistics["mean"])
    labelled = {"device": "cpu", "max_steps": 1, "batch_size": 10}  # without views: crop and flip
    assert load_card(run_stage("finetune", labelled, {"shards": shards, "encoder": model})).channels == channels
    files = run_stage("embed", {"device": "cpu"}, {"shards": shards, "encoder": model})
    batch = open_shards(shards, "test").batch(range(10))
    with torch.no_grad():
        expected = encoder(evaluation_view(batch.images, batch.sizes, 12, card.mean, card.std))
    torch.testing.assert_close(read_features(files).features[20:], expected, rtol=1e-4, atol=1e-5)
    pixels = run_stage("embed", {"encoder": "pixels", "image_size": 6}, {"shards": shards})
    assert read_features(pixels).features.shape == (30, channels * 36)
    random = {"encoder": "random", "architecture": TINY, "image_size": 12, "device": "cpu"}
    assert torch.isfinite(read_features(run_stage("embed", random, {"shards": shards})).features).all()


def test_an_encoder_of_other_channels(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    rgb, four = (
        run_stage(
            "shard", {"source": f"folder:{write_images(tmp_path / str(channels), channels)}", "channels": channels}
        )
        for channels in (3, 4)
    )
    views_rgb, views_four = (run_stage("augment", {"image_size": 8}, {"shards": shards}) for shards in (rgb, four))
    training = {"architecture": TINY, "batch_size": 8, "epochs": 1, "max_steps": 1, "device": "cpu"}
    still = {"optimiser": {"name": "sgd", "learning_rate": 1e-30, "weight_decay": 0}}
    of_rgb = run_stage("pretrain", training, {"shards": rgb, "views": views_rgb})
    inflated = run_stage("pretrain", training | still, {"shards": four, "views": views_four, "encoder": of_rgb})
    assert "inflated to 4 channels" in capsys.readouterr().err
    assert load_card(inflated).mean == read_policy(views_four).mean
    stems: list[Tensor] = [stem_of(load_encoder(model)[0]).weight for model in (of_rgb, inflated)]
    torch.testing.assert_close(stems[1], stems[0].mean(1, keepdim=True).mul(0.75).repeat(1, 4, 1, 1))

    with pytest.raises(UnusableBackbone, match="the encoder takes images of 4 channels and the shards have 3"):
        run_stage("pretrain", training, {"shards": rgb, "views": views_rgb, "encoder": inflated})
    with pytest.raises(UsageError, match=r"embed\.encoder takes images of 3 channels and the shards have 4") as error:
        run_stage("embed", {"device": "cpu"}, {"shards": four, "encoder": of_rgb})
    assert error.value.exit_code == 2
    with pytest.raises(OtherChannels, match="the images have 4 channels, and the view is for 3"):
        run_stage("pretrain", training, {"shards": four, "views": views_rgb})


@pytest.mark.parametrize(("settings", "processes"), [({}, 1), ({"tile": {"size": 8}}, 1), ({}, 2)])
def test_a_window_that_cuts_off_much_is_told(
    tmp_path: Path,
    run_stage: RunStage,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    processes: int,
):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    for number, size in enumerate((8, 24, 8, 8)):
        values = np.full((size, size), 1000 * number, np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    Image.new("L", (50, 50)).save(tmp_path / "shallow.png")
    common = {"source": f"folder:{tmp_path}", "near_duplicates": False, "test_fraction": 0.0, "workers": processes}
    run_stage("shard", common | settings | {"window": [1000, 4000], "channels": 1})
    assert "lie outside" not in capsys.readouterr().err, "64 of 768 values are below"
    run_stage("shard", common | settings | {"window": [2000, 4000], "channels": 1})
    assert (
        "warning: 83% of the pixel values of 16-bit, 32-bit and float images lie outside window [2000, 4000] and "
        "became 0 or 255: the smallest is 0, the largest 3000"
    ) in capsys.readouterr().err


def test_a_window_that_is_the_wrong_way_round_is_refused(run_stage: RunStage):
    for window in ([5, 5], [9, 3]):
        with pytest.raises(ValueError, match=r"window.*the lower value first"):
            run_stage("shard", {"source": "folder:a", "window": window})
