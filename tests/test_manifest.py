"""The write protocol, and that damage is found."""

import json
from pathlib import Path

import pytest

from pipeline.manifest import (
    FILES,
    MANIFEST,
    canonical_json,
    check,
    commit_folder,
    create_file,
    replace_file,
    seal,
    sha256_bytes,
)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    (folder / FILES / "below").mkdir(parents=True)
    (folder / FILES / "a.bin").write_bytes(b"12345")
    (folder / FILES / "below" / "b.bin").write_bytes(b"")
    seal(folder)
    return folder


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == '{"a":[1.5,null,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_a_manifest_lists_every_file(sealed: Path) -> None:
    files = json.loads((sealed / MANIFEST).read_bytes())["files"]
    assert files == {
        "a.bin": {"size": 5, "sha256": sha256_bytes(b"12345")},
        "below/b.bin": {"size": 0, "sha256": sha256_bytes(b"")},
    }
    assert check(sealed) == []


@pytest.mark.parametrize(
    ("damage", "path", "problem"),
    [
        (lambda files: (files / "a.bin").write_bytes(b"12346"), "a.bin", "has other content"),
        (lambda files: (files / "a.bin").write_bytes(b"1234"), "a.bin", "has 4 bytes instead of 5"),
        (lambda files: (files / "a.bin").unlink(), "a.bin", "is missing"),
        (lambda files: (files / "c").write_bytes(b""), "c", "is not in the manifest"),
        (lambda files: (files.parent / MANIFEST).write_bytes(b"{"), MANIFEST, "cannot be read"),
    ],
)
def test_damage_is_named(sealed: Path, damage, path: str, problem: str) -> None:
    damage(sealed / FILES)
    found = check(sealed)
    assert [one.path for one in found] == [path]
    assert found[0].problem.startswith(problem)


def test_a_committed_folder_is_never_replaced(sealed: Path, tmp_path: Path) -> None:
    destination = tmp_path / "builds" / "one"
    assert commit_folder(sealed, destination)
    assert not sealed.exists()
    (sealed / FILES).mkdir(parents=True)
    (sealed / FILES / "other").write_bytes(b"x")
    seal(sealed)
    assert not commit_folder(sealed, destination)
    assert (destination / FILES / "a.bin").is_file()
    assert sealed.is_dir()


def test_of_several_creators_one_wins(tmp_path: Path) -> None:
    assert create_file(tmp_path / "v1.json", b"first")
    assert not create_file(tmp_path / "v1.json", b"second")
    assert (tmp_path / "v1.json").read_bytes() == b"first"
    replace_file(tmp_path / "v1.json", b"third")
    assert [path.name for path in tmp_path.iterdir()] == ["v1.json"], "no private copies are left"
