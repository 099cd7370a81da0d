"""Settings of the stage `probe`."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, Settings, StageSettings, artifact, setting

Count = Annotated[int, Field(ge=1)]


class PenaltyPath(Settings):
    """A path of L2 penalties, evenly spaced in their logarithm (lambda on the mean loss)."""

    smallest: float = setting(1e-8, "smallest penalty", gt=0)
    largest: float = setting(1e2, "largest penalty", gt=0)
    count: int = setting(21, "values on the path", ge=2)


class Probe(StageSettings):
    """How good features are: logistic regression, nearest neighbours, and both with few labels."""

    stage_version: ClassVar[int] = 4
    lower_for_memory: ClassVar[tuple[str, ...]] = ("penalties.count", "folds")

    features: str = artifact("embed", description="features of all splits")
    test_split: Literal["test", "val"] = setting("test", "the split that is scored, once")
    penalties: PenaltyPath = setting(PenaltyPath(), "penalties that are tried")
    held_out_fraction: float = setting(0.1, "share of train, stratified, that chooses the penalty", gt=0, lt=1)
    folds: int = setting(
        5,
        "folds that choose the penalty inside a small subset; with several labels an image those that choose penalty "
        "and thresholds",
        ge=2,
    )
    label_fractions: tuple[float, ...] = setting((0.01, 0.1), "shares of the labels; all of them always")
    subsets: tuple[Count, ...] = setting((10, 5), "subsets drawn at each of these shares")
    neighbours: tuple[Count, ...] = setting((20, 200), "k of the nearest-neighbour classifier", min_length=1)
    neighbour_temperature: float = setting(0.1, "weight of a neighbour: exp(similarity / temperature)", gt=0)
    bootstrap_samples: int = setting(1000, "resamplings of the test part for a 95% interval", ge=100)
    without_labels: Literal["fail", "pass"] = setting(
        "fail", "without labels, or with one class only: fail, or pass without a score; a report then shows health"
    )
    thresholds: Literal["per_class", "global", "prevalence"] = setting(
        "per_class",
        "with several labels an image: from which score on an image has a label, chosen out of fold; for each the one "
        "of its highest F1 (below 50 images with the label drawn towards the global one), one for all of the highest "
        "macro F1, or as many images as have it in train",
    )
    transfer: bool = setting(
        False,
        "with several labels: also measure what it brings that the labels of the nearest training image overwrite "
        "those of the linear probe, above a cosine that is chosen out of fold",
    )
    max_iterations: int = setting(500, "of L-BFGS for one penalty", ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Probe":
        if len(self.subsets) != len(self.label_fractions):
            raise ValueError("subsets needs one number for each of label_fractions")
        if any(not 0 < fraction < 1 for fraction in self.label_fractions):
            raise ValueError("label_fractions are above 0 and below 1; all labels are always there")
        if self.penalties.smallest >= self.penalties.largest:
            raise ValueError("penalties.smallest must be below penalties.largest")
        return self

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        features = inputs["features"] if "features" in inputs else Estimate()
        # The features, their standardised copy, and what the solver holds of it.
        return Estimate(features.samples, memory_bytes=LIBRARIES_BYTES + 4 * features.samples * features.sample_bytes)
