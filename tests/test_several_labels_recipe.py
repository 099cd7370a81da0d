"""configs/several-labels.yaml in little: from mosaics to the report, and the figures of its rare labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import by_seed, mosaics
from pipeline import runner
from pipeline.recipe import load_recipe
from pipeline.store import Store, open_store
from stages.settings import STAGES
from stages.settings.finetune import Finetune

RECIPE = Path(__file__).resolve().parent.parent / "configs/several-labels.yaml"
LITTLE = [
    "simclr.max_steps=2",
    "simclr.batch_size=64",
    "simclr.architecture.width=4",
    "tuned_*.max_steps=2",
    "probe_*.penalties={smallest: 1e-3, largest: 1e-2, count: 2}",
    "probe_*.neighbours=[5]",
    "probe_*.bootstrap_samples=100",
    "found_*.bootstrap_samples=100",
]
ROWS = ("bce", "focal", "bce_balanced", "triplet_bce_any", "triplet_bce_jaccard")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("several-labels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mosaics", str(folder / "mosaics"), "--train", "240", "--test", "160"])
        assert mosaics.main() == 0
        assert mosaics.main() == 2, "a folder that is there is left as it is"
    recipe = load_recipe(RECIPE, STAGES, [f"shards.source=csv:{folder}/mosaics/labels.csv", *LITTLE])
    found = open_store(folder / "store")
    runner.run(runner.Planner(found, recipe, print), (), lambda _: None)
    return found


def read(store: Store, step: str, name: str = "metrics.json") -> dict[str, Any]:
    (version,) = store.versions("several-labels", step)
    return json.loads((store.files(version.stage, version.digest) / name).read_text())


@pytest.mark.xdist_group("several-labels-recipe")
def test_every_row_is_scored_by_probe_and_retrieval(store: Store) -> None:
    for row in ("simclr", *ROWS):
        probe, found = read(store, f"probe_{row}"), read(store, f"found_{row}")
        assert probe["several_labels"]
        assert 0 < probe["linear"]["map"] < 1
        assert len(probe["linear"]["per_class"]) == 10
        assert found["protocol"]["relation"] == {"kind": "jaccard", "threshold": 0.5}
        assert found["protocol"]["intervals_draw"] == "groups of queries"
        assert 0 < found["recall"]["1"] < 1
        assert probe["protocol"]["encoder_saw_labels"] == found["protocol"]["encoder_saw_labels"] == (row != "simclr")


@pytest.mark.xdist_group("several-labels-recipe")
def test_all_rows_see_as_many_images(store: Store) -> None:
    cards = {row: read(store, f"tuned_{row}", "model.json") for row in ROWS}
    assert {card["labels_seen"][-1]["samples"] for card in cards.values()} == {240}
    recipe = load_recipe(RECIPE, STAGES)
    for row in ROWS:
        settings = recipe.steps[f"tuned_{row}"].settings
        assert isinstance(settings, Finetune)
        assert (settings.images_per_batch, settings.max_steps) == (120, 300)


@pytest.mark.xdist_group("several-labels-recipe")
def test_the_report_shows_labels_and_retrievals(store: Store) -> None:
    numbers = read(store, "report", "report.json")
    assert len(numbers["retrievals"]) == len(numbers["retrieved"]) + 3 == 6
    assert numbers["several_labels"]
    assert all(one["nearest_classes"] is None for one in numbers["retrievals"])
    assert "the intervals hold for other queries" in numbers["verdict"]["caveat"]
    table = numbers["retrieval"]
    assert table["comparable"]
    assert sum(cell["best"] for row in table["rows"] for cell in row["cells"][:1]) >= 1
    for page in numbers["retrieved"]:
        for query in page["queries"]:
            own = set((query["label"] or "").split(", "))
            for found in query["neighbours"]:
                other = set(found["label"].split(", "))
                assert found["right"] == (len(own & other) / len(own | other) >= 0.5)
    (version,) = store.versions("several-labels", "report")
    html = (store.files(version.stage, version.digest) / "report.html").read_text()
    assert "what belongs to a query by the relation in the protocol of retrieval counts as of its class" in html
    assert "Classes of the nearest image" not in html


@pytest.mark.xdist_group("several-labels-recipe")
def test_the_rare_labels_are_those_of_the_fewest_training_images(store: Store) -> None:
    found = by_seed.by_seed(store, "several-labels", "probe_bce")
    assert found is not None
    (figures,) = found[2].values()
    probe = read(store, "probe_bce")
    table = sorted(probe["linear"]["per_class"], key=lambda one: one["train"])
    rare = [one for one in table if one["train"] and one["test"]][:3]
    assert figures["mAP, rare"] == pytest.approx(np.mean([one["average_precision"] for one in rare]))
    assert figures["F1, rare"] == pytest.approx(np.mean([one["f1"] for one in rare]))
    assert figures["macro F1"] == probe["linear"]["macro_f1"]
