"""Features of every image of every split, one row each: what probes and retrieval look at."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.run import Run
from stages.images import Batch, open_shards, read_summary
from stages.models import Encoder, build_encoder, load_encoder
from stages.models.encoders import PUBLISHED_WIDTH, TIMM_PREFIX
from stages.settings.embed import Embed
from stages.views import Interpolation, evaluation_view

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Source:
    """What makes features: the resize and normalisation of its images, and the function from them to rows."""

    kind: str
    name: str
    stage: str | None
    architecture: dict[str, Any] | None
    image_size: int
    mean: Colour
    std: Colour
    interpolation: Interpolation
    antialias: bool
    dimension: int
    features: Callable[[Tensor], Tensor]
    """[B, 3, h, w] -> [B, D]"""


def embed(run: Run, settings: Embed) -> None:
    """Write features.parquet and features.json."""
    folder = run.input("shards")
    summary = read_summary(folder)
    source = _source(run, settings, summary["statistics"])
    schema = pa.schema(
        {
            "id": pa.int64(),
            "key": pa.string(),
            "split": pa.string(),
            "label": pa.int32(),
            "features": pa.list_(pa.float32(), source.dimension),
        }
    )
    counts = {split: entry["samples"] for split, entry in summary["splits"].items()}
    with (
        pq.ParquetWriter(run.out / "features.parquet", schema, compression="none", use_dictionary=["split"]) as writer,
        run.progress(sum(counts.values()), "images") as progress,
    ):
        for split in counts:
            for batch, keys in _batches(run, settings, split):
                rows = _rows(source, batch, run.device)
                columns = [
                    pa.array(batch.sample_ids.numpy()),
                    pa.array(keys),
                    pa.array([split] * len(keys)),
                    pa.array(batch.labels.numpy().astype(np.int32)),
                    pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), source.dimension),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                progress.advance(len(keys))
    encoder = {
        "kind": source.kind,
        "name": source.name,
        "stage": source.stage,
        "architecture": source.architecture,
        "image_size": source.image_size,
    }
    card = {
        "format": 1,
        "encoder": encoder,
        "dimension": source.dimension,
        "classes": summary["classes"],
        "splits": counts,
    }
    (run.out / "features.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    run.count(samples=sum(counts.values()), dimension=source.dimension)


def _source(run: Run, settings: Embed, statistics: dict[str, Any]) -> Source:
    if run.is_artifact("encoder"):
        encoder, card = load_encoder(run.input("encoder"))
        architecture = card.architecture.model_dump()
        return Source(
            "pretrained", card.architecture.backbone, card.kind, architecture, card.image_size, card.mean, card.std,
            card.interpolation, card.antialias, card.embedding_size, _function(encoder, run.device),
        )  # fmt: skip
    if settings.encoder == "pixels":
        return Source(
            "pixels", "pixels", None, None, settings.image_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", True,
            3 * settings.image_size**2, lambda images: images.flatten(1),
        )  # fmt: skip
    if settings.encoder == "random":
        architecture = settings.architecture.model_dump() | {"pretrained": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # as the stage pretrain does: these are the weights that it starts from
            encoder = build_encoder(**architecture, image_size=settings.image_size)
        return Source(
            "random", settings.architecture.backbone, None, architecture, settings.image_size,
            _colour(statistics["mean"]), _colour(statistics["std"]), "bilinear", True,
            encoder.embedding_size, _function(encoder.eval(), run.device),
        )  # fmt: skip
    return _from_timm(run, settings)


def _from_timm(run: Run, settings: Embed) -> Source:
    """A published encoder of timm, with the size, resize and normalisation of images that its weights know."""
    published = timm.get_pretrained_cfg(settings.encoder.removeprefix(TIMM_PREFIX))
    image_size = settings.image_size if published is None else published.input_size[-1]
    encoder = build_encoder(settings.encoder, PUBLISHED_WIDTH, 0, True, image_size)
    run.say(f"weights {encoder.weights.source}, licence: {encoder.weights.licence or 'not stated'}")
    mean, std = encoder.weights.mean, encoder.weights.std
    if published is None or mean is None or std is None:
        raise UsageError(f"{run.step}.encoder: timm does not say how {settings.encoder} wants its images")
    interpolation = "bilinear" if published.interpolation == "bilinear" else "bicubic"
    return Source(
        "timm", settings.encoder, None, None, image_size, mean, std, interpolation, True,
        encoder.embedding_size, _function(encoder.eval(), run.device),
    )  # fmt: skip


def _function(encoder: Encoder, device: torch.device) -> Callable[[Tensor], Tensor]:
    encoder.to(device).to(memory_format=torch.channels_last)
    return lambda images: encoder(images.contiguous(memory_format=torch.channels_last))


def _colour(values: list[float]) -> Colour:
    red, green, blue = values
    return red, green, blue


def _batches(run: Run, settings: Embed, split: str) -> Iterator[tuple[Batch, list[str]]]:
    shards = open_shards(run.input("shards"), split)
    for first in range(0, len(shards), settings.batch_size):
        positions = np.arange(first, min(first + settings.batch_size, len(shards)))
        yield shards.batch(positions, settings.workers), [shards.keys[position] for position in positions]


@torch.no_grad()
def _rows(source: Source, batch: Batch, device: torch.device) -> np.ndarray:
    """[B, D] float32"""
    images = evaluation_view(
        batch.images.to(device), batch.sizes, source.image_size, source.mean, source.std,
        source.interpolation, source.antialias,
    )  # fmt: skip
    return source.features(images).float().cpu().numpy()
