import io
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import TarWriter

from pipeline.manifest import seal
from stages.images import DamagedShard, open_shards, packing, packing_processes
from stages.images.decode import decode_rgb
from stages.images.encode import Storage
from stages.images.index import Row, read_index, rows_table, write_index, write_summary
from stages.images.packing import Chunk, Packed, PixelSums, make_chunks, pack_chunk
from stages.images.packing_processes import cut, join, pack
from stages.sources.candidates import Candidate

STORAGE = Storage(max_short_side=64, max_long_side=64, jpeg_quality=95, background=(255, 255, 255))


def image_file(pixels: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_shards(
    folder: Path, images: list[tuple[bytes, str | None]], images_per_shard: int = 100, storage_side: int = 64
) -> list[Packed]:
    """Shards of a training split, from (image file, class)."""
    folder.mkdir(parents=True, exist_ok=True)
    candidates = [
        Candidate(f"{number:03d}", content, "train", () if name is None else (name,))
        for number, (content, name) in enumerate(images)
    ]
    classes = sorted({name for _, name in images if name is not None})
    chunks = make_chunks(
        candidates,
        ["train"] * len(images),
        classes,
        root=None,
        storage=replace(STORAGE, max_short_side=storage_side, max_long_side=storage_side),
        images_per_shard=images_per_shard,
        folder=folder,
    )
    packed = list(pack(chunks, 1, lambda count: None))
    index = write_index(folder, [one.rows for one in packed])
    split = {
        "samples": index.num_rows,
        "max_height": max(index["height"].to_pylist()),
        "max_width": max(index["width"].to_pylist()),
    }
    write_summary(folder, {"classes": classes, "splits": {"train": split}})
    return packed


def mixed_images(count: int = 23) -> list[tuple[bytes, str | None]]:
    """JPEG and PNG of several sizes, with and without a class."""
    random = np.random.default_rng(0)
    made: list[tuple[bytes, str | None]] = []
    for number in range(count):
        height, width = random.integers(5, 40, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        made.append(
            (image_file(pixels, "PNG" if number % 3 else "JPEG"), None if number % 5 == 4 else "xyz"[number % 3])
        )
    return made


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(folder, mixed_images(), images_per_shard=10)
    return folder


def test_every_sample_comes_back(mixed: Path):
    shards = open_shards(mixed, "train")
    images = mixed_images()
    assert len(shards) == len(images) == 23
    assert shards.classes == ["x", "y", "z"]
    assert shards.keys == [f"{number:03d}" for number in range(23)]
    for position, (content, name) in enumerate(images):
        sample = shards[position]
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), decode_rgb(content))
        assert sample.label == (-1 if name is None else "xyz".index(name))
        assert sample.sample_id == position
        assert sample.key == f"{position:03d}"


@pytest.mark.parametrize("threads_from", [0, 10**9], ids=["threads", "no threads"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_batch_is_its_samples_on_a_canvas(
    mixed: Path, workers: int, threads_from: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stages.images.shards.THREADS_FROM_PIXELS", threads_from)
    shards = open_shards(mixed, "train")
    positions = [7, 0, 22, 7]
    batch = shards.batch(positions, workers=workers)
    height, width = shards.canvas
    assert batch.images.shape == (4, 3, height, width)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sample_ids.tolist() == positions
    for row, position in enumerate(positions):
        sample = shards[position]
        _, sample_height, sample_width = sample.image.shape
        assert batch.sizes[row].tolist() == [sample_height, sample_width]
        assert batch.labels[row] == sample.label == shards.labels[position]
        assert torch.equal(batch.images[row, :, :sample_height, :sample_width], sample.image)
        assert batch.images[row].sum() == sample.image.sum()


def test_positions_may_be_a_list_an_array_or_a_tensor(mixed: Path):
    shards = open_shards(mixed, "train")
    wanted = shards.batch([3, 1]).images
    assert torch.equal(shards.batch(np.array([3, 1])).images, wanted)
    assert torch.equal(shards.batch(torch.tensor([3, 1])).images, wanted)
    assert shards.batch([]).images.shape[0] == 0


@pytest.mark.parametrize("position", [-1, 23])
def test_positions_outside_are_refused(mixed: Path, position: int):
    shards = open_shards(mixed, "train")
    with pytest.raises(IndexError, match="from 0 to 22"):
        shards.batch([0, position])
    with pytest.raises(IndexError):
        shards[position]


def test_many_threads_may_read_at_once(mixed: Path):
    shards = open_shards(mixed, "train")
    expected = shards.batch(range(23)).images
    with ThreadPoolExecutor(8) as threads:
        for images in threads.map(lambda _: shards.batch(range(23)).images, range(40)):
            assert torch.equal(images, expected)


pictures = arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)))


@settings(max_examples=25)
@given(st.lists(pictures, min_size=1, max_size=8), st.integers(1, 4))
def test_lossless_images_survive_the_way(
    tmp_path_factory: pytest.TempPathFactory, images: list[np.ndarray], images_per_shard: int
):
    folder = tmp_path_factory.mktemp("lossless")
    write_shards(folder, [(image_file(pixels, "PNG"), None) for pixels in images], images_per_shard)
    batch = open_shards(folder, "train").batch(range(len(images)))
    for pixels, image, (height, width) in zip(images, batch.images, batch.sizes.tolist(), strict=True):
        assert np.array_equal(image[:, :height, :width].permute(1, 2, 0).numpy(), pixels)


def test_the_index_points_at_the_bytes(mixed: Path):
    for row in pq.read_table(mixed / "index.parquet").to_pylist():
        with tarfile.open(mixed / row["shard"]) as tar:
            (member,) = [one for one in tar.getmembers() if one.name == f"{row['id']:09d}.{row['format']}"]
            assert (member.offset_data, member.size) == (row["offset"], row["size"])
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)


def test_webdataset_reads_the_shards(mixed: Path):
    paths = sorted(mixed.glob("train-*.tar"))
    assert len(paths) == 3
    samples = []
    for path in paths:
        with path.open("rb") as stream:  # given an address, webdataset leaves the file open
            files = tar_file_expander([{"url": path.name, "stream": stream}])
            samples += list(group_by_keys(files))
    assert len(samples) == 23
    shards = open_shards(mixed, "train")
    for position, sample in enumerate(samples):
        assert sample["__key__"] == f"{position:09d}"
        pixels = decode_rgb(sample.get("jpg") or sample["png"])
        assert np.array_equal(pixels, shards[position].image.permute(1, 2, 0).numpy())
        assert int(sample.get("cls", b"-1")) == shards.labels[position]


def test_tars_are_those_that_webdataset_writes(mixed: Path):
    for path in sorted(mixed.glob("train-*.tar")):
        with path.open("rb") as stream:
            samples = list(group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])))
        written = io.BytesIO()
        with TarWriter(written, encoder=False, compress=False, mtime=0) as writer:
            for sample in samples:
                writer.write(sample)
        assert written.getvalue() == path.read_bytes()


# Damage


@pytest.fixture
def damageable(tmp_path: Path) -> Path:
    write_shards(tmp_path, mixed_images(), images_per_shard=10)
    return tmp_path


def test_a_flipped_bit_is_named_with_shard_and_sample(damageable: Path):
    row = pq.read_table(damageable / "index.parquet").to_pylist()[13]
    path = damageable / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["offset"] + row["size"] // 2] ^= 1
    path.write_bytes(content)
    shards = open_shards(damageable, "train")
    shards.batch([*range(13), *range(14, 23)])
    for read in (lambda: shards[13], lambda: shards.batch([3, 13, 4])):
        with pytest.raises(DamagedShard, match=r"train-000001\.tar: sample 13 \(013\) is damaged.*hash") as error:
            read()
        assert error.value.exit_code == 4


def test_a_sample_that_does_not_decode_is_named(damageable: Path):
    write_shards(damageable, mixed_images(4))
    rows = pq.read_table(damageable / "index.parquet").drop_columns("id").to_pylist()
    rows[1]["format"] = "jpg"
    rows[2]["height"] += 1
    write_index(damageable, [rows_table([Row(**row) for row in rows])])
    shards = open_shards(damageable, "train")
    with pytest.raises(DamagedShard, match=r"sample 1 \(001\) is damaged: it cannot be decoded"):
        shards.batch([0, 1])
    with pytest.raises(DamagedShard, match=r"sample 2 \(002\) is damaged: it is \d+ x \d+ pixels"):
        shards.batch([0, 2])


def cut_tar(folder: Path) -> None:
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-10240])


def empty_tar(folder: Path) -> None:
    (folder / "train-000001.tar").write_bytes(b"")


def lose_tar(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


def cut_index(folder: Path) -> None:
    path = folder / "index.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def shorten_index(folder: Path) -> None:
    table = pq.read_table(folder / "index.parquet")
    write_index(folder, [table.slice(0, 20).drop_columns("id")])


def lose_summary(folder: Path) -> None:
    (folder / "shards.json").unlink()


def break_summary(folder: Path) -> None:
    (folder / "shards.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_tar, r"train-000001\.tar has \d+ bytes instead of \d+"),
        (empty_tar, r"train-000001\.tar has 0 bytes"),
        (lose_tar, r"train-000001\.tar.*No such file.*: sample 10 \(010\) and 9 more cannot be read"),
        (cut_index, r"index\.parquet"),
        (shorten_index, "20 samples of 23"),
        (lose_summary, r"shards\.json.*No such file"),
        (break_summary, r"shards\.json"),
    ],
)
def test_damaged_files_are_named_on_opening(damageable: Path, damage: Callable[[Path], None], named: str):
    damage(damageable)
    with pytest.raises(DamagedShard, match=named):
        open_shards(damageable, "train")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The files of an artifact as a store has it."""
    write_shards(tmp_path / "files", mixed_images(), images_per_shard=10)
    seal(tmp_path)
    return tmp_path / "files"


def exchange_labels(folder: Path) -> None:
    """Of the first two samples, in an index that is in order otherwise."""
    rows = pq.read_table(folder / "index.parquet").drop_columns("id").to_pylist()
    rows[0]["label"], rows[1]["label"] = rows[1]["label"], rows[0]["label"]
    write_index(folder, [rows_table([Row(**row) for row in rows])])


def rename_a_class(folder: Path) -> None:
    path = folder / "shards.json"
    path.write_text(path.read_text().replace('"x"', '"X"'))


@pytest.mark.parametrize(
    ("damage", "named"), [(exchange_labels, r"index\.parquet is damaged"), (rename_a_class, r"shards\.json is damaged")]
)
def test_what_the_index_says_is_held_against_the_manifest(
    published: Path, damage: Callable[[Path], None], named: str
) -> None:
    opened = open_shards(published, "train")
    damage(published)
    with pytest.raises(DamagedShard, match=named) as error:
        open_shards(published, "train")
    assert error.value.exit_code == 4
    assert "makes the shards again" in str(error.value)
    if damage is exchange_labels:
        with pytest.raises(DamagedShard, match=named):
            opened.keys  # noqa: B018 - read when it is asked for
    (published.parent / "manifest.json").unlink()
    assert len(open_shards(published, "train")) == 23, "a copy without a manifest serves"


@pytest.mark.parametrize("manifest", ["{", "[]", '{"files": {}}', '{"files": {"index.parquet": {"size": 1}}}'])
def test_a_damaged_manifest_is_named(published: Path, manifest: str) -> None:
    (published.parent / "manifest.json").write_text(manifest)
    with pytest.raises(DamagedShard, match=r"manifest\.json does not tell what index\.parquet was"):
        read_index(published, "train")


def test_what_a_cut_tar_has_lost_is_named(damageable: Path) -> None:
    rows = pq.read_table(damageable / "index.parquet").to_pylist()
    path = damageable / "train-000001.tar"
    content = path.read_bytes()
    whole, third = (rows[number]["offset"] + rows[number]["size"] for number in (19, 12))
    lost = {len(content) - 1: None, whole: None, whole - 1: "019", third: "013", 0: "010"}
    for size, first in lost.items():
        path.write_bytes(content[:size])
        with pytest.raises(DamagedShard) as error:
            open_shards(damageable, "train")
        assert f"{path} has {size} bytes instead of {len(content)}" in str(error.value)
        assert (first is None) == ("cannot be read" not in str(error.value))
        more = "" if first == "019" else f" and {19 - int(first or 0)} more"
        assert first is None or f": sample {int(first)} ({first}){more} cannot be read" in str(error.value)


def test_a_split_that_is_not_there_is_named(mixed: Path):
    with pytest.raises(ValueError, match="no split 'val'; it has train"):
        open_shards(mixed, "val")


def test_a_newer_format_is_refused(damageable: Path):
    path = damageable / "shards.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2"):
        open_shards(damageable, "train")


# Packing


@settings(max_examples=25)
@given(st.lists(pictures, min_size=1, max_size=6))
def test_statistics_are_those_of_all_pixels(images: list[np.ndarray]):
    sums = PixelSums()
    for pixels in images:
        sums += PixelSums.of(pixels)
    everything = np.concatenate([pixels.reshape(-1, 3) for pixels in images]) / 255
    assert sums.pixels == len(everything)
    assert np.allclose(sums.mean(), everything.mean(axis=0), rtol=0, atol=1e-12)
    assert np.allclose(sums.std(), everything.std(axis=0), rtol=0, atol=1e-7)


def test_statistics_of_large_images_do_not_overflow():
    sums = PixelSums.of(np.full((1100, 1000, 3), 255, np.uint8))
    assert sums.values == (255 * 1_100_000,) * 3
    assert sums.squares == (255**2 * 1_100_000,) * 3


@settings(max_examples=25)
@given(st.lists(pictures, max_size=30), st.integers(1, 500))
def test_sums_of_many_images_are_those_of_each(images: list[np.ndarray], pixels_at_once: int):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(packing, "PIXELS_AT_ONCE", pixels_at_once)
        running = packing._RunningSums(3)
        for pixels in images:
            running.add(pixels)
    pixels = values = squares = 0
    for row in (row.tolist() for image in images for row in image.reshape(-1, 3)):
        pixels += 1
        values += row[1]
        squares += row[1] ** 2
    total = running.total()
    assert (total.pixels, total.values[1], total.squares[1]) == (pixels, values, squares)
    assert running.total() == total


def test_a_process_that_packs_loads_no_torch():
    program = (
        "import sys, stages.images.packing_processes; "
        "print([name for name in ('torch', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_what_reads_shards_is_there_when_it_is_asked_for():
    program = (
        "from stages.images import Batch, Sample, Shards, open_shards; import stages.images as images; images.nothing"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("AttributeError: module 'stages.images' has no attribute 'nothing'\n")


def test_a_chunk_without_a_readable_image_leaves_no_tar(tmp_path: Path):
    (packed,) = write_rejected(tmp_path, [b"", b"no image"])
    assert packed.rows.num_rows == 0
    assert [tuple(one) for one in packed.rejected] == [
        ("000", "the file is empty"),
        ("001", "not an image of a known kind"),
    ]
    assert list(tmp_path.iterdir()) == []


def write_rejected(folder: Path, contents: list[bytes]) -> list[Packed]:
    candidates = [Candidate(f"{number:03d}", content) for number, content in enumerate(contents)]
    chunk = Chunk(folder / "train-000000.tar", "train", 0, candidates, [()] * len(candidates), None, STORAGE)
    return [pack_chunk(chunk, lambda count: None)]


def chunks_of_one_file(folder: Path, content: bytes, lengths: list[int]) -> list[Chunk]:
    (folder / "image").write_bytes(content)
    storage = Storage(4000, 4000, 95, (255, 255, 255))
    return [
        Chunk(
            folder / f"train-{number:06d}.tar",
            "train",
            0,
            [Candidate(str(place), "image") for place in range(length)],
            [()] * length,
            folder,
            storage,
        )
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**20])
def test_files_are_read_in_full(tmp_path: Path, size: int):
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    assert packing._read_file(str(tmp_path / "file")) == content


def test_a_folder_in_the_place_of_a_file_is_rejected(tmp_path: Path):
    (tmp_path / "a.jpg").mkdir()
    chunk = Chunk(tmp_path / "0.tar", "train", 0, [Candidate("a.jpg", "a.jpg")], [()], tmp_path, STORAGE)
    packed = pack_chunk(chunk, lambda count: None)
    assert [tuple(one) for one in packed.rejected] == [("a.jpg", "cannot be opened: Is a directory")]


def test_progress_is_told_and_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "SECONDS_BETWEEN_NEWS", 0)
    (chunk,) = chunks_of_one_file(tmp_path, image_file(np.zeros((4, 4, 3), np.uint8), "PNG"), [7])
    counted: list[int] = []
    pack_chunk(chunk, counted.append)
    assert counted == [1] * 7 + [0]
    monkeypatch.setattr(packing, "SECONDS_BETWEEN_NEWS", 1000)
    counted.clear()
    pack_chunk(chunk, counted.append)
    assert counted == [7]


@pytest.mark.parametrize("who", ["both", "the other"])
def test_progress_of_processes_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    if who == "the other":
        monkeypatch.setattr(packing_processes._Work, "take_back", lambda work: False)
    chunks = chunks_of_one_file(tmp_path, image_file(np.zeros((4, 4, 3), np.uint8), "PNG"), [70] * 9)
    counted: list[int] = []
    packed = list(pack(chunks, 2, counted.append))
    assert [one.chunk for one in packed] == chunks
    assert sum(counted) == sum(one.images for one in packed) == 9 * 70
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", *(chunk.path.name for chunk in chunks)]


def test_a_file_that_cannot_be_opened_is_rejected(tmp_path: Path):
    candidate = Candidate("gone.jpg", "gone.jpg")
    chunk = Chunk(tmp_path / "train-000000.tar", "train", 0, [candidate], [()], tmp_path, STORAGE)
    packed = pack_chunk(chunk, lambda count: None)
    assert [tuple(one) for one in packed.rejected] == [("gone.jpg", "cannot be opened: No such file or directory")]


@pytest.mark.parametrize("length", [1, 2, 5, 23, 40])
def test_parts_joined_are_the_tar(tmp_path: Path, length: int):
    images = [(b"broken", None), *mixed_images(), (b"broken", None)]
    for place in (4, 11, 12):
        images[place] = b"", None
    candidates = [
        Candidate(f"{number:03d}", content, attributes=(f"v{number % 7}" if number % 3 else None, str(number)))
        for number, (content, _) in enumerate(images)
    ]
    labels: list[tuple[int, ...]] = [() if number % 4 == 0 else (number % 4 - 1,) for number in range(len(images))]
    path = tmp_path / "train-000000.tar"
    chunk = Chunk(path, "train", 70, candidates, labels, None, STORAGE, ("by", "number"))
    whole = pack_chunk(chunk, lambda count: None)
    content = chunk.path.read_bytes()
    chunk.path.unlink()
    joined = join(chunk, [pack_chunk(part, lambda count: None) for part in cut(chunk, length)])
    assert chunk.path.read_bytes() == content
    assert joined.rows.equals(whole.rows)
    values = {one.key: one.attributes for one in candidates}
    columns = (joined.rows[name].to_pylist() for name in ("key", "attribute.by", "attribute.number"))
    assert all((by, number) == values[key] for key, by, number in zip(*columns, strict=True))
    assert (joined.rejected, joined.sums, joined.copied) == (whole.rejected, whole.sums, whole.copied)
    assert len(joined.rejected) == 5
    assert list(tmp_path.iterdir()) == [chunk.path]


def test_parts_without_a_readable_image_leave_no_tar(tmp_path: Path):
    candidates = [Candidate(str(number), b"", attributes=("x",)) for number in range(3)]
    chunk = Chunk(tmp_path / "train-000000.tar", "train", 0, candidates, [()] * 3, None, STORAGE, ("by",))
    joined = join(chunk, [pack_chunk(part, lambda count: None) for part in cut(chunk, 2)])
    assert (joined.rows.num_rows, len(joined.rejected)) == (0, 3)
    assert joined.rows.column_names[-1] == "attribute.by"
    assert list(tmp_path.iterdir()) == []


def test_few_large_images_are_worth_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chunks = chunks_of_one_file(tmp_path, image_file(np.zeros((64, 64, 3), np.uint8), "PNG"), [3])
    size = (tmp_path / "image").stat().st_size
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM_BYTES", 3 * size + 1)
    assert not packing_processes._is_large(chunks)
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM_BYTES", 3 * size)
    assert packing_processes._is_large(chunks)
    (one,) = pack(chunks, 2, lambda count: None)
    assert one.rows.num_rows == 3
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM_BYTES", 10**9)
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 3)
    assert packing_processes._is_large(chunks)
    (tmp_path / "image").unlink()
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 4)
    assert not packing_processes._is_large(chunks)


@pytest.mark.parametrize("who", ["both", "the other"])
def test_leaving_off_stops_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str):
    monkeypatch.setattr(packing_processes, "PROCESSES_FROM", 0)
    if who == "the other":
        monkeypatch.setattr(packing_processes._Work, "take_back", lambda work: False)
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    chunks = chunks_of_one_file(tmp_path, image_file(noise, "PNG"), [1, 2000])
    counted = []
    packed = pack(chunks, 2, counted.append)
    assert isinstance(packed, Generator)
    first = next(packed)
    assert first.rows.num_rows == 1
    assert sum(counted) < 2001, "the second chunk is under way"
    started = time.monotonic()
    packed.close()
    assert time.monotonic() - started < 10  # both chunks would take minutes
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2000 * 500 * 500


PARENT = """
import sys
from pathlib import Path

sys.path[:0] = [{tests!r}, {project!r}]

from stages.images import packing_processes
from test_shards import chunks_of_one_file, image_file
import numpy as np

packing_processes.PROCESSES_FROM = 0
packing_processes._Work.take_back = lambda work: False  # the other process does it all, so there is one
content = image_file(np.zeros((4, 4, 3), np.uint8), "PNG")
packed = packing_processes.pack(chunks_of_one_file(Path({folder!r}), content, [1, 1]), 2, lambda count: None)
next(packed)
print("ready", flush=True)
sys.stdin.read()
"""


def test_processes_end_with_a_killed_parent(tmp_path: Path):
    here = Path(__file__).parent
    script = PARENT.format(tests=str(here), project=str(here.parent), folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    # The processes hold the other end of the pipe: it closes when the last of them is gone.
    parent.communicate(timeout=20)
    assert parent.returncode == -9
