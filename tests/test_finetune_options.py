"""Fine-tuning on digits: every loss through the stage, several at once, samplers, negatives, curricula, and what is
refused."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import RunStage, stage_runner
from PIL import Image
from resumed import assert_resumed_equals_whole
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import UsageError
from stages import finetune as finetune_stage
from stages.images import open_shards
from stages.images.batch_plan import Unplannable
from stages.images.index import NoSuchAttribute
from stages.images.loader import BatchLoader
from stages.losses.figures import spread
from stages.losses.watch import LEAST_SPREAD, LOOKS, Watch
from stages.models import load_card, load_encoder, load_head
from stages.models.heads import PairHead
from stages.settings.finetune import Finetune
from stages.settings.losses import LOSSES, LossSettings

TINY: dict[str, Any] = {
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 8,
    "encoder": "random",
    "max_steps": 3,
    "batch_size": 32,
    "classes_per_batch": 5,
    "images_per_class": 4,
    "record_every_steps": 1,
    "label_fraction": 0.2,
    "device": "cpu",
}
KINDS = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in LOSSES}
DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage_runner(tmp_path_factory.mktemp("made"))("shard", {"source": "sklearn:digits"})


def lines(files: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]


class Seen:
    """What the loop saw: labels and embeddings that the loss was given, ids and views."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.labels: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.views: list[Tensor] = []
        measure, mirror, load = finetune_stage.Objective.forward, finetune_stage._mirrored, BatchLoader.load

        def measured(objective: Any, embeddings: Tensor, labels: Tensor, progress: float) -> Any:
            self.labels.append(labels)
            return measure(objective, embeddings, labels, progress)

        def mirrored(images: Tensor, turned: np.ndarray) -> Tensor:
            self.views.append(mirror(images, turned))
            return self.views[-1]

        def loaded(loader: BatchLoader, step: int) -> Any:
            batch = load(loader, step)
            self.ids.append(batch.sample_ids)
            return batch

        patch.setattr(finetune_stage.Objective, "forward", measured)
        patch.setattr(finetune_stage, "_mirrored", mirrored)
        patch.setattr(BatchLoader, "load", loaded)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


# Every loss


@pytest.mark.parametrize("name", list(KINDS))
def test_every_loss_goes_through_the_stage(
    run_stage: RunStage, shards: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = run_stage("finetune", TINY | {"loss": {"name": name}}, {"shards": shards})
    rows = lines(files)
    assert len(rows) == 3
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(row["loss"] > 0 and 0 < row["spread"] <= 1 for row in rows)
    encoder, card = load_encoder(files)
    assert all(value.isfinite().all() for value in load_file(files / "encoder.safetensors").values())
    assert [one.loss for one in card.labels_seen] == [name]
    assert "collapsed" not in capsys.readouterr().err, "an untrained encoder is no alarm"
    kind: type[LossSettings] = KINDS[name]
    assert (card.head is not None) == (files / "head.safetensors").exists() == kind.has_head
    if card.head is None:
        return
    head = load_head(files, card)
    with torch.no_grad():
        embeddings = encoder(torch.rand(6, 3, 8, 8))
    if isinstance(head, PairHead):
        assert (card.head.classes, card.head.names) == (0, None)
        with torch.no_grad():
            one, other = head(embeddings, embeddings.flip(0)).sigmoid(), head(embeddings.flip(0), embeddings).sigmoid()
            both = head.probability(embeddings, embeddings.flip(0))
        torch.testing.assert_close(both, (one + other) / 2)
        torch.testing.assert_close(both, both.flip(0))
        assert torch.equal(one, other) == (name == "pairs_difference")
    else:
        assert (card.head.classes, card.head.names) == (10, DIGITS)
        assert head(embeddings).shape == (6, 10)
    assert card.head.learned_from == card.labels_seen[0]


MORE = [
    {"loss": {"name": "arcface", "centres": 3}},
    {"loss": {"name": "triplet", "mining": "all"}},
    {"loss": {"name": "triplet", "mining": "multi_similarity"}, "sampler": "hierarchical", "hierarchy": "parity"},
    {"loss": {"name": "focal", "alpha": 0.25, "class_weights": "effective_number"}, "sampler": "balanced"},
    {"loss": {"name": "multi_similarity", "memory": 50}, "precision": "bf16"},
    {"loss": {"name": "supcon"}, "sampler": "p_by_k", "projection": {"layers": 2, "hidden": 16, "dimension": 8}},
    {"loss": {"name": "margin"}, "layer_decay": 0.6, "pooling": "gem", "optimiser": {"name": "adamw"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def with_parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits 0 to 5 from a table that says whether they are odd."""
    folder = tmp_path_factory.mktemp("parity")
    random = np.random.default_rng(0)
    rows = ["path,label,parity"]
    for number in range(60):
        label = number % 6
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{label},{'odd' if label % 2 else 'even'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    columns = {"image": "path", "label": "label", "attributes": ["parity"]}
    settings = {"source": f"csv:{folder / 'table.csv'}", "columns": columns, "test_fraction": 0.0, "val_fraction": 0.0}
    return stage_runner(folder)("shard", settings)


@pytest.mark.parametrize("settings", MORE, ids=lambda one: one["loss"]["name"])
def test_their_options_run_and_stay_finite(
    run_stage: RunStage, shards: Path, with_parity: Path, settings: dict[str, Any]
) -> None:
    is_hierarchical = "hierarchy" in settings
    changes = {"label_fraction": 1.0, "classes_per_batch": 4} if is_hierarchical else {}
    files = run_stage("finetune", TINY | changes | settings, {"shards": with_parity if is_hierarchical else shards})
    assert all(np.isfinite(value) for row in lines(files) for value in row.values())
    load_encoder(files)


def test_an_attribute_is_learned_in_place_of_labels(run_stage: RunStage, with_parity: Path) -> None:
    settings = TINY | {"loss": {"name": "arcface"}, "target": "parity"}
    files = run_stage("finetune", settings, {"shards": with_parity})
    card = load_card(files)
    assert card.head is not None
    values = open_shards(with_parity, "train").attribute("parity")
    assert card.head.names == tuple(sorted({str(value) for value in values}))
    assert card.head.classes == 2
    by_label = load_card(run_stage("finetune", TINY | {"loss": {"name": "arcface"}}, {"shards": with_parity}))
    assert card.labels_seen[0].digest != by_label.labels_seen[0].digest
    with pytest.raises(NoSuchAttribute, match=r"no attribute 'colour'; it has parity"):
        run_stage("finetune", settings | {"target": "colour"}, {"shards": with_parity})


def test_a_hierarchical_batch_has_classes_of_both_parents(run_stage: RunStage, with_parity: Path, seen: Seen) -> None:
    settings = {"loss": {"name": "triplet"}, "sampler": "hierarchical", "hierarchy": "parity", "classes_per_batch": 4}
    run_stage("finetune", TINY | settings | {"label_fraction": 1.0}, {"shards": with_parity})
    for labels in seen.labels:
        classes = labels[::4]
        assert torch.equal(classes.repeat_interleave(4), labels)
        assert len(classes.unique()) == 4
        assert (classes % 2).sum() == 2


# Several losses at once


def test_a_weighted_sum_of_losses(run_stage: RunStage, shards: Path) -> None:
    losses = [{"name": "triplet"}, {"name": "bce", "weight": 0.5}]
    files = run_stage("finetune", TINY | {"loss": losses}, {"shards": shards})
    for row in lines(files):
        assert row["loss"] == pytest.approx(row["triplet_loss"] + 0.5 * row["bce_loss"], rel=1e-5)
        assert {"active_triplets", "idle", "positive_distance", "negative_distance", "accuracy"} <= row.keys()
    card = load_card(files)
    assert [one.loss for one in card.labels_seen] == ["triplet+bce"]
    assert card.head is not None
    assert (card.head.kind, card.head.classes) == ("linear", 10)


def test_figures_of_one_name_are_told_apart(run_stage: RunStage, shards: Path) -> None:
    losses = [
        {"name": "cross_entropy"},
        {"name": "arcface"},
        {"name": "triplet"},
        {"name": "contrastive", "weight": 2.0},
    ]
    files = run_stage("finetune", TINY | {"loss": losses}, {"shards": shards})
    (row, *_) = lines(files)
    assert {"accuracy", "arcface_accuracy", "active_triplets", "active_negatives", "positive_distance"} <= row.keys()
    assert not {"contrastive_positive_distance", "contrastive_idle", "triplet_accuracy"} & row.keys()
    card = load_card(files)
    assert card.head is not None
    assert card.head.kind == "linear", "that of the first loss that has one"


# Who is whose negative


def test_mirrored_images_are_mirrored_and_of_another_class(
    run_stage: RunStage, shards: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TINY | {"flip_is_new_class": True, "label_fraction": 0.05, "batch_size": 144, "max_steps": 1}
    files = run_stage("finetune", settings, {"shards": shards})
    assert "cross_entropy on 72 labelled images of 20 classes as 144 samples" in capsys.readouterr().err
    card = load_card(files)
    assert card.head is not None
    assert card.head.names == (*DIGITS, *(f"{name}, mirrored" for name in DIGITS))
    assert card.labels_seen[0].samples == 72, "that many were labelled"
    # All 72 images, each as it is and mirrored: of one draw, one view is the flip of the other.
    (labels,), (views,), ids = seen.labels, seen.views, seen.ids[0].tolist()
    places = {(one, int(label) // 10): place for place, (one, label) in enumerate(zip(ids, labels, strict=True))}
    assert len(places) == 144
    for one in set(ids):
        plain, mirrored = places[one, 0], places[one, 1]
        assert labels[mirrored] == labels[plain] + 10
        assert torch.equal(views[0, mirrored], views[0, plain].flip(-1))
        assert not torch.equal(views[0, mirrored], views[0, plain])


def test_a_plain_image_is_never_mirrored_where_that_is_another_class(
    run_stage: RunStage, shards: Path, seen: Seen
) -> None:
    """The policy's own flip is off: over many visits a plain image looks as it is."""
    views = run_stage(
        "augment",
        {"preset": "natural", "image_size": 8, "contact_sheet_images": 1, "crop_area": [1.0, 1.0],
         "crop_ratio": [1.0, 1.0], "colour_jitter": 0.0, "grey": 0.0, "horizontal_flip": 1.0},
        {"shards": shards},
    )  # fmt: skip
    settings = TINY | {"label_fraction": 0.01, "batch_size": 14, "max_steps": 4}
    run_stage("finetune", settings | {"flip_is_new_class": True}, {"shards": shards, "views": views})
    with_flips = seen.views.copy(), seen.ids.copy(), seen.labels.copy()
    seen.views.clear(), seen.ids.clear(), seen.labels.clear()
    run_stage("finetune", settings, {"shards": shards, "views": views})
    looks = {
        one: view
        for ids, images in zip(seen.ids, seen.views, strict=False)
        for one, view in zip(ids.tolist(), images[0], strict=True)
    }
    compared = 0
    for images, ids, labels in zip(*with_flips, strict=False):
        for view, one, label in zip(images[0], ids.tolist(), labels, strict=True):
            wanted = looks[one] if label >= 10 else looks[one].flip(-1)
            torch.testing.assert_close(view, wanted, rtol=0, atol=1e-5)
            compared += 1
    assert compared == 56


def test_negative_only_classes_have_no_class_of_their_own(run_stage: RunStage, shards: Path, seen: Seen) -> None:
    settings = TINY | {"negative_only": ["3", "8"], "loss": {"name": "bce"}, "batch_size": 200, "max_steps": 1}
    files = run_stage("finetune", settings, {"shards": shards})
    card = load_card(files)
    assert card.head is not None
    kept = ["0", "1", "2", "4", "5", "6", "7", "9"]
    assert card.head.names == tuple(kept)
    train = open_shards(shards, "train")
    names = dict(zip(train.sample_ids.tolist(), (train.classes[label] for label in train.labels), strict=True))
    for one, label in zip(seen.ids[0].tolist(), seen.labels[0].tolist(), strict=True):
        assert label == (kept.index(names[one]) if names[one] in kept else -1)
    assert (seen.labels[0] == -1).sum() > 20


def test_negatives_beside_groups(run_stage: RunStage, shards: Path, seen: Seen) -> None:
    settings = {"negative_only": ["3", "8"], "loss": [{"name": "triplet"}, {"name": "bce"}], "negatives_per_batch": 6}
    run_stage("finetune", TINY | settings, {"shards": shards})
    for labels in seen.labels:
        assert labels.shape == (26,)
        assert (labels[:20] >= 0).all()
        assert (labels[20:] == -1).all()


def test_large_classes_come_first(
    run_stage: RunStage, tmp_path: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = run_stage("shard", {"source": make_images(tmp_path / "images", {"a": 12, "b": 12, "c": 2, "d": 1})})
    settings = {
        "label_fraction": 1.0, "loss": {"name": "triplet"}, "classes_per_batch": 2, "images_per_class": 2,
        "max_steps": 20, "curriculum": {"min_per_class": 12, "share": 0.4}, "classes_of_one": "drop",
    }  # fmt: skip
    run_stage("finetune", TINY | settings, {"shards": shards})
    said = capsys.readouterr().err
    assert "the first 8 steps are of the 2 classes with 12 images or more" in said
    assert "1 of 4 classes have a single image ('d'): they are left out" in said
    assert "27 labelled images of 3 classes as 26 samples" in said
    first, then = torch.cat(seen.labels[:8]), torch.cat(seen.labels[8:])
    assert first.unique().tolist() == [0, 1]
    assert then.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("kept", "names"), [("repeat", "abcd"), ("drop", "abc"), ("negative", "abc")])
def test_classes_of_a_single_image(run_stage: RunStage, tmp_path: Path, kept: str, names: str, seen: Seen) -> None:
    shards = run_stage("shard", {"source": make_images(tmp_path / "images", {"a": 5, "b": 5, "c": 5, "d": 1})})
    settings = {
        "label_fraction": 1.0, "loss": [{"name": "triplet"}, {"name": "bce"}], "classes_of_one": kept, "max_steps": 6,
        "negatives_per_batch": 1 if kept == "negative" else 0, "classes_per_batch": 3,
    }  # fmt: skip
    card = load_card(run_stage("finetune", TINY | settings, {"shards": shards}))
    assert card.head is not None
    assert card.head.names == tuple(names), "the head has no place for what it never saw"
    labels = set(torch.cat(seen.labels).tolist())
    assert labels == set(range(len(names))) | ({-1} if kept == "negative" else set())


def make_images(folder: Path, counts: dict[str, int]) -> str:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        for number in range(count):
            path = folder / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return f"folder:{folder}"


# What is thrown away


@pytest.mark.parametrize("name", ["supcon", "cross_entropy"])
def test_a_projection_is_thrown_away(
    run_stage: RunStage, shards: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TINY | {"loss": {"name": name}, "projection": {"layers": 2, "hidden": 16, "dimension": 8}}
    files = run_stage("finetune", settings, {"shards": shards})
    encoder, card = load_encoder(files)
    assert {path.name for path in files.iterdir()} == {"encoder.safetensors", "model.json", "metrics.jsonl"}
    assert (card.head, card.projector, card.neck, card.embedding_size) == (None, None, None, 32)
    assert encoder(torch.rand(2, 3, 8, 8)).shape == (2, 32)
    plain = run_stage("finetune", settings | {"projection": None}, {"shards": shards})
    one, other = (load_file(folder / "encoder.safetensors")["conv1.weight"] for folder in (files, plain))
    assert not torch.equal(one, other), "it was trained through"
    assert ("thrown away with it" in capsys.readouterr().err) == (name == "cross_entropy"), "it has a head"


# Alarms


def look(watch: Watch, embeddings: Tensor, loss: float, idle: float | None = None) -> list[str]:
    figures = {} if idle is None else {"idle": torch.tensor(idle)}
    found = watch.look(embeddings, torch.tensor(loss), figures)
    assert found.item() == pytest.approx(spread(embeddings).item())
    return watch.alarms()


def test_a_collapse_is_told_once() -> None:
    torch.manual_seed(0)
    apart, point = torch.randn(30, 8), torch.randn(1, 8) + 1e-3 * torch.randn(30, 8)
    assert spread(apart) > 0.9
    assert spread(point) < LEAST_SPREAD
    watch = Watch("triplet", 0.3)
    assert not any(look(watch, apart, 0.3) for _ in range(5)), "the loss alone says nothing"
    for embeddings in (point, point, apart, point, point):
        assert look(watch, embeddings, 0.301) == []
    (said,) = look(watch, point, 0.301)
    assert said.startswith(
        "the embeddings have collapsed to a point, and the loss stays near 0.3, its value there: a lower"
    )
    assert not any(look(watch, embeddings, 0.3) for embeddings in (point, apart, point, point, point, point))
    for other in (Watch("triplet", 0.3), Watch("arcface", None)):  # a loss that is elsewhere, or has no such value
        found = [look(other, point, 0.34) for _ in range(LOOKS)]
        assert found[:-1] == [[]] * (LOOKS - 1)
        assert found[-1][0].startswith("the embeddings have collapsed to a point: a lower")


def test_spread_is_by_loops_over_all_pairs() -> None:
    """1 - |mean|^2 is half of the mean squared distance over all ordered pairs, each row with itself too."""
    torch.manual_seed(1)
    rows = torch.randn(9, 4, dtype=torch.float64)
    unit = [row / row.norm() for row in rows]
    squares = [float((a - b).square().sum()) for a in unit for b in unit]
    assert spread(rows).item() == pytest.approx(sum(squares) / len(squares) / 2, abs=1e-6)


def test_nothing_to_learn_from_is_told_once() -> None:
    torch.manual_seed(0)
    apart = torch.randn(30, 8)
    watch = Watch("triplet", 0.3)
    for idle in (1.0, 1.0, 0.0, 1.0, 0.2):  # of a line's last batch: any share of it
        assert look(watch, apart, 0.0, idle) == []
    (said,) = look(watch, apart, 0.0, 1.0)
    assert said.startswith("triplet finds no pair or triplet to learn from in batch after batch")
    assert not any(look(watch, apart, 0.0, 1.0) for _ in range(5))
    both = Watch("triplet", 0.3)
    found = [look(both, torch.ones(4, 3), 0.3, 1.0) for _ in range(LOOKS)]
    assert [len(one) for one in found] == [0] * (LOOKS - 1) + [2]


def test_a_run_that_collapses_says_so(run_stage: RunStage, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hard triplets at a huge rate, as the docstring of the alarm has it."""
    settings = {
        "loss": {"name": "triplet"}, "max_steps": 100, "epochs": 100, "record_every_steps": 4,
        "optimiser": {"name": "adamw", "learning_rate": 0.2, "scaling": "none", "warmup_epochs": 0.0},
    }  # fmt: skip
    files = run_stage("finetune", TINY | settings, {"shards": shards})
    first, *_, last = lines(files)
    assert first["spread"] > 100 * LEAST_SPREAD > LEAST_SPREAD > last["spread"]
    said = capsys.readouterr().err
    assert said.count("the embeddings have collapsed to a point, and the loss stays near 0.3, its value there") == 1


def test_a_run_that_finds_nothing_says_so(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Black and white: of one class all are alike, and nothing of the other is."""
    for name, shade in (("black", 0), ("white", 255)):
        path = tmp_path / "images/train" / name
        path.mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.full((8, 8, 3), abs(shade - number), dtype=np.uint8)).save(path / f"{number}.png")
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}"})
    settings = {"loss": {"name": "multi_similarity"}, "label_fraction": 1.0, "max_steps": 8, "epochs": 8}
    files = run_stage("finetune", TINY | settings, {"shards": shards})
    assert {row["idle"] for row in lines(files)} == {1.0}
    assert capsys.readouterr().err.count("multi_similarity finds no pair or triplet to learn from") == 1


# Resume


RESUMED = [
    {"loss": {"name": "triplet", "memory": 64, "memory_start": 0.2, "mining": "distance_weighted"}},
    {"loss": [{"name": "margin", "memory": 30, "memory_start": 0.0}, {"name": "bce"}], "neck": "bn"},
    {"loss": {"name": "pairs_concatenated"}, "batch_size": 16},
    {"loss": {"name": "supcon"}, "projection": {"layers": 2, "hidden": 16, "dimension": 8}, "sampler": "balanced"},
]


@pytest.mark.parametrize("changes", RESUMED, ids=["memory", "combined", "pairs", "supcon"])
def test_resumed_it_ends_with_the_bytes_of_an_uninterrupted_run(
    shards: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted = {"encoder.safetensors", "model.json", "metrics.jsonl"}
    assert_resumed_equals_whole(tmp_path, TINY | {"max_steps": 6} | changes, shards, (2, 2), wanted)  # after 2 and 4


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": {"name": "triplet"}, "sampler": "shuffled"},
            "sampler: triplet cannot be trained on batches of shuffled; it takes p_by_k or hierarchical",
        ),
        (
            {"loss": {"name": "pairs_cosine"}, "sampler": "p_by_k"},
            "sampler: pairs_cosine cannot be trained on batches of p_by_k; it takes pairs",
        ),
        (
            {"loss": [{"name": "pairs_cosine"}, {"name": "bce"}]},
            "sampler: bce cannot be trained on batches of pairs; it takes shuffled or balanced or p_by_k or "
            "hierarchical",
        ),
        (
            {"loss": [{"name": "supcon"}, {"name": "triplet"}]},
            "loss: supcon takes two views of each image and the others one: train them one after another",
        ),
        (
            {"loss": {"name": "pairs_cosine"}, "batch_size": 9},
            "batch_size: pairs are of two images: take an even number",
        ),
        ({"loss": [{"name": "bce"}, {"name": "triplet"}, {"name": "bce"}]}, "loss: bce stands twice"),
        ({"loss": []}, "loss: the list is empty"),
        ({"loss": {"name": "triplet"}, "sampler": "hierarchical"}, "hierarchy and sampler: hierarchical go together"),
        ({"hierarchy": "kind"}, "hierarchy and sampler: hierarchical go together"),
        ({"negatives_per_batch": 3}, "negatives_per_batch: shuffled takes them as they come; leave it out"),
        (
            {"loss": {"name": "pairs_cosine"}, "curriculum": {"min_per_class": 3}},
            "curriculum: is for classes, not for pairs",
        ),
        (
            {"loss": {"name": "arcface"}, "negative_only": ["seven"]},
            "negative_only: arcface has no use for images without a class",
        ),
        (
            {"loss": {"name": "n_pairs"}, "classes_of_one": "negative"},
            "classes_of_one: negative: n_pairs has no use for images without a class",
        ),
        (
            {"freeze": "encoder", "projection": {}},
            "freeze: encoder leaves nothing that is kept: the projection is thrown away",
        ),
        (
            {"loss": [{"name": "triplet"}, {"name": "bce"}], "neck": "bn", "projection": {}},
            "neck: bn stands between embedding and classifier, where the projection is: take one",
        ),
        (
            {"loss": {"name": "triplet"}, "neck": "bn"},
            "neck: nothing works behind it: triplet compares; add a loss that classifies",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        Finetune.model_validate_json(json.dumps({"shards": "shards", "encoder": "random"} | changes))
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert error["msg"] == f"Value error, {message}"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"negative_only": ["ten"], "loss": {"name": "bce"}},
            Unplannable, "negative_only: no labelled training image is 'ten'",
        ),
        (
            {"loss": {"name": "triplet"}, "negatives_per_batch": 1},
            Unplannable, "negatives_per_batch: 1 is more than the 0 negative-only images",
        ),
        (
            {"curriculum": {"min_per_class": 999}},
            Unplannable, "curriculum.min_per_class: 0 classes have 999 images or more; two are needed",
        ),
        (
            {"pooling": "gem", "architecture": {"backbone": "timm:test_resnet"}, "image_size": 32},
            ValueError, "pooling: only resnet10",
        ),
    ],
)  # fmt: skip
def test_what_the_images_cannot_give_is_one_line(
    run_stage: RunStage, shards: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace(".", r"\.")) as caught:
        run_stage("finetune", TINY | changes, {"shards": shards})
    assert "\n" not in str(caught.value)
    assert getattr(caught.value, "exit_code", None) == 2


def test_views_that_mirror_in_another_way_are_refused(run_stage: RunStage, shards: Path) -> None:
    flipped = {"preset": "microscopy", "image_size": 8, "contact_sheet_images": 1}
    views = run_stage("augment", flipped, {"shards": shards})
    with pytest.raises(UsageError, match=r"^finetune\.flip_is_new_class: the views are flipped vertically"):
        run_stage("finetune", TINY | {"flip_is_new_class": True}, {"shards": shards, "views": views})


def test_a_hierarchy_that_there_is_not(run_stage: RunStage, shards: Path) -> None:
    settings = {"loss": {"name": "triplet"}, "sampler": "hierarchical", "hierarchy": "species"}
    with pytest.raises(Exception, match="species") as caught:
        run_stage("finetune", TINY | settings, {"shards": shards})
    assert "\n" not in str(caught.value)
    assert isinstance(getattr(caught.value, "exit_code", None), int)


def test_the_sampler_is_that_of_the_loss_that_is_particular() -> None:
    def used(loss: Any) -> str:
        return Finetune.model_validate_json(
            json.dumps({"shards": "shards", "encoder": "random", "loss": loss})
        ).sampler_used

    assert used({"name": "bce"}) == used([{"name": "bce"}, {"name": "proxy_anchor"}]) == "shuffled"
    assert used([{"name": "bce"}, {"name": "circle"}]) == used({"name": "n_pairs"}) == "p_by_k"
    assert used({"name": "pairs_cosine"}) == "pairs"
