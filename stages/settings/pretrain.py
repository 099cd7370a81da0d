"""Settings of the stage `pretrain`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, Settings, StageSettings, artifact, setting
from stages.settings.architecture import Architecture
from stages.settings.training import CANVASES, Optimiser, disk_bytes, map_bytes, weight_bytes


class Projector(Settings):
    """The head g of SimCLR, dropped after pretraining (Chen et al. 2020, section 4.2)."""

    layers: int = setting(2, "linear layers, each but the last followed by batch norm and ReLU", ge=1, le=4)
    hidden: int = setting(512, "width of the layers but the last", ge=1)
    dimension: int = setting(128, "width of the last layer", ge=2)


class SmallerViews(Settings):
    """A part of training whose views have fewer pixels: its steps are quicker, and coarse features come first."""

    share: float = setting(description="of all steps", gt=0, le=1)
    image_size: int = setting(description="height and width of a view, in pixels", ge=4)


FITTED_STEPS = 1000
FITTED_BATCHES = ((64, 256), (128, 128))
"""Largest fitted batch for views of so many pixels at most; 64 for larger ones."""

TILE_ROWS, TILES = 1024, 3
"""NT-Xent holds tiles of the matrix of similarities, on a CPU of so many rows and columns: the exponentials that it
keeps, and in the backward pass one that is computed and its weights (stages/losses/similarity_tiles.py)."""


class Pretrain(StageSettings):
    """SimCLR: two views of each image, NT-Xent over the global batch (Chen et al. 2020)."""

    stage_version: ClassVar[int] = 3
    uses_ranks: ClassVar[bool] = True
    lower_for_memory: ClassVar[tuple[str, ...]] = ("batch_size", "views.image_size", "architecture.width")

    shards: str = artifact("shard", description="images to learn from: their training part")
    views: str = artifact("augment", description="the view policy")
    encoder: str | None = artifact(
        "pretrain", "finetune", default=None, description="an encoder to start from, instead of a new one"
    )
    architecture: Architecture = setting(Architecture(), "of a new encoder")
    projector: Projector = setting(Projector(), "the head that the loss sees")
    optimiser: Optimiser = setting(Optimiser(), "optimiser and schedule")
    epochs: int | None = setting(
        200, "passes over the training images; null: as many as max_steps needs, or else 1,000 steps", ge=1
    )
    max_steps: int | None = setting(None, "stop after this many steps, if that is less than the epochs", ge=1)
    batch_size: int | None = setting(
        512,
        "images in a global batch: each gives two views; null: a power of two, at most half of the training images "
        "and 64 to 256 by the size of the views",
        ge=2,
    )
    smaller_views: tuple[SmallerViews, ...] = setting(
        (), "parts that training begins with, one after another; what is left has views of the policy's size"
    )
    one_per_group: bool = setting(
        False, "where images have groups: one image of each an epoch, so that they are not negatives of one another"
    )
    temperature: float = setting(0.5, "of NT-Xent", gt=0)
    gradient_clip: float | None = setting(None, "largest norm of the whole gradient", gt=0)
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the encoder's arithmetic; the loss is always fp32")
    channels_last: bool = setting(
        True, "memory format of the encoder, where torch is safe with it (at 8 channels or more)"
    )
    online_probe: bool = setting(True, "where labels exist: a linear probe beside, behind a stopped gradient")
    record_every_steps: int = setting(10, "steps that one line of metrics.jsonl is the mean of", ge=1)
    health_every_epochs: int = setting(1, "epochs between two measurements of RankMe; the last is always taken", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)
    log_every_seconds: float = setting(10.0, "between two lines of progress", hashed=False, ge=0)
    checkpoint_every_steps: int | None = setting(
        None,
        "steps between two checkpoints; null: 200, or more where that would take over 1% of the time",
        hashed=False,
        ge=1,
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (), "experiment trackers, by Accelerate", hashed=False
    )

    @model_validator(mode="after")
    def _check(self) -> "Pretrain":
        shares = sum(part.share for part in self.smaller_views)
        if shares > 1 + 1e-9:
            raise ValueError(f"smaller_views: the shares add up to {shares:.4g}, more than 1")
        return self

    def batch_size_for(self, images: int, image_size: int) -> int:
        """The batch size, or the one that fits so many training images and views of so many pixels."""
        if self.batch_size is not None:
            return self.batch_size
        largest = next((batch for size, batch in FITTED_BATCHES if image_size <= size), 64)
        half = 2 ** ((images // 2).bit_length() - 1) if images >= 2 else 0  # the power of two below
        return min(max(half, min(images, 4)), largest)

    def epochs_for(self, steps_per_epoch: int) -> int:
        """The epochs, or as many as it takes for the steps that are wanted."""
        return self.epochs or -(-(self.max_steps or FITTED_STEPS) // steps_per_epoch)

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        pixels = inputs["views"].sample_bytes / 12 if "views" in inputs else 224**2
        weights, maps = weight_bytes(self.architecture), map_bytes(self.architecture, pixels)
        scalar_bytes = {"fp32": 1.0, "bf16": 0.5}[self.precision]
        shards = inputs["shards"] if "shards" in inputs else Estimate()
        batch_size = self.batch_size_for(shards.samples or 2**62, round(pixels**0.5))
        batch = 1.3 * 2 * batch_size * maps * scalar_bytes
        similarities = 4 * TILES * min(2 * batch_size, TILE_ROWS) ** 2
        canvases = CANVASES * batch_size * shards.sample_bytes
        memory_bytes = int(LIBRARIES_BYTES + 4 * weights + batch + similarities + canvases)
        disk = disk_bytes(weights, self.optimiser)
        return Estimate(shards.samples, int(maps), disk, memory_bytes, int(weights))
