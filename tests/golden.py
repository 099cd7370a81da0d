"""Golden outputs of every stage on a small recipe, and the source that made them.

`make golden` writes them anew; it refuses where a step gives other outputs under the old stage versions. Where RECIPE
itself changes, delete golden.json first.
"""

import ast
import hashlib
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sample_images import LONGEST_COPIED, write_images

from pipeline import runner
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages.images import open_shards
from stages.images.index import read_index
from stages.settings import STAGES

TOP = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # what other processors' kernels may do to a few steps of training
GRID = 4
"""Rows and columns of the fields that a picture is summed up by."""

RECIPE = """
name: golden
seed: 5
steps:
  digits: {stage: shard, source: "sklearn:digits"}
  folder: {stage: shard, source: "folder:images", max_long_side: LONGEST_COPIED, max_rejected: 0.2}
  unlabelled: {stage: shard, source: "folder:images", labels: none, max_rejected: 0.2}

  small_views: {stage: augment, shards: digits, preset: natural, image_size: 12, blur: 0.5, contact_sheet_images: 2}
  fused_views: {stage: augment, shards: digits, preset: natural, image_size: 12, blur: 0.5, engine: fused,
                contact_sheet_images: 2}
  large_views: {stage: augment, shards: folder, preset: natural, image_size: 72, contact_sheet_images: 4}
  turned_views: {stage: augment, shards: folder, preset: microscopy, image_size: 48, contact_sheet_images: 4}

  lars: &pretrain
    stage: pretrain
    shards: digits
    views: small_views
    architecture: {backbone: resnet10, width: 4}
    projector: {layers: 2, hidden: 16, dimension: 8}
    optimiser: {name: lars, learning_rate: 0.5}
    epochs: 1
    max_steps: 4
    batch_size: 64
    record_every_steps: 2
  sgd:
    <<: *pretrain
    projector: {layers: 3, hidden: 16, dimension: 8}
    optimiser: {name: sgd, learning_rate: 0.1, scaling: square_root}
    gradient_clip: 1.0
    max_steps: 2
    channels_last: false
  adamw:
    <<: *pretrain
    shards: folder
    views: large_views
    optimiser: {name: adamw, learning_rate: 0.001, scaling: none}
    max_steps: 2
    epochs: 2
    batch_size: 4

  muon:
    <<: *pretrain
    views: fused_views
    smaller_views: [{share: 0.5, image_size: 8}]
    optimiser: {name: muon, learning_rate: 0.02, scaling: none}
    record_every_steps: 1

  tuned_classes:
    stage: finetune
    shards: digits
    views: small_views
    encoder: lars
    loss: {name: arcface, margin_ramp: 0.5}
    label_fraction: 0.1
    batch_size: 32
    max_steps: 3
    record_every_steps: 1
  tuned_pairs:
    stage: finetune
    shards: folder
    encoder: adamw
    projector_layers: 1
    loss: {name: triplet, margin: soft}
    freeze: layer1
    classes_per_batch: 2
    images_per_class: 3
    max_steps: 2

  embed: {stage: embed, shards: digits, encoder: lars}
  embed_tuned: {stage: embed, shards: digits, encoder: tuned_classes}
  embed_random: {stage: embed, shards: digits, encoder: random, architecture: {backbone: resnet10, width: 4}}
  embed_pixels: {stage: embed, shards: digits, encoder: pixels, image_size: 8}
  embed_unlabelled: {stage: embed, shards: unlabelled, encoder: adamw}
  embed_unlabelled_pixels: {stage: embed, shards: unlabelled, encoder: pixels, image_size: 72}

  probe: &probe
    stage: probe
    features: embed
    penalties: {smallest: 1e-3, largest: 1e0, count: 3}  # 1e-4 turns on rounding: an image more on some processors
    label_fractions: [0.1]
    subsets: [2]
    folds: 2
    bootstrap_samples: 100
  probe_random: {<<: *probe, features: embed_random}
  probe_tuned: {<<: *probe, features: embed_tuned}
  probe_pixels: {<<: *probe, features: embed_pixels}

  pseudo:
    stage: pseudo_label
    features: embed_pixels
    label_fraction: 0.1
    per_class: 20  # so many that no image at the threshold is among them
    include_test: true
    penalties: {smallest: 1e-2, largest: 1e0, count: 3}

  retrieve: {stage: retrieve, features: embed_pixels, bootstrap_samples: 100}
  retrieve_train: {stage: retrieve, features: embed_pixels, gallery: train, bootstrap_samples: 100}

  report: {stage: report, of: [probe, probe_random, probe_pixels, probe_tuned], neighbour_queries: 2}
  report_retrieval: {stage: report, of: [retrieve, probe_pixels, retrieve_train], neighbour_queries: 2}
  report_unlabelled: {stage: report, of: [embed_unlabelled, embed_unlabelled_pixels], neighbour_queries: 2}
""".replace("LONGEST_COPIED", str(LONGEST_COPIED))

STEPS: dict[str, str] = {name: values["stage"] for name, values in yaml.safe_load(RECIPE)["steps"].items()}
"""The stage of every step."""


def make_outputs(folder: Path) -> dict[str, Any]:
    """Run the recipe in a store below `folder` and sum up, step by step, what was written."""
    write_images(folder / "images")
    path = folder / "golden.yaml"
    path.write_text(RECIPE.replace("folder:images", f"folder:{folder / 'images'}"))
    store = Store(folder / "store")
    finished = runner.run(runner.Planner(store, load_recipe(path, STAGES), print), (), lambda _: None)
    files = {one.planned.step.name: store.files(one.record.stage, one.record.digest) for one in finished}
    return {step: SUMMARIES[STEPS[step]](place) for step, place in files.items()}


def _shard(files: Path) -> dict[str, Any]:
    """Exact pixels of lossless images; JPEG images by their fields, since decoders differ a little."""
    summary = json.loads((files / "shards.json").read_text())
    for split in summary["splits"].values():
        del split["bytes"]
    rejected = [json.loads(line) for line in (files / "rejected.jsonl").read_text().splitlines()]
    return {"summary": summary, "rejected": rejected} | {split: _split(files, split) for split in summary["splits"]}


def _split(files: Path, split: str) -> dict[str, Any]:
    shards = open_shards(files, split)
    batch = shards.batch(range(len(shards)))
    index = read_index(files, split)
    is_jpeg = index["format"].to_numpy(zero_copy_only=False) == "jpg"
    sizes = batch.sizes.tolist()
    return {
        "keys": _sha("\n".join(shards.keys).encode()),
        "labels": _sha(batch.labels.numpy().tobytes()),
        "lossless": _sha(batch.images.numpy()[~is_jpeg].tobytes()),
        "jpeg": {
            shards.keys[row]: _fields(batch.images[row, :, : sizes[row][0], : sizes[row][1]].permute(1, 2, 0).numpy())
            for row in np.flatnonzero(is_jpeg)
        },
    }


def _augment(files: Path) -> dict[str, Any]:
    sheet = np.asarray(Image.open(files / "contact_sheet.png"))
    return {"policy": json.loads((files / "policy.json").read_text()), "sheet": _fields(sheet)}


def _fields(picture: np.ndarray) -> dict[str, Any]:
    """Size, mean and sharpness of the fields of a picture, uint8 [H, W, 3]: moves with crops, turns, colours, blur."""
    values = picture.astype(np.float64)
    fields = [field for row in np.array_split(values, GRID) for field in np.array_split(row, GRID, axis=1)]
    return {
        "size": list(picture.shape),
        "mean": [[round(value, 2) for value in field.mean(axis=(0, 1)).tolist()] for field in fields],
        "sharpness": [round(float(np.abs(np.diff(field, axis=1)).mean()), 2) for field in fields],
    }


def _trained(files: Path) -> dict[str, Any]:
    weights = {
        f"{path.stem}.{name}": value
        for path in sorted(files.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
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
        "labels": {key: labels.get(key) for key in ("top1", "sd", "labels")},
    }


def _pseudo_label(files: Path) -> dict[str, Any]:
    metrics = json.loads((files / "metrics.json").read_text())
    found = {key: metrics["out_of_fold"][key] for key in ("images", "precision", "coverage")}
    table = pq.read_table(files / "pseudo_labels.parquet")
    return {
        "threshold": metrics["threshold"],
        "penalty": metrics["penalty"],
        "out_of_fold": found,
        "labelled": metrics["counts"]["labelled"],
        "given": [one["train"] + one["test"] for one in metrics["by_class"]],
        "images": metrics["images"],
        "columns": table.column_names,
    }


def _retrieve(files: Path) -> dict[str, Any]:
    metrics = json.loads((files / "metrics.json").read_text())
    del metrics["verification"]["roc"]
    table = pq.read_table(files / "neighbours.parquet")
    return metrics | {"columns": table.column_names, "neighbours": len(table["neighbours"][0])}


def _report(files: Path) -> dict[str, Any]:
    """Every number of report.json; of the page its text without numbers, with style and script as they are."""
    parts = re.split(r"(<style>.*?</style>|<script>.*?</script>)", (files / "report.html").read_text(), flags=re.DOTALL)
    page = "".join(part if place % 2 else _masked(part) for place, part in enumerate(parts))
    return {"numbers": _mask_text(json.loads((files / "report.json").read_text())), "page": _sha(page.encode())}


def _mask_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mask_text(item) for key, item in value.items() if key != "bytes"}  # JPEG encoders differ
    if isinstance(value, list):
        return [_mask_text(item) for item in value]
    return _masked(value) if isinstance(value, str) else value


def _masked(text: str) -> str:
    """Without pictures, digests and numbers."""
    text = re.sub(r"data:image/[^\"]*", "data:image", text)
    text = re.sub(r"(?<![\w.])[0-9a-f]{8,}(?!\w)", "#", text)
    return re.sub(r"[-+\N{MINUS SIGN}]?\d[\d.,]*(e[-+]?\d+)?", "#", text)


SUMMARIES = {
    "shard": _shard,
    "augment": _augment,
    "pretrain": _trained,
    "finetune": _trained,
    "embed": _embed,
    "probe": _probe,
    "pseudo_label": _pseudo_label,
    "retrieve": _retrieve,
    "report": _report,
}


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def source_files(stage: str) -> list[Path]:
    """The stage's file, its settings, every module of stages/ that these import, and what lies beside those modules."""
    pending = [TOP / "stages" / f"{stage}.py", TOP / "stages" / "settings" / f"{stage}.py"]
    modules: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in modules:
            continue
        modules.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stages."):
                place = TOP / node.module.replace(".", "/")
                candidates = [place.with_suffix(".py"), place / "__init__.py"]
                candidates += [place / f"{alias.name}.py" for alias in node.names]
                pending += [one for one in candidates if one.is_file()]
    packages = {path.parent for path in modules} - {TOP / "stages"}
    beside = {path for package in packages for path in package.rglob("*") if path.suffix not in (".py", ".pyc")}
    return sorted(modules | {path for path in beside if path.is_file()})


def source_hash(stage: str) -> str:
    """Over everything that the stage is made of, templates included."""
    return _sha(
        "\n".join(f"{path.relative_to(TOP)} {_sha(path.read_bytes())}" for path in source_files(stage)).encode()
    )


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


def verdict(step: str, golden: dict[str, Any] | None, outputs: Any) -> str:
    """What is wrong with a step, in words; empty if its outputs are the golden ones."""
    stage = STEPS[step]
    if golden is None:
        return f"step {step} has no golden outputs: make golden"
    version = STAGES[stage].version
    moved = "" if source_hash(stage) == golden["source_sha256"] else "its source moved, and "
    found = differences(golden["outputs"], json.loads(json.dumps(outputs)))
    if version != golden["version"]:
        return f"stage {stage} has version {version}, golden.json has {golden['version']}: make golden"
    if found:
        lines = "; ".join(found[:3])
        return f"step {step} of stage {stage}: {moved}its outputs changed ({lines}): raise stage_version, make golden"
    return ""


def main() -> int:
    torch.set_num_threads(1)
    before = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = make_outputs(Path(folder))
    for step, found in outputs.items():
        problem = verdict(step, before.get(step), found)
        if "raise stage_version" in problem:
            print(problem, file=sys.stderr)
            return 1
    golden = {
        step: {
            "stage": STEPS[step],
            "version": STAGES[STEPS[step]].version,
            "source_sha256": source_hash(STEPS[step]),
            "outputs": found,
        }
        for step, found in outputs.items()
    }
    text = json.dumps(golden, indent=1, sort_keys=True)
    # A list of numbers on one line.
    GOLDEN.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
