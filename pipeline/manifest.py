"""Bytes on disk: canonical JSON, hashes, and the one write protocol for builds and checkpoints.

A folder is committed by one rename: write in a private folder of the same filesystem, sync, manifest last, rename
without replacing, sync the parent. A reader sees all of it or nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.failpoints import reach
from pipeline.processes import this_process

MANIFEST = "manifest.json"
FILES = "files"
BLOCK_BYTES = 1 << 18


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. Refuses NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_json(data: bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is no JSON, or nests deeper than anything of ours.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def sha256_bytes(data: bytes) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """64 hexadecimal digits of a file's content."""
    # By the system's own calls: of a small file, hashlib's way takes four times as long.
    digest, descriptor = hashlib.sha256(), os.open(path, os.O_RDONLY)
    try:
        while block := os.read(descriptor, BLOCK_BYTES):
            digest.update(block)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileProblem:
    """A file that is not as its manifest says."""

    path: str
    problem: str


def scan(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` by relative posix path: size in bytes and sha256."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seal(folder: Path) -> str:
    """Write `folder`/manifest.json over `folder`/files; returns its sha256, the digest of the folder."""
    reach("seal.hash")
    manifest = canonical_json({"files": scan(folder / FILES)})
    reach("seal.manifest")
    (folder / MANIFEST).write_bytes(manifest)
    return sha256_bytes(manifest)


def check(folder: Path, known: Mapping[str, list[int]] | None = None) -> list[FileProblem]:
    """Hold `folder`/files against `folder`/manifest.json; an empty list means that every byte is as it was written.

    Args:
        known: stamps of files that were found whole (see `stamps`): one that has its stamp still is not read again.
    """
    files = folder / FILES
    try:
        # Whatever became of it, a damaged one is told and stops nobody from taking another folder.
        expected = _read_manifest(folder / MANIFEST)
    except (OSError, ValueError) as error:
        return [FileProblem(MANIFEST, f"cannot be read ({error})")]
    problems = []
    for name, (size, sha256) in sorted(expected.items()):
        path = files / name
        if _is_link(path, files):
            problems.append(FileProblem(name, "is a link, or in a folder that is one: files of artifacts are plain"))
        elif not path.is_file():
            problems.append(FileProblem(name, "is missing"))
        elif path.stat().st_size != size:
            problems.append(FileProblem(name, f"has {path.stat().st_size} bytes instead of {size}"))
        elif known and known.get(name) == _stamp(path):
            continue
        elif sha256_file(path) != sha256:
            problems.append(FileProblem(name, "has other content"))
    present = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file() or path.is_symlink()}
    problems += [FileProblem(name, "is not in the manifest") for name in sorted(present - set(expected))]
    return problems


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """The files that a manifest lists: by relative path, size in bytes and sha256.

    Raises:
        OSError: it is not there.
        ValueError: it is none of this version, or leads out of its folder; names the field.
    """
    manifest = parse_json(path.read_bytes())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("it has no object `files`")
    if unknown := sorted(manifest.keys() - {"files"}):
        raise ValueError(f"this version knows no {unknown[0]!r} in it")
    for name, entry in manifest["files"].items():
        if name != PurePosixPath(name).as_posix() or name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise ValueError(f"files: {name!r} leads out of the artifact")
        if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
            raise ValueError(f"files: of {name!r} it has to say size and sha256, and nothing else")
    return {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}


def _is_link(path: Path, top: Path) -> bool:
    """Whether a path, or a folder between it and `top`, is a symbolic link."""
    between = path.relative_to(top).parents
    return path.is_symlink() or any((top / one).is_symlink() for one in between)


def stamps(folder: Path) -> dict[str, list[int]]:
    """Size and times of every file of `folder`/files: none can be written to without another stamp."""
    files = folder / FILES
    return {path.relative_to(files).as_posix(): _stamp(path) for path in sorted(files.rglob("*")) if path.is_file()}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # the last cannot be set by hand


def delete(path: Path) -> None:
    """Delete a file or a folder, as far as that can be, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Ask the disk to keep a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(folder: Path, destination: Path) -> bool:
    """Move a complete private folder to its place by one rename.

    Returns:
        False if the destination was there already (it is left as it was, and so is `folder`).
    """
    reach("commit.sync")
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
    reach("commit.rename")
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, destination)  # refuses a folder that is not empty, and a committed one never is
    except OSError:
        if destination.is_dir():
            return False
        raise
    reach("commit.renamed")
    sync(destination.parent)
    reach("commit.done")
    return True


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    private = _private_copy(path, data)
    os.replace(private, path)
    reach("file.placed")
    sync(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Write a file only if none of that name is there; False if one was. One of several writers wins."""
    private = _private_copy(path, data)
    try:
        os.link(private, path)
        reach("file.placed")
    except FileExistsError:
        return False
    finally:
        private.unlink()
    sync(path.parent)
    return True


def _private_copy(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    private = path.with_name(f".{path.name}.{this_process()}.tmp")
    reach("file.write")
    try:
        with private.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # the disk is full
        private.unlink(missing_ok=True)
        raise
    reach("file.written")
    return private
