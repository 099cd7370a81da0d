"""What the stages that train have in common: the optimiser, and how much memory an encoder takes."""

from typing import Literal

from pipeline.settings import Settings, setting
from stages.settings.architecture import Architecture


class Optimiser(Settings):
    """Optimiser and learning-rate schedule (warm-up, then cosine to zero, per step)."""

    name: Literal["lars", "sgd", "adamw", "muon"] = setting("lars", "LARS: You et al. 2017; Muon: Jordan et al. 2024")
    learning_rate: float = setting(1.0, "before scaling by the batch size", gt=0)
    scaling: Literal["linear", "square_root", "none"] = setting(
        "linear", "linear: rate x batch / 256; square_root: rate x sqrt(batch); none: the rate as it is"
    )
    momentum: float = setting(0.9, "of SGD, LARS and Muon", ge=0, lt=1)
    weight_decay: float = setting(1e-4, "not applied to biases and norms", ge=0)
    warmup_epochs: float = setting(10.0, "linear warm-up; at most a tenth of the steps where a run is short", ge=0)


# Counted with torch's saved-tensor hooks at 32 and 224 pixels: what the backward pass keeps of one view, as a multiple
# of the stem's output; and parameters at width 64. Others are taken for a ResNet-50.
MAPS = {"resnet10": 11, "resnet18": 30, "resnet34": 43, "resnet50": 107, "resnet101": 160, "resnet152": 220}
PARAMETERS = {
    "resnet10": 5e6,
    "resnet18": 11e6,
    "resnet34": 21e6,
    "resnet50": 24e6,
    "resnet101": 43e6,
    "resnet152": 58e6,
}


CANVASES = 3
"""Batches of decoded images that the loader has room for: RING in stages/images/loader.py."""


def weight_bytes(architecture: Architecture) -> float:
    """Roughly what the parameters of an encoder take in fp32."""
    return 4 * PARAMETERS.get(architecture.backbone, 30e6) * (architecture.width / 64) ** 2


CHECKPOINTS = 3
"""That lie on the disk at a time: KEPT in pipeline/checkpoint.py, and the one that is written."""


def disk_bytes(weights: float, optimiser: Optimiser) -> int:
    """Roughly what training takes on the disk: its result, and checkpoints of weights and the optimiser's state."""
    return int(weights * (1 + CHECKPOINTS * (3 if optimiser.name == "adamw" else 2)))


def map_bytes(architecture: Architecture, pixels: float) -> float:
    """Roughly what the backward pass keeps of one view of this many pixels, in fp32."""
    if pixels > architecture.small_stem_up_to**2:
        pixels /= 16
    return MAPS.get(architecture.backbone, 110) * architecture.width * pixels * 4
