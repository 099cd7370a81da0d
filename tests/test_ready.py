"""Encoders loaded from a store: the same rows as the stage embed gives, whatever form an image comes in."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sample_images
import torch
from PIL import Image, ImageOps

from pipeline import cli, encoders, open_store
from pipeline.errors import BadData, DamagedArtifact, UsageError
from stages.encoders.ready import STORED, NotAnEncoder, ReadyEncoder, load_artifact, storage_facts
from stages.settings.shard import IMAGE_SUFFIXES, Shard

RECIPE = """
name: tiny
steps:
  shards:   {{stage: shard, source: "folder:{images}", max_rejected: 1, max_long_side: 150, max_short_side: 110}}
  views:    {{stage: augment, shards: shards, image_size: 96, contact_sheet_images: 1}}
  simclr:   {{stage: pretrain, shards: shards, views: views, architecture: {{backbone: resnet10, width: 4}},
              epochs: 1, batch_size: 4, projector: {{dimension: 4}}, device: cpu}}
  features: {{stage: embed, shards: shards, encoder: simclr, device: cpu}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with what folders have in them, and a store in which an encoder learned from them."""
    folder = tmp_path_factory.mktemp("ready")
    sample_images.write_images(folder / "images")
    (folder / "tiny.yaml").write_text(RECIPE.format(images=folder / "images"))
    code = cli.guarded(
        lambda: cli.app(["run", str(folder / "tiny.yaml"), "--store", str(folder / "store")], standalone_mode=False)
    )
    assert code == 0
    return folder


@pytest.fixture
def encoder(world: Path) -> ReadyEncoder:
    return open_store(world / "store").load("simclr@latest")


def rows(world: Path) -> dict[str, torch.Tensor]:
    """By path of the image: its row of features.parquet."""
    (path,) = (world / "store" / "builds" / "embed").rglob("features.parquet")
    table = pq.read_table(path)
    keys, features = table["key"].to_pylist(), table["features"].to_pylist()
    return {key: torch.tensor(row) for key, row in zip(keys, features, strict=True)}


def test_it_gives_the_rows_of_the_stage_embed(world: Path, encoder: ReadyEncoder) -> None:
    assert isinstance(encoder, torch.nn.Module)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert (encoder.reference, encoder.embedding_size) == ("tiny/simclr@v1", 32)
    expected = rows(world)
    assert len(expected) == 9, "turned by EXIF, transparent, grey, with a palette, larger than the caps, ..."
    images = torch.stack([encoder.preprocess(world / "images" / key) for key in expected])
    assert images.shape == (9, 3, 96, 96)
    torch.testing.assert_close(encoder(images), torch.stack([*expected.values()]), rtol=1e-4, atol=1e-5)


def test_every_form_of_an_image_gives_one_view(world: Path, encoder: ReadyEncoder) -> None:
    for name in ("train/leaf/copied.jpg", "train/leaf/turned.jpg", "train/stone/glass.png", "train/leaf/palette.png"):
        path = world / "images" / name
        view = encoder.preprocess(path)
        assert torch.equal(encoder.preprocess(str(path)), view)
        assert torch.equal(encoder.preprocess(path.read_bytes()), view)
        with Image.open(path) as image:
            difference = (encoder.preprocess(image) - view).abs()
        # Of JPEG, Pillow and simplejpeg decode to within a few grey levels, and a turned one was encoded again.
        assert difference.mean() < 0.15 if name.endswith("jpg") else difference.max() == 0
    with Image.open(world / "images/test/stone/plain.png") as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    view = encoder.preprocess(world / "images/test/stone/plain.png")
    assert torch.equal(encoder.preprocess(pixels), view)
    assert torch.equal(encoder.preprocess(torch.tensor(pixels).permute(2, 0, 1)), view)


def test_pixels_are_scaled_down_as_files_are(encoder: ReadyEncoder, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (250, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    assert encoder.storage.max_long_side == 150, "as the shards were that it learned from"
    assert torch.equal(encoder.preprocess(pixels), encoder.preprocess(tmp_path / "large.png"))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8), np.uint8), torch.zeros(3, 8, 8)],
    ids=["float", "channels first", "no channels", "float tensor"],
)
def test_other_pixels_are_refused(encoder: ReadyEncoder, pixels: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"pixels are uint8, an array \[H, W, 3\] or a tensor \[3, H, W\]"):
        encoder.preprocess(pixels)


def test_the_usual_storage_is_the_stage_shards_own() -> None:
    defaults = Shard(source="folder:x").model_dump(mode="json")
    facts = storage_facts(STORED)
    assert facts == {name: defaults[name] for name in facts}


def test_what_is_no_encoder_is_said(world: Path) -> None:
    store = open_store(world / "store")
    with pytest.raises(NotAnEncoder, match=r"tiny/shards@v1 holds no encoder: name the step of a pretrain or finetune"):
        store.load("shards")
    with pytest.raises(UsageError, match="no artifact of that name"):
        store.load("nothing")


def test_a_damaged_encoder_is_not_loaded(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "store", tmp_path / "store")
    (weights,) = (tmp_path / "store" / "builds").rglob("encoder.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=r"tiny/simclr: encoder\.safetensors has other content.*--force"):
        open_store(tmp_path / "store").load("simclr")


def test_images_of_another_kind_are_read_as_the_shards_were(world: Path, encoder: ReadyEncoder, tmp_path: Path) -> None:
    """16-bit images need the window that their shards were made with."""
    files = next((world / "store" / "builds").rglob("encoder.safetensors")).parent
    deep = load_artifact(files, "deep", {"shard": {"window": [1000.0, 3000.0]}})
    Image.fromarray(np.full((20, 20), 2000, dtype=np.uint16)).save(tmp_path / "deep.png")
    middle = encoder.preprocess(np.full((20, 20, 3), 128, dtype=np.uint8))
    torch.testing.assert_close(deep.preprocess(tmp_path / "deep.png"), middle, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="window"):
        encoder.preprocess(tmp_path / "deep.png")


def test_a_folder_of_unreadable_images_is_told_by_their_reasons(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without naming settings, of which `simclr embed` has none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        Image.fromarray(np.full((8, 8), 300 * number, dtype=np.uint16)).save(folder / f"deep {number}.png")
    (folder / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(folder / "fine.png")
    command = ["embed", "simclr", str(folder), "--out", str(tmp_path / "out.parquet"), "--store", str(world / "store")]
    assert cli.guarded(lambda: cli.app([*command, "--device", "cpu"], standalone_mode=False)) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "embed warning: 7 images are left out, the first: deep 0.png (16-bit or 32-bit image (PNG, mode I;16), and the "
        "encoder knows no window for it: convert it to 8 bits a channel)",
        "embed warning: empty.png: the file is empty; it is left out",
    ]
    assert pq.read_table(tmp_path / "out.parquet")["path"].to_pylist() == ["fine.png"]

    (folder / "empty.png").unlink()
    for number in range(7):
        Image.new("RGB", (8, 8)).save(folder / f"deep {number}.png")
    files = next((world / "store" / "builds").rglob("encoder.safetensors")).parent
    of_four = load_artifact(files, "four", {"shard": {"channels": 4}})
    with pytest.raises(BadData, match="none of its 8 images can be read"):
        encoders.embed_folder(
            of_four, folder, tmp_path / "out.parquet", IMAGE_SUFFIXES, batch_size=3, device="cpu", workers=2
        )
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "embed warning: 8 images are left out, the first: deep 0.png (3 channels (PNG, mode RGB), and the encoder "
        "takes images of 4)"
    ]
    tiny = load_artifact(files, "tiny", {"shard": {"max_megapixels": 1e-6}})
    for number in range(12):
        Image.new("RGB", (8, 9 + number)).save(folder / f"large {number}.png")
    with pytest.raises(BadData):
        encoders.embed_folder(
            tiny, folder, tmp_path / "out.parquet", IMAGE_SUFFIXES, batch_size=9, device="cpu", workers=2
        )
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 11
    assert lines[1].endswith("large 0.png: too large: 8 x 9 pixels, more than 1: make it smaller; it is left out")
    assert lines[-1] == "embed warning: 3 more images are left out for other reasons; --json names them all"


def test_opening_a_store_imports_no_torch() -> None:
    code = "import sys, pipeline; pipeline.open_store('nowhere'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
