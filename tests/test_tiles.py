"""Very large images as tiles: every pixel, no loss, one group, whatever the processes."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from conftest import RunStage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from stages.images import open_shards, packing_processes
from stages.images.decode import decode_rgb
from stages.images.tiles import Tile, tile_corners
from stages.settings.shard import Shard


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture under a little noise, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * (1 + c) + columns * (2 - c) for c in range(3)], axis=2) % 200
    return (smooth + np.random.default_rng(seed).integers(0, 20, smooth.shape)).astype(np.uint8)


def naive_starts(length: int, size: int, stride: int) -> list[int]:
    """Walk along until the end is reached; the last step is cut short."""
    starts = [0]
    while starts[-1] + size < length:
        starts.append(min(starts[-1] + stride, length - size))
    return starts


lengths = st.integers(1, 60)


@given(lengths, lengths, st.integers(1, 25), st.data())
def test_tiles_cover_every_pixel_and_stay_inside(height: int, width: int, size: int, data: st.DataObject):
    tile = Tile(size, data.draw(st.integers(1, size)))
    corners = tile_corners(height, width, tile)
    expected = [
        (top, left)
        for top in naive_starts(height, size, tile.stride)
        for left in naive_starts(width, size, tile.stride)
    ]
    assert corners == expected
    assert len(set(corners)) == len(corners)
    covered = np.zeros((height, width), bool)
    for top, left in corners:
        part = covered[top : top + size, left : left + size]
        assert part.shape == (min(size, height), min(size, width))
        part[:] = True
    assert covered.all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Per split and class a large image, and a small one: PNG in train, JPEG in test."""
    for split, kind in (("train", "png"), ("test", "jpg")):
        for number, name in enumerate("ab"):
            path = tmp_path / "images" / split / name
            path.mkdir(parents=True)
            Image.fromarray(picture(150, 210 + 30 * number, number)).save(path / f"large.{kind}", quality=92)
            Image.fromarray(picture(64, 40, number)).save(path / f"small.{kind}", quality=92)
    return tmp_path / "images"


SETTINGS = {"tile": {"size": 64, "stride": 50}, "max_short_side": 30, "max_long_side": 30, "workers": 1}


def test_an_image_is_put_together_again_from_its_tiles(folder: Path, run_stage: RunStage):
    files = run_stage("shard", {"source": f"folder:{folder}", **SETTINGS})
    shards = open_shards(files, "train")
    assert shards.canvas == (64, 64)
    for name, label in (("a", 0), ("b", 1)):
        original = np.array(Image.open(folder / f"train/{name}/large.png"))
        rebuilt = np.zeros_like(original)
        parent = f"train/{name}/large.png"
        places = [number for number, key in enumerate(shards.keys) if key.startswith(f"{parent}#")]
        assert len(places) == len(naive_starts(150, 64, 50)) * len(naive_starts(original.shape[1], 64, 50))
        for place in places:
            top, left = map(int, shards.keys[place].rpartition("#")[2].split(","))
            tile = shards[place].image.permute(1, 2, 0).numpy()
            assert np.array_equal(tile, original[top : top + 64, left : left + 64])
            rebuilt[top : top + 64, left : left + 64] = tile
        assert np.array_equal(rebuilt, original)
        assert shards.labels[places].tolist() == [label] * len(places)
        assert len(set(shards.groups[places].tolist())) == 1
        small = shards.keys.index(f"train/{name}/small.png")  # smaller than a tile in one direction, equal in the other
        assert np.array_equal(
            shards[small].image.permute(1, 2, 0).numpy(), np.array(Image.open(folder / f"train/{name}/small.png"))
        )
        assert shards.groups[small] not in shards.groups[places]


def test_counts_groups_and_statistics(folder: Path, run_stage: RunStage):
    (folder / "train/a/broken.png").write_bytes(b"no image")
    files = run_stage("shard", {"source": f"folder:{folder}", "max_rejected": 0.2, **SETTINGS})
    facts = json.loads((files / "shards.json").read_text())
    rows = pq.read_table(files / "index.parquet").to_pylist()
    assert (facts["images_in"], facts["rejected"], facts["samples_out"]) == (9, 1, len(rows))
    assert facts["tile"] == {"size": 64, "stride": 50}
    assert facts["groups"] == 4
    assert facts["copied"] == 2, "the small JPEG images are within a tile"
    assert {row["group"] for row in rows} == {None} | {
        f"{split}/{name}/large.{kind}" for split, kind in (("train", "png"), ("test", "jpg")) for name in "ab"
    }
    assert all((row["group"] is None) == ("#" not in row["key"]) for row in rows)
    shards = open_shards(files, "train")
    pixels = np.concatenate([shards[place].image.reshape(3, -1).numpy() for place in range(len(shards))], axis=1) / 255
    assert facts["statistics"]["pixels"] == pixels.shape[1]
    assert np.allclose(facts["statistics"]["mean"], pixels.mean(axis=1), rtol=0, atol=1e-12)
    assert np.allclose(facts["statistics"]["std"], pixels.std(axis=1), rtol=0, atol=1e-9)


def test_tiles_of_a_jpeg_are_jpeg_and_near_it(folder: Path, run_stage: RunStage):
    files = run_stage("shard", {"source": f"folder:{folder}", **SETTINGS})
    rows = [row for row in pq.read_table(files / "index.parquet").to_pylist() if row["key"].startswith("test/a/large")]
    original = decode_rgb((folder / "test/a/large.jpg").read_bytes()).astype(float)
    shards = open_shards(files, "test")
    for row in rows:
        assert row["format"] == "jpg"
        top, left = map(int, row["key"].rpartition("#")[2].split(","))
        tile = shards[shards.keys.index(row["key"])].image.permute(1, 2, 0).numpy()
        error = ((tile - original[top : top + 64, left : left + 64]) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 35


@pytest.mark.parametrize(("channels", "kind"), [(1, "png"), (4, "npy")])
def test_tiles_of_any_number_of_channels(tmp_path: Path, run_stage: RunStage, channels: int, kind: str):
    values = np.random.default_rng(0).integers(0, 4096, (70, 50, channels), dtype=np.uint16)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images/large.tif"
    tifffile.imwrite(path, values.squeeze(), photometric="minisblack", planarconfig="contig" if channels > 1 else None)
    settings = {"source": f"folder:{tmp_path / 'images'}", "test_fraction": 0, "tile": {"size": 32}}
    files = run_stage("shard", settings | {"channels": channels, "window": [0, 4095]})
    shards = open_shards(files, "train")
    assert [key.partition("#")[2] for key in shards.keys] == ["0,0", "0,18", "32,0", "32,18", "38,0", "38,18"]
    assert {row["format"] for row in pq.read_table(files / "index.parquet").to_pylist()} == {kind}
    expected = np.rint(values * (255 / 4095)).astype(np.uint8)
    assert np.array_equal(shards[5].image.permute(1, 2, 0).numpy(), expected[38:, 18:])


def test_bytes_do_not_depend_on_processes(folder: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    monkeypatch.setattr(packing_processes._Work, "take_back", lambda work: False)  # the other process does it all
    (folder / "train/b/broken.png").write_bytes(b"no image")
    settings = {"source": f"folder:{folder}", "max_rejected": 0.2, **SETTINGS}
    one, two = (run_stage("shard", settings | {"workers": workers}) for workers in (1, 2))
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir()} for files in (one, two)
    ]
    assert digests[0] == digests[1]
    assert "train-000000.tar" in digests[0]


def test_tiles_have_the_attributes_of_their_image(folder: Path, run_stage: RunStage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    monkeypatch.setattr(packing_processes._Work, "take_back", lambda work: False)  # they go to another process and back
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))]
    rows = [f"{name},{name.split('/')[0]},scanner {number}" for number, name in enumerate(names)]
    (folder / "table.csv").write_text("\n".join(["path,split,scanner", *rows]) + "\n")
    settings = SETTINGS | {"source": f"csv:{folder}/table.csv", "workers": 2}
    files = run_stage("shard", settings | {"columns": {"attributes": ["scanner"]}})
    for split in ("train", "test"):
        shards = open_shards(files, split)
        assert len(shards) > 10
        parents = [key.partition("#")[0] for key in shards.keys]
        assert shards.attribute("scanner") == [f"scanner {names.index(parent)}" for parent in parents]


def test_names_in_the_tar_are_unique(folder: Path, run_stage: RunStage):
    files = run_stage("shard", {"source": f"folder:{folder}", **SETTINGS})
    with tarfile.open(files / "train-000000.tar") as tar:
        names = tar.getnames()
    assert len(set(names)) == len(names)
    assert {"000000000-0-0.png", "000000000-0-0.cls", "000000000-86-146.png", "000000001.png"} <= set(names)


def test_splits_are_drawn_on_whole_images(tmp_path: Path, run_stage: RunStage):
    for number in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(picture(70, 70, number)).save(tmp_path / "images" / f"{number}.png")
    files = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}", "test_fraction": 0.5, "tile": {"size": 40}})
    parents = {split: {key.partition("#")[0] for key in open_shards(files, split).keys} for split in ("train", "test")}
    assert not parents["train"] & parents["test"]
    assert [len(open_shards(files, split)) for split in ("train", "test")] == [12, 12]


def test_an_image_that_is_too_large_is_rejected_until_it_is_asked_for(tmp_path: Path, run_stage: RunStage):
    (tmp_path / "images").mkdir()
    Image.fromarray(picture(100, 100)).save(tmp_path / "images/large.png")
    Image.fromarray(picture(30, 30)).save(tmp_path / "images/small.png")
    settings = {
        "source": f"folder:{tmp_path / 'images'}", "tile": {"size": 64}, "max_rejected": 1, "test_fraction": 0,
    }  # fmt: skip
    files = run_stage("shard", settings | {"max_megapixels": 0.009})
    (line,) = (files / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "too large: 100 x 100 pixels, more than 9,000: raise `max_megapixels`"
    assert len(open_shards(run_stage("shard", settings | {"max_megapixels": 0.01}), "train")) == 5


@pytest.mark.parametrize("wrong", [{"size": 64, "stride": 65}, {"size": 4}, {"stride": 5}, {"size": 64, "stride": 0}])
def test_wrong_tiles_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValidationError):
        Shard.model_validate({"source": "folder:a", "tile": wrong})


def test_caps_have_no_effect_on_tiles():
    assert Shard.model_validate({"source": "folder:a", "tile": {"size": 64}}).without_effect() == {
        "max_short_side",
        "max_long_side",
    }
    assert Shard.model_validate({"source": "folder:a"}).without_effect() == set()
