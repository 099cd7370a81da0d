"""Features of every image of every split, one row each: what probes and retrieval look at."""

import json
from collections.abc import Callable, Iterator, Sequence
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
from stages.images import Batch, Shards, open_shards, read_summary
from stages.images.index import ATTRIBUTE
from stages.models import Encoder, build_encoder, load_encoder
from stages.models.encoders import PUBLISHED_WIDTH, TIMM_PREFIX, require_backbone
from stages.settings.embed import Embed
from stages.views import Interpolation, evaluation_view, read_policy, squares

Colour = tuple[float, ...]


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
    """[B, C, h, w] -> [B, D]"""
    labels_seen: Sequence[dict[str, Any]] = ()
    """One entry for each fine-tuning that is behind the weights."""


def check_settings(settings: Embed) -> None:
    """What can be said before anything runs. Raises UnusableBackbone."""
    if settings.encoder == "random":
        require_backbone(settings.architecture.backbone)
    elif settings.encoder.startswith(TIMM_PREFIX):
        require_backbone(settings.encoder)


def embed(run: Run, settings: Embed) -> None:
    """Write features.parquet and features.json."""
    folder = run.input("shards")
    summary = read_summary(folder)
    source = _source(run, settings, summary["statistics"])
    attributes = {name: f"{ATTRIBUTE}{name}" for name in summary.get("attributes", {})}
    schema = pa.schema(
        {
            "id": pa.int64(),
            "key": pa.string(),
            "split": pa.string(),
            "label": pa.int32(),
            "labels": pa.list_(pa.int32()),
            "group": pa.string(),
            **dict.fromkeys(attributes.values(), pa.string()),
            "features": pa.list_(pa.float32(), source.dimension),
        }
    )
    counts = {split: entry["samples"] for split, entry in summary["splits"].items()}
    with (
        pq.ParquetWriter(
            run.out / "features.parquet", schema, compression="none", use_dictionary=["split", *attributes.values()]
        ) as writer,
        run.progress(sum(counts.values()), "images") as progress,
    ):
        for split in counts:
            shards = open_shards(folder, split)
            for part, rows in _embedded(run, settings, source, shards):
                columns = [
                    pa.array(shards.sample_ids[part].numpy()),
                    pa.array(shards.keys[part]),
                    pa.array([split] * len(rows)),
                    pa.array(shards.labels[part].numpy().astype(np.int32)),
                    pa.array(shards.label_lists[part], schema.field("labels").type),
                    pa.array(shards.group_names[part], pa.string()),
                    *(pa.array(shards.attribute(name)[part], pa.string()) for name in attributes),
                    pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), source.dimension),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                progress.advance(len(rows))
    encoder = {
        "kind": source.kind,
        "name": source.name,
        "stage": source.stage,
        "architecture": source.architecture,
        "image_size": source.image_size,
        "labels_seen": source.labels_seen,
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
    mean, std = tuple(statistics["mean"]), tuple(statistics["std"])
    channels = len(mean)
    if run.is_artifact("encoder"):
        encoder, card = load_encoder(run.input("encoder"))
        if card.channels != channels:
            raise UsageError(
                f"{run.step}.encoder takes images of {card.channels} channels and the shards have {channels}: "
                "take shards or an encoder of the other's channels"
            )
        architecture = card.architecture.model_dump()
        return Source(
            "pretrained", card.architecture.backbone, card.kind, architecture, card.image_size, card.mean, card.std,
            card.interpolation, card.antialias, card.embedding_size, _function(encoder, run.device),
            [one.model_dump() for one in card.labels_seen],
        )  # fmt: skip
    image_size, interpolation, antialias = settings.image_size, "bilinear", True
    if run.is_artifact("views"):
        policy = read_policy(run.input("views"))
        image_size, interpolation, antialias = policy.image_size, policy.interpolation, policy.antialias
    if settings.encoder == "pixels":
        return Source(
            "pixels", "pixels", None, None, image_size, (0.0,) * channels, (1.0,) * channels, interpolation, antialias,
            channels * image_size**2, lambda images: images.flatten(1),
        )  # fmt: skip
    if settings.encoder == "random":
        architecture = settings.architecture.model_dump() | {"pretrained": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)  # as the stage pretrain does: these are the weights that it starts from
            encoder = build_encoder(**architecture, image_size=image_size, channels=channels)
        return Source(
            "random", settings.architecture.backbone, None, architecture, image_size,
            mean, std, interpolation, antialias,
            encoder.embedding_size, _function(encoder.eval(), run.device),
        )  # fmt: skip
    return _from_timm(run, settings, mean, std)


def _from_timm(run: Run, settings: Embed, mean: Colour, std: Colour) -> Source:
    """A published encoder of timm, with the size, resize and normalisation of images that its weights know.

    Args:
        mean, std: of the shards, which hold instead where images are not RGB.
    """
    published = timm.get_pretrained_cfg(settings.encoder.removeprefix(TIMM_PREFIX))
    image_size = settings.image_size if published is None else published.input_size[-1]
    encoder = build_encoder(settings.encoder, PUBLISHED_WIDTH, 0, True, image_size, len(mean))
    run.say(f"weights {encoder.weights.source}, licence: {encoder.weights.licence or 'not stated'}")
    if published is None:
        raise UsageError(f"{run.step}.encoder: timm does not say how {settings.encoder} wants its images")
    mean, std = encoder.weights.mean or mean, encoder.weights.std or std
    interpolation = "bilinear" if published.interpolation == "bilinear" else "bicubic"
    return Source(
        "timm", settings.encoder, None, None, image_size, mean, std, interpolation, True,
        encoder.embedding_size, _function(encoder.eval(), run.device),
    )  # fmt: skip


def _function(encoder: Encoder, device: torch.device) -> Callable[[Tensor], Tensor]:
    encoder.to(device).to(memory_format=torch.channels_last)
    return lambda images: encoder(images.contiguous(memory_format=torch.channels_last))


def _embedded(run: Run, settings: Embed, source: Source, shards: Shards) -> Iterator[tuple[slice, np.ndarray]]:
    """Consecutive parts of a split with their rows, float32 [B, D]; on ranks other than 0 nothing comes out.

    The ranks take turns, a batch each, so that every batch is composed as in a single process.
    """
    batches = [
        np.arange(first, min(first + settings.batch_size, len(shards)))
        for first in range(0, len(shards), settings.batch_size)
    ]
    for first in range(0, len(batches), run.ranks):
        turn = batches[first : first + run.ranks]
        mine = torch.empty(0, source.dimension, device=run.device)
        if run.rank < len(turn):
            mine = _rows(source, settings, shards.batch(turn[run.rank], settings.workers), run.device)
        rows = run.gather(mine).cpu().numpy()
        if run.rank == 0:
            for positions in turn:
                yield slice(positions[0], positions[-1] + 1), rows[: len(positions)]
                rows = rows[len(positions) :]


@torch.no_grad()
def _rows(source: Source, settings: Embed, batch: Batch, device: torch.device) -> Tensor:
    """[B, D] float32, the mean over what is looked at of each image."""
    images, looks = batch.images.to(device), []
    for square in squares(settings.crops, settings.mirror):
        view = evaluation_view(
            images, batch.sizes, source.image_size, source.mean, source.std,
            source.interpolation, source.antialias, square,
        )  # fmt: skip
        looks.append(source.features(view).float())
    return looks[0] if len(looks) == 1 else torch.stack(looks).mean(dim=0)
