"""The supervised losses as a recipe says them: `loss: {name: arcface, margin: 0.4}`. One class each."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from pipeline.settings import Settings, setting


def _margin(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One fault instead of one for each type that it could have been."""
    try:
        return check(value)
    except ValidationError:
        raise ValueError("is a number above 0, or soft") from None


class LossSettings(Settings):
    """Base of the settings of a loss; each has its `name` and docstring.

    Attributes:
        batches: `plain`, or `class_balanced` where a loss needs several images of each class in a batch.
        has_head: whether it trains something of its own on top of the encoder.
    """

    batches: ClassVar[Literal["plain", "class_balanced"]] = "plain"
    has_head: ClassVar[bool] = True


class CrossEntropy(LossSettings):
    """Softmax cross-entropy of a linear classifier on the embedding."""

    name: Literal["cross_entropy"]
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes (Szegedy et al. 2016)", ge=0, lt=1
    )


class Triplet(LossSettings):
    """Batch-hard triplet loss on unit vectors, unsquared distance (Hermans et al. 2017)."""

    batches = "class_balanced"
    has_head = False

    name: Literal["triplet"]
    margin: Annotated[Annotated[float, Field(gt=0)] | Literal["soft"], WrapValidator(_margin)] = setting(
        0.3, "by which the hardest negative is to be farther away than the hardest positive; soft: softplus"
    )


class ArcFace(LossSettings):
    """Softmax over cosines to class prototypes, a margin added to the angle to the own one (Deng et al. 2019)."""

    name: Literal["arcface"]
    scale: float | None = setting(None, "factor of the cosines; if left out 16, above 1,000 classes 30", gt=0)
    margin: float = setting(0.3, "radians that are added to the angle to the own class", ge=0, lt=1.57)
    margin_ramp: float = setting(0.5, "share of the steps over which the margin grows from 0", ge=0, le=1)


LossChoice = Annotated[CrossEntropy | Triplet | ArcFace, Field(discriminator="name")]
"""Every loss; stages/losses/registry.py has the same names."""
