"""Verification by a trained head of pairs, from a recipe: its errors from loops, the report, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunStage, stage_runner
from sklearn.metrics import roc_auc_score, roc_curve

from pipeline import runner
from pipeline.errors import UsageError
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages.evaluation import pair_scores, read_features
from stages.images import open_shards
from stages.models import load_card, load_head
from stages.models.heads import PairHead
from stages.settings import STAGES
from stages.settings.retrieve import Retrieve

ENCODER: dict[str, Any] = {"encoder": "random", "architecture": {"backbone": "resnet10", "width": 4}, "image_size": 8}
TINY: dict[str, Any] = ENCODER | {"device": "cpu", "max_steps": 20, "batch_size": 64}
QUICK = {"bootstrap_samples": 100}
LOSSES = ("pairs_concatenated", "pairs_difference", "pairs_cosine", "cross_entropy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    run = stage_runner(tmp_path_factory.mktemp("made"))
    shards = run("shard", {"source": "sklearn:digits", "near_duplicates": False})
    files = {"shards": shards}
    trained: dict[str, dict[str, Any]] = {name: {"loss": {"name": name}} for name in LOSSES}
    trained["projected"] = {"loss": {"name": "pairs_difference"}, "projection": {"dimension": 8}}
    for name, settings in trained.items():
        files[name] = run("finetune", TINY | settings, {"shards": shards})
        files[f"features of {name}"] = run("embed", {"device": "cpu"}, {"shards": shards, "encoder": files[name]})
    return files


def metrics_of(files: Path) -> dict[str, Any]:
    return json.loads((files / "metrics.json").read_text())


def probabilities(
    made: dict[str, Path], loss: str, queries: str, gallery: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every pair of different images once, by the head itself: genuine or not, f(a, b) and f(b, a)."""
    features = read_features(made[f"features of {loss}"])
    head = load_head(made[loss], load_card(made[loss]))
    assert isinstance(head, PairHead)
    found = []
    rows, columns = (np.flatnonzero(features.splits == split) for split in (queries, gallery))
    with torch.no_grad():
        for row in rows.tolist():
            others = columns[columns > row] if queries == gallery else columns
            a, b = features.features[row].expand(len(others), -1), features.features[others]
            alike = features.labels[others] == features.labels[row]
            found.append(torch.stack([alike.double(), head(a, b).double(), head(b, a).double()]))
    truth, one, other = torch.cat(found, dim=1)
    return truth.numpy() == 1, one.sigmoid().numpy(), other.sigmoid().numpy()


@pytest.mark.parametrize("loss", ["pairs_concatenated", "pairs_difference"])
@pytest.mark.parametrize("gallery", ["test", "train"])
def test_errors_are_those_of_the_heads_probabilities(
    run_stage: RunStage, made: dict[str, Path], loss: str, gallery: str
) -> None:
    inputs = {"features": made[f"features of {loss}"], "head": made[loss]}
    metrics = metrics_of(run_stage("retrieve", QUICK | {"gallery": gallery}, inputs))
    found = metrics["verification_by_head"]
    truth, one, other = probabilities(made, loss, "test", gallery)
    mean = (one + other) / 2
    assert (found["genuine_pairs"], found["impostor_pairs"]) == (truth.sum(), (~truth).sum())
    assert (found["head"], found["sampled"]) == (loss.removeprefix("pairs_"), False)
    assert found["error"] < 1e-3
    assert found["auc"] == pytest.approx(roc_auc_score(truth, mean), abs=found["error"] + 1e-6)
    fmr, tpr, _ = roc_curve(truth, mean, drop_intermediate=False)
    at = int(np.argmax(fmr >= 1 - tpr))
    assert found["eer"] == pytest.approx((fmr[at] + 1 - tpr[at]) / 2, abs=found["error"] + 1e-3)
    assert found["fnmr"]["1e-2"] == pytest.approx((1 - tpr)[fmr <= 1e-2].min(), abs=found["error"] + 1e-3)
    assert found["asymmetry"] == pytest.approx(np.abs(one - other).mean(), abs=1e-6)
    assert (found["asymmetry"] > 0) == (loss == "pairs_concatenated")
    for false_matches, misses, threshold in list(zip(*found["roc"].values(), strict=True))[1:-1:20]:
        assert false_matches == pytest.approx((mean[~truth] >= threshold).mean(), abs=1e-3)
        assert misses == pytest.approx((mean[truth] < threshold).mean(), abs=1e-3)
    plain = metrics_of(run_stage("retrieve", QUICK | {"gallery": gallery}, {"features": inputs["features"]}))
    assert "verification_by_head" not in plain
    assert plain["verification"] == metrics["verification"], "beside the cosine, whose figures stay"


def test_of_many_pairs_a_sample_says_nearly_the_same(
    run_stage: RunStage, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"features": made["features of pairs_concatenated"], "head": made["pairs_concatenated"]}
    whole = metrics_of(run_stage("retrieve", QUICK, inputs))["verification_by_head"]
    assert "a sample of the pairs" not in capsys.readouterr().err
    monkeypatch.setattr(pair_scores, "MOST_PAIRS", 40_000)
    found = metrics_of(run_stage("retrieve", QUICK, inputs))["verification_by_head"]
    assert found["sampled"]
    said = f"the head scores a sample of the pairs: {found['genuine_pairs']:,} of one class and "
    assert said + f"{found['impostor_pairs']:,} of two" in capsys.readouterr().err
    assert found["genuine_pairs"] + found["impostor_pairs"] < 25_000
    assert found["auc"] == pytest.approx(whole["auc"], abs=0.01)
    assert found["eer"] == pytest.approx(whole["eer"], abs=0.015)


def test_what_does_not_belong_together_is_refused(run_stage: RunStage, made: dict[str, Path]) -> None:
    other = {"features": made["features of cross_entropy"], "head": made["pairs_difference"]}
    name = made["pairs_difference"].parent.name
    with pytest.raises(UsageError) as caught:
        run_stage("retrieve", QUICK, other)
    assert str(caught.value) == (
        f"retrieve.head: {name} is not what made the features: take features of the stage embed with encoder: {name}"
    )
    pixels = run_stage("embed", {"encoder": "pixels", "image_size": 8}, {"shards": made["shards"]})
    with pytest.raises(UsageError, match="is not what made the features"):
        run_stage("retrieve", QUICK, {"features": pixels, "head": made["pairs_difference"]})
    lacking = r"has no head of pairs; those of pairs_concatenated and pairs_difference without a projection have one$"
    # Without a head, with another one, and with one that was trained on projections, which are thrown away.
    for name in ("pairs_cosine", "cross_entropy", "projected"):
        with pytest.raises(UsageError, match=rf"^retrieve\.head: .* {lacking}"):
            run_stage("retrieve", QUICK, {"features": made[f"features of {name}"], "head": made[name]})
    with pytest.raises(ValueError, match="head: scores pairs in verification, which is false"):
        Retrieve.model_validate({"features": "features", "head": "tuned", "verification": False})


RECIPE = """
name: pairs
steps:
  shards:   {stage: shard, source: "sklearn:digits", near_duplicates: false}
  tuned: &tuned
    stage: finetune
    shards: shards
    encoder: random
    architecture: {backbone: resnet10, width: 4}
    image_size: 8
    loss: {name: pairs_concatenated}
    pairs: PAIRS
    epochs: 2
    batch_size: 32
    device: cpu
  features: {stage: embed, shards: shards, encoder: tuned, device: cpu}
  pixels:   {stage: embed, shards: shards, encoder: pixels, image_size: 8}
  found:    {stage: retrieve, features: features, head: tuned, bootstrap_samples: 100}
  other:    {stage: retrieve, features: pixels, head: tuned, bootstrap_samples: 100}
  report:   {stage: report, of: [found], neighbour_queries: 2}
  headed:   {<<: *tuned, freeze: encoder}
  frozen:   {stage: embed, shards: shards, encoder: headed, device: cpu}
  by_angle: {stage: retrieve, features: frozen, bootstrap_samples: 100}
  by_head:  {stage: retrieve, features: frozen, head: headed, bootstrap_samples: 100}
  frozen_report: {stage: report, of: [by_angle, by_head], neighbour_queries: 2}
"""


@pytest.fixture
def run(tmp_path: Path, made: dict[str, Path]) -> Callable[..., dict[str, Path]]:
    """Runs steps of RECIPE in a store, with pairs from a file; returns the files of those that ran."""
    keys = open_shards(made["shards"], "train").keys
    table, recipe, store = tmp_path / "pairs.csv", tmp_path / "recipe.yaml", Store(tmp_path / "store")
    recipe.write_text(RECIPE.replace("PAIRS", str(table)))

    def go(*steps: str, last_target: float = 0.5) -> dict[str, Path]:
        rows = [f"{a},{b},{float(a[0] == b[0])}" for a, b in zip(keys[:150], keys[100:250], strict=True)]
        table.write_text("\n".join(["a,b,target", *rows, f"{keys[0]},{keys[1]},{last_target}"]))
        planner = runner.Planner(store, load_recipe(recipe, STAGES), print)
        ran: list[str] = []
        done = runner.run(planner, steps, lambda one: ran.append(one.step.name) if one.state == "run" else None)
        files = {one.planned.step.name: store.files(one.record.stage, one.record.digest) for one in done}
        return {name: files[name] for name in ran}

    return go


def test_a_recipe_from_pairs_to_a_report(run: Callable[..., dict[str, Path]]) -> None:
    files = run("report")
    assert [*files] == ["shards", "tuned", "features", "found", "report"]
    assert run("report") == {}
    metrics = metrics_of(files["found"])
    numbers = json.loads((files["report"] / "report.json").read_text())
    cosine, head = numbers["retrieval"]["verification"]["rows"]
    assert cosine["auc"] == metrics["verification"]["auc"]
    assert "head" not in cosine
    assert (head["auc"], head["asymmetry"]) == tuple(
        metrics["verification_by_head"][key] for key in ("auc", "asymmetry")
    )
    page = (files["report"] / "report.html").read_text()
    assert f"by its head of pairs (concatenated), which differs by {head['asymmetry']:.3f} when the two" in page
    assert "<small>images in given pairs</small>" in page
    assert "Dashed: by a head of pairs." in page
    assert [*run("tuned", last_target=0.25)] == ["tuned"], "the file counts by its content"
    with pytest.raises(UsageError, match=r"^other\.head: tuned is not what made the features"):
        run("other", last_target=0.25)


def test_a_head_that_learned_classes_of_the_queries_is_transductive(run: Callable[..., dict[str, Path]]) -> None:
    """Its encoder is as it was initialised: the cosine says nothing of these classes that it was taught."""
    numbers = json.loads((run("frozen_report")["frozen_report"] / "report.json").read_text())
    cosine, head = numbers["retrieval"]["rows"]
    assert (cosine["step"], cosine["seen"], cosine["transductive"]) == ("by_angle", [], False)
    seen = {"step": "headed", "stage": "finetune", "query_images": 0, "query_classes": 10}
    assert (head["step"], head["seen"], head["transductive"]) == ("by_head", [seen], True)
