"""WebDataset tars from elsewhere."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from conftest import RunStage
from PIL import Image
from webdataset.writer import TarWriter

from stages.images import open_shards
from stages.settings.shard import IMAGE_SUFFIXES
from stages.sources.candidates import Absent, Source, SourceError
from stages.sources.columns import Columns, Reading
from stages.sources.tars import TarMember, count_tars, read_tars


def jpeg(shade: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(file, kind)
    return file.getvalue()


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    """As webdataset writes it: values that are no bytes by their ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def samples(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"cell/{first + n:04d}",
            "left.jpg": jpeg(first + n),
            "right.png": jpeg(200 + n, "PNG"),
            "cls": n % 2,
            "txt": "a caption",
            "json": {"patient": f"p{n // 4}", "about": {"kinds": ["x", "y"] if n % 3 else [], "part": "train"}},
        }
        for n in range(count)
    ]


def read(location: Path, *, splits: Any = None, **columns: Any) -> Source:
    return read_tars(location, IMAGE_SUFFIXES, Reading(Columns(**columns), splits=splits))


def test_a_name_that_leads_nowhere_inside_json_is_refused(tmp_path: Path):
    """A misspelt group would let one patient into two splits."""
    path = write(tmp_path / "a.tar", samples(3))
    assert {one.group for one in read(path, group="json.patient").candidates} == {"p0"}
    with pytest.raises(SourceError, match=r"no sample has a value at 'json\.pateint' \(columns\.group\)"):
        read(path, group="json.pateint")


def test_json_under_a_name_of_its_own(tmp_path: Path):
    path = write(tmp_path / "a.tar", [{"__key__": "one", "jpg": jpeg(1), "meta.json": {"a": {"kind": "cat"}}}])
    assert read(path, label="meta.json.a.kind").classes == ["cat"]
    with pytest.raises(SourceError, match=r"no sample has a field 'other\.json\.a'"):
        read(path, label="other.json.a")


def test_the_first_image_is_taken_where_none_is_named(tmp_path: Path):
    source = read(write(tmp_path / "a.tar", samples(3)))
    assert [(one.key, one.labels, one.split, one.group) for one in source.candidates] == [
        ("a/cell/0000.left.jpg", ("0",), None, None),
        ("a/cell/0001.left.jpg", ("1",), None, None),
        ("a/cell/0002.left.jpg", ("0",), None, None),
    ]
    assert source.notes == (
        "fields: image left.jpg, label cls; not used: json.patient, json.about.kinds, json.about.part, right.png, txt",
    )
    for number, one in enumerate(source.candidates):
        assert isinstance(one.image, TarMember)
        assert one.image.read() == jpeg(number)
        assert one.image.size_bytes == len(jpeg(number))


def test_fields_may_be_named(tmp_path: Path):
    path = write(tmp_path / "a.tar", samples(3))
    columns = {"image": "right.png", "labels": "json.about.kinds", "group": "json.patient", "split": "json.about.part"}
    source = read(path, **columns)
    assert [(one.key, one.labels, one.split, one.group) for one in source.candidates] == [
        ("a/cell/0000.right.png", (), "train", "p0"),
        ("a/cell/0001.right.png", ("x", "y"), "train", "p0"),
        ("a/cell/0002.right.png", ("x", "y"), "train", "p0"),
    ]
    assert {one.split for one in read(path, splits="drawn", **columns).candidates} == {None}
    assert source.notes == (
        "fields: image right.png, labels json.about.kinds, split json.about.part, group json.patient; not used: "
        "cls, left.jpg, txt",
    )


def test_attributes_are_fields_and_places_in_json(tmp_path: Path):
    part = samples(3)
    del part[1]["txt"]
    path = write(tmp_path / "a.tar", part)
    names = ("json.patient", "txt", "json.about.kinds", "cls")
    source = read(path, attributes=names)
    assert source.attributes == names
    assert [(one.labels, one.attributes) for one in source.candidates] == [
        (("0",), ("p0", "a caption", None, "0")),
        (("1",), ("p0", None, "x|y", "1")),
        (("0",), ("p0", "a caption", "x|y", "0")),
    ]
    assert source.notes == (
        "fields: image left.jpg, label cls, attribute json.patient, attribute txt, attribute json.about.kinds, "
        "attribute cls; not used: json.about.part, right.png",
    )
    with pytest.raises(SourceError, match=r"no sample has a field 'who' \(columns.attributes\)"):
        read(path, attributes=("who",))
    with pytest.raises(SourceError, match=r"no sample has a value at 'json.pateint' \(columns.attributes\)"):
        read(path, attributes=("txt", "json.pateint"))
    with pytest.raises(SourceError, match=r"field 'right.png' is an image, and no attribute \(columns.attributes\)"):
        read(path, attributes=("right.png",))


def test_what_may_be_a_label_and_is_not_used_is_said(tmp_path: Path):
    part = [
        {"__key__": "1", "jpg": jpeg(1), "meta.json": {"kind": "cat", "about": {"age": 3}, "none": {}}},
        {"__key__": "2", "png": jpeg(2, "PNG"), "json": ["no", "object"]},
    ]
    source = read(write(tmp_path / "a.tar", part))
    assert source.notes == (
        "fields: image jpg or png; not used: meta.json.kind, meta.json.none, meta.json.about.age, json "
        "(columns.label names one)",
    )
    part = [{"__key__": "1", "jpg": jpeg(1), "cls": 1, "json": {f"k{n:02d}": n for n in range(50)}}]
    (note,) = read(write(tmp_path / "b.tar", part), group="json.k01").notes
    assert note.startswith("fields: image jpg, label cls, group json.k01; not used: json.k00, json.k02, ")
    assert note.endswith(", json.k20, 29 more in json")


@pytest.mark.parametrize("names", [("train-0", "train-1", "val-0"), ("train/0", "train/1", "valid/0")])
def test_names_give_the_splits(tmp_path: Path, names: tuple[str, ...]):
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.tar", samples(2, 10 * number))
    assert [one.split for one in read(tmp_path).candidates] == ["train"] * 4 + ["val"] * 2
    assert {one.split for one in read(tmp_path, splits="drawn").candidates} == {None}
    pattern = "train*/*.tar" if "/" in names[0] else "tr*.tar"
    assert [one.split for one in read(tmp_path / pattern).candidates] == ["train"] * 4
    write(tmp_path / "other.tar", samples(1))
    with pytest.raises(SourceError, match=r"some files are of a split by their name, but not other.tar"):
        read(tmp_path)


def test_a_sample_without_an_image_is_rejected_not_passed_over(tmp_path: Path):
    path = write(tmp_path / "a.tar", [*samples(1), {"__key__": "x", "cls": 1, "txt": "no image"}])
    last = read(path).candidates[-1]
    assert last.key == "a/x"
    assert isinstance(last.image, Absent)
    assert last.image.reason == "the sample has no image"


def test_members_of_no_sample_are_counted(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./README", "./sub", "sub/1.jpg", "sub/1.cls", "2.jpg", ".hidden.jpg", "3.JPG"):
            member = tarfile.TarInfo(name)
            content = b"" if name == "./sub" else b"7" if name.endswith("cls") else jpeg(1)
            member.size = len(content)
            member.type = tarfile.DIRTYPE if name == "./sub" else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(content))
    source = read(tmp_path / "a.tar")
    assert [(one.key, one.labels) for one in source.candidates] == [
        ("a/2.jpg", ()),
        ("a/3.jpg", ()),
        ("a/sub/1.jpg", ("7",)),
    ]
    assert source.left_out == {"members of tars that belong to no sample": 2}


@pytest.mark.parametrize("names", [("1.jpg", "1.jpg"), ("1.jpg", "2.jpg", "1.cls"), ("1.jpg", "2.jpg", "./1.jpg")])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, names: tuple[str, ...]):
    """What belongs to which sample could only be guessed."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(jpeg(1))
            tar.addfile(member, io.BytesIO(jpeg(1)))
    with pytest.raises(SourceError, match=r"a.tar: member '(./)?1\.\w+' comes after .* the key '1' stands twice"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "damage", ["in a member", "between members", "in a header", "a flipped bit in a header", "joined"]
)
def test_no_damage_is_passed_over(tmp_path: Path, damage: str):
    path = write(tmp_path / "a.tar", samples(4))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-3]
    match damage:
        case "in a member":
            del content[last.offset_data + 10 :]
        case "between members":
            del content[last.offset :]
        case "in a header":
            del content[last.offset + 100 :]
        case "a flipped bit in a header":
            content[last.offset + 3] ^= 4
        case "joined":
            content = content + content
    path.write_bytes(bytes(content))
    with pytest.raises(SourceError, match=r"a\.tar (is cut off|is damaged|cannot be read)") as error:
        read(path)
    assert error.value.exit_code == 6


def test_what_is_wrong_is_one_line(tmp_path: Path):
    with pytest.raises(SourceError, match=r"wds:.*gone.tar: there is no such file or folder"):
        read(tmp_path / "gone.tar")
    with pytest.raises(SourceError, match=r"no .tar file in this folder"):
        read(tmp_path)
    path = write(tmp_path / "a.tar", samples(2))
    with pytest.raises(SourceError, match=r"no sample has a field 'webp' \(columns.image\); there are: .*left.jpg"):
        read(path, image="webp")
    write(tmp_path / "text.tar", [{"__key__": "1", "txt": "a"}])
    with pytest.raises(SourceError, match=r"no field is known to be an image; name it in columns.image, of: txt"):
        read(tmp_path / "text.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(path)
    with pytest.raises(SourceError, match=r"packed.tar cannot be read as a tar: .*a compressed tar has to be unpacked"):
        read(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(SourceError, match="no sample in these tars"):
        read(tmp_path / "none.tar")


def test_how_many_there_are_is_told_from_the_first_tar(tmp_path: Path):
    for number in range(3):
        write(tmp_path / f"{number}.tar", samples(20))
    count, named = count_tars(str(tmp_path), sorted(IMAGE_SUFFIXES), None)
    assert named == {}
    assert 50 <= count <= 75


def test_tars_from_elsewhere_become_shards(tmp_path: Path, run_stage: RunStage):
    write(tmp_path / "tars/train-000.tar", samples(8))
    write(tmp_path / "tars/test-000.tar", samples(4, 100))
    columns = {"image": "left.jpg", "group": "json.patient", "attributes": ["json.patient"]}
    files = run_stage("shard", {"source": f"wds:{tmp_path}/tars", "columns": columns, "allow_group_in_splits": True})
    facts = json.loads((files / "shards.json").read_text())
    assert (facts["copied"], facts["source_kind"], facts["groups"]) == (12, "wds", 2)
    train, test = open_shards(files, "train"), open_shards(files, "test")
    assert [int(train[n].image[0, 0, 0]) for n in range(8)] == list(range(8))
    assert [int(test[n].image[0, 0, 0]) for n in range(4)] == list(range(100, 104))
    assert train.labels.tolist() == [0, 1] * 4
    assert [len(train.groups.unique()), len(test.groups.unique())] == [2, 1]
    assert train.attribute("json.patient") == train.group_names == ["p0"] * 4 + ["p1"] * 4
    assert facts["attributes"] == {"json.patient": {"distinct": 2, "missing": 0}}
