"""Parquet tables: paths, bytes, and both as Hugging Face datasets keep them."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image

from stages.images import open_shards
from stages.sources import parquet
from stages.sources.candidates import Candidate, Source, SourceError
from stages.sources.columns import Columns, Reading
from stages.sources.parquet import ParquetCell, list_parquet, read_parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"},
    "marks": {"feature": {"names": ["x", "y"], "_type": "ClassLabel"}, "_type": "Sequence"},
}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, images: pa.Array, /, **columns: pa.Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, **columns}).replace_schema_metadata(METADATA)
    pq.write_table(table, path, row_group_size=4)
    return path


def as_hugging_face(count: int, first: int = 0) -> pa.Array:
    return pa.array([{"bytes": png(first + n), "path": f"p{n // 3}_{n}.png"} for n in range(count)], IMAGE)


def read(location: Path, *, splits: Any = None, **columns: Any) -> Source:
    return read_parquet(location, None, Reading(Columns(**columns), splits=splits))


def shade(candidate: Candidate) -> int:
    assert isinstance(candidate.image, ParquetCell)
    with Image.open(io.BytesIO(candidate.image.read())) as image:
        red = image.getpixel((0, 0))
    assert isinstance(red, tuple)
    return int(red[0])


def test_bytes_as_hugging_face_keeps_them(tmp_path: Path):
    labels = pa.array([n % 3 if n != 4 else -1 for n in range(10)])
    source = read(write(tmp_path / "t.parquet", as_hugging_face(10), label=labels))
    assert [one.key for one in source.candidates] == [f"{n:06d}/p{n // 3}_{n}.png" for n in range(10)]
    assert [one.labels for one in source.candidates][3:6] == [("cat",), (), ("eel",)]
    assert source.classes == ["cat", "dog", "eel"]
    assert [shade(one) for one in source.candidates] == list(range(10))
    assert shade(pickle.loads(pickle.dumps(source.candidates[7]))) == 7
    assert all(one.image.size_bytes > 0 for one in source.candidates if isinstance(one.image, ParquetCell))


def test_one_row_group_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = read(write(tmp_path / "t.parquet", as_hugging_face(10)))
    calls = []
    real = pq.ParquetFile.read_row_group

    def counting(self: pq.ParquetFile, group: int, **options: Any) -> pa.Table:
        calls.append((group, options["columns"]))
        return real(self, group, **options)

    parquet._column.cache_clear()
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    assert [shade(one) for one in source.candidates] == list(range(10))
    assert calls == [(group, ["image.bytes"]) for group in range(3)]
    assert parquet._column.cache_info().currsize == 1


def test_plain_bytes_and_lists_of_labels(tmp_path: Path):
    marks = pa.array([[0, 1], [], [1], None])
    source = read(write(tmp_path / "t.parquet", pa.array([png(n) for n in range(4)]), marks=marks), labels="marks")
    assert [one.key for one in source.candidates] == [f"{n:06d}" for n in range(4)]
    assert [one.labels for one in source.candidates] == [("x", "y"), (), ("y",), ()]
    assert [shade(one) for one in source.candidates] == list(range(4))


@pytest.mark.parametrize("keeps_statistics", [True, False])
def test_paths_where_there_are_no_bytes(tmp_path: Path, keeps_statistics: bool):
    """Row groups: all have bytes, none has, some have."""
    rows = [{"bytes": png(n) if n in (0, 1, 5) else None, "path": f"{n}.png"} for n in range(6)]
    table = pa.table({"image": pa.array([*rows, None], IMAGE)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2, write_statistics=keeps_statistics)
    source = read(tmp_path / "t.parquet")
    assert [one.key for one in source.candidates] == [
        "000000/0.png", "000001/1.png", "000005/5.png", "2.png", "3.png", "4.png", "row 000006",
    ]  # fmt: skip
    assert [one.image for one in source.candidates[3:6]] == ["2.png", "3.png", "4.png"]
    rows, paths = list_parquet(str(tmp_path / "t.parquet"), None, None)
    assert (rows, paths) == (7, {f"{n}.png": str(tmp_path / f"{n}.png") for n in (2, 3, 4)})


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_paths(tmp_path: Path, kind: pa.DataType):
    path = write(
        tmp_path / "t.parquet", pa.array(["a/1.png", None, "2.png"]).cast(kind), group=pa.array([1.0, None, 2.0])
    )
    assert [(one.key, one.group) for one in read(path).candidates] == [
        ("2.png", "2"),
        ("a/1.png", "1"),
        ("row 000001", None),
    ]


def test_bytes_come_before_paths_where_neither_is_named(tmp_path: Path):
    path = write(tmp_path / "t.parquet", as_hugging_face(2), path=pa.array(["a.png", "b.png"]))
    assert read(path).notes == ("columns: image image; not used: path (columns.label names one)",)
    assert [one.key for one in read(path, image="path").candidates] == ["a.png", "b.png"]


def test_attributes_are_text_and_classes_their_names(tmp_path: Path):
    columns = {
        "label": pa.array([0, 2, -1, 1]),
        "marks": pa.array([[0, 1], [], [1], None]),
        "price": pa.array([1.5, 2.0, None, float("nan")]),
        "is_old": pa.array([True, False, None, True]),
        "note": pa.array(["a ", "", None, "b"]).dictionary_encode(),
        "a.b": pa.array([1, 2, 3, 4]),
    }
    path = write(tmp_path / "t.parquet", as_hugging_face(4), **columns)
    source = read(path, attributes=tuple(columns))
    assert [one.labels for one in source.candidates] == [("cat",), ("eel",), (), ("dog",)]
    assert source.attributes == ("label", "marks", "price", "is_old", "note", "a.b")
    assert [one.attributes for one in source.candidates] == [
        ("cat", "x|y", "1.5", "true", "a", "1"),
        ("eel", None, "2", "false", None, "2"),
        (None, "y", None, None, None, "3"),
        ("dog", None, None, "true", "b", "4"),
    ]
    with pytest.raises(SourceError, match=r"no column 'by' \(columns.attributes\); its columns are: image, label"):
        read(path, attributes=("by",))
    with pytest.raises(SourceError, match=r"'image' holds bytes, and is no attribute \(columns.attributes\)"):
        read(path, attributes=("label", "image"))


def test_several_files_may_be_splits(tmp_path: Path):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"data/{split}-00000-of-00001.parquet", as_hugging_face(2))
    source = read(tmp_path)
    assert [(one.key, one.split) for one in source.candidates] == [
        ("000000/p0_0.png", "test"), ("000001/p0_1.png", "test"), ("000002/p0_0.png", "train"),
        ("000003/p0_1.png", "train"), ("000004/p0_0.png", "val"), ("000005/p0_1.png", "val"),
    ]  # fmt: skip
    assert {one.split for one in read(tmp_path, splits="drawn").candidates} == {None}
    assert len(read(tmp_path / "data/t*.parquet").candidates) == 4
    write(tmp_path / "more.parquet", as_hugging_face(1))
    with pytest.raises(SourceError, match=r"some files are of a split by their name, but not more.parquet"):
        read(tmp_path)


def test_what_is_wrong_is_one_line(tmp_path: Path):
    (tmp_path / "no.parquet").write_bytes(b"no table")
    with pytest.raises(SourceError, match=r"no.parquet cannot be read as Parquet"):
        read(tmp_path / "no.parquet")
    with pytest.raises(SourceError, match=r"there is no such file or folder"):
        read(tmp_path / "gone.parquet")
    with pytest.raises(SourceError, match=r"no file matches"):
        read(tmp_path / "gone*.parquet")
    write(tmp_path / "wrong.parquet", pa.array([1, 2]))
    with pytest.raises(SourceError, match=r"column 'image' is of the type int64"):
        read(tmp_path / "wrong.parquet")
    with pytest.raises(SourceError, match=r"no column 'who' \(columns.group\); its columns are: image"):
        read(tmp_path / "wrong.parquet", group="who")
    write(tmp_path / "label.parquet", as_hugging_face(2), label=pa.array([0, 3]))
    with pytest.raises(SourceError, match=r"label.parquet: label has a class 3, and names for 3"):
        read(tmp_path / "label.parquet")
    write(tmp_path / "two/a.parquet", as_hugging_face(1))
    write(tmp_path / "two/b.parquet", as_hugging_face(1), label=pa.array([0]))
    with pytest.raises(SourceError, match=r"b.parquet has other columns than a.parquet"):
        read(tmp_path / "two")


def test_a_dataset_of_hugging_face_becomes_shards(tmp_path: Path, run_stage: RunStage):
    labels = pa.array([n % 2 for n in range(24)])
    write(tmp_path / "train-0.parquet", as_hugging_face(24), label=labels)
    write(tmp_path / "test-0.parquet", as_hugging_face(6, 100), label=labels[:6])
    settings = {"source": f"parquet:{tmp_path}", "group_pattern": r"/(p\d+)_", "allow_group_in_splits": True}
    files = run_stage("shard", settings | {"columns": {"attributes": ["label"]}})
    train, test = open_shards(files, "train"), open_shards(files, "test")
    assert train.classes == ["cat", "dog"]
    assert sorted(int(train[n].image[0, 0, 0]) for n in range(24)) == list(range(24))
    assert sorted(int(test[n].image[0, 0, 0]) for n in range(6)) == list(range(100, 106))
    assert np.array_equal(train.labels, [int(key.rpartition("_")[2][:-4]) % 2 for key in train.keys])
    assert len(train.groups.unique()) == 8
    assert train.attribute("label") == [train.classes[label] for label in train.labels.tolist()]
