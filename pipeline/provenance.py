"""Where a result comes from: the key of a step, the fingerprint of foreign files, code and environment."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.manifest import canonical_json, replace_file, sha256_bytes, sha256_file
from pipeline.settings import ForeignInput

STORE_FORMAT = 1
FILES_WORTH_A_WORD = 1000
LIBRARIES = ("torch", "torchvision", "kornia", "timm", "accelerate", "webdataset", "scikit-learn", "numpy", "pillow")


def step_key(
    stage: str, version: int, seed: int | None, settings: dict[str, Any], inputs: dict[str, Any], names: Any = None
) -> str:
    """The name of a result before it exists: sha256 over all that decides its bytes, and nothing else.

    Args:
        settings: the hashed subset.
        inputs: digests of artifacts, fingerprints of foreign files.
        names: whatever names and ancestors a stage that shows its lineage looks at.
    """
    payload = {
        "format": STORE_FORMAT,
        "stage": stage,
        "version": version,
        "seed": seed,
        "settings": settings,
        "inputs": inputs,
        "names": names,
    }
    return sha256_bytes(canonical_json(payload))


@dataclass(frozen=True)
class Fingerprint:
    """What a foreign source held when it was last looked at."""

    value: str
    """`foreign:` and 64 hexadecimal digits: over sorted relative paths, sizes and contents."""
    files: int
    size_bytes: int
    looked_at: float
    """Seconds since 1970."""


def fingerprint(
    source: ForeignInput, cache: Path, *, look: bool = True, tell: Callable[[str], None] = lambda _: None
) -> Fingerprint | None:
    """Fingerprint a foreign source by content; files whose size and time did not change are not read again.

    Args:
        cache: folder of the store for what was seen; can be deleted at any time.
        look: False trusts the last look and returns None where there was none.
        tell: called with a line if many files have to be read.

    Raises:
        UsageError: a root is missing or holds no file of the wanted kind.
    """
    identity = {"kind": source.kind, "roots": [str(root.absolute()) for root in source.roots]}
    name = sha256_bytes(canonical_json(identity | {"suffixes": sorted(source.suffixes)}))[:16]
    summary, listing = cache / f"{name}.json", cache / f"{name}.files.json"
    if not look:
        return Fingerprint(**json.loads(summary.read_bytes())) if summary.is_file() else None
    seen = _contents(source, listing, tell)
    content = [source.kind, [[path, size, digest] for path, (size, _, digest) in sorted(seen.items())]]
    result = Fingerprint(
        value=f"foreign:{sha256_bytes(canonical_json(content))}",
        files=len(seen),
        size_bytes=sum(entry[0] for entry in seen.values()),
        looked_at=time.time(),
    )
    replace_file(summary, canonical_json(asdict(result)))
    return result


def _contents(source: ForeignInput, listing: Path, tell: Callable[[str], None]) -> dict[str, list[Any]]:
    """By path: size, time and hash of each file; `listing` keeps them, also what was read before an interruption."""
    known = json.loads(listing.read_bytes()) if listing.is_file() else {}
    stamps: dict[str, list[int]] = {}
    places: dict[str, Path] = {}
    for number, root in enumerate(source.roots):
        if not root.is_dir():
            raise UsageError(f"{source.kind}:{root}: no such folder")
        for path, relative, status in _files(root, source.suffixes):
            stamps[f"{number}/{relative}"] = [status.st_size, status.st_mtime_ns]
            places[f"{number}/{relative}"] = path
    roots = ", ".join(str(root) for root in source.roots)
    if source.roots and not stamps:
        raise UsageError(f"{source.kind}:{roots}: no files here ending in {', '.join(sorted(source.suffixes))}")
    seen = {entry: known[entry] for entry, stamp in stamps.items() if known.get(entry, [])[:2] == stamp}
    unread = [entry for entry in stamps if entry not in seen]
    if len(unread) > FILES_WORTH_A_WORD:
        tell(f"{roots}: reads {len(unread):,} files that are new or changed since the last look")
    try:
        for entry in unread:
            seen[entry] = [*stamps[entry], _content(places[entry])]
    finally:
        if unread or seen.keys() != known.keys():
            replace_file(listing, canonical_json(seen))
    return seen


def _files(root: Path, suffixes: frozenset[str]) -> Iterator[tuple[Path, str, os.stat_result]]:
    """Every regular file below `root` that is not hidden, with its relative posix path and status.

    Links are followed, a folder that links to one above it is not entered again, and links to nothing are passed over.
    """
    pending = [(str(root), "", frozenset({os.path.realpath(root)}))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                # A name that is no UTF-8 has no place in JSON as it is.
                relative = f"{prefix}{entry.name}".encode(errors="backslashreplace").decode()
                if _is(entry.is_dir):
                    place = os.path.realpath(entry.path)
                    if place not in above:
                        pending.append((entry.path, f"{relative}/", above | {place}))
                elif _is(entry.is_file) and (not suffixes or os.path.splitext(entry.name)[1].lower() in suffixes):
                    yield Path(entry.path), relative, entry.stat()


def _is(kind: Callable[[], bool]) -> bool:
    """False for a link that leads in a circle, which cannot be asked what it is."""
    try:
        return kind()
    except OSError:
        return False


def _content(path: Path) -> str:
    """The hash of a file, or a word for one that may not be read: the stage that reads it says so by name."""
    try:
        return sha256_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def code() -> dict[str, Any]:
    """Git commit, whether the tree was changed, and a hash over the source of both packages."""
    top = Path(__file__).resolve().parent.parent
    sources = sorted(path for package in ("pipeline", "stages") for path in (top / package).rglob("*.py"))
    listing = [[path.relative_to(top).as_posix(), sha256_file(path)] for path in sources]
    commit = _git(top, "rev-parse", "HEAD") if (top / ".git").exists() else None
    return {
        "commit": commit,
        "dirty": bool(_git(top, "status", "--porcelain")) if commit else None,
        "source_sha256": sha256_bytes(canonical_json(listing)),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Python, platform, processors and library versions."""
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": versions,
    }
