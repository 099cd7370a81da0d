"""Where a result comes from: the key of a step, and the fingerprint of foreign files."""

import glob
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.manifest import canonical_json, parse_json, replace_file, sha256_bytes, sha256_file
from pipeline.settings import Call, ForeignInput

STORE_FORMAT = 1
FILES_WORTH_A_WORD = 1000
NO_FILE = "no file"
"""In the place of the hash, where what is named is not there: the key changes when it comes."""
NO_STAMP = [-1, -1]


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
    samples: int = 0
    """Roughly, where the source says it; 0: one for each file."""


def fingerprint(
    source: ForeignInput,
    cache: Path,
    *,
    look: bool = True,
    fetch: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    call: Callable[[Call], Any] | None = None,
) -> Fingerprint | None:
    """Fingerprint a foreign source by content; files whose size and time did not change are not read again.

    What can be fetched is so before the first look, never after it: the key of a step that reads it stands for the
    files that came, and a source that was neither fetched nor looked at has none yet.

    Args:
        cache: folder of the store for what was seen; can be deleted at any time.
        look: False trusts the last look and returns None where there was none.
        fetch: whether what is not there yet may be fetched; else None is returned.
        tell: called with a line if many files have to be read.
        call: calls the functions that the source names; needed for those that name any.

    Raises:
        UsageError: a root is missing or holds no file of the wanted kind.
    """
    identity: dict[str, Any] = {"kind": source.kind, "roots": [str(root.absolute()) for root in source.roots]}
    identity |= {"suffixes": sorted(source.suffixes), "names": source.names}
    identity |= {"listing": source.listing.arguments if source.listing else None}
    name = sha256_bytes(canonical_json(identity))[:16]
    summary, listing = cache / f"{name}.json", cache / f"{name}.files.json"
    last = _last_look(summary)
    if not look:
        return last
    samples = last.samples if last else 0
    if source.fetch is not None and (last is None or not _stamps(source)):
        if not fetch:
            return None
        assert call is not None, "needed to fetch"
        samples = call(source.fetch)
    named: Mapping[str, str] = {}
    if source.listing is not None:
        assert call is not None, "needed to list what a file names"
        _check_roots(source)  # before a function of a stage trips over what is not there
        samples, named = call(source.listing)
    seen = _contents(source, named, listing, tell)
    content = [source.kind, [[path, size, digest] for path, (size, _, digest) in sorted(seen.items())]]
    result = Fingerprint(
        value=f"foreign:{sha256_bytes(canonical_json(content))}",
        files=len(seen),
        size_bytes=sum(entry[0] for entry in seen.values()),
        looked_at=time.time(),
        samples=samples,
    )
    replace_file(summary, canonical_json(asdict(result)))
    return result


def _contents(
    source: ForeignInput, named: Mapping[str, str], listing: Path, tell: Callable[[str], None]
) -> dict[str, list[Any]]:
    """By name: size, time and hash of each file; `listing` keeps them, also what was read before an interruption."""
    known = _known_files(listing)
    _check_roots(source)
    found = _stamps(source)
    roots = ", ".join(str(root) for root in source.roots)
    if source.roots and not found:
        endings = f" ending in {', '.join(sorted(source.suffixes))}" if source.suffixes else ""
        raise UsageError(f"{source.kind}:{roots}: no files here{endings}")
    found |= {f"named/{name}": (path, _stamp(path)) for name, path in named.items()}
    seen = {name: known[name] for name, (_, stamp) in found.items() if known.get(name, [])[:2] == stamp}
    unread = [name for name in found if name not in seen]
    if len(unread) > FILES_WORTH_A_WORD:
        tell(f"{roots}: reads {len(unread):,} files that are new or changed since the last look")
    try:
        for name in unread:
            path, stamp = found[name]
            seen[name] = [*stamp, NO_FILE if stamp == NO_STAMP else _content(Path(path))]
    finally:
        if unread or seen.keys() != known.keys():
            replace_file(listing, canonical_json(seen))
    return seen


def _last_look(path: Path) -> Fingerprint | None:
    """What was written when a source was last looked at; what cannot be read counts as nothing, as if it were gone."""
    try:
        found = Fingerprint(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (found.files, found.size_bytes, found.looked_at, found.samples)
    is_sound = isinstance(found.value, str) and all(isinstance(one, int | float) for one in numbers)
    return found if is_sound else None


def _known_files(path: Path) -> dict[str, list[Any]]:
    """By name: size, time and hash of each file, as it was seen; nothing where that cannot be read."""
    try:
        known = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(one, list) for one in known.values()) else {}


def _check_roots(source: ForeignInput) -> None:
    for root in source.roots:
        if not root.exists() and not glob.has_magic(str(root)):
            raise UsageError(f"{source.kind}:{root}: no such folder or file")
        if source.listing is None and source.suffixes and root.is_file():
            raise UsageError(f"{source.kind}:{root}: is a file; give the folder of the images")
        if source.listing is not None and not source.suffixes and root.is_dir():
            raise UsageError(f"{source.kind}:{root}: is a folder; give the file")


def _stamps(source: ForeignInput) -> dict[str, tuple[str, list[int]]]:
    """By name: path, and size and time, of every file at the roots."""
    names = source.names or tuple(str(number) for number in range(len(source.roots)))
    return {
        f"{name}/{relative}": (str(path), [status.st_size, status.st_mtime_ns])
        for name, root in zip(names, source.roots, strict=True)
        for path, relative, status in _files_at(root, source.suffixes)
    }


def _files_at(root: Path, suffixes: frozenset[str]) -> Iterator[tuple[Path, str, os.stat_result]]:
    """The files of a folder, the file itself, or the files that match a pattern."""
    if root.is_dir():
        yield from files_below(root, suffixes)
    elif root.is_file():
        yield root, root.name, root.stat()
    else:
        fixed = next((one for one in root.parents if not glob.has_magic(str(one))), Path())
        for match in sorted(glob.glob(str(root), recursive=True)):
            if os.path.isfile(match):
                yield Path(match), Path(match).relative_to(fixed).as_posix(), os.stat(match)


def _stamp(path: str) -> list[int]:
    """Size and time of a file that is named somewhere."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return NO_STAMP
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else NO_STAMP


def files_below(root: Path, suffixes: frozenset[str]) -> Iterator[tuple[Path, str, os.stat_result]]:
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
