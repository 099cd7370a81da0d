"""Shards that are damaged: nothing of that goes unseen, and what looking for it costs."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from benchmarks.image_files import LARGE, SMALL, find_or_make, write_shards
from faults.bad_images import jpegs, picture, saved
from faults.shard_damage import FLIPPED, GROWN, Damage, Read, draw_damages, read_all, regions_of
from faults.tally import Tally
from faults.zygote import Zygote
from pipeline.manifest import seal
from pipeline.store import Store
from stages.images import index, open_shards, shards

SEED = 20_260_101
ROW = "shard-damage"
SPLITS = ["train", "test"]
TRIES = 3
"""Of measuring, of which the median counts."""


@dataclass(frozen=True)
class Made:
    """Shards in a store, and all that is in them.

    Attributes:
        artifact: has manifest.json and files/.
    """

    place: Path
    store: Store
    artifact: Path
    digest: str
    samples: dict[str, Read]
    damages: list[Damage]

    @property
    def files(self) -> Path:
        return self.artifact / "files"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, is_whole: bool) -> Made:
    """Small JPEGs, photographs and PNGs of two classes, in tars of ten."""
    place = tmp_path_factory.mktemp("shards")
    images = [(content, "jpg") for content in (*jpegs(SMALL)[:24], *jpegs(LARGE)[:4])]
    images += [(saved(picture(number, 9, 7), "PNG"), "png") for number in range(12)]
    for number, (content, suffix) in enumerate([*images, (b"no image", "jpg")]):
        path = place / f"images/{'train' if number % 3 else 'test'}/{'ab'[number % 2]}/{number:02d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    recipe = (
        "name: damaged\nsteps:\n  shards: {stage: shard, source: 'folder:images', images_per_shard: 10, "
        "max_rejected: 0.1, max_short_side: 128, group_pattern: '(..)\\.'}\n"
        "  features: {stage: embed, shards: shards, encoder: pixels, image_size: 8}\n"
    )
    (place / "damaged.yaml").write_text(recipe)
    code, said = zygote.run(["run", "damaged.yaml", "shards", "--store", "store"], place)
    assert code == 0, said
    store = Store(place / "store")
    version = store.resolve("damaged/shards")
    artifact = store.build(version.stage, version.digest)
    samples = read_all(artifact / "files", SPLITS)
    assert isinstance(samples, dict)
    assert len(samples) == len(images)
    rows = pq.read_table(artifact / "files/index.parquet").to_pylist()
    regions = regions_of(artifact, {(row["shard"], row["offset"]): row["key"] for row in rows})
    damages = draw_damages(artifact, regions, 1000 if is_whole else 80, np.random.default_rng(SEED))
    return Made(place, store, artifact, version.digest, samples, damages)


def test_no_damage_to_shards_is_silent(made: Made, tally: Tally) -> None:
    """What is read is as it was, or an error names the file, and where a sample is lost, that as well."""
    tried: Counter[str] = Counter()
    for damage in made.damages:
        with damage.done(made.artifact):
            check_told(made, damage, read_all(made.files, SPLITS))
            problems = made.store.verify("shard", made.digest)
        assert [one.path for one in problems] == [damage.region.path.removeprefix("files/")], (SEED, damage, problems)
        of_tar = damage.region.path.endswith(".tar")
        tried[
            f"{damage.how}, {damage.region.kind if damage.how == FLIPPED else 'tar' if of_tar else 'other file'}"
        ] += 1
    assert read_all(made.files, SPLITS) == made.samples, "the damage was undone"
    for note, count in sorted(tried.items()):
        tally.add(ROW, tried=count, held=count, note=note)


def check_told(made: Made, damage: Damage, found: dict[str, Read] | str) -> None:
    """That what was read is what the damage left, and all else is told."""
    region, says = damage.region, (SEED, damage, found if isinstance(found, str) else None)
    name = region.path.removeprefix("files/")
    is_tar = name.endswith(".tar")
    if isinstance(found, str):  # a split could not be opened
        assert name in found, says
        assert not (is_tar and damage.how == FLIPPED), says
        if is_tar and damage.how != GROWN:
            lost = [key for key, (shard, end) in ends(made).items() if shard == name and end > kept_bytes(damage)]
            first = f": sample {made.samples[lost[0]].sample_id} ({lost[0]})" if lost else " instead of "
            assert first in found, says
            assert (f" and {len(lost) - 1} more cannot be read" in found) == (len(lost) > 1), says
        return
    assert damage.how == FLIPPED or not is_tar, says
    damaged = [key for key, one in found.items() if one.error is not None]
    assert damaged == ([] if region.key is None else [region.key]), says
    for key in damaged:
        sample = made.samples[key]
        assert f"{name}: sample {sample.sample_id} ({key}) is damaged" in (found[key].error or ""), says
    assert {key: one for key, one in found.items() if key not in damaged} == {
        key: one for key, one in made.samples.items() if key not in damaged
    }, says


def kept_bytes(damage: Damage) -> int:
    return damage.place if damage.how == "truncated" else 0


def ends(made: Made) -> dict[str, tuple[str, int]]:
    """By key: the tar that a sample is in, and where its bytes end; in the order of the index."""
    rows = pq.read_table(made.files / "index.parquet").to_pylist()
    return {row["key"]: (row["shard"], row["offset"] + row["size"]) for row in rows}


def test_verify_names_what_is_damaged(made: Made, zygote: Zygote, tally: Tally, is_whole: bool) -> None:
    chosen = made.damages[:: 10 if is_whole else 20]
    for damage in chosen:
        with damage.done(made.artifact):
            code, said = zygote.run(["verify", "damaged/shards", "--store", "store"], made.place)
        assert code == 4, (SEED, damage, said)
        assert f"damaged/shards@v1: {damage.region.path.removeprefix('files/')} " in said, (SEED, damage, said)
    assert zygote.run(["verify", "--store", "store"], made.place)[0] == 0
    tally.add(ROW, tried=len(chosen), held=len(chosen), note="named by `simclr verify`")


def test_a_step_does_not_begin_with_damaged_shards(made: Made, zygote: Zygote) -> None:
    command = ["run", "damaged.yaml", "features", "--store", "store"]
    damage = next(one for one in made.damages if one.region.kind == "image" and one.how == FLIPPED)
    with damage.done(made.artifact):
        code, said = zygote.run(command, made.place)
    assert code == 4, said
    assert f"{damage.region.path.removeprefix('files/')} has other content" in said
    assert zygote.run(command, made.place)[0] == 0


# The peer


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_over_the_same_damage(made: Made, tally: Tally) -> None:
    """Counted, not asserted: its reader, as it is and with a decoder behind it, over the same damaged tars."""
    tars = sorted(str(path) for path in made.files.glob("*.tar"))
    readers: dict[str, Callable[[], Any]] = {
        "as it is": lambda: wds.WebDataset(tars, shardshuffle=False),
        'with .decode("pil")': lambda: wds.WebDataset(tars, shardshuffle=False).decode("pil"),
    }
    for note, reader in readers.items():
        expected = list(as_read(reader()))
        assert len(expected) == len(made.samples)
        tried = silent = 0
        for damage in made.damages:
            if not damage.region.path.endswith(".tar"):
                continue
            tried += 1
            with damage.done(made.artifact):
                try:
                    silent += list(as_read(reader())) != expected
                except Exception:  # whatever it raises, it was not silent
                    continue
        assert tried > 0
        tally.add(ROW, tried=tried, held=tried - silent, subject="webdataset", note=f"{note}, {wds.__version__}")
    gc.collect()  # files that it leaves open would be told in another test


def as_read(dataset: Any) -> Iterator[dict[str, Any]]:
    """Samples as they come, without where they were found."""
    for sample in dataset:
        values = {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        yield {name: (v.size, v.tobytes()) if isinstance(v, Image.Image) else v for name, v in values.items()}


# What the checks cost


@pytest.mark.alone
@pytest.mark.parametrize(
    ("kind", "images", "batch", "most"),
    [(SMALL, 5_120, 256, 0.05), (LARGE, 256, 4, 0.01)],
    ids=["small", "photographs"],
)
def test_checks_cost_little(
    kind: str, images: int, batch: int, most: float, tmp_path: Path, tally: Tally, is_whole: bool
) -> None:
    """With and without the hash of each sample and the digests of index and summary."""
    root, files, what = find_or_make(kind, None, images, tmp_path / "made")
    folder = tmp_path / "one/files"
    write_shards(root, files, folder, images // 4, 512)
    seal(tmp_path / "one")
    starts = range(0, images, batch)[:: 1 if is_whole or kind == SMALL else 4]
    shares = [share_of_checks(folder, images, batch, starts, 8 if is_whole else 4) for _ in range(TRIES)]
    share = median(shares)
    each = ", ".join(f"{one:.2%}" for one in shares)
    note = f"{what}: {share:.2%} of loading (at most {most:.0%}), the median of {each}"
    tally.add("cost-shard-checks", tried=TRIES, held=sum(one <= most for one in shares), note=note)
    assert share <= most, note


def share_of_checks(folder: Path, images: int, batch: int, starts: Sequence[int], repetitions: int) -> float:
    """Of the time of one thread that opens the shards and loads all images once.

    Each batch is loaded with and without checks, one after the other, and the median counts of what they differ by.
    """
    opened, opening = {}, {}
    for is_checked in (False, True):
        with checks(is_checked):
            opening[is_checked] = median(seconds_of(lambda: open_shards(folder, "train")) for _ in range(21))
            opened[is_checked] = open_shards(folder, "train")
    shares, with_checks = [], []
    for number in range(repetitions):
        for start in starts:
            seconds = {}
            for is_checked in (True, False) if number % 2 else (False, True):
                with checks(is_checked):
                    seconds[is_checked] = seconds_of(partial(opened[is_checked].batch, range(start, start + batch)))
            shares.append(1 - seconds[False] / seconds[True])
            with_checks.append(seconds[True])
    epoch = images / batch * median(with_checks)
    return median(shares) + (opening[True] - opening[False]) / epoch


def seconds_of(work: Callable[[], object]) -> float:
    """Of this thread, so that what else the machine does matters less."""
    before = time.thread_time()
    work()
    return time.thread_time() - before


@contextmanager
def checks(is_checked: bool) -> Iterator[None]:
    """Leaves reading as it is, or lets it compare the length of each sample instead, which takes no time."""
    if is_checked:
        yield
        return
    original = shards.Shards.__init__

    def without_hashes(self: shards.Shards, folder: Path, split: str, *more: str) -> None:
        original(self, folder, split, *more)
        self._hashes = self._bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Shards, "__init__", without_hashes)
        patch.setattr(shards.xxhash, "xxh3_64_intdigest", len)
        patch.setattr(index, "require_published", lambda path: None)
        yield
