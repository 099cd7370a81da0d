"""Settings of the stage `pseudo_label`."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, StageSettings, artifact, setting
from stages.settings.probe import PenaltyPath


class PseudoLabel(StageSettings):
    """Classes for training images without a label, by a classifier that learned from those with one (Lee 2013)."""

    stage_version: ClassVar[int] = 1
    lower_for_memory: ClassVar[tuple[str, ...]] = ("penalties.count", "folds")

    features: str = artifact("embed", description="features of all splits")
    label_fraction: float = setting(
        1.0,
        "share of the labelled training images that is learned from; the labels of the others are hidden",
        gt=0,
        le=1,
    )
    label_subset: int = setting(0, "which of the subsets of that share, as in finetune", ge=0)
    precision: float = setting(
        0.95,
        "share of right pseudo-labels that the threshold is chosen for, out of fold on labelled images",
        gt=0,
        le=1,
    )
    threshold: float | None = setting(
        None, "probability from which on a class is given; left out: chosen for `precision`", ge=0, le=1
    )
    per_class: int | None = setting(None, "pseudo-labels of a class at most, the most confident ones", ge=1)
    include_test: bool = setting(
        False,
        "pseudo-labels for test images too, whose labels are not looked at: transductive, and the report of everything "
        "that is trained with them says so; not with `split_by: class`, where train has none of their classes",
    )
    penalties: PenaltyPath = setting(PenaltyPath(), "penalties of the logistic regression that are tried")
    folds: int = setting(5, "folds of the labelled images that choose penalty and threshold", ge=2)
    max_iterations: int = setting(500, "of L-BFGS for one penalty", ge=1)

    @model_validator(mode="after")
    def _check(self) -> "PseudoLabel":
        if self.penalties.smallest >= self.penalties.largest:
            raise ValueError("penalties.smallest must be below penalties.largest")
        return self

    def without_effect(self) -> set[str]:
        idle = set() if self.threshold is None else {"precision"}
        return idle | ({"label_subset"} if self.label_fraction == 1 else set())

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        features = inputs["features"] if "features" in inputs else Estimate()
        # The features, their standardised copy, and what the solver holds of it.
        return Estimate(features.samples, memory_bytes=LIBRARIES_BYTES + 4 * features.samples * features.sample_bytes)
