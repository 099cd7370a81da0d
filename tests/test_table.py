"""CSV files that name images: columns, labels, splits, groups, and what is wrong with them."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import RunStage
from PIL import Image

from pipeline.errors import BadData
from pipeline.provenance import fingerprint
from stages.images import open_shards
from stages.images.index import NoSuchAttribute
from stages.settings.shard import Shard
from stages.sources.candidates import Source, SourceError
from stages.sources.columns import Columns, Reading
from stages.sources.table import list_csv, read_csv


def table(folder: Path, *lines: str, name: str = "table.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def read(path: Path, *, splits: Any = None, split_values: Any = None, **columns: Any) -> Source:
    return read_csv(path, None, Reading(Columns(**columns), True, splits, split_values))


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)


def test_standard_columns_are_known_by_name(tmp_path: Path):
    source = read(table(tmp_path, "Label,Path,split,group,more", "cat,b.jpg,test,p1,x", " dog ,./a.jpg, Valid,p2,y"))
    assert [(one.key, one.split, one.labels, one.group) for one in source.candidates] == [
        ("a.jpg", "val", ("dog",), "p2"),
        ("b.jpg", "test", ("cat",), "p1"),
    ]
    assert source.root == tmp_path
    assert source.notes == ("columns: image Path, label Label, split split, group group; not used: more",)
    assert source.classes == ["cat", "dog"]


def test_what_may_be_a_label_and_is_not_used_is_said(tmp_path: Path):
    source = read(table(tmp_path, "id,path,klass", "1,a.jpg,cat"))
    assert source.notes == ("columns: image path; not used: id, klass (columns.label names one)",)
    source = read(table(tmp_path, "path,label", "a.jpg,cat|dog", "b.jpg,dog"))
    assert source.classes == ["cat|dog", "dog"]
    assert source.remarks == (
        "1 values of label hold '|', the first: cat|dog; each is one class: several of an image are read by "
        "columns.labels",
    )


def test_columns_may_be_named(tmp_path: Path):
    path = table(tmp_path, "path,label,who,kind,by", "a.jpg,1,p1,x|y| x,hand", "b.jpg,2,,,machine")
    columns = Columns(labels="kind", group="who", split="by")
    source = read_csv(path, None, Reading(columns, split_values={"hand": "train", "machine": "test"}))
    assert [(one.split, one.labels, one.group) for one in source.candidates] == [
        ("train", ("x", "y"), "p1"),
        ("test", (), None),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_seen_in_the_header(tmp_path: Path, delimiter: str):
    path = table(tmp_path, delimiter.join(["file_name", "class"]), delimiter.join(['"x,y;z.jpg"', "1"]))
    assert [(one.key, one.labels) for one in read(path).candidates] == [("x,y;z.jpg", ("1",))]


def test_a_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path):
    (tmp_path / "table.csv").write_bytes(b'\xef\xbb\xbfpath,label\r\n\r\n"a.jpg","two\r\nlines"\r\n\r\n')
    assert [(one.key, one.labels) for one in read(tmp_path / "table.csv").candidates] == [("a.jpg", ("two\r\nlines",))]


def test_splits_that_are_drawn_need_no_column_and_labels_may_be_left_out(tmp_path: Path):
    path = table(tmp_path, "path,label,split", "a.jpg,1,nonsense")
    (candidate,) = read_csv(path, None, Reading(labels=False, splits="drawn")).candidates
    assert (candidate.split, candidate.labels) == (None, ())


def test_an_image_that_two_rows_name_is_two_samples(tmp_path: Path):
    source = read(table(tmp_path, "path,label", "a.jpg,1", "b.jpg,1", "a.jpg,2"))
    assert [(one.key, one.image, one.labels) for one in source.candidates] == [
        ("a.jpg", "a.jpg", ("1",)),
        ("a.jpg#2", "a.jpg", ("2",)),
        ("b.jpg", "b.jpg", ("1",)),
    ]
    assert source.remarks[0].startswith("1 rows name an image that another row named before, the first: a.jpg")


def test_attributes_go_along_as_text(tmp_path: Path):
    lines = ["path,class,by,split,note", "b.jpg,1,noto,test, x ", "a.jpg,2,,train,", "c.jpg,1,fluent,train,a|b"]
    source = read(table(tmp_path, *lines), attributes=("by", "split", "class", "note"))
    assert source.attributes == ("by", "split", "class", "note")
    assert [(one.key, one.labels, one.split, one.attributes) for one in source.candidates] == [
        ("a.jpg", ("2",), "train", (None, "train", "2", None)),
        ("b.jpg", ("1",), "test", ("noto", "test", "1", "x")),
        ("c.jpg", ("1",), "train", ("fluent", "train", "1", "a|b")),
    ]
    assert source.notes == (
        "columns: image path, label class, split split, attribute by, attribute split, attribute class, attribute note",
    )
    assert read(table(tmp_path, *lines)).attributes == ()


WRONG = {
    "empty": ([""], {}, "is empty"),
    "no rows": (["path,label"], {}, "has a header and no rows"),
    "no header": (["1.jpg,cat", "2.jpg,dog"], {}, "no column that is known to hold images .*columns are: 1.jpg, cat"),
    "missing column": (["path,label", "a,b"], {"group": "who"}, r"no column 'who' \(columns.group\).*path, label"),
    "missing attribute": (["path,by", "a,b"], {"attributes": ("by", "who")},
                          r"no column 'who' \(columns.attributes\); its columns are: path, by"),
    "two of a name": (["path,label,path", "a,b,c"], {}, "two columns of the name 'path'"),
    "label and labels": (["path,label,labels", "a,b,c"], {}, "'label' and a column 'labels': name the one to take"),
    "row of another length": (["path,label", "a,b", "a"], {}, "line 3: 1 cells instead of the header's 2"),
    "no split": (["path,split", "a,train", "b,fold1"], {}, "line 3: 'fold1' is no split: .*say in split_values"),
    "quote": (["path,label", '"a,b'], {}, "cannot be read as CSV"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "columns", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, lines: list[str], columns: dict[str, Any], message: str):
    path = table(tmp_path, *lines) if lines != [""] else tmp_path / "table.csv"
    path.touch()
    with pytest.raises(SourceError, match=message) as error:
        read(path, **columns)
    assert error.value.exit_code == 6
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_table_that_is_not_there_or_no_utf8(tmp_path: Path):
    with pytest.raises(SourceError, match=r"there is no table .*gone.csv"):
        read(tmp_path / "gone.csv")
    (tmp_path / "table.csv").write_bytes("path\ncafé.jpg\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"is not UTF-8 .*save it as UTF-8"):
        read(tmp_path / "table.csv")


def test_split_values_name_every_value_and_need_a_column(tmp_path: Path):
    path = table(tmp_path, "path,by", "a.jpg,noto", "b.jpg,fluent")
    with pytest.raises(SourceError, match=r"line 3: 'fluent' is no split: say in split_values what it stands for"):
        read(path, split_values={"noto": "train"}, split="by")
    with pytest.raises(SourceError, match=r"split_values: .* has no split column; name one in columns.split, of: path"):
        read(path, split_values={"noto": "train"})
    with pytest.raises(SourceError, match=r"`splits: given`, but .* has no split column"):
        read(path, splits="given")


# The fingerprint


def look(settings: Shard, cache: Path) -> str:
    found = fingerprint(settings.foreign_inputs()["source"], cache, call=lambda call: list_csv(*call.arguments))
    assert found is not None
    return found.value


def test_the_key_knows_the_table_and_all_that_it_names(tmp_path: Path):
    path = table(tmp_path / "one", "path,label", "a.jpg,1", "deep/b.jpg,2", "gone.jpg,2", ",1")
    for name in ("a.jpg", "deep/b.jpg", "other.jpg"):
        picture(tmp_path / "one" / name, 10)
    settings = Shard.model_validate({"source": f"csv:{path}"})
    values = [look(settings, tmp_path / "cache")]
    picture(tmp_path / "one/other.jpg", 20)
    assert look(settings, tmp_path / "cache") == values[0], "no row names it"
    picture(tmp_path / "one/gone.jpg", 10)
    values.append(look(settings, tmp_path / "cache"))
    picture(tmp_path / "one/deep/b.jpg", 30)
    values.append(look(settings, tmp_path / "cache"))
    table(tmp_path / "one", "path,label", "a.jpg,1", "deep/b.jpg,1", "gone.jpg,2", ",1")
    values.append(look(settings, tmp_path / "cache"))
    assert len(set(values)) == 4
    (tmp_path / "one").rename(tmp_path / "two")
    settings = Shard.model_validate({"source": f"csv:{tmp_path}/two/table.csv"})
    assert look(settings, tmp_path / "cache") == values[-1], "paths do not count"


def test_images_lie_where_the_settings_say(tmp_path: Path):
    path = table(tmp_path, "path", "a.jpg", str(tmp_path / "images/b/c.jpg"))
    rows, paths = list_csv(str(path), str(tmp_path / "images"), None)
    assert (rows, list(paths.values())) == (2, [str(tmp_path / "images/a.jpg"), str(tmp_path / "images/b/c.jpg")])
    source = read_csv(path, tmp_path / "images", Reading())
    assert source.root == tmp_path / "images"
    assert [one.key for one in source.candidates] == sorted(paths)


# Through the stage


def test_a_table_with_groups_becomes_shards(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    lines = ["image,class,patient"]
    for number in range(60):
        picture(tmp_path / f"scans/{number}.png", number)
        lines.append(f"scans/{number}.png,{'ab'[number % 12 // 6]},p{number // 6}")
    path = table(tmp_path, *lines)
    files = run_stage("shard", {"source": f"csv:{path}", "columns": {"group": "patient"}})
    said = capsys.readouterr().err
    assert "10 groups, the largest of 6 samples" in said
    assert "columns: image image, label class, group patient" in said
    facts = json.loads((files / "shards.json").read_text())
    assert (facts["source_kind"], facts["groups"], facts["several_labels"]) == ("csv", 10, False)
    parts = {split: open_shards(files, split) for split in facts["splits"]}
    assert {split: len(part) for split, part in parts.items()} == {"train": 48, "test": 12}
    assert facts["splits"]["test"]["class_counts"] == [6, 6]
    groups = {split: {int(key[6:-4]) // 6 for key in part.keys} for split, part in parts.items()}
    assert not groups["train"] & groups["test"]
    assert parts["train"].has_groups
    assert len(parts["train"].groups.unique()) == 8


def test_attributes_come_through(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    """Whatever order, split and rejection do to the rows; without them the index has no such column."""
    lines = ["path,label,by,kind"]
    for number in range(20):
        picture(tmp_path / f"{number}.png", number)
        lines.append(f"{number}.png,{number % 2},{'pqr'[number % 3]},{'' if number < 5 else number // 5}")
    (tmp_path / "3.png").write_bytes(b"no image")
    settings = {"source": f"csv:{table(tmp_path, *lines)}", "test_fraction": 0.3, "max_rejected": 0.1}
    files = run_stage("shard", settings | {"columns": {"attributes": ["by", "kind"]}})
    said = capsys.readouterr().err
    assert "attribute by: 3 values\n" in said
    assert "attribute kind: 3 values, 4 samples have none\n" in said
    facts = json.loads((files / "shards.json").read_text())
    assert facts["attributes"] == {"by": {"distinct": 3, "missing": 0}, "kind": {"distinct": 3, "missing": 4}}
    for split, count in (("train", 13), ("test", 6)):
        shards = open_shards(files, split)
        numbers = [int(key.removesuffix(".png")) for key in shards.keys]
        assert len(numbers) == count
        assert shards.attributes == ("by", "kind")
        assert shards.attribute("by") == ["pqr"[number % 3] for number in numbers]
        assert shards.attribute("kind") == [None if number < 5 else str(number // 5) for number in numbers]
        message = f"{files} has no attribute 'color'; it has by, kind: name it in columns.attributes of the stage shard"
        with pytest.raises(NoSuchAttribute, match=re.escape(message)) as error:
            shards.attribute("color")
        assert (error.value.exit_code, isinstance(error.value, ValueError)) == (2, True)
    plain = run_stage("shard", settings)
    assert pq.read_schema(plain / "index.parquet").names == [
        name for name in pq.read_schema(files / "index.parquet").names if name not in ("attribute.by", "attribute.kind")
    ]
    assert facts.keys() - json.loads((plain / "shards.json").read_text()).keys() == {"attributes"}
    with pytest.raises(NoSuchAttribute, match="it has none: name it in"):
        open_shards(plain, "train").attribute("by")


def test_several_labels_come_through(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    for number in range(10):
        picture(tmp_path / f"{number}.png", number)
    labels = ["a|b", "b", "", "c|a|b", "a", "b", "c", "a|c", "b", "a"]
    path = table(tmp_path, "file,labels", *(f"{number}.png,{names}" for number, names in enumerate(labels)))
    files = run_stage("shard", {"source": f"csv:{path}", "test_fraction": 0.0})
    assert "3 samples have several labels; a sample has 1.3 on average" in capsys.readouterr().err
    shards = open_shards(files, "train")
    assert [["abc"[label] for label in names] for names in shards.label_lists] == [
        sorted(names.split("|")) if names else [] for names in labels
    ]
    assert shards.labels.tolist() == [-1, 1, -1, -1, 0, 1, 2, -1, 1, 0]
    facts = json.loads((files / "shards.json").read_text())
    assert facts["several_labels"]
    assert facts["splits"]["train"]["class_counts"] == [5, 5, 3]
    assert facts["splits"]["train"]["unlabelled"] == 1


def test_files_that_are_not_there_are_rejected_by_name(tmp_path: Path, run_stage: RunStage):
    picture(tmp_path / "a.png", 1)
    path = table(tmp_path, "path,label", "a.png,x", "gone.png,x", ",x")
    with pytest.raises(BadData, match=r"2 of 3 images .*gone.png \(cannot be opened: No such file or directory\)"):
        run_stage("shard", {"source": f"csv:{path}", "test_fraction": 0.0})
    files = run_stage("shard", {"source": f"csv:{path}", "test_fraction": 0.0, "max_rejected": 0.9})
    listed = {
        one["path"]: one["reason"] for one in map(json.loads, (files / "rejected.jsonl").read_text().splitlines())
    }
    assert listed == {
        "gone.png": "cannot be opened: No such file or directory",
        "line 4": "cannot be opened: the row names no image",
    }


@pytest.mark.parametrize("image", ["../b.jpg", "a/../../b.jpg", "/etc/passwd", "b\0.jpg", "../imagesb/a.jpg"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, image: str):
    path = table(tmp_path, "path", "a.jpg", image)
    for read_it in (
        lambda: read_csv(path, tmp_path / "images", Reading()),
        lambda: list_csv(str(path), str(tmp_path / "images"), None),
    ):
        with pytest.raises(
            SourceError, match=r"table.csv, line 3: path .* leads out of the folder .*images: set `images_root`"
        ):
            read_it()
    if "\0" not in image:
        assert len(read_csv(path, Path("/"), Reading()).candidates) == 2


@pytest.mark.parametrize("root", [None, "scans"])
def test_a_wrong_root_is_told_by_a_path_that_was_tried(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str], root: str | None
):
    picture(tmp_path / "here.png", 1)
    table(tmp_path, "path,label", "here.png,x", "c/1.png,x", "c/2.png,x", "c/3.png,x")
    settings: dict[str, Any] = {"source": f"csv:{tmp_path}/table.csv", "test_fraction": 0.0}
    if root is not None:
        settings["images_root"] = str(tmp_path / root)
    looked = tmp_path / (root or "")
    first = looked / "c/1.png"
    count = "3" if root is None else "4"
    now = f"(now {looked}{', that of the table' if root is None else ''})"
    expected = (
        f"{count} of 4 files that the table names are not there, the first was to be {first}: set `images_root` to the "
        f"folder that paths start from {now}"
    )
    with pytest.raises(BadData, match="Mend or remove them") as error:
        run_stage("shard", settings)
    assert f"(cannot be opened: No such file or directory). {expected}. Mend" in str(error.value)
    if root is None:
        run_stage("shard", settings | {"max_rejected": 1.0})
        assert f"warning: {expected}\n" in capsys.readouterr().err
    else:
        with pytest.raises(BadData) as error:
            run_stage("shard", settings | {"max_rejected": 1.0})
        assert str(error.value) == f"no image is left for train: {expected}"


def test_a_few_files_that_are_missing_say_nothing_of_the_root(tmp_path: Path, run_stage: RunStage):
    for name in "ab":
        picture(tmp_path / f"{name}.png", 1)
    path = table(tmp_path, "path", "a.png", "b.png", "gone.png")
    with pytest.raises(BadData, match="1 of 3 images") as error:
        run_stage("shard", {"source": f"csv:{path}"})
    assert "images_root" not in str(error.value)
    path = table(tmp_path, "path", "a.png", "/nowhere/1.png", "/nowhere/2.png")
    with pytest.raises(BadData, match=r"to be /nowhere/1.png: the table has that path in full"):
        run_stage("shard", {"source": f"csv:{path}", "images_root": "/"})


@pytest.mark.parametrize("allowed", [False, True])
def test_a_group_in_two_splits(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str], allowed: bool):
    for name in "abcd":
        picture(tmp_path / f"{name}.png", 1)
    rows = ["a.png,train,p1", "b.png,test,p1", "c.png,test,p2", "d.png,train,"]
    path = table(tmp_path, "path,split,group", *rows)
    settings = {"source": f"csv:{path}", "allow_group_in_splits": allowed}
    message = "1 of 2 groups are in more than one split: p1 (train, test)"
    if allowed:
        run_stage("shard", settings)
        assert message in capsys.readouterr().err
        return
    with pytest.raises(SourceError) as error:
        run_stage("shard", settings)
    assert message in str(error.value)
    assert error.value.exit_code == 6


def test_groups_from_a_pattern(tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]):
    for number in range(20):
        picture(tmp_path / f"images/p{number // 4}_{number % 4}.png", number)
    picture(tmp_path / "images/lone.png", 7)
    settings = {"source": f"folder:{tmp_path}/images", "test_fraction": 0.2}
    files = run_stage("shard", settings | {"group_pattern": r"(p\d+)_"})
    said = capsys.readouterr().err
    assert "1 of 21 images do not match group_pattern and are groups of their own, the first: lone.png" in said
    assert "5 groups, the largest of 4 samples, 1 samples are in none" in said
    chosen = [key[:2] for key in open_shards(files, "test").keys if key != "lone.png"]
    assert len(chosen) == 4
    assert len(set(chosen)) == 1
    with pytest.raises(SourceError, match="matches no image"):
        run_stage("shard", settings | {"group_pattern": "q"})


def test_of_several_parentheses_those_that_take_part_name_the_group(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    for number in range(12):
        picture(tmp_path / f"{'pq'[number % 2]}{number // 4 + 10 * (number % 2)}_{number}.png", number)
    settings = {"source": f"folder:{tmp_path}", "test_fraction": 0.0}
    files = run_stage("shard", settings | {"group_pattern": r"p(\d+)|q(\d+)"})
    said = capsys.readouterr().err
    assert "6 groups, the largest of 2 samples" in said
    assert "group_pattern" not in said
    assert {row["group"] for row in pq.read_table(files / "index.parquet").to_pylist()} == set("012") | {
        "10", "11", "12",
    }  # fmt: skip


def test_parentheses_that_hold_nothing_are_told(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    for name in ("airplane/1", "airplane/2", "ship/1", "ship/2", "top"):
        picture(tmp_path / f"{name}.png", 1)
    settings = {"source": f"folder:{tmp_path}", "test_fraction": 0.0}
    run_stage("shard", settings | {"group_pattern": "(airplane)?/"})
    said = capsys.readouterr().err
    assert "1 of 5 images do not match group_pattern and are groups of their own, the first: top.png" in said
    assert (
        "2 of 5 images match group_pattern, but its parentheses hold nothing in them: they are groups of their own, "
        "the first: ship/1.png"
    ) in said
    with pytest.raises(SourceError, match=r"matches 4 of 5 images, but its parentheses hold nothing in any of them"):
        run_stage("shard", settings | {"group_pattern": "(car)?/"})
    with pytest.raises(SourceError, match=r"'x\?' matches 5 of 5 images, but the match holds nothing"):
        run_stage("shard", settings | {"group_pattern": "x?"})


def test_too_few_groups_for_a_test_split_are_told(
    tmp_path: Path, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
):
    for number in range(8):
        picture(tmp_path / f"p{number // 4}_{number}.png", number)
    run_stage("shard", {"source": f"folder:{tmp_path}", "group_pattern": r"p\d"})
    assert "nothing is left for test: too few groups for test_fraction 0.2" in capsys.readouterr().err
