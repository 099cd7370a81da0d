"""Sets of torchvision, of those that can be laid out without a network."""

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from conftest import RunStage
from PIL import Image

from pipeline import runner
from pipeline.errors import UsageError
from pipeline.provenance import fingerprint
from pipeline.recipe import load_recipe
from pipeline.settings import Call
from pipeline.store import open_store
from stages.images import open_shards
from stages.settings import STAGES
from stages.settings.shard import Shard
from stages.sources import torchvision_sets
from stages.sources.candidates import Source, SourceError
from stages.sources.columns import Reading
from stages.sources.torchvision_sets import NoSuchSet, TorchvisionItem, fetch_set, read_set

DIGITS = np.random.default_rng(0).integers(0, 256, (15, 28, 28), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _nothing_is_known():
    torchvision_sets._open.cache_clear()


def mnist(root: Path) -> Path:
    """Ten images for training and five for testing; torchvision only looks whether the files are there."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, images in (("train", DIGITS[:10]), ("t10k", DIGITS[10:])):
        head = struct.pack(">IIII", 0x803, len(images), 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = np.arange(len(images), dtype=np.uint8) % 10
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(images)) + labels.tobytes())
    return root


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(path, quality=95)


def eurosat(root: Path) -> Path:
    for number in range(6):
        picture(root / f"eurosat/2750/{('Forest', 'River')[number % 2]}/{number}.jpg", number)
    return root


def textures(root: Path) -> Path:
    """The Describable Textures Dataset, whose files and labels are lists."""
    for split, names in (
        ("train", ("banded/1", "dotted/2")),
        ("val", ("banded/3",)),
        ("test", ("dotted/4", "banded/5")),
    ):
        for name in names:
            picture(root / f"dtd/dtd/images/{name}.jpg", int(name[-1]))
        (root / "dtd/dtd/labels").mkdir(exist_ok=True)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    return root


def countries(root: Path) -> Path:
    """A set whose validation split is called `valid`."""
    for split in ("train", "valid", "test"):
        for name in ("AD", "AE"):
            picture(root / f"country211/{split}/{name}/1.jpg", 10)
    return root


def listed(source: Source) -> list[tuple[str, str | None, tuple[str, ...]]]:
    return [(one.key, one.split, one.labels) for one in source.candidates]


def test_images_without_files_are_read_one_by_one(tmp_path: Path):
    source = read_set("MNIST", mnist(tmp_path), Reading())
    assert listed(source)[:2] == [("test/0.png", "test", ("0 - zero",)), ("test/1.png", "test", ("1 - one",))]
    assert [one.split for one in source.candidates] == ["test"] * 5 + ["train"] * 10
    for one, pixels in zip(source.candidates, (*DIGITS[10:], *DIGITS[:10]), strict=True):
        item = pickle.loads(pickle.dumps(one.image))
        assert isinstance(item, TorchvisionItem)
        assert item.size_bytes == 28 * 28
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(item.read()))), pixels)
    assert {one.split for one in read_set("MNIST", tmp_path, Reading(splits="drawn")).candidates} == {None}
    assert {one.labels for one in read_set("MNIST", tmp_path, Reading(labels=False)).candidates} == {()}


def test_files_are_taken_as_they_are(tmp_path: Path):
    source = read_set("EuroSAT", eurosat(tmp_path), Reading())
    assert listed(source)[0] == ("eurosat/2750/Forest/0.jpg", None, ("Forest",))
    assert [one.image for one in source.candidates] == [one.key for one in source.candidates]
    assert source.root == tmp_path
    with pytest.raises(SourceError, match="`splits: given`, but torchvision:EuroSAT has no splits"):
        read_set("EuroSAT", tmp_path, Reading(splits="given"))


def test_the_splits_of_a_set(tmp_path: Path):
    source = read_set("DTD", textures(tmp_path), Reading())
    assert listed(source) == [
        ("dtd/dtd/images/banded/1.jpg", "train", ("banded",)),
        ("dtd/dtd/images/banded/3.jpg", "val", ("banded",)),
        ("dtd/dtd/images/banded/5.jpg", "test", ("banded",)),
        ("dtd/dtd/images/dotted/2.jpg", "train", ("dotted",)),
        ("dtd/dtd/images/dotted/4.jpg", "test", ("dotted",)),
    ]
    source = read_set("Country211", countries(tmp_path), Reading())
    assert {one.key.split("/")[1]: one.split for one in source.candidates} == {
        "train": "train", "valid": "val", "test": "test",
    }  # fmt: skip


class Told:
    """A set that says wrong things about itself."""

    def __init__(self, labels: list[int], samples: list[Any]):
        self.targets, self._samples = labels, samples

    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4), (place, 0, 0)), place


def test_what_a_set_lists_is_held_against_what_it_gives(tmp_path: Path):
    picture(tmp_path / "other.png", 200)
    images = Told([2, 1, 0], [(str(tmp_path / "other.png"), place) for place in range(3)])
    assert torchvision_sets._labels(images) == [0, 1, 2]
    assert torchvision_sets._files(images) is None
    for place in range(3):
        images[place][0].save(tmp_path / f"{place}.png")
    images._samples = [(str(tmp_path / f"{place}.png"), 7) for place in range(3)]
    assert torchvision_sets._labels(images) == [0, 1, 2]
    assert torchvision_sets._files(images) == [str(tmp_path / f"{place}.png") for place in range(3)]


def test_class_names_are_unique_and_whole():
    images = type("Set", (), {"classes": [("tench", "Tinca tinca"), ("crane",), ("crane",)]})()
    assert torchvision_sets._class_names(images) == ["tench, Tinca tinca", "crane (1)", "crane (2)"]
    assert torchvision_sets._class(-1, ["a"]) == ()
    assert torchvision_sets._class(3, None) == ("3",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR01", "has no such set; did you mean .*CIFAR10"),
        ("flowers102", "did you mean Flowers102"),
        ("cifar", "did you mean CIFAR10"),
        ("VisionDataset2", "has no such set"),
        ("EMNIST", "needs split beside a folder"),
        ("FakeData", "reads no folder"),
        ("CocoDetection", "needs annFile beside a folder"),
    ],
)
def test_names_that_are_no_sets(tmp_path: Path, name: str, message: str):
    with pytest.raises(NoSuchSet, match=message) as error:
        fetch_set(name, str(tmp_path))
    assert error.value.exit_code == 2


def test_a_set_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path):
    with pytest.raises(SourceError, match=rf"torchvision:EuroSAT: Dataset not found.*looked in {tmp_path}") as error:
        read_set("EuroSAT", tmp_path, Reading())
    assert error.value.exit_code == 6
    with pytest.raises(SourceError, match="FER2013"):
        fetch_set("FER2013", str(tmp_path / "new"))


# Fetching


def test_a_set_is_fetched_before_its_first_look(tmp_path: Path):
    settings = Shard.model_validate({"source": "torchvision:MNIST", "download_folder": str(tmp_path / "mnist")})
    source, cache, calls = settings.foreign_inputs()["source"], tmp_path / "cache", []

    def call(named: Call) -> int:
        calls.append(named)
        mnist(tmp_path / "mnist")
        return fetch_set(*named.arguments)

    assert fingerprint(source, cache, look=False, call=call) is None
    assert fingerprint(source, cache, call=call) is None, "a dry run downloads nothing"
    found = fingerprint(source, cache, fetch=True, call=call)
    assert found is not None
    assert (found.files, found.samples, len(calls)) == (4, 15, 1)
    assert fingerprint(source, cache, look=False) == found
    again = fingerprint(source, cache, fetch=True, call=call)
    assert again is not None
    assert (again.value, again.samples, len(calls)) == (found.value, 15, 1)
    labels = tmp_path / "mnist/MNIST/raw/t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x09")
    other = fingerprint(source, cache, call=call)
    assert other is not None
    assert other.value != found.value, "a file that changed changes the key"


def test_runs_with_a_set_know_what_is_to_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the recipe on: status before the download, a dry run, the run, and a second run."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: sets\nsteps:\n  shards: {stage: shard, source: 'torchvision:MNIST', download_folder: %s, workers: 1}\n"
        % (tmp_path / "here")
    )
    store, loaded = open_store(tmp_path / "store"), load_recipe(recipe, STAGES)
    monkeypatch.setattr(
        torchvision.datasets.MNIST,
        "download",
        lambda self: None if Path(self.root).joinpath("MNIST").exists() else mnist(Path(self.root)),
    )
    for look, why in ((False, "never looked at"), (True, "fetched first")):
        (planned,) = runner.plan(runner.Planner(store, loaded, print, look=look))
        assert (planned.state, planned.why) == ("run", f"first run: its source {'was' if not look else 'is'} {why}")
    (finished,) = runner.run(runner.Planner(store, loaded, print), (), lambda _: None)
    assert finished.ran
    files = store.files("shard", finished.record.digest)
    assert json.loads((files / "shards.json").read_text())["splits"].keys() == {"train", "test"}
    (finished,) = runner.run(runner.Planner(store, loaded, print), (), lambda _: None)
    assert not finished.ran
    (planned,) = runner.plan(runner.Planner(store, loaded, print, look=False))
    assert planned.state == "up to date"
    with pytest.raises(UsageError, match="no such folder"):
        fingerprint(Shard.model_validate({"source": "folder:gone"}).foreign_inputs()["source"], tmp_path)


def test_a_set_of_torchvision_becomes_shards(tmp_path: Path, run_stage: RunStage):
    settings = {"source": "torchvision:EuroSAT", "download_folder": str(eurosat(tmp_path / "here"))}
    files = run_stage("shard", settings | {"test_fraction": 0.34})
    facts = json.loads((files / "shards.json").read_text())
    assert (facts["source_kind"], facts["copied"]) == ("torchvision", 6)
    assert facts["splits"]["test"]["class_counts"] == [1, 1]
    digits = {"source": "torchvision:MNIST", "download_folder": str(mnist(tmp_path / "there"))}
    train = open_shards(run_stage("shard", digits), "train")
    assert np.array_equal(np.stack([train[n].image[0] for n in range(10)]), DIGITS[:10])
    assert [train.classes[label] for label in train.labels[:2]] == ["0 - zero", "1 - one"]
