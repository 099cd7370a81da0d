"""Pairs that a file names: read, matched with shards, learned from; resumed, refused, and counted by content."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import RunStage, stage_runner
from PIL import Image
from resumed import assert_resumed_equals_whole
from scipy.stats import spearmanr

from pipeline.errors import BadData
from pipeline.provenance import fingerprint
from pipeline.recipe import load_recipe
from stages.evaluation import labels_digest, read_features
from stages.images import open_shards
from stages.models import load_card
from stages.settings import STAGES
from stages.settings.finetune import Finetune
from stages.sources.candidates import SourceError
from stages.sources.pair_table import read_pairs

PAGE = (Path(__file__).resolve().parent.parent / "docs/metric-learning.md").read_text(encoding="utf-8")
ENCODER: dict[str, Any] = {"encoder": "random", "architecture": {"backbone": "resnet10", "width": 4}, "image_size": 8}
TINY: dict[str, Any] = ENCODER | {"device": "cpu", "batch_size": 16, "record_every_steps": 1}
DIFFERENCE = {"name": "pairs_difference"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = stage_runner(tmp_path_factory.mktemp("made"))
    return run("shard", {"source": "sklearn:digits", "near_duplicates": False})


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def likeness(left: str, right: str) -> float:
    """Of digits, by the folders that they lie in."""
    return 1 - abs(int(left.split("/")[0]) - int(right.split("/")[0])) / 9


def draw(keys: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    drawn = np.random.default_rng(seed).integers(0, len(keys), (count, 2))
    return [(keys[left], keys[right]) for left, right in drawn.tolist()]


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    return write(path, "a,b,target", *(f"{a},{b},{likeness(a, b)}" for a, b in pairs))


def lines(files: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]


# The file


def test_a_table_is_read_and_matched(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", "target;a;note;b", "0.25;./one.png;x;deep//two.png", "", "1;gone.png;;one.png")
    table = read_pairs(path)
    assert table.names == [("one.png", "deep/two.png"), ("gone.png", "one.png")]
    assert table.targets.tolist() == [0.25, 1.0]
    assert table.lines == [2, 4]
    assert table.among(["x", "deep/two.png", "one.png"]).tolist() == [[2, 1], [-1, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\none,two\n", "pairs.csv has no column 'target'; pairs need a, b, target, and its columns are: a, b"),
        ("a,b,target\n1,2,1\n1,2,much\n", "pairs.csv, line 3: the target 'much' is no number"),
        ("a,b,target\n1,2,\n", "pairs.csv, line 2: the target '' is no number"),
        ("a,b,target\n1,2,1.5\n", "pairs.csv, line 2: the target 1.5 is not from 0 (nothing in common) to 1 (alike)"),
        ("a,b,target\n1,2,-0.1\n", "pairs.csv, line 2: the target -0.1 is not from 0"),
        ("a,b,target\n1,2,nan\n", "pairs.csv, line 2: the target nan is not from 0"),
        ("a,b,target\n\n1, ,1\n", "pairs.csv, line 3: a pair is of two images, and one of the cells is empty"),
        ("a,b,target\n1,2\n", "pairs.csv, line 2: 2 cells instead of the header's 3"),
        ("a,b,target\n", "pairs.csv has a header and no rows"),
        ("", "pairs.csv is empty"),
        ("a,b,target\n\xe4,2,1\n", "pairs.csv is not UTF-8 (byte 11): save it as UTF-8"),
        (None, "there is no file pairs.csv: pairs need a CSV file with the columns a, b, target"),
    ],
)
def test_what_is_no_table_of_pairs_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        read_pairs(path) if content is not None else read_pairs(Path("pairs.csv"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 6


# Training


def test_graded_targets_are_learned(run_stage: RunStage, shards: Path, tmp_path: Path) -> None:
    """Digits are the more alike the nearer their numbers: what is learned of pairs holds for images never seen."""
    path = write_pairs(tmp_path / "pairs.csv", draw(open_shards(shards, "train").keys, 3000, seed=0))
    gentle = {"crop_area": [0.7, 1.0], "colour_jitter": 0.0, "grey": 0.0, "contact_sheet_images": 1}
    views = run_stage("augment", {"preset": "text", "image_size": 8} | gentle, {"shards": shards})
    settings = {"loss": {"name": "pairs_cosine"}, "pairs": str(path), "epochs": 6, "optimiser": {"learning_rate": 1.0}}
    tuned = run_stage(
        "finetune", TINY | settings | {"batch_size": 128, "record_every_steps": 10}, {"shards": shards, "views": views}
    )
    found = []
    for encoder in ({"shards": shards}, {"shards": shards, "encoder": tuned}):
        settings = {"device": "cpu"} if "encoder" in encoder else ENCODER | {"device": "cpu"}
        features = read_features(run_stage("embed", settings, encoder))
        rows = dict(zip(features.keys.tolist(), features.features, strict=True))
        pairs = draw(open_shards(shards, "test").keys, 3000, seed=1)
        cosines = [torch.cosine_similarity(rows[a], rows[b], dim=0).item() for a, b in pairs]
        found.append(spearmanr(cosines, [likeness(a, b) for a, b in pairs]).statistic)
    assert abs(found[0]) < 0.15
    assert found[1] > 0.6
    assert lines(tuned)[-1]["loss"] < 0.04, "the targets' own variance is 0.055"


@pytest.mark.parametrize("loss", [DIFFERENCE, {"name": "pairs_concatenated"}])
def test_a_head_learns_from_graded_targets(
    run_stage: RunStage, shards: Path, tmp_path: Path, loss: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train = open_shards(shards, "train")
    pairs = draw(train.keys, 40, seed=2)
    path = write_pairs(tmp_path / "pairs.csv", pairs)
    files = run_stage("finetune", TINY | {"loss": loss, "pairs": str(path), "epochs": 3}, {"shards": shards})
    rows = lines(files)
    assert len(rows) == 3 * (40 // 8)
    assert all(row["loss"] > 0 and 0 <= row["asymmetry"] < 1 for row in rows)
    assert {row["asymmetry"] > 0 for row in rows} == {loss["name"] == "pairs_concatenated"}
    images = len({key for pair in pairs for key in pair})
    assert f"on 40 given pairs of {images} images; resnet10" in capsys.readouterr().err
    card = load_card(files)
    assert card.head is not None
    assert (card.head.kind, card.head.names) == (loss["name"].removeprefix("pairs_"), None)
    digest = labels_digest(("\t".join(pair) for pair in pairs), (str(likeness(*pair)) for pair in pairs))
    seen = {"loss": loss["name"], "fraction": 1.0, "subset": 0, "seed": 0, "samples": images, "digest": digest}
    assert [one.model_dump() for one in card.labels_seen] == [seen]


def test_images_need_no_label(run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "images" / ("train" if number < 4 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    shards = run_stage("shard", {"source": f"folder:{tmp_path / 'images'}", "labels": "none"})
    path = write(
        tmp_path / "pairs.csv",
        "a,b,target",
        "train/0.png,train/1.png,1",
        "train/2.png,test/4.png,0",
        "train/2.png,train/2.png,1",
        "nowhere.png,train/3.png,0.5",
        "train/3.png,train/0.png,0.1",
    )
    settings = TINY | {"loss": {"name": "pairs_cosine"}, "pairs": str(path), "epochs": 2}
    files = run_stage("finetune", settings, {"shards": shards})
    said = capsys.readouterr().err
    assert (
        f"2 of 5 pairs of {path} are left out, since an image is not in the training part: line 3 names 'test/4.png'"
    ) in said
    assert "batches of 6: there are no more than 3 pairs" in said
    assert len(lines(files)) == 2
    write(path, "a,b,target", "train/0.png,test/4.png,1", "0.png,train/1.png,1")
    with pytest.raises(BadData) as caught:
        run_stage("finetune", settings, {"shards": shards})
    assert str(caught.value) == (
        f"finetune.pairs: none of the 2 pairs of {path} is of two training images: line 2 names 'test/4.png', "
        "and training images are named like 'train/0.png'"
    )


def test_resumed_it_ends_with_the_bytes_of_an_uninterrupted_run(shards: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.csv", draw(open_shards(shards, "train").keys, 20, seed=3))
    given = TINY | {"loss": {"name": "pairs_concatenated"}, "pairs": str(path), "epochs": 3}
    wanted = {"encoder.safetensors", "head.safetensors", "model.json", "metrics.jsonl"}
    assert_resumed_equals_whole(tmp_path, given, shards, (2, 2), wanted)  # after steps 2 and 4 of 6


# The settings


def test_the_file_counts_by_its_content(tmp_path: Path) -> None:
    given = {"shards": "shards", "encoder": "simclr", "loss": {"name": "pairs_cosine"}}
    assert Finetune.model_validate(given).foreign_inputs() == {}

    def look(path: Path) -> str:
        settings = Finetune.model_validate(given | {"pairs": str(path)})
        found = fingerprint(settings.foreign_inputs()["pairs"], tmp_path / "cache")
        assert found is not None
        return found.value

    first = look(write(tmp_path / "one/pairs.csv", "a,b,target", "1,2,1"))
    assert look(write(tmp_path / "two/pairs.csv", "a,b,target", "1,2,1")) == first
    assert look(write(tmp_path / "one/pairs.csv", "a,b,target", "1,2,0.9")) != first
    assert "positive_share" in Finetune.model_validate(given | {"pairs": "pairs.csv"}).without_effect()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": {"name": "triplet"}},
            "pairs: triplet does not learn from given pairs; pairs_cosine, pairs_difference and pairs_concatenated do",
        ),
        ({"target": "kind"}, "target: is for labels, and given pairs are learned from without; leave it out"),
        ({"label_fraction": 0.5}, "label_fraction: is for labels, "),
        ({"negative_only": ["new"]}, "negative_only: is for labels, "),
        ({"flip_is_new_class": True}, "flip_is_new_class: is for labels, "),
        ({"curriculum": {"min_per_class": 2}}, "curriculum: is for classes, not for pairs"),
        ({"batch_size": 7}, "batch_size: pairs are of two images: take an even number"),
    ],
)
def test_settings_that_do_not_go_with_given_pairs(changes: dict[str, Any], message: str) -> None:
    given = {"shards": "shards", "encoder": "random", "loss": DIFFERENCE, "pairs": "pairs.csv"}
    with pytest.raises(ValueError, match="1 validation error") as caught:
        Finetune.model_validate_json(json.dumps(given | changes))
    assert message in str(caught.value)


# The documentation


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    section = PAGE.split("## Pairs of your own")[1].split("\n## ")[0]
    (table,) = re.findall(r"```csv\n(.*?)```", section, re.DOTALL)
    assert len(read_pairs(write(tmp_path / "pairs.csv", table))) == len(table.splitlines()) - 1
    (text,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    before = (
        "  shards: {stage: shard, source: 'folder:images'}\n  simclr: {stage: pretrain, shards: shards, views: v}\n"
    )
    before += "  v: {stage: augment, shards: shards}\n"
    path = write(tmp_path / "recipe.yaml", f"name: pairs\nsteps:\n{before}{text}")
    steps = load_recipe(path, STAGES).steps
    assert {*yaml.safe_load(text)} <= {*steps}
    assert [name for name, step in steps.items() if step.settings.foreign_inputs().keys() & {"pairs"}] == ["tuned"]
    assert steps["found"].references() == {"features": ["features"], "head": ["tuned"]}
