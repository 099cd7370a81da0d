"""Sizes, batches and epochs that a recipe leaves to what is there, and what becomes of images without labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image

from pipeline import cli
from pipeline.errors import BadData
from pipeline.recipe import load_recipe
from pipeline.settings import Estimate, hashed_subset
from stages.images.loader import RING
from stages.losses.similarity_tiles import CPU
from stages.reports.health import alarm
from stages.settings import STAGES
from stages.settings.augment import Augment
from stages.settings.embed import Embed
from stages.settings.finetune import Finetune
from stages.settings.pretrain import TILE_ROWS, TILES, Pretrain
from stages.settings.training import CANVASES
from stages.views import read_policy

ENCODER: dict[str, Any] = {"backbone": "resnet10", "width": 4}
PRETRAIN: dict[str, Any] = {
    "architecture": ENCODER,
    "projector": {"hidden": 8, "dimension": 4},
    "batch_size": None,
    "epochs": None,
    "max_steps": 3,
    "record_every_steps": 1,
    "device": "cpu",
}


def pretrain(**values: Any) -> Pretrain:
    return Pretrain(shards="shards", views="views", **values)


def write_images(root: Path, count: int, folder: str = "", size: tuple[int, int] = (20, 24)) -> Path:
    random = np.random.default_rng(count)
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("short_side", "size"), [(1, 16), (16, 16), (31, 16), (32, 32), (95, 64), (100, 96), (223, 128), (500, 224)]
)
def test_the_largest_size_that_the_images_reach(short_side: int, size: int) -> None:
    assert Augment(shards="shards", image_size=None).image_size_for(short_side) == size
    assert Augment(shards="shards", image_size=50).image_size_for(short_side) == 50


@pytest.mark.parametrize(
    ("images", "image_size", "batch"),
    [
        (2, 32, 2), (3, 32, 3), (5, 32, 4), (26, 32, 8), (240, 32, 64), (512, 64, 256), (50_000, 32, 256),
        (50_000, 96, 128), (50_000, 224, 64), (26, 224, 8),
    ],
)  # fmt: skip
def test_a_batch_that_fits(images: int, image_size: int, batch: int) -> None:
    assert pretrain(batch_size=None).batch_size_for(images, image_size) == batch
    assert pretrain(batch_size=12).batch_size_for(images, image_size) == 12


def test_a_fitted_batch_is_never_larger_than_the_set() -> None:
    batches = [pretrain(batch_size=None).batch_size_for(images, 32) for images in range(2, 3000)]
    assert all(2 <= batch <= images for images, batch in enumerate(batches, start=2))
    assert batches == sorted(batches)


def test_epochs_that_make_the_steps() -> None:
    assert pretrain(epochs=None).epochs_for(1) == 1000
    assert pretrain(epochs=None).epochs_for(300) == 4
    assert pretrain(epochs=None, max_steps=50).epochs_for(40) == 2
    assert pretrain(epochs=None).epochs_for(10_000) == 1
    assert pretrain(epochs=7, max_steps=50).epochs_for(1) == 7


def test_what_is_left_open_is_hashed_as_such() -> None:
    assert hashed_subset(pretrain(batch_size=None))["batch_size"] is None
    assert hashed_subset(Augment(shards="shards", image_size=None))["image_size"] is None
    assert "image_size" in hashed_subset(Embed(shards="shards", encoder="random"))
    with_views = Embed(shards="shards", encoder="random", views="views")
    assert "image_size" not in hashed_subset(with_views), "the policy's counts, and it is an input"


def test_estimates_know_no_sizes_yet() -> None:
    views = Augment(shards="shards", image_size=None).estimate({"shards": Estimate(100)})
    assert views.sample_bytes == 12 * 224**2
    small = pretrain(batch_size=None).estimate({"views": views, "shards": Estimate(100)})
    large = pretrain(batch_size=None).estimate({"views": views, "shards": Estimate(100_000)})
    assert 0 < small.memory_bytes < large.memory_bytes


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_memory_is_counted_for_every_batch_in_the_loaders_ring(stage: str) -> None:
    settings = (
        pretrain(batch_size=64) if stage == "pretrain" else Finetune(shards="shards", encoder="random", batch_size=64)
    )
    small, large = (settings.estimate({"shards": Estimate(1000, sample_bytes)}) for sample_bytes in (0, 2**20))
    assert large.memory_bytes - small.memory_bytes == RING * 64 * 2**20
    assert CANVASES == RING


def test_memory_of_similarities_stays_within_a_few_tiles() -> None:
    """No matrix of all pairs is counted, since none is made: beyond a tile, memory is linear in the batch."""
    assert CPU[:2] == (TILE_ROWS, TILE_ROWS)
    assert CPU.kept <= TILE_ROWS**2
    views = Estimate(sample_bytes=12 * 8**2)
    sizes = (128, 256, 4096, 8192, 16384)
    memory = [pretrain(batch_size=size).estimate({"views": views}).memory_bytes for size in sizes]
    assert memory[4] - memory[3] == pytest.approx(2 * (memory[3] - memory[2]), abs=4)
    of_views = (memory[3] - memory[2]) * 128 / 4096
    assert memory[1] - memory[0] == pytest.approx(of_views + 4 * TILES * (512**2 - 256**2), abs=4)


def test_stages_fit_to_the_images_and_say_so(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "images", 11, size=(37, 50))
    shards = run_stage("shard", {"source": f"folder:{source}", "test_fraction": 0})
    views = run_stage("augment", {"image_size": None, "contact_sheet_images": 1}, {"shards": shards})
    assert read_policy(views).image_size == 32
    model = run_stage("pretrain", PRETRAIN, {"shards": shards, "views": views})
    lines = (model / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "as many steps as max_steps says"
    told = capsys.readouterr().err
    assert "image_size is fitted: 32 pixels, half of the images being 37 or less on the short side" in told
    assert "batch_size is fitted: 4 of the 11 training images" in told
    assert "3 steps of 4 (2 epochs)" in told

    settings = {"encoder": "random", "architecture": ENCODER, "device": "cpu"}
    files = run_stage("embed", settings, {"shards": shards, "views": views})
    same = run_stage("embed", settings | {"image_size": 32}, {"shards": shards})
    assert json.loads((files / "features.json").read_bytes())["encoder"]["image_size"] == 32
    assert pq.read_table(files / "features.parquet") == pq.read_table(same / "features.parquet")


def test_one_image_is_one_clear_line(run_stage: RunStage, tmp_path: Path) -> None:
    shards = run_stage("shard", {"source": f"folder:{write_images(tmp_path / 'images', 1)}"})
    views = run_stage("augment", {"image_size": None, "contact_sheet_images": 1}, {"shards": shards})
    with pytest.raises(BadData, match="there is one training image, and SimCLR tells images apart: it takes two"):
        run_stage("pretrain", PRETRAIN, {"shards": shards, "views": views})


@pytest.mark.parametrize("folders", [[""], ["leaf"]], ids=["no labels", "one class"])
def test_without_labels_a_probe_passes_where_it_may(run_stage: RunStage, tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        write_images(tmp_path / "images", 10, folder)
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}"})
    features = run_stage("embed", {"encoder": "pixels", "image_size": 4}, {"shards": shards})
    with pytest.raises(BadData, match="without_labels: pass"):
        run_stage("probe", {}, {"features": features})
    probe = run_stage("probe", {"without_labels": "pass"}, {"features": features})
    assert [path.name for path in probe.iterdir()] == ["metrics.json"]
    metrics = json.loads((probe / "metrics.json").read_bytes())
    assert metrics["without_labels"].startswith("no train image" if folders == [""] else "all 8 training images")
    assert metrics["encoder"]["name"] == "pixels"


def test_with_labels_the_setting_changes_nothing(run_stage: RunStage, tmp_path: Path) -> None:
    for folder in ("leaf", "stone"):
        write_images(tmp_path / "images", 10, folder)
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}"})
    features = run_stage("embed", {"encoder": "pixels", "image_size": 4}, {"shards": shards})
    short = {"label_fractions": [], "subsets": [], "bootstrap_samples": 100, "penalties": {"count": 2}}
    strict = run_stage("probe", short, {"features": features})
    lenient = run_stage("probe", short | {"without_labels": "pass"}, {"features": features})
    assert (strict / "metrics.json").read_bytes() == (lenient / "metrics.json").read_bytes()


def test_few_images_are_not_taken_for_a_collapse() -> None:
    assert alarm(1.9, 128, 0) is not None
    assert alarm(1.9, 128, 0, samples=8) is None
    assert alarm(1.9, 128, 128, samples=8) is not None


def test_the_recipe_for_any_folder() -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "configs" / "folder.yaml", STAGES)
    simclr, views = recipe.steps["simclr"].settings, recipe.steps["views"].settings
    assert isinstance(simclr, Pretrain)
    assert isinstance(views, Augment)
    assert (simclr.batch_size, simclr.epochs, views.image_size) == (None, None, None)


def test_any_folder_ends_with_health_and_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_images(tmp_path / "images", 12, size=(9, 17))
    tiny = "{backbone: resnet10, width: 4}"
    overrides = [
        f"shards.source=folder:{source}", "simclr.max_steps=2", "simclr.device=cpu", "views.contact_sheet_images=1",
        f"simclr.architecture={tiny}", f"features_random.architecture={tiny}",
        "features.device=cpu", "features_random.device=cpu",
    ]  # fmt: skip
    arguments = ["run", "folder", "--store", str(tmp_path / "store"), "--json"]
    arguments += [word for one in overrides for word in ("--set", one)]
    assert cli.guarded(lambda: cli.app(arguments, standalone_mode=False)) == 0
    told = capsys.readouterr()
    (report,) = [Path(one["files"]) for one in json.loads(told.out) if one["step"] == "report"]
    numbers = json.loads((report / "report.json").read_bytes())
    assert numbers["probes"] == []
    assert [one["label"] for one in numbers["health"]] == ["random encoder", "pretrained"]
    assert len(numbers["neighbours"]) == 2
    assert "probe warning: no probe: no train image has a label" in told.err
