"""Golden outputs of every stage on a tiny recipe, and the source they were made by.

`make golden` writes them anew; it refuses where a stage gives other outputs under its old version.
"""

import ast
import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline import runner
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages.images import open_shards
from stages.settings import STAGES

TOP = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # what other processors' kernels may do to a few steps of training

RECIPE = """
name: golden
seed: 5
steps:
  shard: {stage: shard, source: "sklearn:digits"}
  augment: {stage: augment, shards: shard, preset: natural, image_size: 12, blur: 0.5, contact_sheet_images: 2}
  pretrain:
    stage: pretrain
    shards: shard
    views: augment
    architecture: {backbone: resnet10, width: 4}
    projector: {layers: 2, hidden: 16, dimension: 8}
    optimiser: {name: lars, learning_rate: 0.5}
    epochs: 1
    max_steps: 4
    batch_size: 64
    record_every_steps: 2
  embed: {stage: embed, shards: shard, encoder: pretrain}
  probe:
    stage: probe
    features: embed
    penalties: {smallest: 1e-4, largest: 1e0, count: 3}
    label_fractions: [0.1]
    subsets: [2]
    folds: 2
    bootstrap_samples: 100
  report: {stage: report, of: [probe]}
"""


def make_outputs(folder: Path) -> dict[str, Any]:
    """Run the recipe in a store below `folder` and sum up what each stage wrote."""
    path = folder / "golden.yaml"
    path.write_text(RECIPE)
    store = Store(folder / "store")
    finished = runner.run(store, load_recipe(path, STAGES), announce=lambda _: None)
    files = {one.planned.step.name: store.files(one.record.stage, one.record.digest) for one in finished}
    return {name: SUMMARIES[name](place) for name, place in files.items()}


def _shard(files: Path) -> dict[str, Any]:
    summary = json.loads((files / "shards.json").read_text())
    batches = {
        split: open_shards(files, split).batch(range(entry["samples"])) for split, entry in summary["splits"].items()
    }
    return {
        "summary": summary | {"splits": {split: entry["samples"] for split, entry in summary["splits"].items()}},
        "pixels": {split: _sha(batch.images.numpy()) for split, batch in batches.items()},
        "labels": {split: _sha(batch.labels.numpy()) for split, batch in batches.items()},
    }


def _augment(files: Path) -> dict[str, Any]:
    sheet = np.asarray(Image.open(files / "contact_sheet.png"), dtype=np.float64)
    return {"policy": json.loads((files / "policy.json").read_text()), "sheet": [*sheet.shape, sheet.mean()]}


def _pretrain(files: Path) -> dict[str, Any]:
    weights = load_file(files / "encoder.safetensors")
    return {
        "card": json.loads((files / "model.json").read_text()),
        "metrics": [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()],
        "norms": {name: float(torch.linalg.vector_norm(value.double())) for name, value in weights.items()},
    }


def _embed(files: Path) -> dict[str, Any]:
    table = pq.read_table(files / "features.parquet")
    features = np.stack(table["features"].to_numpy())
    return {
        "card": json.loads((files / "features.json").read_text()),
        "ids": [int(table["id"][0].as_py()), int(table["id"][-1].as_py())],
        "mean": float(features.mean()),
        "norms": [float(value) for value in np.linalg.norm(features[:5], axis=1)],
    }


def _probe(files: Path) -> dict[str, Any]:
    metrics = json.loads((files / "metrics.json").read_text())
    linear, labels = metrics["linear"], metrics["label_curve"]["10pct"]
    return {
        "linear": {key: linear[key] for key in ("top1", "top1_ci95", "penalty")},
        "knn": {k: entry["top1"] for k, entry in metrics["knn"].items()},
        "labels": {key: labels[key] for key in ("top1", "sd", "labels")},
    }


def _report(files: Path) -> dict[str, Any]:
    report = json.loads((files / "report.json").read_text())
    return {"keys": sorted(report), "columns": report["table"]["columns"], "rows": len(report["table"]["rows"])}


SUMMARIES = {
    "shard": _shard,
    "augment": _augment,
    "pretrain": _pretrain,
    "embed": _embed,
    "probe": _probe,
    "report": _report,
}


def _sha(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def source_hash(stage: str) -> str:
    """Over the stage's file, its settings, and every module of stages/ that these import."""
    pending = [TOP / "stages" / f"{stage}.py", TOP / "stages" / "settings" / f"{stage}.py"]
    seen: dict[str, str] = {}
    while pending:
        path = pending.pop()
        name = path.relative_to(TOP).as_posix()
        if name in seen:
            continue
        seen[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stages."):
                place = TOP / node.module.replace(".", "/")
                candidates = [place.with_suffix(".py"), place / "__init__.py"]
                candidates += [place / f"{alias.name}.py" for alias in node.names]
                pending += [one for one in candidates if one.is_file()]
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()


def differences(golden: Any, found: Any, place: str = "") -> list[str]:
    """Where two outputs differ, floats by more than the tolerance."""
    if isinstance(golden, float) and isinstance(found, int | float):
        same = math.isclose(golden, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        return [] if same else [f"{place}: {golden} -> {found}"]
    if isinstance(golden, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted(golden.keys() | found.keys())
            for line in differences(golden.get(key), found.get(key), f"{place}.{key}")
        ]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        pairs = enumerate(zip(golden, found, strict=True))
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{place}[{index}]")]
    return [] if golden == found else [f"{place}: {golden} -> {found}"]


def verdict(stage: str, golden: dict[str, Any] | None, outputs: Any) -> str:
    """What is wrong with a stage, in words; empty if its outputs are the golden ones."""
    if golden is None:
        return f"stage {stage} has no golden outputs: make golden"
    version = STAGES[stage].version
    moved = "" if source_hash(stage) == golden["source_sha256"] else "its source moved, and "
    found = differences(golden["outputs"], json.loads(json.dumps(outputs)))
    if version != golden["version"]:
        return f"stage {stage} has version {version}, golden.json has {golden['version']}: make golden"
    if found:
        return f"stage {stage}: {moved}its outputs changed ({'; '.join(found[:3])}): raise stage_version, make golden"
    return ""


def main() -> int:
    torch.set_num_threads(1)
    before = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = make_outputs(Path(folder))
    for stage, found in outputs.items():
        problem = verdict(stage, before.get(stage), found)
        if "raise stage_version" in problem:
            print(problem, file=sys.stderr)
            return 1
    golden = {
        stage: {"version": STAGES[stage].version, "source_sha256": source_hash(stage), "outputs": found}
        for stage, found in outputs.items()
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
