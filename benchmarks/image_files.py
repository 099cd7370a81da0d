"""Image files for comparisons: those of a folder, a part of one, or made ones; and shards of them."""

import shutil
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from stages.images.encode import Storage
from stages.images.index import write_index, write_summary
from stages.images.packing import Chunk, make_chunks
from stages.images.packing_processes import pack
from stages.sources.candidates import Candidate

BACKGROUND = (255, 255, 255)
SMALL, LARGE = "small", "large"
SUFFIXES = {".jpg", ".jpeg"}


def find_or_make(kind: str, data: Path | None, count: int, scratch: Path) -> tuple[Path, list[str], str]:
    """`count` JPEG files of one kind.

    Args:
        kind: `small`, CIFAR-10 at 32 px, else made; `large`, photographs, else made at 500 x 400 px. Of fewer files
            than `count` some come several times.
        data: a folder with cifar10/train/ and photos/, or cifar10 itself; None takes ./data where it is there.
        scratch: where files are made, where none are found.

    Returns:
        A folder, the files below it, `<class>/<name>` or `<name>`, and what they are in words.
    """
    data = data or Path("data")
    places = [data / "cifar10/train", data / "train"] if kind == SMALL else [data / "photos", data.parent / "photos"]
    for place in places:
        found = sorted(one.relative_to(place).as_posix() for one in place.rglob("*") if one.suffix.lower() in SUFFIXES)
        if found:
            step = max(1, len(found) // count)
            return (
                place.resolve(),
                [found[step * number % len(found)] for number in range(count)],
                "/".join(place.parts[-2:]),
            )
    folder = scratch / kind
    make(folder, *((min(count, 2_000), 32, 32) if kind == SMALL else (min(count, 100), 500, 400)))
    found = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*.jpg"))
    return folder, [found[number % len(found)] for number in range(count)], "made images"


def cifar10(data: Path | None) -> Path | None:
    """The folder that holds train/ and test/ of CIFAR-10: the one given, else data/cifar10 where it is there."""
    usual = Path("data/cifar10")
    return data or (usual if usual.is_dir() else None)


def make(folder: Path, count: int, width: int, height: int) -> Path:
    """JPEG files in ten class folders: smooth colours under a little noise, which compress about as photographs do."""
    random = np.random.default_rng(0)
    for number in range(count):
        (folder / f"{number % 10}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + random.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8)
        content = simplejpeg.encode_jpeg(pixels, 90, "RGB", "420")
        (folder / f"{number % 10}/{number:06d}.jpg").write_bytes(content)
    return folder


def cut(images: Path, folder: Path, most_per_class: int) -> Path:
    """Copies of the first images of each class of images/{train,test}/<class>/; returns the folder."""
    for split in ("train", "test"):
        for place in sorted((images / split).iterdir()):
            (folder / split / place.name).mkdir(parents=True)
            for file in sorted(place.iterdir())[:most_per_class]:
                shutil.copyfile(file, folder / split / place.name / file.name)
    return folder


def candidates_of(files: list[str]) -> list[Candidate]:
    """What a source makes of them: a file's folder is its class."""
    return [
        Candidate(f"{number:07d}/{file}", file, "train", (file.rpartition("/")[0] or "photo",))
        for number, file in enumerate(files)
    ]


def chunks_of(
    root: Path, candidates: list[Candidate], folder: Path, images_per_shard: int, short_side: int
) -> list[Chunk]:
    """The work of packing them, as the stage `shard` cuts it."""
    storage = Storage(short_side, 16 * short_side, 95, BACKGROUND)
    classes = sorted({name for one in candidates for name in one.labels})
    return make_chunks(
        candidates, ["train"] * len(candidates), classes,
        root=root, storage=storage, images_per_shard=images_per_shard, folder=folder,
    )  # fmt: skip


def write_shards(root: Path, files: list[str], folder: Path, images_per_shard: int, short_side: int) -> None:
    """An artifact of the stage `shard` with one split, `train`."""
    folder.mkdir(parents=True)
    chunks = chunks_of(root, candidates_of(files), folder, images_per_shard, short_side)
    index = write_index(folder, [one.rows for one in pack(chunks, 2, lambda count: None)])
    split = {
        "samples": index.num_rows,
        "max_height": int(index["height"].to_numpy().max()),
        "max_width": int(index["width"].to_numpy().max()),
    }
    classes = [str(label) for label in range(int(index["label"].to_numpy().max()) + 1)]
    write_summary(folder, {"classes": classes, "splits": {"train": split}})
