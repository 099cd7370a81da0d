"""What encoders are called on the page, which make one row, and what its cells and sentences say of fine-tuned ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.losses import registry
from stages.reports.artifacts import Artifact, Lineage
from stages.reports.lineage import MOST_NODES, NODE_HEIGHT, NODE_WIDTH, drawing
from stages.reports.names import LOSSES, Compared, Named, loss_name, name_all, share_text
from stages.reports.probes import Probe, comparison, console_table, protocol, rows_of
from stages.reports.verdict import compare, verdict


class Steps:
    """A lineage that grows step by step."""

    def __init__(self) -> None:
        self.artifacts: list[Artifact] = []
        self.add("shard", "shards")
        self.add("pretrain", "simclr", {}, shards="shards")

    def add(self, stage: str, step: str, settings: dict[str, Any] | None = None, **inputs: str) -> Artifact:
        digests: dict[str, tuple[str, ...]] = {field: (f"digest of {name}",) for field, name in inputs.items()}
        self.artifacts.append(Artifact(stage, step, f"digest of {step}", 1, 0, settings or {}, digests, Path(step)))
        return self.artifacts[-1]

    def tuned(
        self, loss: str, fraction: float, start: str = "simclr", step: str = "", subset: int = 0, **settings: Any
    ) -> Compared:
        step = step or f"{loss} {fraction} {start}"
        given = {key.replace("__", "."): item for key, item in settings.items()}
        given |= {} if loss == "cross_entropy" else {"loss.name": loss}
        given |= {} if fraction == 1 else {"label_fraction": fraction}
        known = any(one.step == start for one in self.artifacts)
        inputs = {"shards": "shards"} | ({"encoder": start} if known else {})
        self.add("finetune", step, given if known else given | {"encoder": start}, **inputs)
        seen = [{"loss": loss, "fraction": fraction, "subset": subset, "seed": 0, "samples": 10}]
        return self.embedded(step, seen)

    def embedded(self, step: str, seen: list[dict[str, Any]] | None = None) -> Compared:
        features = self.add("embed", f"features of {step}", {}, shards="shards", encoder=step)
        stage = "finetune" if seen else "pretrain"
        card = {"kind": "pretrained", "name": "resnet10", "stage": stage, "labels_seen": seen or []}
        return Compared(card, f"probe of {step}", features)

    def names(self, *compared: Compared) -> list[Named]:
        return name_all(Lineage(self.artifacts), compared)


def test_fine_tunings_that_differ_in_their_labels_are_one_row() -> None:
    steps = Steps()
    compared = [steps.embedded("simclr")]
    for start in ("simclr", "random", "timm:resnet18"):
        for loss in ("arcface", "triplet", "cross_entropy"):
            compared += [steps.tuned(loss, fraction, start) for fraction in (0.01, 0.1, 1)]
    names = steps.names(*compared)
    assert list(dict.fromkeys(name.row_label for name in names)) == [
        "pretrained",
        "ArcFace from pretrained",
        "triplet from pretrained",
        "cross-entropy from pretrained",
        "ArcFace from random",
        "triplet from random",
        "cross-entropy from random",
        "ArcFace from timm resnet18",
        "triplet from timm resnet18",
        "cross-entropy from timm resnet18",
    ]
    assert [name.label for name in names[1:4]] == [
        "ArcFace from pretrained, 1% of the labels",
        "ArcFace from pretrained, 10% of the labels",
        "ArcFace from pretrained, all labels",
    ]
    assert len({name.label for name in names}) == len(names)
    assert {name.kind for name in names} == {"pretrained", "fine-tuned"}


def test_what_follows_the_number_of_labels_does_not_part_a_row() -> None:
    steps = Steps()
    names = steps.names(
        steps.tuned("arcface", 0.01, epochs=200, batch_size=8), steps.tuned("arcface", 1, optimiser__warmup_epochs=2)
    )
    assert [name.row_label for name in names] == ["ArcFace from pretrained"] * 2


def test_other_settings_are_other_rows_and_are_said() -> None:
    steps = Steps()
    names = steps.names(
        steps.tuned("arcface", 0.1, step="a"),
        steps.tuned("arcface", 0.1, step="b", freeze="encoder"),
        steps.tuned("arcface", 1, step="c", freeze="encoder"),
        steps.tuned("arcface", 1, step="d", loss__margin=0.5, projector_layers=1),
        steps.tuned("arcface", 0.1, step="e", label_subset=1, subset=1),
    )
    assert [name.row_label for name in names] == [
        "ArcFace from pretrained",
        "ArcFace from pretrained (freeze encoder)",
        "ArcFace from pretrained (freeze encoder)",
        "ArcFace from pretrained (margin 0.5, projector layers 1)",
        "ArcFace from pretrained (label subset 1)",
    ]
    assert [name.label for name in names][3] == names[3].row_label, "all labels, alone in its row: nothing to add"


def test_two_of_one_share_are_two_rows() -> None:
    steps = Steps()
    names = steps.names(
        steps.tuned("triplet", 0.1, step="short", epochs=5),
        steps.tuned("triplet", 0.1, step="long", epochs=50),
        steps.tuned("triplet", 1, step="all", epochs=50),
    )
    assert [name.row_label for name in names] == [
        "triplet from pretrained (epochs 5)",
        "triplet from pretrained (epochs 50)",
        "triplet from pretrained (epochs 50)",
    ]


def test_two_probes_of_the_same_features_are_two_rows() -> None:
    steps = Steps()
    one = steps.tuned("triplet", 0.1)
    again = Compared(one.encoder, "another probe", one.features, {"neighbours": [1]})
    same = Compared(one.encoder, "yet another", one.features)
    names = steps.names(one, again, same)
    assert len({name.row_label for name in names}) == 3
    assert names[1].row_label == "triplet from pretrained (neighbours 1)"


def test_versions_of_a_step_are_rows_of_their_own() -> None:
    steps = Steps()
    for one in (steps.embedded("simclr"), steps.tuned("arcface", 1)):
        seeds = [replace(one, seed=seed, digest=f"{seed}" * 64) for seed in (0, 1, 2)]
        label = steps.names(one)[0].label
        names = steps.names(*seeds)
        assert [name.row_label for name in names] == [f"{label} (seed {seed})" for seed in (0, 1, 2)]
        again = [replace(one, digest=f"{version}" * 64) for version in "ab"]
        assert [name.row_label for name in steps.names(*again)] == [f"{label} ({'a' * 12})", f"{label} ({'b' * 12})"]


def test_a_frozen_encoder_is_the_one_that_it_started_from() -> None:
    steps = Steps()
    shards = {"shards": "shards"}
    steps.add("finetune", "head", {"freeze": "encoder"}, **shards, encoder="simclr")
    features = steps.add("embed", "features of head", {}, **shards, encoder="head")
    card = {"kind": "pretrained", "name": "resnet10", "stage": "finetune", "labels_seen": []}
    (name,) = steps.names(Compared(card, "probe of head", features))
    assert (name.label, name.kind) == ("pretrained, frozen", "fine-tuned")


def test_pretraining_after_labels_is_not_called_pretrained() -> None:
    steps = Steps()
    tuned = steps.tuned("arcface", 0.1, step="tuned")
    steps.add("pretrain", "again", {}, shards="shards", encoder="tuned")
    features = steps.add("embed", "features of again", {}, shards="shards", encoder="again")
    card = tuned.encoder | {"stage": "pretrain"}
    (name,) = steps.names(Compared(card, "probe of again", features))
    assert (name.label, name.kind, name.fraction) == ("pretrained from ArcFace from simclr", "fine-tuned", 0.1)


def test_where_it_started_is_said_as_exactly_as_needed() -> None:
    steps = Steps()
    steps.add("pretrain", "simclr_long", {}, shards="shards")
    first = steps.tuned("cross_entropy", 1, "simclr_long", step="ce")
    second = steps.tuned("arcface", 1, "ce")
    assert [name.label for name in steps.names(first, second)] == [
        "cross-entropy from simclr_long",
        "ArcFace from cross-entropy from simclr_long",
    ]


def test_shares_as_text() -> None:
    assert [share_text(one) for one in (0.001, 0.01, 0.1, 1.0)] == [
        "0.1% of the labels",
        "1% of the labels",
        "10% of the labels",
        "all labels",
    ]


# Cells and sentences

SHARES = {"1pct": 0.01, "10pct": 0.1, "100pct": 1.0}


def probe(name: Named, saw: float = 0.0, correct: Any = None, **changes: Any) -> Probe:
    """A probe of 1,000 labels whose scores are told apart by the second digit."""
    right = np.arange(100) < 90 if correct is None else np.asarray(correct)
    curve = {}
    for key, share in SHARES.items():
        fair = share >= saw
        several = not saw and share < 1
        values = ([0.5 + share / 10, 0.6 + share / 10] if several else [0.7 + share / 10 + saw / 100]) if fair else []
        scores: dict[str, Any] = {"top1": float(np.mean(values)) if values else None, "by_subset": values}
        scores |= {"sd": 0.05} if several else {}
        curve[key] = scores | {
            "subsets": len(values),
            "subset_indices": list(range(len(values))),
            "encoder_saw": saw,
            "encoder_saw_exactly": saw in (0, share),
            "labels": round(1000 * share),
            "fixed_penalty": False,
            "knn": {"20": scores},
        }
    top1 = float(right.mean())
    metrics = {
        "linear": {"top1": top1, "top1_ci95": [top1 - 0.02, top1 + 0.02], "penalty": 1.0, "penalty_at_edge": False},
        "knn": {"20": {"top1": 0.5, "k_used": 20}},
        "label_curve": curve,
        "protocol": {"test": len(right)},
    }
    return Probe(name, "d", "f", metrics | changes, np.arange(len(right)).astype(str), right)


PLAIN = probe(Named("pretrained", "pretrained", "probe", "net"), correct=np.arange(100) < 80)


def tuned(fraction: float, row: str = "ArcFace from pretrained", correct: Any = None) -> Probe:
    name = Named(f"{row}, {share_text(fraction)}", "fine-tuned", f"probe {fraction}", "net", row, fraction)
    return probe(name, fraction, correct)


def cells(*probes: Probe) -> list[list[Any]]:
    """By row: (value, saw) of the linear probe's cells."""
    table = comparison(probes)
    return [[one and (one["value"], one["saw"]) for one in row["cells"][:3]] for row in table["rows"]]


def test_a_cell_is_of_the_encoder_that_saw_exactly_these_labels() -> None:
    assert cells(tuned(1.0), tuned(0.01), tuned(0.1)) == [
        [(pytest.approx(0.7011), None), (pytest.approx(0.711), None), (pytest.approx(0.81), None)]
    ]


def test_without_one_a_cell_says_what_its_encoder_saw() -> None:
    assert cells(PLAIN, tuned(0.1))[1] == [
        (None, 0.1),  # it saw more than the classifier may
        (pytest.approx(0.711), None),
        (pytest.approx(0.801), 0.1),
    ]
    assert cells(tuned(1.0), tuned(0.01))[0] == [
        (pytest.approx(0.7011), None),
        (pytest.approx(0.7101), 0.01),
        (pytest.approx(0.81), None),
    ]
    assert cells(tuned(1.0), tuned(0.1))[0][0] == (None, 0.1), "the one that saw the least is named"
    printed = console_table(comparison([PLAIN, tuned(0.1)]))
    nothing = "\N{EN DASH}"
    assert printed["rows"][1][1:4] == ["80.1% [88.0, 92.0] saw 10%", f"{nothing} saw 10%", "71.1%"]


def test_rows_keep_the_order_of_their_first_probe() -> None:
    rows = rows_of([tuned(0.01), PLAIN, tuned(1.0)])
    assert [row.label for row in rows] == ["ArcFace from pretrained", "pretrained"]
    assert rows[0].fullest.name.fraction == 1


def test_a_mean_over_subsets_and_a_single_subset_are_no_contest() -> None:
    table = comparison([PLAIN, tuned(0.1), tuned(1.0)])
    assert [[one["best"] for one in row["cells"][:3]] for row in table["rows"]] == [
        [True, False, False],  # at 1% nothing else was measured
        [False, False, True],
    ]
    assert [one["best"] for one in comparison([PLAIN, PLAIN])["rows"][0]["cells"]] == [False] * 6, "one row"


def test_the_protocol_says_which_subset_was_measured() -> None:
    card = {item["name"]: item["values"] for item in protocol([PLAIN, tuned(0.1)])["differing"]}
    assert card["Subsets at 1%"] == ["2 of 10 labels", "none: the encoder saw 10%"]
    assert card["Subsets at 10%"] == ["2 of 100 labels", "number 0 alone, of 100 labels"]


def test_the_verdict_compares_fine_tuned_encoders_where_all_labels_are_used() -> None:
    better, worse, same = (np.arange(100) < bound for bound in (95, 50, 80))
    found = verdict(
        [
            tuned(0.01, correct=worse),
            tuned(1.0, correct=better),
            probe(Named("random encoder", "random", "probe_random", "net"), correct=worse),
            PLAIN,
            tuned(0.1, "triplet from pretrained", correct=same),
            tuned(1.0, "ArcFace from random", correct=worse),
        ]
    )
    assert found["subject"] == "pretrained", "what learned without labels comes first"
    assert found["sentence"].startswith("Pretrained reaches 80.0% top-1")
    assert "ArcFace" not in found["sentence"]
    assert found["fine_tuned"] == (
        "With all labels, by linear probe: ArcFace from pretrained (+15.0 points) is better than pretrained; "
        "triplet from pretrained (+0.0 points, saw 10% of the labels) is not told apart from pretrained; "
        "ArcFace from random (-30.0 points) is worse than pretrained."
    )
    assert found["state"] == "better"
    assert [(one["label"], one["saw"]) for one in found["scores"]] == [
        ("pretrained", None),
        ("ArcFace from pretrained", None),
        ("random encoder", None),
        ("triplet from pretrained", 0.1),
        ("ArcFace from random", None),
    ]


def test_with_few_labels_the_same_subset_is_compared() -> None:
    found = verdict([PLAIN, tuned(0.01), tuned(1.0)])
    assert found["few_labels"] == (
        "With 1% of the labels (10), 20 nearest neighbours reach 55.1%. Fine-tuned on one such subset: 70.1% "
        "(ArcFace from pretrained); pretrained reaches 50.1% with the same labels."
    )
    assert verdict([PLAIN, tuned(1.0)])["few_labels"].endswith("20 nearest neighbours reach 55.1%.")


def test_fine_tuned_encoders_alone_have_a_verdict() -> None:
    found = verdict([tuned(0.1), tuned(0.1, "triplet from random")])
    assert found["sentence"].startswith("ArcFace from pretrained (saw 10% of the labels) reaches 90.0%")
    assert found["subject"] == "ArcFace from pretrained"
    assert found["few_labels"] is None


def test_an_interval_draws_whole_groups() -> None:
    """Ten frames of each video: the differences of videos decide, not those of frames."""
    random = np.random.default_rng(1)
    ours, theirs = np.repeat(random.random(40) < 0.8, 10), np.repeat(random.random(40) < 0.6, 10)
    name = Named("a", "pretrained", "", "")
    groups = np.repeat(np.arange(40), 10)
    frames = compare(probe(name, correct=ours), probe(name, correct=theirs))["interval"]
    metrics = PLAIN.metrics
    one, other = (
        Probe(
            name, "", "", metrics | {"linear": {"top1": float(right.mean())}}, np.arange(400).astype(str), right, groups
        )
        for right in (ours, theirs)
    )
    videos = compare(one, other)["interval"]
    assert videos[1] - videos[0] > 2.5 * (frames[1] - frames[0])
    gains = (ours.astype(float) - theirs)[::10]
    slow = [gains[random.integers(0, 40, 40)].mean() for _ in range(4000)]
    np.testing.assert_allclose(videos, np.quantile(slow, [0.025, 0.975]), atol=0.03)


# The drawing of many


def test_a_large_drawing_joins_what_was_made_alike() -> None:
    steps = Steps()
    compared = []
    for start in ("simclr", "random"):
        for loss in ("arcface", "triplet", "cross_entropy"):
            compared += [steps.tuned(loss, fraction, start) for fraction in (0.01, 0.1, 1)]
    for one in compared:
        assert one.features is not None
        steps.add("probe", one.step, {}, features=one.features.step)
    steps.add("embed", "features", {}, shards="shards", encoder="simclr")
    steps.add("embed", "features of pixels", {}, shards="shards")
    assert len(steps.artifacts) > MOST_NODES
    drawn = drawing(Lineage(steps.artifacts), "the page")
    assert sorted((node["step"], node["steps"]) for node in drawn["nodes"]) == [
        *[(f"9 \N{MULTIPLICATION SIGN} {stage}", 9) for stage in ("embed", "embed", "finetune", "finetune")],
        *[("9 \N{MULTIPLICATION SIGN} probe", 9)] * 2,
        ("features", 1),
        ("features of pixels", 1),
        ("shards", 1),
        ("simclr", 1),
        ("the page", 1),
    ]
    assert sum(node["steps"] for node in drawn["nodes"]) == len(steps.artifacts) + 1
    titles = " ".join(node["title"] for node in drawn["nodes"])
    assert all(one.step in titles for one in steps.artifacts)
    places = [(node["x"], node["y"]) for node in drawn["nodes"]]
    for number, (x1, y1) in enumerate(places):
        for x2, y2 in places[:number]:
            assert abs(x1 - x2) >= NODE_WIDTH or abs(y1 - y2) >= NODE_HEIGHT
    small = drawing(Lineage(steps.artifacts[:20]), "the page")
    assert all(node["steps"] == 1 for node in small["nodes"])


def test_names_of_losses() -> None:
    assert loss_name("triplet+n_pairs") == "triplet + N-pairs"
    assert loss_name("pairs_cosine") == "pairs cosine"
    assert LOSSES.keys() <= registry.LOSSES.keys()
