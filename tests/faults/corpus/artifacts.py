"""Hostile artifacts of the other stages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash

from faults import hostile_files as files
from faults.corpus.forging import AUGMENT, PRETRAIN, PROBE, SEARCH, forged, put, rewrite, set_column, set_json
from faults.corpus.inputs import Command, Hostile
from faults.world import change_json


def make_artifacts() -> list[Hostile]:
    objects = put("index.faiss", files.pickled)
    rows = "gallery.parquet"

    def indexed(**values: Any) -> Callable[[Path, Path], Any]:
        def edit(folder: Path, _: Path) -> None:
            card = json.loads((folder / "metrics.json").read_text())
            change_json(folder / "metrics.json", index=card["index"] | values)

        return edit

    def of(
        step: str, command: Command, *cases: tuple[str, Callable[[Path, Path], Any], tuple[str, ...]]
    ) -> list[Hostile]:
        return [Hostile(name, forged(step, edit, command), told, needs_store=True) for name, edit, told in cases]

    return [
        *of(
            "shards",
            AUGMENT,
            ("shards.json: another format", set_json("shards.json", format=99), ("shards.json", "format 99")),
            ("shards.json: nests too deep", put("shards.json", lambda _: b"[" * 100_000), ("shards.json",)),
            ("shards.json: a pickle", put("shards.json", files.pickled), ("shards.json",)),
            (
                "shards.json: classes that are no texts",
                set_json("shards.json", classes=[{"a": 1}]),
                ("shards.json", "classes"),
            ),
            (
                "shards.json: images larger than memory",
                set_json("shards.json", splits={"train": {"samples": 12, "max_height": 2**50, "max_width": 1}}),
                ("shards.json", "splits.train.max_height"),
            ),
            (
                "index: a shard above",
                set_column("index.parquet", "shard", "../../../x"),
                ("index.parquet", "shard: '../../../x'"),
            ),
            (
                "index: a shard elsewhere",
                set_column("index.parquet", "shard", "/etc/passwd"),
                ("index.parquet", "/etc/passwd"),
            ),
            (
                "index: a format that is a pickle",
                set_column("index.parquet", "format", "pyd"),
                ("index.parquet", "format: 'pyd'"),
            ),
            (
                "index: an image larger than its split",
                set_column("index.parquet", "height", 2**30),
                ("index.parquet", "height"),
            ),
            ("index: a label that is none", set_column("index.parquet", "label", 77), ("index.parquet", "label")),
            (
                "index: an offset below zero",
                set_column("index.parquet", "offset", -(2**40)),
                ("index.parquet", "offset"),
            ),
            ("index: a pickle", put("index.parquet", files.pickled), ("index.parquet", "cannot read")),
            (
                "shard: an .npy of objects as image",
                _npy_in_shard,
                (".tar: sample 0", "is damaged", "cannot be decoded"),
            ),
        ),
        *of(
            "features",
            PROBE,
            ("features.json: another format", set_json("features.json", format=99), ("features.json", "format")),
            (
                "features.json: a dimension that is none",
                set_json("features.json", dimension="x"),
                ("features.json", "dimension"),
            ),
            (
                "features.json: another dimension",
                set_json("features.json", dimension=3),
                ("features.parquet", "features"),
            ),
            ("features.json: nests too deep", put("features.json", lambda _: b"[" * 100_000), ("features.json",)),
            ("features: a pickle", put("features.parquet", files.pickled), ("features.parquet", "cannot read")),
            ("features: an .npy of objects", put("features.parquet", files.npy_of_objects), ("features.parquet",)),
        ),
        *of(
            "found",
            [*SEARCH, "toy/found"],
            ("vector index: a pickle", objects, ("index.faiss", "IHNf")),
            (
                "vector index: cut short",
                rewrite("index.faiss", lambda old: old[:200]),
                ("index.faiss", "cannot read it"),
            ),
            (
                "vector index: more vectors than memory",
                rewrite("index.faiss", lambda old: old[:8] + (2**60).to_bytes(8, "little") + old[16:]),
                ("index.faiss",),
            ),
            (
                "vector index: of another kind",
                rewrite("index.faiss", lambda old: b"IxPT" + old[4:]),
                ("index.faiss", "IHNf"),
            ),
            (
                "vectors: a pickle",
                put("vectors.safetensors", files.pickled),
                ("vectors.safetensors", "no safetensors"),
            ),
            ("vectors: a name twice", rewrite("vectors.safetensors", files.doubled), ("vectors.safetensors", "twice")),
            ("rows of an index: a pickle", put(rows, files.pickled), (rows, "cannot read")),
            ("metrics.json: an import path as index", indexed(kind="os.system"), ("metrics.json", "index.kind")),
            (
                "metrics.json: an effort without end",
                indexed(parameters={"efSearch": 2**60}),
                ("metrics.json", "efSearch"),
            ),
        ),
        *of(
            "views",
            PRETRAIN,
            ("policy.json: an unknown field", set_json("policy.json", run="os.system"), ("policy.json", "run")),
            ("policy.json: a pickle", put("policy.json", files.pickled), ("policy.json",)),
        ),
    ]


def _npy_in_shard(folder: Path, canary: Path) -> None:
    """The bytes of an image become an array of objects, with a hash that fits."""
    table = pq.read_table(folder / "index.parquet")
    row = table.slice(0, 1).to_pylist()[0]
    content = files.npy_of_objects(canary)
    shard_file = folder / row["shard"]
    old = shard_file.read_bytes()
    shard_file.write_bytes(old[: row["offset"]] + content + old[row["offset"] + len(content) :])
    for column, value in (("size", len(content)), ("format", "npy"), ("xxh3", xxhash.xxh3_64_intdigest(content))):
        set_column("index.parquet", column, value)(folder, canary)
