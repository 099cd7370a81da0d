"""Fine-tuning on images with several labels: mosaics of digits through the stage."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_finetune_options
import torch
from conftest import RunStage, stage_runner
from processes import run_in_processes
from pydantic import ValidationError
from resumed import assert_resumed_equals_whole
from test_finetune_options import Seen, lines
from test_finetune_processes import finetune
from torch import Tensor, distributed

from benchmarks.mosaics import Mosaics, make_mosaics, write_mosaics
from pipeline.errors import BadData
from pipeline.launcher import Place
from pipeline.ranks import Ranks
from pipeline.settings import hashed_subset
from stages.images import open_shards
from stages.images.batch_plan import Unplannable
from stages.labels import LabelRelation
from stages.labels.sets import multi_hot, rarest_labels
from stages.models import load_card, load_encoder, load_head
from stages.settings.finetune import Finetune
from stages.settings.losses import OF_SEVERAL_LABELS
from stages.settings.relation import Relation

NAMES = [f"digit {number}" for number in range(10)]
TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 16,
    "encoder": "random",
    "max_steps": 3,
    "batch_size": 24,
    "classes_per_batch": 5,
    "images_per_class": 4,
    "record_every_steps": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shard_mosaics(tmp_path_factory.mktemp("made"))


def shard_mosaics(folder: Path) -> Path:
    parts: dict[str, Mosaics] = {"train": make_mosaics(150, part="train"), "test": make_mosaics(40, part="test")}
    table = write_mosaics(folder / "mosaics", parts, NAMES)
    return stage_runner(folder)("shard", {"source": f"csv:{table}", "near_duplicates": False})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def by_id(shards: Path) -> dict[int, list[bool]]:
    train = open_shards(shards, "train")
    return dict(zip(train.sample_ids.tolist(), multi_hot(train.label_lists, 10).tolist(), strict=True))


@pytest.mark.parametrize("name", OF_SEVERAL_LABELS)
def test_every_loss_of_several_labels_goes_through_the_stage(
    run_stage: RunStage, shards: Path, name: str, seen: Seen
) -> None:
    files = run_stage("finetune", TINY | {"loss": {"name": name}}, {"shards": shards})
    rows, known = lines(files), by_id(shards)
    assert len(rows) == 3
    assert all(np.isfinite(value) for row in rows for value in row.values())
    views = 2 if name == "supcon" else 1
    for ids, labels in zip(seen.ids, seen.labels, strict=True):
        assert labels.dtype == torch.bool
        assert labels.tolist() == [known[one] for one in ids.tolist()] * views
    encoder, card = load_encoder(files)
    assert [(one.loss, one.samples) for one in card.labels_seen] == [(name, 150)]
    if name in ("bce", "focal"):
        assert card.head is not None
        assert card.head.names == tuple(NAMES)
        with torch.no_grad():
            assert load_head(files, card)(encoder(torch.rand(6, 3, 16, 16))).shape == (6, 10)


def test_a_head_learns_which_digits_an_image_holds(run_stage: RunStage, shards: Path) -> None:
    whole = {"preset": "text", "image_size": 16, "crop_area": [0.9, 1.0], "colour_jitter": 0.0, "grey": 0.0}
    views = run_stage("augment", whole | {"contact_sheet_images": 1}, {"shards": shards})
    settings = TINY | {"loss": {"name": "bce"}, "architecture": {"backbone": "resnet10", "width": 8}}
    settings |= {"max_steps": 120, "epochs": 30, "optimiser": {"learning_rate": 0.1, "scaling": "none"}}
    rows = lines(run_stage("finetune", settings, {"shards": shards, "views": views}))
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:5], rows[-5:]))
    assert last < 0.85 * first
    assert np.mean([row["accuracy"] for row in rows[-5:]]) > 0.8


@pytest.mark.parametrize("kind", ["any", "all", "jaccard"])
def test_sampler_and_loss_take_the_relation_that_is_named(
    run_stage: RunStage, shards: Path, kind: str, seen: Seen
) -> None:
    relation = {"kind": kind} | ({"threshold": 0.7} if kind == "jaccard" else {})
    loss = [{"name": "triplet"}, {"name": "bce", "weight": 0.1}]
    files = run_stage("finetune", TINY | {"loss": loss, "label_relation": relation}, {"shards": shards})
    assert len(lines(files)) == 3
    wanted = LabelRelation(kind, 0.7)  # type: ignore[arg-type]
    for labels in seen.labels:
        blocks = labels.reshape(5, 4, 10)
        assert blocks.all(dim=1).any(dim=1).all(), "each block has a label in common"
        if kind == "all":
            assert wanted.between(labels, labels).reshape(5, 4, 5, 4).diagonal(dim1=0, dim2=2).all()


def test_an_image_that_comes_under_two_labels_comes_in_two_views(run_stage: RunStage, shards: Path, seen: Seen) -> None:
    settings = TINY | {
        "loss": {"name": "triplet"},
        "classes_per_batch": 10,
        "images_per_class": 6,
        "label_fraction": 0.3,
    }
    run_stage("finetune", settings, {"shards": shards})
    repeated = 0
    for ids, views in zip(seen.ids, seen.views, strict=True):
        places: dict[int, list[Tensor]] = {}
        for one, view in zip(ids.tolist(), views[0], strict=True):
            assert not any(torch.equal(view, other) for other in places.get(one, []))
            places.setdefault(one, []).append(view)
        repeated += sum(len(same) - 1 for same in places.values())
    assert repeated > 20


def test_a_share_of_the_labels_has_some_of_each(run_stage: RunStage, shards: Path, seen: Seen) -> None:
    settings = TINY | {"loss": {"name": "bce"}, "label_fraction": 0.2, "max_steps": 12, "epochs": 9, "batch_size": 10}
    files = run_stage("finetune", settings, {"shards": shards})
    sets = np.array([*by_id(shards).values()])
    chosen = {one for ids in seen.ids for one in ids.tolist()}
    rarest = rarest_labels(sets)
    of_chosen = rarest[[place for place, one in enumerate(by_id(shards)) if one in chosen]]
    assert len(chosen) == load_card(files).labels_seen[0].samples == 30
    assert set(of_chosen.tolist()) == set(rarest.tolist())
    seen.ids.clear()
    run_stage("finetune", settings | {"label_fraction": 0.4}, {"shards": shards})
    assert chosen < {one for ids in seen.ids for one in ids.tolist()}, "subsets are nested"


# Refused


@pytest.mark.parametrize("loss", [{"name": "cross_entropy"}, [{"name": "bce"}, {"name": "arcface"}]])
def test_several_labels_for_a_loss_of_one_are_one_line(run_stage: RunStage, shards: Path, loss: Any) -> None:
    name = loss["name"] if isinstance(loss, dict) else "arcface"
    with pytest.raises(BadData) as caught:
        run_stage("finetune", TINY | {"loss": loss}, {"shards": shards})
    assert str(caught.value) == (
        f"finetune: images with several labels; {name} learns from one label an image; bce, focal, contrastive, "
        "margin, triplet, supcon, multi_similarity and circle take several; `target` names an attribute to learn in "
        "their place"
    )


def test_samplers_of_one_label_are_refused(run_stage: RunStage, shards: Path) -> None:
    with pytest.raises(Unplannable, match="curriculum: is for images with one label each"):
        run_stage("finetune", TINY | {"loss": {"name": "bce"}, "curriculum": {"min_per_class": 2}}, {"shards": shards})


def test_a_threshold_is_of_jaccard() -> None:
    with pytest.raises(ValueError, match="threshold: any has none; it is of jaccard"):
        Relation.model_validate({"kind": "any", "threshold": 0.5})
    for threshold in (0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            Relation.model_validate({"kind": "jaccard", "threshold": threshold})


def test_a_relation_that_is_not_named_is_not_in_the_key() -> None:
    plain = Finetune.model_validate({"shards": "shards", "encoder": "random"})
    assert "label_relation" not in hashed_subset(plain)
    named = plain.model_copy(update={"label_relation": Relation(kind="all")})
    assert hashed_subset(named)["label_relation"] == {"kind": "all", "threshold": 0.5}


def test_with_one_label_each_a_relation_changes_nothing(run_stage: RunStage) -> None:
    digits = run_stage("shard", {"source": "sklearn:digits"})
    settings = TINY | {"loss": {"name": "triplet"}, "image_size": 8, "max_steps": 2, "label_fraction": 0.1}
    plain, named = (
        run_stage("finetune", settings | more, {"shards": digits})
        for more in ({}, {"label_relation": {"kind": "jaccard", "threshold": 0.9}})
    )
    for path in plain.iterdir():
        assert path.read_bytes() == (named / path.name).read_bytes()


def test_resumed_it_ends_with_the_bytes_of_an_uninterrupted_run(shards: Path, tmp_path: Path) -> None:
    """A memory of several labels is part of the checkpoint."""
    loss = [{"name": "contrastive", "memory": 40, "memory_start": 0.0}, {"name": "focal"}]
    changes = {"loss": loss, "label_fraction": 1.0, "label_relation": {"kind": "jaccard"}}
    settings, wanted = test_finetune_options.TINY | changes, {"encoder.safetensors", "model.json", "metrics.jsonl"}
    assert_resumed_equals_whole(tmp_path, settings | {"max_steps": 6}, shards, (2, 2), wanted)


# Several processes

VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"loss": [{"name": "triplet"}, {"name": "focal"}], "classes_per_batch": 4, "images_per_class": 6},
    "supcon": {"loss": {"name": "supcon"}, "label_relation": {"kind": "jaccard"}, "batch_size": 40},
    "memory": {"loss": {"name": "margin", "memory": 50, "memory_start": 0.0}, "images_per_class": 4},
}


def variant_of(changes: dict[str, Any]) -> dict[str, Any]:
    return {"image_size": 16, "label_fraction": 1.0} | changes


def all_of(rank: int, folder: Path, shards: Path) -> dict[str, Tensor]:
    size = distributed.get_world_size()
    peers = Ranks(Place(rank, size, rank, size), distributed.FileStore(str(folder / "store"), size))
    return {
        f"{variant}/{name}": value
        for variant, changes in VARIANTS.items()
        for name, value in finetune(folder / variant, peers, shards, variant_of(changes)).items()
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    return run_in_processes(all_of, folder, folder, shards)


@pytest.mark.xdist_group("finetune-several-labels")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_two_processes_equal_one(of_two: list[dict[str, Tensor]], shards: Path, tmp_path: Path, variant: str) -> None:
    wanted = finetune(tmp_path, Ranks(), shards, variant_of(VARIANTS[variant]))
    for found in of_two:
        for name, value in wanted.items():
            if name.startswith(("ids", "views")):
                continue
            difference = (found[f"{variant}/{name}"].double() - value.double()).norm()
            assert difference <= 1e-5 * max(1.0, value.double().norm().item()), name


def test_a_relation_is_refused_where_nothing_reads_it() -> None:
    for loss in ({"name": "arcface"}, {"name": "bce"}, {"name": "pairs_difference"}):
        with pytest.raises(ValidationError, match="does not compare images by their labels"):
            Finetune.model_validate(
                {"shards": "s", "encoder": "random", "loss": loss, "label_relation": {"kind": "any"}}
            )
    by_set = {"loss": {"name": "bce"}, "sampler": "p_by_k", "label_relation": {"kind": "all"}}
    assert Finetune.model_validate({"shards": "s", "encoder": "random"} | by_set).label_relation is not None


def test_a_relation_that_changes_nothing_is_told(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> None:
    digits = run_stage("shard", {"source": "sklearn:digits", "near_duplicates": False})
    run_stage("finetune", TINY | {"loss": {"name": "triplet"}, "label_relation": {"kind": "all"}}, {"shards": digits})
    assert "label_relation changes nothing: every image has one label" in capsys.readouterr().err


def test_images_without_a_partner_are_told(
    run_stage: RunStage, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for threshold, is_told in ((0.9, True), (0.1, False)):
        relation = {"kind": "jaccard", "threshold": threshold}
        run_stage("finetune", TINY | {"loss": {"name": "triplet"}, "label_relation": relation}, {"shards": shards})
        assert ("belong to no other of it" in capsys.readouterr().err) == is_told


def test_jaccard_of_one_draws_as_equal_sets(run_stage: RunStage, shards: Path, seen: Seen) -> None:
    for relation in ({"kind": "all"}, {"kind": "jaccard", "threshold": 1}):
        run_stage("finetune", TINY | {"loss": {"name": "triplet"}, "label_relation": relation}, {"shards": shards})
    first, second = seen.labels[: len(seen.labels) // 2], seen.labels[len(seen.labels) // 2 :]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
