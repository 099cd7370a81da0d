"""Settings of the stage `retrieve`."""

import os
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, Settings, StageSettings, artifact, setting
from stages.settings.relation import Relation

Count = Annotated[int, Field(ge=1)]
Split = Literal["train", "val", "test"]
TILE_BYTES = 150 * 2**20
"""Of similarities and what is made of them, in one thread."""
MOST_THREADS = 8
"""That work at a time (MOST_THREADS of stages/evaluation/similarity.py, which is not for settings to import)."""
LINK_BYTES = 280
"""Of an image's links to others in an index (hnsw)."""
INDEX_FROM = 100_000
"""Gallery images from which an index is made `by_size`: there one core takes over a millisecond for an exact query of
128 numbers, and an index a fifth of it (docs/speed.md)."""


class By(Settings):
    """Queries and gallery by a further column of the source, within one split."""

    column: str = setting(description="one of columns.attributes of the stage shard")
    queries: tuple[str, ...] = setting(description="values of the column whose images are queries", min_length=1)
    gallery: tuple[str, ...] = setting(description="values of the column whose images are the gallery", min_length=1)


class OpenSet(Settings):
    """Queries may be of an identity that the gallery does not hold: the right answer is then `new`."""

    new_share: float = setting(
        0.2,
        "share of the identities that are taken out of the gallery, by a seeded draw; and the share of new queries, by "
        "weights, that the threshold is chosen for and that the figures are of",
        gt=0,
        lt=1,
    )
    validation_split: Split = setting(
        "val", "the split that the threshold is chosen on, of identities that neither train nor the queries have"
    )


class Retrieve(StageSettings):
    """How well images of a class find one another: recall, MAP@R, verification, and an open set where wanted."""

    stage_version: ClassVar[int] = 2

    features: str = artifact("embed", description="features of all splits")
    queries: Split = setting("test", "the split whose images are queries")
    gallery: Split = setting(
        "test", "the split that is searched; where it is that of the queries each of them is left out of its own search"
    )
    by: By | None = setting(None, "queries and gallery by a further column, in place of splits")
    test_split: Split = setting("test", "the split that `by` is applied in")
    relation: Relation | None = setting(
        None, "of images with several labels: which gallery images a query wants; left out: any"
    )
    recall_at: tuple[Count, ...] = setting((1, 5, 10, 100), "k of Recall@k", min_length=1)
    neighbours: int = setting(10, "nearest images of each query that neighbours.parquet keeps", ge=1)
    bootstrap_samples: int = setting(1000, "resamplings of identities for a 95% interval", ge=100)
    verification: bool = setting(True, "errors of a threshold on similarity, over all pairs of images")
    head: str | None = artifact(
        "finetune",
        default=None,
        description="the fine-tuning that made the features' encoder: its head of pairs (of pairs_concatenated or "
        "pairs_difference) scores pairs for verification too, beside the cosine",
    )
    open_set: OpenSet | None = setting(None, "also with queries whose right answer is `new`")
    index: Literal["none", "by_size", "hnsw", "ivf"] = setting(
        "none",
        "an index of the gallery for `simclr search`, which finds most of the nearest without looking at all of them "
        "(the figures stay those of the exact search; it needs faiss-cpu, the extra `index`): hnsw; ivf, which is made "
        "in less than half of the time, and may have to look longer; by_size: hnsw from 100,000 gallery images on",
    )

    @property
    def splits(self) -> tuple[Split, Split]:
        """Those of queries and gallery."""
        return (self.queries, self.gallery) if self.by is None else (self.test_split, self.test_split)

    @model_validator(mode="after")
    def _check(self) -> "Retrieve":
        if self.head is not None and not self.verification:
            raise ValueError("head: scores pairs in verification, which is false")
        if self.open_set is not None:
            queries, gallery = self.splits
            if queries != gallery:
                raise ValueError("open_set takes queries and gallery from one split: identities are taken out of it")
            if self.open_set.validation_split == queries:
                raise ValueError(f"open_set.validation_split: a threshold chosen on {queries} cannot be scored there")
        return self

    def without_effect(self) -> set[str]:
        idle = {"test_split"} if self.by is None else {"queries", "gallery"}
        return idle | ({"relation"} if self.relation is None else set())

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        features = inputs["features"] if "features" in inputs else Estimate()
        # The features, the parts of them that are compared, and these on the sphere.
        all_bytes = features.samples * features.sample_bytes
        threads = min(os.cpu_count() or 1, MOST_THREADS)
        memory_bytes = LIBRARIES_BYTES + threads * TILE_BYTES + 3 * all_bytes
        if self.index == "none":
            return Estimate(features.samples, memory_bytes=memory_bytes)
        # Unit vectors, and those of the index: of all samples, since how many the gallery has is not known here.
        index_bytes = 2 * all_bytes + features.samples * LINK_BYTES
        disk_bytes = Estimate().disk_bytes + index_bytes
        return Estimate(features.samples, disk_bytes=disk_bytes, memory_bytes=memory_bytes + index_bytes)
