"""Retrieval of images with several labels: figures from loops over sets, and the stage on mosaics of digits."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunStage
from sklearn.metrics import average_precision_score, roc_auc_score
from test_multilabel_probe import PIXELS, TARGETS, mosaics
from test_relation import belong
from test_retrieval import cosine
from torch import Tensor

from pipeline.errors import BadData
from stages.evaluation import bootstrap_interval, count_pairs, rank_gallery, retrieval, similarity, verification
from stages.labels import Against, LabelRelation, RelationKind

RELATIONS = [LabelRelation("any"), LabelRelation("all"), LabelRelation("jaccard", 0.5)]
QUICK: dict[str, Any] = {"bootstrap_samples": 100}


def kind_of(relation: LabelRelation) -> str:
    return relation.kind


def as_set(row: Tensor) -> frozenset[int]:
    return frozenset(row.nonzero()[:, 0].tolist())


@pytest.fixture(params=[2**20, 100, 1], ids=["one tile", "many tiles", "a query each"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", request.param)
    monkeypatch.setattr(retrieval, "TILE_PAIRS", request.param)


def scene(overlap: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and gallery, labels of both (some have none), and which row a query is."""
    random = torch.Generator().manual_seed(1)
    gallery, sets = torch.randn(41, 4, generator=random), torch.rand(41, 5, generator=random) < 0.3
    if overlap == "one set":
        return gallery, gallery, sets, sets, torch.arange(41)
    queries, wanted = torch.randn(23, 4, generator=random), torch.rand(23, 5, generator=random) < 0.3
    same = torch.full((23,), -1)
    if overlap == "some of both":
        same[:7] = torch.randperm(41, generator=random)[:7]
        queries[:7], wanted[:7] = gallery[same[:7]], sets[same[:7]]
    return queries, gallery, wanted, sets, same


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
@pytest.mark.parametrize("overlap", ["none", "one set", "some of both"])
def test_the_ranking_is_that_of_loops_over_sets(overlap: str, relation: LabelRelation) -> None:
    queries, gallery, wanted, sets, same = scene(overlap)
    ranking = rank_gallery(queries, gallery, wanted, sets, same, 6, relation)
    assert ranking.has_relevant.sum() > 0
    for query in range(len(queries)):
        own = as_set(wanted[query])
        rows = [row for row in range(len(gallery)) if row != same[query]]
        rows.sort(key=lambda row: (-cosine(queries[query].tolist(), gallery[row].tolist()), row))
        right = [belong(relation.kind, relation.threshold, own, as_set(sets[row])) for row in rows]
        total = sum(right)
        precision = [sum(right[: rank + 1]) / (rank + 1) for rank in range(len(rows))]
        hits = [precision[rank] * right[rank] for rank in range(len(rows))]
        assert ranking.relevant[query] == total
        assert ranking.first[query] == (right.index(True) + 1 if total else 0)
        assert ranking.r_precision[query] == pytest.approx(precision[total - 1] if total else 0.0)
        assert ranking.average_precision_at_r[query] == pytest.approx(sum(hits[:total]) / max(total, 1))
        assert ranking.average_precision_at_5[query] == pytest.approx(sum(hits[:5]) / max(min(total, 5), 1))
        assert ranking.neighbours.index[query].tolist() == rows[:6]
        assert ranking.right[query].tolist() == right[:6]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
@pytest.mark.parametrize("overlap", ["none", "one set", "some of both"])
def test_each_pair_counts_once(overlap: str, relation: LabelRelation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "BINS", 64)
    queries, gallery, wanted, sets, same = scene(overlap)
    found = count_pairs(queries, gallery, wanted, sets, same, relation)
    expected, seen = np.zeros((2, 64), dtype=int), set[frozenset[tuple[str, int]]]()
    for query in range(len(queries)):
        for row in range(len(gallery)):
            one = ("gallery", int(same[query])) if same[query] >= 0 else ("query", query)
            pair = frozenset([one, ("gallery", row)])
            if not wanted[query].any() or not sets[row].any() or len(pair) == 1 or pair in seen:
                continue
            seen.add(pair)
            is_genuine = belong(relation.kind, relation.threshold, as_set(wanted[query]), as_set(sets[row]))
            score = torch.cosine_similarity(queries[query].double(), gallery[row].double(), dim=0).item()
            expected[0 if is_genuine else 1, min(63, int((score + 1) * 32))] += 1
    assert [one.tolist() for one in found] == expected.tolist()


@dataclass(frozen=True)
class Counting(LabelRelation):
    """Remembers how often it was made ready for columns."""

    asked: list[int] = field(default_factory=list)

    def against(self, columns: Tensor) -> Against:
        self.asked.append(len(columns))
        return super().against(columns)


def test_the_labels_of_a_gallery_are_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "TILE_PAIRS", 1)
    monkeypatch.setattr(retrieval, "TILE_PAIRS", 1)
    queries, gallery, wanted, sets, same = scene("some of both")
    for measure in (rank_gallery, count_pairs):
        relation = Counting()
        measure(queries, gallery, wanted, sets, same, relation=relation)
        assert len(relation.asked) == 1


@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
def test_of_one_label_each_it_is_the_ranking_by_classes(relation: LabelRelation) -> None:
    random = torch.Generator().manual_seed(5)
    rows, labels = torch.randn(60, 6, generator=random), torch.randint(-1, 4, (60,), generator=random)
    sets = labels[:, None] == torch.arange(4)
    one, several = (rank_gallery(rows, rows, found, found, torch.arange(60), 5, relation) for found in (labels, sets))
    for name in ("relevant", "first", "r_precision", "average_precision_at_r", "average_precision_at_5", "right"):
        assert np.array_equal(getattr(one, name), getattr(several, name)), name


# The stage


def metrics_of(files: Path) -> dict[str, Any]:
    return json.loads((files / "metrics.json").read_text())


def related(kind: RelationKind, threshold: float = 0.5) -> np.ndarray:
    """bool [T, T], test images that belong together, without each with itself."""
    test = TARGETS[500:].astype(int)
    shared = test @ test.T
    either = test.sum(1)[:, None] + test.sum(1) - shared
    found = {"any": shared > 0, "all": shared == either, "jaccard": shared / either >= threshold}[kind]
    return found & ~np.eye(len(test), dtype=bool)


@pytest.mark.parametrize("kind", [None, "all", "jaccard"])
def test_figures_of_the_stage_are_those_of_whole_rankings(
    run_stage: RunStage, tmp_path: Path, kind: RelationKind | None
) -> None:
    settings = QUICK | ({} if kind is None else {"relation": {"kind": kind}})
    files = run_stage("retrieve", settings, {"features": mosaics(tmp_path)}, seed=3)
    metrics, together = metrics_of(files), related(kind or "any")
    unit = PIXELS[500:] / np.linalg.norm(PIXELS[500:], axis=1, keepdims=True)
    similarities = unit @ unit.T
    counted = np.flatnonzero(together.any(axis=1))
    first, within = [], []
    for query in counted:
        order = [row for row in np.argsort(-similarities[query], kind="stable") if row != query]
        right = together[query][order]
        first.append(int(np.argmax(right)) + 1)
        total = int(right.sum())
        truth = right[:total]
        within.append(average_precision_score(truth, np.arange(total, 0, -1)) * truth.mean() if truth.any() else 0.0)
    assert metrics["recall"]["1"] == pytest.approx(np.mean(np.array(first) == 1))
    assert metrics["mrr"] == pytest.approx(np.mean(1 / np.array(first)))
    assert metrics["map_at_r"] == pytest.approx(np.mean(within), abs=1e-6)
    assert metrics["map_at_r_ci95"] == pytest.approx(bootstrap_interval(np.array(within), 100, 3), abs=1e-6)
    upper = np.triu_indices(300, 1)
    auc = roc_auc_score(together[upper], similarities[upper])
    assert metrics["verification"]["auc"] == pytest.approx(auc, abs=1e-4)
    assert metrics["verification"]["genuine_pairs"] == together[upper].sum()
    protocol = metrics["protocol"]
    assert protocol["several_labels"] is True
    assert protocol["relation"] == {"kind": kind or "any"} | ({"threshold": 0.5} if kind == "jaccard" else {})
    assert protocol["intervals_draw"] == "queries"
    assert protocol["identities"] == protocol["gallery_identities"] == TARGETS[500:].any(axis=0).sum()
    assert protocol["queries_without_match"] == 300 - len(counted)
    assert protocol["chance_recall_1"] == pytest.approx(together[counted].sum(axis=1).mean() / 299)
    table = pq.read_table(files / "neighbours.parquet").to_pydict()
    assert table["labels"] == [np.flatnonzero(row).tolist() for row in TARGETS[500:]]
    places = np.array(table["neighbours"]) - 500
    assert table["right"] == np.take_along_axis(together, places, axis=1).tolist()


def test_declared_groups_are_drawn_whole(run_stage: RunStage, tmp_path: Path) -> None:
    groups = [f"burst {row // 3}" for row in range(800)]
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": mosaics(tmp_path, groups=groups)}))
    assert metrics["protocol"]["intervals_draw"] == "groups of queries"


def test_images_without_labels_are_said(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = TARGETS.copy()
    targets[600:620] = False
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": mosaics(tmp_path, targets=targets)}))
    said = " ".join(capsys.readouterr().err.split())
    assert "20 of 300 queries have no label and are left out" in said
    assert "20 of 300 gallery images have no label: they count as wrong" in said
    assert (metrics["protocol"]["queries"], metrics["protocol"]["gallery_without_label"]) == (280, 20)


def test_where_everything_belongs_together_there_is_nothing_to_find(run_stage: RunStage, tmp_path: Path) -> None:
    targets = TARGETS.copy()
    targets[500:, 0] = True
    with pytest.raises(BadData, match=r"^retrieve: every gallery image belongs to every query \(relation: any\)") as e:
        run_stage("retrieve", QUICK, {"features": mosaics(tmp_path / "a", targets=targets)})
    assert "\n" not in str(e.value)
    jaccard = QUICK | {"relation": {"kind": "jaccard"}}
    assert metrics_of(run_stage("retrieve", jaccard, {"features": mosaics(tmp_path / "b", targets=targets)}))


def test_queries_that_nothing_belongs_to_are_left_out(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = TARGETS.copy()
    targets[500:, 9] = False
    targets[700] = np.arange(10) == 9
    metrics = metrics_of(run_stage("retrieve", QUICK, {"features": mosaics(tmp_path, targets=targets)}))
    said = " ".join(capsys.readouterr().err.split())
    assert "to 1 of 300 queries no other gallery image belongs (relation: any): they are left out" in said
    assert metrics["protocol"]["identities_without_match"] == 1
