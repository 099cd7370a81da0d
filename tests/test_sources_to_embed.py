"""Every kind of source, from its files to features with their labels and groups."""

import csv
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image
from webdataset.writer import TarWriter

from pipeline import runner
from pipeline.recipe import load_recipe
from pipeline.store import open_store
from stages.settings import STAGES

NUMBERS = range(16)
"""Images of one shade each, four of a group, classes `even` and `odd`, the last four for testing."""


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def class_of(number: int) -> str:
    return ("even", "odd")[number % 2]


def split_of(number: int) -> str:
    return "test" if number >= 12 else "train"


def several_folders(root: Path) -> dict[str, Any]:
    for number in NUMBERS:
        path = root / f"g{number // 4}" / split_of(number) / class_of(number) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return {"source": [f"folder:{root}/g{group}" for group in range(4)], "group_pattern": "^g."}


def csv_table(root: Path) -> dict[str, Any]:
    root.mkdir()
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "patient"])
        for number in NUMBERS:
            (root / f"{number}.png").write_bytes(png(number))
            writer.writerow([f"{number}.png", class_of(number), "AB"[number >= 12], f"g{number // 4}"])
    columns = {"split": "fold", "group": "patient"}
    return {"source": f"csv:{root}/table.csv", "columns": columns, "split_values": {"A": "train", "B": "test"}}


def hugging_face(root: Path) -> dict[str, Any]:
    root.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["even", "odd"]}}
    for split in ("train", "test"):
        numbers = [number for number in NUMBERS if split_of(number) == split]
        images = [{"bytes": png(number), "path": None} for number in numbers]
        table = pa.table(
            {
                "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                "label": [number % 2 for number in numbers],
                "group": [f"g{number // 4}" for number in numbers],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=5)
    return {"source": f"parquet:{root}"}


def tars(root: Path) -> dict[str, Any]:
    root.mkdir()
    for split in ("train", "test"):
        with TarWriter(str(root / f"{split}-0.tar")) as writer:
            for number in NUMBERS:
                if split_of(number) == split:
                    about = {"kind": class_of(number), "group": f"g{number // 4}"}
                    writer.write({"__key__": f"{number:02d}", "seen.png": png(number), "json": about})
    return {"source": f"wds:{root}/*.tar", "columns": {"label": "json.kind", "group": "json.group"}}


def torchvision_set(root: Path) -> dict[str, Any]:
    (root / "MNIST/raw").mkdir(parents=True)
    for name, part in (("train", NUMBERS[:12]), ("t10k", NUMBERS[12:])):
        pixels = np.stack([np.full((28, 28), 10 * number, np.uint8) for number in part])
        head = struct.pack(">IIII", 0x803, len(part), 28, 28)
        (root / f"MNIST/raw/{name}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = np.array([number % 2 for number in part], np.uint8)
        (root / f"MNIST/raw/{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, len(part)) + labels.tobytes()
        )
    return {"source": "torchvision:MNIST", "download_folder": str(root)}


@pytest.mark.parametrize("make", [several_folders, csv_table, hugging_face, tars, torchvision_set])
def test_from_the_source_to_features(tmp_path: Path, run_stage: RunStage, make: Callable[[Path], dict[str, Any]]):
    shards = run_stage("shard", make(tmp_path / "source"))
    features = run_stage("embed", {"encoder": "pixels", "image_size": 2}, {"shards": shards})
    rows = pq.read_table(features / "features.parquet").to_pylist()
    classes = json.loads((features / "features.json").read_text())["classes"]
    assert len(rows) == len(NUMBERS)
    seen = set()
    for row in rows:
        number = round(row["features"][0] * 25.5)
        seen.add(number)
        assert row["split"] == split_of(number)
        assert row["labels"] == [row["label"]]
        expected = ["0 - zero", "1 - one"][number % 2] if make is torchvision_set else class_of(number)
        assert classes[row["label"]] == expected
        assert row["group"] == (None if make is torchvision_set else f"g{number // 4}")
    assert seen == set(NUMBERS)


@pytest.mark.parametrize("make", [several_folders, csv_table, hugging_face, tars])
def test_a_dry_run_knows_how_many_images_there_are(tmp_path: Path, make: Callable[[Path], dict[str, Any]]):
    """Of tars, from the beginning of the first."""
    recipe = {"steps": {"shards": {"stage": "shard"} | make(tmp_path / "source")}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    store = open_store(tmp_path / "store")
    planned = runner.plan(runner.Planner(store, load_recipe(tmp_path / "recipe.yaml", STAGES), print))
    samples = runner.estimate(store, planned)["shards"].samples
    assert samples == len(NUMBERS) or (make is tars and abs(samples - len(NUMBERS)) < 8)
