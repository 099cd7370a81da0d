"""Damage to the files of an artifact of shards: single places of them, and what reading says of it."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stages.images import DamagedShard, Shards, open_shards
from stages.images.tar import BLOCK

FLIPPED, TRUNCATED, EMPTIED, REMOVED, GROWN = "flipped", "truncated", "emptied", "removed", "grown"
"""A bit is flipped, a file is cut, cut to nothing, deleted, or has more bytes than before."""
HOW_ELSE = (TRUNCATED, TRUNCATED, EMPTIED, REMOVED, GROWN)
"""How files are damaged where no bit is flipped, each as often as it is named."""


@dataclass(frozen=True)
class Region:
    """Bytes of a file that serve one purpose.

    Attributes:
        kind: `header`, `image`, `class`, `padding` or `end` of a tar; otherwise the name of the file.
        path: relative to the artifact.
        key: of the sample that the bytes are of, where they are an image's.
    """

    kind: str
    path: str
    start: int
    end: int
    key: str | None = None


@dataclass(frozen=True)
class Damage:
    """What happens to one file, at a place in the region."""

    how: str
    region: Region
    place: int
    bit: int = 0

    @contextmanager
    def done(self, artifact: Path) -> Iterator[None]:
        """Do it, and undo it afterwards."""
        path = artifact / self.region.path
        before = path.read_bytes()
        path.unlink()
        if self.how != REMOVED:
            path.write_bytes(self._applied(before))
        yield
        path.unlink(missing_ok=True)
        path.write_bytes(before)

    def _applied(self, content: bytes) -> bytes:
        match self.how:
            case "flipped":
                changed = content[self.place] ^ 1 << self.bit
                return content[: self.place] + bytes([changed]) + content[self.place + 1 :]
            case "truncated":
                return content[: self.place]
            case "grown":
                return content + bytes(1 + self.place % (2 * BLOCK))
        return b""


def regions_of(artifact: Path, keys: dict[tuple[str, int], str]) -> list[Region]:
    """All bytes of an artifact.

    Args:
        keys: of the images, by tar and offset.
    """
    found = [Region("manifest.json", "manifest.json", 0, (artifact / "manifest.json").stat().st_size)]
    for path in sorted((artifact / "files").iterdir()):
        name, size = f"files/{path.name}", path.stat().st_size
        if path.suffix != ".tar":
            found += [Region(path.name, name, 0, size)] if size else []
            continue
        end = 0
        with tarfile.open(path) as tar:
            for member in tar:
                start = member.offset_data
                end = start + member.size
                key = keys.get((path.name, start))
                found.append(Region("header", name, member.offset, start))
                found.append(Region("class" if key is None else "image", name, start, end, key))
                if end % BLOCK:
                    found.append(Region("padding", name, end, end := end + -end % BLOCK))
        found.append(Region("end", name, end, size))
    return found


def draw_damages(artifact: Path, regions: list[Region], count: int, random: np.random.Generator) -> list[Damage]:
    """`count` of them: two thirds flip a bit, as many in each kind of region; the others cut, grow and delete files."""
    kinds = sorted({one.kind for one in regions})
    drawn = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        of_kind = [one for one in regions if one.kind == kind]
        region = of_kind[random.integers(len(of_kind))]
        place = int(random.integers(region.start, region.end))
        how = FLIPPED if number % 3 else HOW_ELSE[int(random.integers(len(HOW_ELSE)))]
        drawn.append(Damage(how, region, place, int(random.integers(8))))
    return drawn


@dataclass(frozen=True)
class Read:
    """A sample as it was read.

    Attributes:
        error: why it was not, instead of an image.
    """

    key: str
    sample_id: int
    labels: tuple[int, ...]
    group: str | None
    label: int
    pixels: bytes
    error: str | None = None


def read_all(files: Path, splits: list[str]) -> dict[str, Read] | str:
    """Every sample, one by one, or the error where a split cannot be opened."""
    try:
        opened = [open_shards(files, split) for split in splits]
        return {one.key: one for shards in opened for one in _read_split(shards)}
    except DamagedShard as error:
        return _line(error)


def _read_split(shards: Shards) -> Iterator[Read]:
    for position, (key, labels, group) in enumerate(
        zip(shards.keys, shards.label_lists, shards.group_names, strict=True)
    ):
        known = Read(key, int(shards.sample_ids[position]), tuple(labels), group, int(shards.labels[position]), b"")
        try:
            sample = shards[position]
        except DamagedShard as error:
            yield replace(known, error=_line(error))
            continue
        assert (sample.key, sample.sample_id, sample.label) == (known.key, known.sample_id, known.label)
        yield replace(known, pixels=bytes(str(sample.image.shape), "ascii") + sample.image.numpy().tobytes())


def _line(error: DamagedShard) -> str:
    assert error.exit_code == 4
    assert "\n" not in str(error)
    return str(error)
