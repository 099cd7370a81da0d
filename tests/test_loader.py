import io
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_shards import image_file, mixed_images, write_shards
from torch import Tensor

from benchmarks.loader import make_index
from stages.images import Batch, DamagedShard, Shards, open_shards, shards
from stages.images.decode import decode_rgb
from stages.images.loader import RING, BatchLoader, least_side_for
from stages.images.schedule import OnePerGroup, Shuffled
from stages.views import Policy
from stages.views.draws import draw

IMAGES = 23
EVERYTHING, NOTHING = 2**40, 0
"""Bytes of free memory: all sets are kept, none is."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """JPEG and PNG of many sizes, the largest on both sides among them."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(folder, mixed_images(IMAGES), images_per_shard=10)
    return open_shards(folder, "train")


@pytest.fixture
def loading() -> Iterator[Any]:
    """Makes loaders and closes them."""
    made: list[BatchLoader] = []

    def load(*given: Any, **options: Any) -> BatchLoader:
        made.append(BatchLoader(*given, **options))
        return made[-1]

    yield load
    for one in made:
        one.close()


def slow_batch(opened: Shards, positions: np.ndarray) -> Tensor:
    """One sample after another on a canvas of zeros, uint8 [B, C, H, W]."""
    canvas = torch.zeros(len(positions), opened.channels, *opened.canvas, dtype=torch.uint8)
    for row, position in enumerate(positions.tolist()):
        image = opened[position].image
        for channel in range(opened.channels):
            for y in range(image.shape[1]):
                canvas[row, channel, y, : image.shape[2]] = image[channel, y]
    return canvas


@pytest.mark.parametrize("free_bytes", [EVERYTHING, NOTHING], ids=["kept", "decoded each time"])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_those_of_the_schedule(
    mixed: Shards, loading: Any, monkeypatch: pytest.MonkeyPatch, workers: int, free_bytes: int
):
    monkeypatch.setattr(shards, "THREADS_FROM_PIXELS", 0)
    schedule = Shuffled(3, IMAGES, 5)
    loader = loading(mixed, schedule, workers, free_bytes=free_bytes)
    assert loader.steps_per_epoch == 4
    for step in [*range(13), 2, 2, 9, 40, 41]:  # three epochs and more, and back and forth
        positions = schedule.positions(step)
        batch = loader.load(step)
        assert torch.equal(batch.images, slow_batch(mixed, positions))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sample_ids.tolist() == positions.tolist()
        assert batch.labels.tolist() == mixed.labels[positions].tolist()
        assert batch.sizes.tolist() == [list(mixed[position].image.shape[1:]) for position in positions.tolist()]


@pytest.mark.parametrize("free_bytes", [EVERYTHING, NOTHING], ids=["kept", "decoded each time"])
def test_ranks_share_a_batch(mixed: Shards, loading: Any, free_bytes: int):
    schedule = Shuffled(0, IMAGES, 6)
    loaders = [loading(mixed, schedule, 1, rank, 3, free_bytes=free_bytes) for rank in range(3)]
    for step in range(8):
        parts = [loader.load(step) for loader in loaders]
        assert torch.cat([part.images for part in parts]).equal(slow_batch(mixed, schedule.positions(step)))
        assert torch.cat([part.sample_ids for part in parts]).tolist() == schedule.positions(step).tolist()


@pytest.mark.parametrize("free_bytes", [EVERYTHING, NOTHING], ids=["kept", "decoded each time"])
def test_a_batch_holds_until_the_call_after_the_next(mixed: Shards, loading: Any, free_bytes: int):
    loader = loading(mixed, Shuffled(0, IMAGES, 6), free_bytes=free_bytes)
    given = []
    for step in (0, 1, 2, 3, 7, 1, 2, 3):
        given.append(loader.load(step))
        wanted = [one.images.clone() for one in given[-2:]]
        assert loader._ahead is not None
        loader._ahead[1].result()  # what is read ahead is written by now
        assert all(torch.equal(one.images, images) for one, images in zip(given[-2:], wanted, strict=True))
    places = [one.images.data_ptr() for one in given]
    assert places[:RING] * 2 == places[: 2 * RING]
    assert len(set(places)) == RING


def test_nothing_is_written_over_before_copies_of_it_to_a_gpu_are_done(
    mixed: Shards, loading: Any, monkeypatch: pytest.MonkeyPatch
):
    """With a GPU that does nothing but take down which batches it was given copies of before an event."""
    given: list[int] = []  # where in memory the batches lie that were handed out
    waited_for = written_over = 0

    class Event:
        def record(self) -> None:
            self.batches = len(given)

        def synchronize(self) -> None:
            nonlocal waited_for
            waited_for = max(waited_for, self.batches)

    empty, decode = torch.empty, Shards._decode

    def watched(self: Shards, images: np.ndarray, positions: np.ndarray, least_side: int | None) -> None:
        nonlocal written_over
        below = [number for number, place in enumerate(given) if place == images.ctypes.data]
        written_over += len(below) > 0
        assert waited_for > max(below, default=-1)
        decode(self, images, positions, least_side)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *given, pin_memory, **options: empty(*given, **options))
    monkeypatch.setattr(Shards, "_decode", watched)
    loader = loading(mixed, Shuffled(0, IMAGES, 6), free_bytes=NOTHING)
    for step in (0, 1, 2, 3, 4, 9, 2, 3, 4, 5):
        given.append(loader.load(step).images.data_ptr())
        assert loader._ahead is not None
        loader._ahead[1].result()  # so that the next call's event comes too late for it
    assert written_over > RING


def test_a_set_that_is_kept_is_read_once(tmp_path: Path, loading: Any, monkeypatch: pytest.MonkeyPatch):
    write_shards(tmp_path, mixed_images(12))
    opened = open_shards(tmp_path, "train")
    read: list[int] = []
    decode = Shards._decode

    def watched(self: Shards, images: np.ndarray, positions: np.ndarray, least_side: int | None) -> None:
        read.extend(positions.tolist())
        decode(self, images, positions, least_side)

    monkeypatch.setattr(Shards, "_decode", watched)
    loader = loading(opened, Shuffled(0, 12, 5), free_bytes=EVERYTHING)
    for step in range(20):
        loader.load(step)
    assert sorted(read) == list(range(12))


def test_a_damaged_image_is_told_of_a_set_that_is_kept(tmp_path: Path, loading: Any):
    write_shards(tmp_path, mixed_images(12))
    opened = open_shards(tmp_path, "train")
    path = tmp_path / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[opened._offsets[7] + 20] ^= 1
    path.write_bytes(content)
    loader = loading(open_shards(tmp_path, "train"), Shuffled(0, 12, 12), free_bytes=EVERYTHING)
    for _ in range(2):
        with pytest.raises(DamagedShard, match=r"sample 7 \(007\) is damaged"):
            loader.load(0)


def test_size_decides_what_is_kept(mixed: Shards, loading: Any):
    height, width = mixed.canvas
    size = IMAGES * height * width * 3
    kept = loading(mixed, Shuffled(0, IMAGES, 5), 1, 0, 2, free_bytes=8 * size).description
    assert f"{IMAGES} images on a canvas of {width} x {height} take 0.1 MiB and stay decoded" in kept
    decoded = loading(mixed, Shuffled(0, IMAGES, 5), 1, 0, 2, free_bytes=8 * size - 8).description
    assert "and are decoded each time: more than a quarter of the memory that is free" in decoded
    assert "1/8" not in decoded
    scaled = loading(mixed, Shuffled(0, IMAGES, 5), least_side=9, free_bytes=0).description
    assert "JPEGs are decoded at 1/2, 1/4 or 1/8, to a short side of 9 at least" in scaled
    assert "1/8" not in loading(mixed, Shuffled(0, IMAGES, 5), least_side=64, free_bytes=0).description


def test_the_system_is_asked_for_free_memory(mixed: Shards, loading: Any):
    assert "stay decoded" in loading(mixed, Shuffled(0, IMAGES, 5)).description


# Decoding at a part of the size


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth, as photographs are: uint8 [H, W, 3]."""
    coarse = np.random.default_rng(height * width).integers(60, 200, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


SIDES = [(64, 64), (63, 130), (200, 65), (31, 31), (97, 129), (256, 300)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """JPEG of several sizes, and a PNG."""
    folder = tmp_path_factory.mktemp("photographs")
    images = [(image_file(photograph(*sides), "JPEG"), None) for sides in SIDES]
    write_shards(folder, [*images, (image_file(photograph(120, 120), "PNG"), None)], storage_side=300)
    return open_shards(folder, "train")


@pytest.mark.parametrize("least_side", [1, 8, 16, 17, 31, 32, 33, 64, 128, 1000])
def test_scaled_images_keep_the_least_side(photographs: Shards, least_side: int):
    batch = photographs.batch(range(len(SIDES) + 1), least_side=least_side)
    assert tuple(batch.images.shape[2:]) == photographs.canvas_at(least_side)
    for row, (height, width) in enumerate(SIDES):
        divisor = 1
        for one in (2, 4, 8):
            if min(-(-height // one), -(-width // one)) >= least_side:
                divisor = one
        size = -(-height // divisor), -(-width // divisor)
        assert tuple(batch.sizes[row].tolist()) == size
        # Means of divisor x divisor pixels, nearly: libjpeg leaves out the high frequencies of each block.
        whole = Image.fromarray(decode_rgb(image_file(photograph(height, width), "JPEG")))
        expected = np.asarray(whole.resize((size[1], size[0]), Image.Resampling.BOX)).astype(int)
        got = batch.images[row, :, : size[0], : size[1]].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).mean() < (10 if divisor > 1 else 1e-9)  # unrelated: 40
        assert batch.images[row, :, size[0] :].sum() == batch.images[row, :, :, size[1] :].sum() == 0
    assert batch.sizes[-1].tolist() == [120, 120]  # PNG is decoded whole


@pytest.mark.parametrize("at_once", [1, 5, 2**20])
def test_what_a_split_decodes_to_is_known_from_its_different_sizes(
    mixed: Shards, monkeypatch: pytest.MonkeyPatch, at_once: int
):
    monkeypatch.setattr(shards, "SAMPLES_AT_ONCE", at_once)
    opened, whole = open_shards(mixed.folder, "train"), mixed.batch(range(IMAGES)).sizes
    for least_side in (None, 1, 3, 8, 20, 100):
        sizes = mixed.batch(range(IMAGES), least_side=least_side).sizes
        assert opened.canvas_at(least_side) == tuple(sizes.amax(0).tolist())
        assert opened.is_scaled_at(least_side) == (not torch.equal(sizes, whole))


def test_without_a_least_side_pixels_are_exact(photographs: Shards):
    batch = photographs.batch(range(len(SIDES)))
    for row, (height, width) in enumerate(SIDES):
        expected = decode_rgb(image_file(photograph(height, width), "JPEG"))
        assert np.array_equal(batch.images[row, :, :height, :width].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("free_bytes", [EVERYTHING, NOTHING], ids=["kept", "decoded each time"])
def test_a_loader_decodes_scaled(photographs: Shards, loading: Any, free_bytes: int):
    schedule = Shuffled(1, len(photographs), 3)
    loader = loading(photographs, schedule, least_side=20, free_bytes=free_bytes)
    for step in range(6):
        batch, expected = loader.load(step), photographs.batch(schedule.positions(step), least_side=20)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.sizes, expected.sizes)


def policy(image_size: int, crop_area: tuple[float, float], crop_ratio: tuple[float, float]) -> Policy:
    nothing: dict[str, Any] = dict.fromkeys(
        (
            "horizontal_flip", "vertical_flip", "quarter_turns", "colour_jitter", "colour_strength", "brightness",
            "contrast", "saturation", "hue", "grey", "blur",
        ),
        0.0,
    )  # fmt: skip
    return Policy(
        image_size=image_size, crop_area=crop_area, crop_ratio=crop_ratio, **nothing, blur_sigma=(0.1, 2.0),
        interpolation="bilinear", antialias=True, mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip


@given(
    st.integers(8, 64),
    st.floats(0.05, 1.0),
    st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.8), (1.5, 3.0), (0.3, 2.0)]),
    st.floats(1.0, 8.0),
)
def test_no_crop_of_the_least_side_is_smaller_than_the_view(
    image_size: int, smallest_area: float, crop_ratio: tuple[float, float], stretch: float
):
    side = least_side_for(image_size, (smallest_area, 1.0), crop_ratio)
    ids = torch.arange(300)
    sizes = torch.tensor([[side, round(side * stretch)], [round(side * stretch), side]]).repeat(150, 1)
    drawn = draw(policy(image_size, (smallest_area, 1.0), crop_ratio), 0, ids, 0, sizes, 2)
    assert int(torch.minimum(drawn.height, drawn.width).min()) >= image_size


def test_the_least_side_of_the_published_crops():
    # 8% of the area and 3 : 4: 224 / sqrt(0.06), and half a pixel for rounding.
    assert least_side_for(224, (0.08, 1.0), (3 / 4, 4 / 3)) == 917


# Growth

HUGE, MANY = 100_000_000, 1_000_000
AT_ONCE = 0.05
"""Seconds, which one operation on all of HUGE samples takes even in numpy. A busy host is given several tries."""


def test_an_epoch_of_a_hundred_million_starts_anywhere_at_once():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        schedule = Shuffled(0, HUGE, 4096)
        positions = schedule.positions(37 * schedule.steps_per_epoch - 1)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < AT_ONCE
    assert len(np.unique(positions)) == 4096
    assert positions.max() < HUGE
    tracemalloc.start()
    schedule = Shuffled(0, HUGE, 4096)
    schedule.positions(37 * schedule.steps_per_epoch - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_a_loader_of_a_million_starts_anywhere_at_once(tmp_path: Path, loading: Any, monkeypatch: pytest.MonkeyPatch):
    """From an index whose tars are empty: all is as in training but for the decoding."""
    make_index(tmp_path / "many", MANY)
    monkeypatch.setattr(Shards, "_decode", lambda self, images, *_: images.fill(7))
    opened, schedule = open_shards(tmp_path / "many", "train"), Shuffled(0, MANY, 256)
    step = 37 * schedule.steps_per_epoch - 1

    def first_batch() -> Batch:
        loader = loading(opened, schedule, least_side=8, free_bytes=NOTHING)
        assert "images on a canvas of 8 x 8" in loader.description
        return loader.load(step)

    tracemalloc.start()
    first_batch()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MANY  # the different sizes are found
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        batch = first_batch()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < AT_ONCE
    assert batch.sample_ids.tolist() == schedule.positions(step).tolist()
    assert batch.sizes.tolist() == [[8, 8]] * 256
    tracemalloc.start()
    first_batch()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MANY / 2


def test_a_batch_of_many_groups_is_drawn_at_once():
    """Groups are sorted when a schedule is made; then an epoch of any number starts at once."""
    schedule = OnePerGroup(0, np.arange(1_000_000) // 2, 256)
    tracemalloc.start()
    positions = schedule.positions(10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19
    assert len(np.unique(positions // 2)) == 256


def test_what_training_does_not_need_is_not_read(mixed: Shards, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    read_index = shards.read_index

    def watched(folder: Path, split: str, columns: Any = None) -> Any:
        read.extend(columns)
        return read_index(folder, split, columns)

    monkeypatch.setattr(shards, "read_index", watched)
    opened = open_shards(mixed.folder, "train")
    opened.batch(range(IMAGES))
    assert not {"key", "group", "labels", "split"} & set(read)
    assert (opened.keys, opened.group_names) == (mixed.keys, [None] * IMAGES)
    assert opened.label_lists == [[] if label < 0 else [label] for label in mixed.labels.tolist()]
    assert not opened.has_groups
    assert opened.groups.tolist() == list(range(IMAGES))
    assert sorted(read[-3:]) == ["group", "key", "labels"]


def test_many_small_tars_are_opened(tmp_path: Path):
    write_shards(tmp_path, mixed_images(IMAGES), images_per_shard=1)
    opened = open_shards(tmp_path, "train")
    for position, (content, _) in enumerate(mixed_images(IMAGES)):
        with Image.open(io.BytesIO(content)) as image:
            assert opened[position].image.shape[1:] == (image.height, image.width)
