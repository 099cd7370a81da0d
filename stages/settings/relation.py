"""Settings that say which images with several labels belong together."""

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class Relation(Settings):
    """Which images with several labels belong together; of one label each it is the label, whatever is said here."""

    kind: Literal["any", "all", "jaccard"] = setting(
        description="any: they share a label; all: they have the same labels; jaccard: they share enough of them"
    )
    threshold: float = setting(
        0.5, "of jaccard: share of the labels that either has which both have, at least", gt=0, le=1
    )

    @model_validator(mode="after")
    def _check(self) -> "Relation":
        if "threshold" in self.model_fields_set and self.kind != "jaccard":
            raise ValueError(f"threshold: {self.kind} has none; it is of jaccard")
        return self
