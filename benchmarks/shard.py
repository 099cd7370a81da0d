"""Small JPEG files into shards: the packing of the stage `shard` against webdataset's ShardWriter, images a second.

The work of a run is to read every file and to write tars of 10,000 images with their classes. Ours also decodes each
image (a damaged one is left out), hashes what it writes, sums its pixels for mean and standard deviation, and makes
the rows of the index; ShardWriter does none of this. Its processes start in time that is counted, as are webdataset's:
ShardWriter has no processes of its own, so `two processes` is two of it, each with half of the files.

`stage` is the whole stage `shard` in a process of its own: listing the folder, fingerprints, splits, packing, index,
without the search for near-duplicates; and `memory` what packing adds to the memory of that process at its peak, for
several numbers of images: what is left of an image is its row of the index, some 150 bytes.
"""

import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import webdataset as wds

import pipeline.cli
from benchmarks.harness import TOP, Comparison, Row, Work, alternate, arguments, peak_bytes, report
from benchmarks.image_files import SMALL, candidates_of, chunks_of, find_or_make, make
from stages.images.packing import Chunk
from stages.images.packing_processes import pack
from stages.sources.candidates import Candidate

Writing = Callable[[Path, list[Candidate], Path, int], None]
"""An adapter: of files below a root, listed with their classes, shards in a folder, by so many processes."""

IMAGES_PER_SHARD = 10_000
PEER, PEERS = "ShardWriter", "ShardWriter, two processes"


def ours(root: Path, files: list[Candidate], folder: Path, processes: int) -> None:
    """Write shards of the files."""
    chunks = chunks_of(root, files, folder, IMAGES_PER_SHARD, 512)
    with as_under_simclr():
        images = sum(one.images for one in pack(chunks, processes, lambda count: None))
    assert images == len(files), f"{images} images of {len(files)}"


@contextmanager
def as_under_simclr() -> Iterator[None]:
    """A process starts by importing the main program: `simclr`'s in a real run, not this one, which loads torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = pipeline.cli
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def shard_writer(root: Path, files: list[Candidate], folder: Path, processes: int) -> None:
    """Write shards of the files."""
    if processes == 1:
        write_part(root, files, folder, 0)
        return
    length = -(-len(files) // processes)
    parts = [files[start : start + length] for start in range(0, len(files), length)]
    context = multiprocessing.get_context("fork")  # the quickest start there is
    running = [
        context.Process(target=write_part, args=(root, part, folder, number * length))
        for number, part in enumerate(parts)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0, f"exit code {process.exitcode}"


def write_part(root: Path, files: list[Candidate], folder: Path, first: int) -> None:
    names = sorted({one.labels[0] for one in files})
    labels = {name: str(label).encode() for label, name in enumerate(names)}
    pattern = str(folder / f"{first:07d}-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=IMAGES_PER_SHARD, verbose=0, encoder=False) as writer:
        for number, file in enumerate(files, first):
            with open(f"{root}/{file.image}", "rb", buffering=0) as image:
                content = image.read()
            writer.write({"__key__": f"{number:09d}", "jpg": content, "cls": labels[file.labels[0]]})


def stage(folder: Path, scratch: Path) -> None:
    """The stage `shard` as `simclr run` runs it, with the start of the program."""
    recipe = scratch / "recipe.yaml"
    settings = f"stage: shard, source: 'folder:{folder}', near_duplicates: false"
    recipe.write_text(f"name: bench\nseed: 0\nsteps:\n  shards: {{{settings}}}\n")
    with tempfile.TemporaryDirectory(dir=scratch) as store:
        subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "run", str(recipe), "--store", store],
            cwd=TOP, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def peak_of_packing(root: str, files: list[Candidate], *, warm_up: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if warm_up:
            # The list of files is there before, as the source gives it.
            listed[:] = chunks_of(Path(root), files, Path(folder), IMAGES_PER_SHARD, 512)
        chunks = [replace(one, path=Path(folder) / one.path.name) for one in listed]
        if warm_up:
            chunks = [replace(chunks[0], candidates=chunks[0].candidates[:100])]
        list(pack(chunks, 1, lambda count: None))


listed: list[Chunk] = []


def main() -> None:
    given = arguments(__doc__, on_host=True)
    count, runs = (20_000, 3) if given.quick else (50_000, 7)
    comparison = Comparison("shard", "images/s", f"{count:,} files, two processes", runs=runs)
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        root, found, what = find_or_make(SMALL, given.data, count, scratch)
        files = candidates_of(found)

        def writing(adapter: Writing, processes: int) -> Work:
            def work() -> None:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    adapter(root, files, Path(folder), processes)

            return work

        contenders = {
            "ours": writing(ours, 2),
            "ours, one process": writing(ours, 1),
            PEER: writing(shard_writer, 1),
            PEERS: writing(shard_writer, 2),
        }
        rates = {name: count / seconds for name, seconds in alternate(contenders, runs).items()}
        comparison.rows += [
            Row(comparison.headline, {"ours": rates["ours"], PEER: rates[PEER], PEERS: rates[PEERS]}),
            Row(f"{count:,} files, one process", {"ours": rates["ours, one process"], PEER: rates[PEER]}),
        ]
        comparison.ratio = {
            "webdataset": rates["ours"] / rates[PEER],
            "webdataset_two_processes": rates["ours"] / rates[PEERS],
            "webdataset_one_process": rates["ours, one process"] / rates[PEER],
        }
        numbers = (5_000, 20_000) if given.quick else (5_000, 20_000, 80_000)
        for number in numbers:
            many = [files[place % count] for place in range(number)]
            peak = peak_bytes(peak_of_packing, str(root), many) / 2**20
            comparison.rows.append(Row(f"{number:,} files, memory", {"ours": peak}, unit="MiB"))
        made = scratch / "stage"
        make(made, count, 32, 32)
        seconds = alternate({"stage": lambda: stage(made, scratch)}, 1, warm_up=0)["stage"]
        comparison.rows.append(Row(f"the stage, {count:,} made files", {"ours": count / seconds}))
        comparison.notes.append(f"files: {what}")
    report(comparison)


if __name__ == "__main__":
    main()
