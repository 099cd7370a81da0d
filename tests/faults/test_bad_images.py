"""Images that cannot be used, when a folder is sharded: each is listed with its reason, the others are as they were."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.image_files import LARGE, SMALL
from faults import bad_images
from faults.tally import Tally
from faults.zygote import Zygote
from pipeline.store import Store
from stages.images import open_shards

SEED = 20_260_102
ROW = "bad-images"
MOST_MORE_MEMORY = 300_000_000
GOOD = 40


@dataclass(frozen=True)
class Sharded:
    """What became of a folder.

    Attributes:
        rows: of the index, in its order.
        rejected: reasons, by path.
        peak: bytes of memory that were resident at most.
        said: by the command.
    """

    files: Path
    rows: list[dict[str, Any]]
    rejected: dict[str, str]
    peak: int
    said: str

    @property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows]


@pytest.fixture
def good() -> dict[str, bytes]:
    """JPEG and PNG files, in the order of the index."""
    made = {f"{number:04d}.jpg": content for number, content in enumerate(bad_images.jpegs(SMALL)[:GOOD])}
    for number in range(3, GOOD, 10):
        made[f"{number:04d}.png"] = bad_images.saved(bad_images.picture(number), "PNG")
        del made[f"{number:04d}.jpg"]
    return dict(sorted(made.items()))


def shard(zygote: Zygote, place: Path, name: str, images: dict[str, bytes]) -> Sharded:
    """Write the images, and run the command."""
    (place / name).mkdir()
    for path, content in images.items():
        (place / name / path).write_bytes(content)
    step = f"{{stage: shard, source: 'folder:{name}', max_rejected: 1.0, test_fraction: 0.0}}"
    (place / f"{name}.yaml").write_text(f"name: {name}\nsteps:\n  shards: {step}\n")
    code, said = zygote.run(["run", f"{name}.yaml", "--store", "store"], place, seconds=300)
    assert code == 0, (SEED, code, said)
    store = Store(place / "store")
    version = store.resolve(f"{name}/shards")
    record = store.record(version.stage, version.key, version.digest)
    files = store.files(version.stage, version.digest)
    listed = [json.loads(line) for line in (files / "rejected.jsonl").read_text().splitlines()]
    rejected = {one["path"]: one["reason"] for one in listed}
    rows = pq.read_table(files / "index.parquet").to_pylist()
    assert len(listed) == len(rejected)
    assert sorted([*rejected, *(row["key"] for row in rows)]) == sorted(images), "each is in one of both lists"
    return Sharded(files, rows, rejected, record.attempts[-1]["peak_memory_bytes"]["host"], said)


def check_good(found: Sharded, alone: Sharded) -> None:
    """That the good images have the order and the bytes that they have without the others."""
    kept = [(row["key"], row["xxh3"], row["size"]) for row in found.rows if row["key"] in set(alone.keys)]
    assert kept == [(row["key"], row["xxh3"], row["size"]) for row in alone.rows]
    assert found.keys == sorted(found.keys)
    opened = open_shards(found.files, "train")
    for start in range(0, len(opened), 50):
        opened.batch(range(start, min(start + 50, len(opened))))


def test_what_folders_have_in_them(zygote: Zygote, tmp_path: Path, good: dict[str, bytes], tally: Tally) -> None:
    unreadable, unusual = bad_images.unreadable(), bad_images.unusual()
    alone = shard(zygote, tmp_path, "alone", good)
    assert alone.keys == [*good]
    assert not alone.rejected
    images = good | {name: content for name, (content, _) in (unreadable | unusual).items()}
    # The names are among the good ones, so that these stand in other places than without.
    images = {
        name if name in good else f"00{20 + place % 9}-{name}": one for place, (name, one) in enumerate(images.items())
    }
    found = shard(zygote, tmp_path, "mixed", images)
    check_good(found, alone)
    more = found.peak - alone.peak
    reasons = {path.split("-", 1)[1]: reason for path, reason in found.rejected.items()}
    assert {*reasons} == {*unreadable}
    for name, (_, reason) in unreadable.items():
        assert reason in reasons[name], name
    sizes = {row["key"].split("-", 1)[-1]: (row["height"], row["width"]) for row in found.rows}
    for name, (_, size) in unusual.items():
        assert sizes[name] == size, name
    assert more <= MOST_MORE_MEMORY
    tally.add(ROW, tried=len(unreadable), held=len(unreadable), note=f"listed; {more / 2**20:.0f} MiB more memory")
    tally.add(ROW, tried=len(unusual), held=len(unusual), note="unusual and read")


@pytest.mark.parametrize("kind", ["JPEG", "other"])
def test_fuzzed_images(
    zygote: Zygote, tmp_path: Path, good: dict[str, bytes], tally: Tally, is_whole: bool, kind: str
) -> None:
    """Whatever was done to them, the command ends, and each is in the index or listed with a reason of one line."""
    random = np.random.default_rng(SEED)
    images = dict(good)
    count = (1_000 if kind == "JPEG" else 400) if is_whole else 100
    if kind == "JPEG":
        for number in range(count):
            of = bad_images.jpegs(SMALL if number % 5 else LARGE)
            images[f"{number * GOOD // count:04d}-{number}.jpg"] = bad_images.fuzzed(of, random)
    else:
        others = bad_images.others()
        suffixes = sorted({suffix for suffix, _ in others})
        for number in range(count):
            suffix = suffixes[number % len(suffixes)]
            of = [content for one, content in others if one == suffix]
            images[f"{number * GOOD // count:04d}-{number}.{suffix}"] = bad_images.fuzzed(of, random)
    alone = shard(zygote, tmp_path, "alone", good)
    found = shard(zygote, tmp_path, "fuzzed", images)
    check_good(found, alone)
    more = found.peak - alone.peak
    for path, reason in found.rejected.items():
        assert path not in good
        assert re.fullmatch(r"[^\n]{8,250}", reason), (SEED, path, reason)
        assert " at 0x" not in reason, (SEED, path, reason)
    assert len(found.rejected) > count / 4, "nearly all of them could be read"
    assert "Traceback" not in found.said
    assert more <= MOST_MORE_MEMORY, (SEED, more)
    note = f"fuzzed {kind}: {len(found.rejected)} listed, {more / 2**20:.0f} MiB more memory"
    print(note)
    tally.add(ROW, tried=count, held=count, note=note)
