"""Vectors of the images of any folder, into one Parquet file."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stages.encoders.ready import ReadyEncoder
from stages.images import UnreadableImage
from stages.sources.candidates import SPLIT_NAMES


class NoDevice(ValueError):
    """The device that was asked for is not there."""

    exit_code = 2


def embed_images(
    encoder: ReadyEncoder,
    images: Sequence[tuple[Path, str]],
    out: Path,
    *,
    batch_size: int,
    device: str,
    workers: int,
    advance: Callable[[int], None],
) -> list[tuple[str, str]]:
    """Write path, label and vector of every image that can be read, in the order given.

    The file appears by one rename when it is complete; without a readable image there is none.

    Args:
        images: (file, path to show) of each.
        out: the Parquet file. Columns: `path` string, `label` string (the parent folder; null without one),
            `vector` fixed-size list of D float32.
        device: auto, cpu, cuda or mps.
        workers: threads that read and decode.
        advance: called with the number of images that are done.

    Returns:
        (path to show, reason) of the images that cannot be read.
    """
    place = find_device(device)
    encoder.to(place)
    size = encoder.embedding_size
    vector = pa.list_(pa.float32(), size)
    schema = pa.schema({"path": pa.string(), "label": pa.string(), "vector": vector})
    schema = schema.with_metadata({"encoder": encoder.reference})
    private = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    rejected: list[tuple[str, str]] = []
    written = 0
    try:
        with pq.ParquetWriter(private, schema, compression="none", use_dictionary=["label"]) as writer:
            for names, views, unreadable in _batches(encoder, images, batch_size, workers):
                rejected += unreadable
                if names:
                    rows = _vectors(encoder, torch.stack(views).to(place))
                    labels = [label_of(name) for name in names]
                    columns = [
                        pa.array(names, pa.string()),
                        pa.array(labels, pa.string()),
                        pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), size),
                    ]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    written += len(names)
                advance(len(names) + len(unreadable))
        if written:
            private.replace(out)
    finally:
        private.unlink(missing_ok=True)
    return rejected


def label_of(path: str) -> str | None:
    """The class folder that a path lies in: its parent, unless that is the root or a split."""
    parents = PurePosixPath(path).parts[:-1]
    return None if not parents or (len(parents) == 1 and parents[0].lower() in SPLIT_NAMES) else parents[-1]


def find_device(name: str) -> torch.device:
    """The device of that name, or with `auto` the best there is. Raises NoDevice."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present.get(name):
        there = ", ".join(["auto", *(kind for kind, there in present.items() if there)])
        raise NoDevice(f"--device {name}: there is no such device here, only {there}")
    return torch.device(name)


def _batches(
    encoder: ReadyEncoder, images: Sequence[tuple[Path, str]], batch_size: int, workers: int
) -> Iterator[tuple[list[str], list[Tensor], list[tuple[str, str]]]]:
    """By batch: names and views of the images that can be read, and the others with the reason."""

    def read(image: tuple[Path, str]) -> Tensor | str:
        try:
            return encoder.preprocess(image[0])
        except UnreadableImage as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    with ThreadPoolExecutor(workers) as threads:
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size]
            names, views, unreadable = [], [], []
            for (_, name), result in zip(part, threads.map(read, part), strict=True):
                if isinstance(result, str):
                    unreadable.append((name, result))
                else:
                    names.append(name)
                    views.append(result)
            yield names, views, unreadable


@torch.no_grad()
def _vectors(encoder: ReadyEncoder, images: Tensor) -> np.ndarray:
    """[B, C, h, w] -> float32 [B, D]"""
    return encoder(images).float().cpu().numpy()
