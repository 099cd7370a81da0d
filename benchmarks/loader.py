"""Batches of decoded images from shards: ours against webdataset's own pipeline with PIL, images a second.

The work of a run is an epoch: every image of the same tars once, shuffled, decoded to uint8, on a common canvas, as
tensors of a batch. webdataset shuffles shards and a buffer of 1,000, decodes by `rgb8` or `pil`, and has 0, 1 or 2
workers; the fastest of these six is its best.

The ratios `webdataset_32`, `webdataset_photos` and `cached` are of equal numbers of processes: one, and where ours
decodes in two threads (images of 96 pixels and more), two workers of webdataset's or what is better. `..._at_its_best`
lets webdataset have up to two workers beside the process that takes the batches, where ours has one core.

`kept` is ours from the second epoch on, with decoded images in memory, against webdataset as it is (it keeps none).
`scaled` decodes JPEGs at the part of their size that is enough for views of 96 pixels from crops of half the area.

Growth: time and memory to open an index (made, 10 thousand to 10 million rows, a million at most with --quick), and
the time until the first batch of an epoch of 100 million is drawn.
"""

import gc
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg
import torch
import webdataset as wds
import xxhash
from PIL import Image
from torch import Tensor

from benchmarks.harness import Comparison, Row, Work, alternate, arguments, exponent, fastest, peak_bytes, report
from benchmarks.image_files import LARGE, SMALL, find_or_make, write_shards
from stages.images import Shards, open_shards
from stages.images.index import INDEX_FILE, SCHEMA, write_summary
from stages.images.loader import BatchLoader, least_side_for
from stages.images.schedule import Shuffled
from stages.images.tar import tar_size

WORKERS = (0, 1, 2)
DECODERS = ("rgb8", "pil")
BEST, ALONE = "webdataset", "webdataset, one process"
SHUFFLE_BUFFER = 1_000
NOTHING, EVERYTHING = 0, 2**40
"""Free memory as ours is told: no set is kept, every set is."""


@dataclass(frozen=True)
class Set:
    """Shards to be read: `images` of them, in batches of `batch_size`."""

    folder: Path
    images: int
    batch_size: int


Loading = Callable[[Set], Work]
"""An adapter: the set is opened, and the work is one epoch of it."""


def ours(images: Set, threads: int = 2, free_bytes: int = NOTHING, least_side: int | None = None) -> Work:
    shards = open_shards(images.folder, "train")
    schedule = Shuffled(0, len(shards), images.batch_size)
    loader = BatchLoader(shards, schedule, threads, free_bytes=free_bytes, least_side=least_side)
    epochs = itertools.count()

    def epoch() -> None:
        first = next(epochs) * loader.steps_per_epoch
        for step in range(first, first + loader.steps_per_epoch):
            loader.load(step)
        # What is read ahead for the next epoch is done within this one.
        assert loader._ahead is not None
        loader._ahead[1].result()

    return epoch


def webdataset(images: Set, workers: int = 0, decoder: str = "rgb8") -> Work:
    tars = sorted(str(path) for path in images.folder.glob("*.tar"))
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
        .shuffle(SHUFFLE_BUFFER)
        .decode(decoder)
        .to_tuple("jpg", "cls")
        .batched(images.batch_size, collation_fn=on_canvas)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    def epoch() -> None:
        seen = sum(len(batch[0]) for batch in loader)
        assert seen == images.images, f"an epoch of {seen}"

    return epoch


def on_canvas(samples: Sequence[tuple[np.ndarray | Image.Image, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, H, W], as large as the largest, their labels and sizes."""
    pixels = [np.asarray(image) for image, _ in samples]
    sizes = np.array([image.shape[:2] for image in pixels])
    if (sizes == sizes[0]).all():
        images = np.stack(pixels)
    else:
        images = np.zeros((len(pixels), *sizes.max(axis=0), 3), dtype=np.uint8)
        for canvas, image in zip(images, pixels, strict=True):
            canvas[: image.shape[0], : image.shape[1]] = image
    labels = torch.tensor([label for _, label in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, torch.from_numpy(sizes)


def compare(images: Set, runs: int, **variants: Work) -> tuple[dict[str, float], str]:
    """Images a second of `variants` of ours and of webdataset, in one process and at its best; and what that is."""
    settings = {
        f"{workers} workers, decode({decoder!r})": webdataset(images, workers, decoder)
        for workers in WORKERS
        for decoder in DECODERS
    }
    best, at_best = fastest(settings)
    _, alone = fastest({name: work for name, work in settings.items() if name.startswith("0 ")})
    contenders = {**variants, BEST: at_best, ALONE: alone}
    return {name: images.images / seconds for name, seconds in alternate(contenders, runs).items()}, best


def decode_alone(shards: Shards) -> Work:
    """What the processor allows on one core: simplejpeg over bytes at rest, and nothing else."""
    contents = [bytes(content) for content in stored(shards)]

    def work() -> None:
        for content in contents:
            simplejpeg.decode_jpeg(content, "RGB")

    return work


def hash_alone(shards: Shards) -> Work:
    contents = stored(shards)

    def work() -> None:
        for content in contents:
            xxhash.xxh3_64_intdigest(content)

    return work


def stored(shards: Shards) -> list[memoryview]:
    """The bytes of each image."""
    starts, sizes = shards._offsets.tolist(), shards._bytes.tolist()
    numbers = shards._shard_numbers.tolist()
    return [
        shards._shards[number][start : start + size] for number, start, size in zip(numbers, starts, sizes, strict=True)
    ]


def make_index(folder: Path, samples: int, per_shard: int = 10_000, bytes_apart: int = 2_048) -> None:
    """An artifact of that many samples with nothing in its tars, which take no space on the disk."""
    folder.mkdir()
    numbers = np.arange(samples)
    shard_numbers = (numbers // per_shard).astype(np.int32)
    names = [f"train-{number:06d}.tar" for number in range(math.ceil(samples / per_shard))]
    offsets = numbers % per_shard * bytes_apart + 512
    size = bytes_apart - 512
    columns: dict[str, Any] = {
        "id": numbers,
        "split": pa.repeat("train", samples),
        "shard": pa.DictionaryArray.from_arrays(pa.array(shard_numbers), pa.array(names)).cast(pa.string()),
        "key": pc.call_function("binary_join_element_wise", [pa.array(numbers).cast(pa.string()), "jpg", "."]),
        "offset": offsets,
        "size": np.full(samples, size),
        "format": pa.repeat("jpg", samples),
        "label": (numbers % 10).astype(np.int32),
        "labels": pa.ListArray.from_arrays(np.arange(samples + 1, dtype=np.int32), (numbers % 10).astype(np.int32)),
        "group": pa.nulls(samples, pa.string()),
        "height": np.full(samples, 32, np.int32),
        "width": np.full(samples, 32, np.int32),
        "xxh3": np.random.default_rng(0).integers(0, 2**63, samples).astype(np.uint64),
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / INDEX_FILE, compression="zstd")
    for number, name in enumerate(names):
        last = min(samples, (number + 1) * per_shard) - 1
        with (folder / name).open("wb") as tar:
            tar.truncate(tar_size(int(offsets[last]) + size))
    split = {"samples": samples, "max_height": 32, "max_width": 32}
    write_summary(folder, {"classes": [*"0123456789"], "splits": {"train": split}})


def open_one(folder: str, small: str, *, warm_up: bool) -> None:
    open_shards(small if warm_up else folder, "train")


def growth(scratch: Path, sizes: Iterable[int]) -> tuple[list[Row], list[str]]:
    """Rows of time and memory to open an index, and their exponents in words."""
    rows, seconds, memory = [], [], []
    for size in sizes:
        folder = scratch / f"index-{size}"
        make_index(folder, size)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            opened = open_shards(folder, "train")
            times.append(time.perf_counter() - started)
            del opened
            gc.collect()
        seconds.append(sorted(times)[1])
        memory.append(peak_bytes(open_one, str(folder), str(scratch / f"index-{min(sizes)}")))
        rows.append(Row(f"open an index of {size:,}", {"ours": seconds[-1]}, unit="s"))
        rows.append(Row(f"open an index of {size:,}, memory at its peak", {"ours": memory[-1] / 2**20}, unit="MiB"))
    # The smallest takes what opening anything takes.
    larger = slice(1, None)
    words = [
        f"to open an index grows as n^{exponent([*sizes][larger], seconds[larger]):.2f} in time and "
        f"n^{exponent([*sizes][larger], memory[larger]):.2f} in memory (from {[*sizes][1]:,} on): "
        f"{memory[-1] / [*sizes][-1]:.0f} bytes a sample at the peak"
    ]
    return rows, words


def first_batch_of(samples: int) -> float:
    """Seconds until the first batch in the middle of an epoch is drawn."""
    started = time.perf_counter()
    schedule = Shuffled(0, samples, 256)
    schedule.positions(7 * schedule.steps_per_epoch // 2)
    return time.perf_counter() - started


def small_images(comparison: Comparison, data: Path | None, count: int, scratch: Path) -> None:
    root, files, what = find_or_make(SMALL, data, count, scratch)
    write_shards(root, files, scratch / "small", count // 4, 512)
    images = Set(scratch / "small", count, 256)
    kept = ours(images, free_bytes=EVERYTHING)
    kept()
    rates, setting = compare(images, comparison.runs, ours=ours(images), kept=kept)
    shards = open_shards(images.folder, "train")
    alone = alternate({"decode": decode_alone(shards), "hash": hash_alone(shards)}, comparison.runs)
    comparison.limit = count / alone["decode"]
    comparison.rows.append(row(comparison.headline, rates, "ours", setting))
    comparison.rows.append(row("32 px JPEG, kept", rates, "kept", setting))
    comparison.ratio |= {
        "webdataset_32": rates["ours"] / rates[ALONE],
        "webdataset_32_at_its_best": rates["ours"] / rates[BEST],
        "cached": rates["kept"] / rates[ALONE],
        "cached_at_its_best": rates["kept"] / rates[BEST],
    }
    comparison.notes.append(
        f"small: {what}; the hash takes {alone['hash'] * rates['ours'] / count:.2%} of loading; simplejpeg alone, one "
        f"core: {comparison.limit:,.0f} images/s"
    )


def photographs(comparison: Comparison, data: Path | None, count: int, scratch: Path) -> None:
    root, files, what = find_or_make(LARGE, data, count, scratch)
    for name, short_side in (("capped at 256", 256), ("uncapped", 2_048)):
        images = Set(scratch / f"large-{short_side}", count, 64)
        write_shards(root, files, images.folder, count // 4, short_side)
        if short_side == 256:
            variant, work = "kept", ours(images, free_bytes=EVERYTHING)
            work()
        else:
            variant, work = "scaled", ours(images, least_side=least_side_for(96, (0.5, 1.0), (3 / 4, 4 / 3)))
        variants = {"ours": ours(images), "one thread": ours(images, threads=1), variant: work}
        rates, setting = compare(images, comparison.runs, **variants)
        case = f"photographs, {name}"
        comparison.rows.append(row(case, rates, "ours", setting))
        comparison.rows.append(row(f"{case}, one thread", rates, "one thread", setting))
        comparison.rows.append(row(f"{case}, {variant}", rates, variant, setting))
        alone = alternate({"hash": hash_alone(open_shards(images.folder, "train"))}, comparison.runs)
        comparison.notes.append(
            f"{case} ({what}): the hash takes {alone['hash'] * rates['one thread'] / count:.2%} of loading"
        )
        if short_side == 256:
            comparison.ratio["webdataset_photos"] = rates["ours"] / rates[BEST]
            comparison.ratio["webdataset_photos_one_thread"] = rates["one thread"] / rates[ALONE]
        else:
            comparison.ratio["webdataset_photos_uncapped"] = rates["ours"] / rates[BEST]
            comparison.ratio["scaled"] = rates["scaled"] / rates["ours"]


def row(case: str, rates: dict[str, float], of_ours: str, setting: str) -> Row:
    return Row(case, {"ours": rates[of_ours], BEST: rates[BEST], ALONE: rates[ALONE]}, {BEST: setting})


def main() -> None:
    given = arguments(__doc__, on_host=True)
    torch.set_num_threads(1)
    comparison = Comparison("loader", "images/s", "32 px JPEG, batches of 256", runs=2 if given.quick else 5)
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        small_images(comparison, given.data, 4_096 if given.quick else 20_480, scratch)
        photographs(comparison, given.data, 128 if given.quick else 512, scratch)
        sizes = [10_000, 100_000, 1_000_000] + ([] if given.quick else [10_000_000])
        rows, words = growth(scratch, sizes)
        comparison.rows += rows
        comparison.notes += words
    times = sorted(first_batch_of(100_000_000) for _ in range(9))
    comparison.rows.append(Row("first batch in an epoch of 100,000,000", {"ours": 1e3 * times[4]}, unit="ms"))
    report(comparison)


if __name__ == "__main__":
    main()
