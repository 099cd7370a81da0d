"""Artifacts as the stages before a report write them, from scikit-learn's digits: small, real and quick to make."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import RunStage
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

from pipeline.run import Ancestor
from pipeline.settings import changed_subset, hashed_subset
from stages.evaluation import Fair, ProbeLabels, labels_digest
from stages.images.encode import Storage
from stages.images.index import write_index, write_summary
from stages.images.packing import make_chunks
from stages.images.packing_processes import pack
from stages.settings import STAGES
from stages.sources.candidates import Candidate

IMAGES, TEST = 480, 120
PENALTIES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)


@dataclass
class Store:
    """Folders of artifacts below `root`, and the ancestors that a Run would list."""

    root: Path
    ancestors: list[Ancestor] = field(default_factory=list)

    def add(
        self, stage: str, step: str, settings: dict[str, Any], inputs: dict[str, Any], seed: int | None = 0
    ) -> Path:
        """Register an artifact; returns the folder to write its files to."""
        number = len(self.ancestors) + 1
        files = self.root / f"{number}-{step}" / "files"
        files.mkdir(parents=True)
        model = STAGES[stage].settings
        typed = model.model_validate_json(json.dumps(dict.fromkeys(inputs, "named") | settings), strict=True)
        digest = hashlib.sha256(f"{number} {step}".encode()).hexdigest()
        hashed, changed = hashed_subset(typed), changed_subset(typed)
        self.ancestors.append(Ancestor(step, stage, 1, digest[::-1], digest, seed, hashed, changed, inputs, files))
        return files

    def digest(self, step: str) -> str:
        return next(one.digest for one in self.ancestors if one.step == step)

    def files(self, *steps: str) -> list[Path]:
        return [one.files for step in steps for one in self.ancestors if one.step == step]


def digit_store(root: Path, classes: Sequence[str] | None = None, *, labelled: bool = True) -> Store:
    """Everything before the report of a recipe with pixels, a random encoder and a pretrained one.

    Args:
        classes: names of the ten digits.
        labelled: False leaves out labels and probes.
    """
    names = list(classes or [f"digit {number}" for number in range(10)])
    values, targets = load_digits(return_X_y=True)
    images, labels = np.asarray(values[:IMAGES]).reshape(-1, 8, 8) / 16, np.asarray(targets[:IMAGES])
    train = np.arange(IMAGES) < IMAGES - TEST
    store = Store(root)
    write_shards(store, images, labels if labelled else None, train, names if labelled else [])
    write_views(store)
    write_pretraining(store, labelled=labelled)
    pixels = images.reshape(IMAGES, -1)
    generator = np.random.default_rng(0)
    random = np.maximum(pixels @ generator.normal(size=(64, 32)), 0)
    separated = separate(pixels, labels)
    learned = np.maximum(separated @ generator.normal(size=(separated.shape[1], 32)), 0)
    for step, kind, features in (
        ("features", "pretrained", learned),
        ("features_random", "random", random),
        ("features_pixels", "pixels", pixels),
    ):
        shown = labels if labelled else np.full(IMAGES, -1)
        write_features(store, step, kind, features, shown, train, names if labelled else [])
        if labelled:
            write_probe(store, step.replace("features", "probe"), step, kind, features, labels, train, names)
    return store


def separate(pixels: Any, labels: Any) -> Any:
    """Features that tell classes apart better than pixels do."""
    return LinearDiscriminantAnalysis().fit(pixels[::2], labels[::2]).transform(pixels)


def write_shards(
    store: Store,
    images: NDArray[np.float64],
    labels: NDArray[np.int64] | None,
    train: NDArray[np.bool_],
    names: list[str],
) -> None:
    files = store.add("shard", "shards", {"source": "folder:elsewhere"}, {"source": "foreign:" + "f" * 64}, None)
    pictures = store.root / "pictures"
    pictures.mkdir()
    candidates = []
    for number, image in enumerate(images):
        key = f"{number:04d}.png"
        pixels = np.repeat((255 * image).astype(np.uint8)[..., None], 3, axis=2).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(pictures / key)
        classes = (names[labels[number]],) if labels is not None else ()
        candidates.append(Candidate(key, key, "train" if train[number] else "test", classes))
    chunks = make_chunks(
        candidates,
        ["train" if one else "test" for one in train],
        names,
        root=pictures,
        storage=Storage(512, 1024, 95, (255, 255, 255)),
        images_per_shard=200,
        folder=files,
    )
    write_index(files, [one.rows for one in pack(chunks, 1, lambda _: None)])
    splits = {}
    for split, members in (("train", train), ("test", ~train)):
        if members.any():
            counts = [] if labels is None else np.bincount(labels[members], minlength=len(names)).tolist()
            samples = int(members.sum())
            size = {"samples": samples, "bytes": 300 * samples, "max_height": 32, "max_width": 32}
            splits[split] = size | {"class_counts": counts}
    rejected = [
        {"path": f"broken/<img src=x onerror=alert({number})>.jpg", "reason": "truncated"} for number in range(12)
    ]
    write_summary(
        files,
        {
            "source_kind": "folder",
            "classes": names,
            "splits": splits,
            "channels": 3,
            "groups": None,
            "several_labels": False,
            "near_duplicates": None,
            "tile": None,
            "images_in": len(images) + len(rejected),
            "samples_out": len(images),
            "rejected": len(rejected),
            "copied": len(images),
            "encoded": 0,
            "statistics": {"mean": [0.3] * 3, "std": [0.37] * 3, "pixels": 1024 * int(train.sum())},
        },
    )
    (files / "rejected.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rejected))


def write_views(store: Store) -> None:
    files = store.add("augment", "views", {"preset": "text"}, {"shards": store.digest("shards")})
    policy = {"image_size": 32, "crop_area": [0.4, 1.0], "horizontal_flip": 0.0, "antialias": True, "mean": [0.3] * 3}
    (files / "policy.json").write_text(json.dumps(policy))
    sheet = np.random.default_rng(1).integers(0, 255, size=(170, 340, 3), dtype=np.uint8)
    Image.fromarray(sheet).save(files / "contact_sheet.png")


def write_pretraining(store: Store, step: str = "simclr", *, labelled: bool = True) -> None:
    inputs = {"shards": store.digest("shards"), "views": store.digest("views")}
    settings = {"epochs": 30, "architecture": {"backbone": "resnet10", "width": 8}, "workers": 1}
    files = store.add("pretrain", step, settings, inputs)
    card = {
        "format": 1,
        "kind": "pretrain",
        "architecture": {"backbone": "resnet10", "width": 8, "small_stem_up_to": 64, "pretrained": False},
        "embedding_size": 64,
        "image_size": 32,
        "mean": [0.3] * 3,
        "std": [0.3] * 3,
        "interpolation": "bilinear",
        "antialias": True,
        "projector": {"layers": 2, "hidden": 512, "dimension": 128},
        "parameters": 79_000,
        "weights": {"source": "initialised", "licence": None},
    }
    (files / "model.json").write_text(json.dumps(card))
    lines = []
    for number in range(1, 901):
        epoch = number / 30
        falling = float(np.exp(-epoch / 8))
        line = {"step": number, "epoch": epoch, "loss": 2 + 3 * falling + 0.05 * np.sin(number)}
        line |= {"contrastive_accuracy": 0.9 - 0.8 * falling, "learning_rate": 0.5 * (1 + np.cos(np.pi * epoch / 30))}
        line |= {"gradient_norm": 1 + falling, "alignment": 0.4 + 0.5 * falling, "uniformity": -3.2 + falling}
        lines.append(line | ({"probe_accuracy": 0.95 - 0.7 * falling} if labelled else {}))
        if number % 150 == 0:
            health = {"rankme": 60 - 40 * falling, "rankme_share": (60 - 40 * falling) / 128, "rankme_samples": 1280}
            lines.append({"step": number, "epoch": epoch} | health)
    (files / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_features(
    store: Store,
    step: str,
    kind: str,
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    train: NDArray[np.bool_],
    names: list[str],
    maker: str = "simclr",
    labels_seen: Sequence[dict[str, Any]] = (),
    label_lists: Sequence[Sequence[int]] | None = None,
) -> None:
    """As the stage embed does.

    Args:
        maker: the step that made the encoder, where `kind` is `pretrained`.
    """
    inputs = {"shards": store.digest("shards")}
    settings = {} if kind == "pretrained" else {"encoder": kind}
    if kind == "pretrained":
        inputs["encoder"] = store.digest(maker)
    files = store.add("embed", step, settings, inputs, 0 if kind == "random" else None)
    splits = ["train" if one else "test" for one in train]
    card = {
        "format": 1,
        "encoder": encoder_card(kind, labels_seen),
        "dimension": features.shape[1],
        "classes": names,
        "splits": {split: splits.count(split) for split in dict.fromkeys(splits)},
    }
    (files / "features.json").write_text(json.dumps(card))
    flat = pa.array(features.astype(np.float32).ravel())
    columns = {
        "id": pa.array(range(len(splits)), pa.int64()),
        "key": [f"{number:04d}.png" for number in range(len(splits))],
        "split": splits,
        "label": pa.array(labels, pa.int32()),
        "labels": pa.array(label_lists or [[one] if one >= 0 else [] for one in labels], pa.list_(pa.int32())),
        "group": pa.nulls(len(splits), pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(flat, features.shape[1]),
    }
    pq.write_table(pa.table(columns), files / "features.parquet", row_group_size=100)


def encoder_card(kind: str, labels_seen: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    stage = None if kind != "pretrained" else "finetune" if labels_seen else "pretrain"
    name = {"pixels": "pixels", "timm": "timm:resnet18"}.get(kind, "resnet10")
    card = {"kind": kind, "name": name, "stage": stage, "architecture": None, "image_size": 32}
    return card | {"labels_seen": list(labels_seen)}


def write_probe(
    store: Store,
    step: str,
    features_step: str,
    kind: str,
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    train: NDArray[np.bool_],
    names: list[str],
    labels_seen: Sequence[dict[str, Any]] = (),
) -> None:
    files = store.add("probe", step, {"max_iterations": 200}, {"features": store.digest(features_step)})
    scaled = (features - features[train].mean(axis=0)) / np.maximum(features[train].std(axis=0), 1e-9)
    seen: Part = (scaled[train], labels[train])
    asked: Part = (scaled[~train], labels[~train])
    model = LogisticRegression(C=1.0, max_iter=300).fit(*seen)
    predicted = model.predict(asked[0])
    right = predicted == asked[1]
    top1 = float(right.mean())
    half = 1.96 * float(np.sqrt(top1 * (1 - top1) / len(right)))
    curve = {"10pct": _few_labels(seen, asked, 36, labels_seen), "100pct": _all_labels(seen, asked, top1, labels_seen)}
    metrics = {
        "linear": {
            "top1": top1,
            "top1_ci95": [max(top1 - half, 0), min(top1 + half, 1)],
            "top5": 0.99,
            "mean_per_class": top1,
            "penalty": 1e-2,
            "penalty_at_edge": False,
            "path": [{"penalty": one, "accuracy": top1 - 0.02 * abs(np.log10(one) + 2)} for one in PENALTIES],
            "confusion": confusion_matrix(asked[1], predicted, labels=range(len(names))).tolist(),
        },
        "knn": {str(k): {"top1": _neighbours(seen, asked, k), "k_used": k} for k in (20, 200)},
        "label_curve": curve,
        "protocol": {
            "train": int(train.sum()),
            "test": int((~train).sum()),
            "groups": None,
            "largest_class": int(np.bincount(labels[train]).max()),
            "held_out": 36,
            "standardised": "train",
            "neighbour_temperature": 0.1,
            "bootstrap_samples": 1000,
            "max_iterations": 200,
            "converged": True,
        },
        "encoder": encoder_card(kind, labels_seen),
        "classes": names,
    }
    (files / "metrics.json").write_text(json.dumps(metrics))
    columns = {
        "id": np.flatnonzero(~train),
        "key": np.flatnonzero(~train).astype(str),
        "group": np.flatnonzero(~train),
        "label": asked[1].astype(np.int32),
        "predicted": predicted.astype(np.int32),
    }
    pq.write_table(pa.table(columns), files / "predictions.parquet")


Part = tuple[Any, Any]  # features [N, D] and labels [N]


def _neighbours(seen: Part, asked: Part, k: int) -> float:
    return float(KNeighborsClassifier(min(k, len(seen[1])), metric="cosine").fit(*seen).score(*asked))


def _at_hand(seen: Part, labels_seen: Sequence[dict[str, Any]]) -> ProbeLabels:
    count = len(seen[1])
    keys = np.array([str(number) for number in range(count)])
    return ProbeLabels(seen[1], np.arange(count), keys, [str(one) for one in range(1000)], 0, labels_seen)


def _few_labels(seen: Part, asked: Part, labels: int, labels_seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Three subsets, or those that are fair to an encoder that saw labels."""
    fair = _at_hand(seen, labels_seen).fair(labels / len(seen[1]), 3)
    linear, near = [], []
    for subset in fair.indices:
        rows = np.random.default_rng(subset).permutation(len(seen[1]))[:labels]
        part = (seen[0][rows], seen[1][rows])
        linear.append(LogisticRegression(C=0.1, max_iter=300).fit(*part).score(*asked))
        near.append(_neighbours(part, asked, 5))
    knn = {k: _scores(near) for k in ("20", "200")}
    return _scores(linear) | {"knn": knn} | _entry(fair, labels, 0.1)


def _all_labels(seen: Part, asked: Part, top1: float, labels_seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    fair = _at_hand(seen, labels_seen).fair(1, 1)
    knn = {str(k): _scores([_neighbours(seen, asked, k)]) for k in (20, 200)}
    return _scores([top1]) | {"knn": knn} | _entry(fair, len(seen[1]), 1e-2)


def _scores(values: list[float]) -> dict[str, Any]:
    spread = {"sd": float(np.std(values, ddof=1))} if len(values) > 1 else {}
    return {"top1": float(np.mean(values)) if values else None} | spread | {"by_subset": [float(one) for one in values]}


def _entry(fair: Fair, labels: int, penalty: float) -> dict[str, Any]:
    return {
        "subsets": len(fair.indices),
        "subset_indices": list(fair.indices),
        "encoder_saw": fair.saw,
        "encoder_saw_exactly": fair.exact,
        "labels": labels,
        "penalties": [penalty] * len(fair.indices),
        "fixed_penalty": False,
    }


def add_fine_tuning(
    store: Store,
    loss: str,
    fraction: float,
    start: str = "simclr",
    step: str | None = None,
    **settings: Any,
) -> str:
    """A fine-tuning of digits, its features and its probe; returns the probe's step.

    Args:
        start: a step, `random` or `timm:NAME`.
    """
    name = step or f"{loss}_{start}_{100 * fraction:g}".replace(":", "_")
    inputs = {"shards": store.digest("shards")}
    given: dict[str, Any] = {"loss": {"name": loss}, "label_fraction": fraction, **settings}
    if any(one.step == start for one in store.ancestors):
        inputs["encoder"] = store.digest(start)
    else:
        given["encoder"] = start
    files = store.add("finetune", name, given, inputs)
    train = np.arange(IMAGES) < IMAGES - TEST
    values, targets = (np.asarray(one)[:IMAGES] for one in load_digits(return_X_y=True))
    at_hand = _at_hand((None, targets[train]), [])
    rows = at_hand.rows(fraction, 0)
    digest = labels_digest(map(str, rows), map(str, targets[train][rows]))
    entry = {"loss": loss, "fraction": fraction, "subset": 0, "seed": 0, "samples": len(rows), "digest": digest}
    seen = [entry]
    (files / "model.json").write_text(json.dumps({"labels_seen": seen, "head": None}))
    lines = [
        {"step": 10, "epoch": 1.0, "loss": 2.0, "accuracy": 0.4, "learning_rate": 0.05, "gradient_norm": 3.0},
        {"step": 20, "epoch": 2.0, "loss": 0.25, "accuracy": 0.975, "learning_rate": 0.0, "gradient_norm": 1.0},
    ]
    (files / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pixels, labels = values / 16, targets
    separated = separate(pixels, labels)
    noise = np.random.default_rng(len(store.ancestors)).normal(size=(IMAGES, 32))
    mixed = separated @ np.random.default_rng(1).normal(size=(separated.shape[1], 32)) + noise / fraction**0.5
    classes = [f"digit {number}" for number in range(10)]
    write_features(store, f"features_{name}", "pretrained", mixed, labels, train, classes, name, seen)
    write_probe(store, f"probe_{name}", f"features_{name}", "pretrained", mixed, labels, train, classes, seen)
    return f"probe_{name}"


def add_retrieval(
    store: Store, run_stage: RunStage, features_step: str, step: str = "", seed: int = 0, **settings: Any
) -> str:
    """A retrieval of features by the stage itself; returns its step."""
    name = step or features_step.replace("features", "retrieve")
    made = run_stage(
        "retrieve", {"bootstrap_samples": 100} | settings, {"features": store.files(features_step)[0]}, seed
    )
    files = store.add("retrieve", name, settings, {"features": store.digest(features_step)}, seed)
    shutil.copytree(made, files, dirs_exist_ok=True)
    return name
