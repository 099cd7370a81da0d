"""Settings of the stage `finetune`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import model_validator

from pipeline.settings import LIBRARIES_BYTES, Estimate, StageSettings, artifact, setting
from stages.settings.architecture import Architecture
from stages.settings.losses import CrossEntropy, LossChoice
from stages.settings.training import CANVASES, Optimiser, map_bytes, weight_bytes


class FinetuneOptimiser(Optimiser):
    """Optimiser and learning-rate schedule (warm-up, then cosine to zero, per step)."""

    name: Literal["lars", "sgd", "adamw"] = setting("sgd", "LARS: You et al. 2017")
    learning_rate: float = setting(
        0.2, "before scaling by the batch size (of few labels the batch is small, and so is the rate)", gt=0
    )
    warmup_epochs: float = setting(1.0, "linear warm-up; at most a tenth of the steps where a run is short", ge=0)


class Finetune(StageSettings):
    """Train an encoder on labels: a classifier or an embedding, from all labels or a share of them."""

    stage_version: ClassVar[int] = 2
    uses_ranks: ClassVar[bool] = True
    lower_for_memory: ClassVar[tuple[str, ...]] = ("batch_size", "classes_per_batch", "images_per_class")

    shards: str = artifact("shard", description="images to learn from: the labelled ones of their training part")
    views: str | None = artifact(
        "augment",
        default=None,
        description="the view policy, of which each image gets one view; if left out: crop and flip",
    )
    encoder: str = artifact(
        "pretrain",
        "finetune",
        description="an encoder to start from, `random` (as initialised from the seed), or `timm:NAME`",
        literals=("random",),
        prefixes=("timm:",),
    )
    architecture: Architecture = setting(Architecture(), "of a `random` encoder")
    image_size: int = setting(32, "pixels, for a `random` encoder without views; any other brings its own", ge=4)
    projector_layers: int = setting(
        0, "layers of the projector that the encoder keeps (SimCLRv2 keeps the first); the embedding is their output",
        ge=0,
    )  # fmt: skip
    loss: LossChoice = setting(
        CrossEntropy(name="cross_entropy"), "what is learned; `name` and the loss's own settings"
    )
    label_fraction: float = setting(1.0, "share of the labelled training images that is used, stratified", gt=0, le=1)
    label_subset: int = setting(0, "which of the subsets of that share: those of the probe's label curve", ge=0)
    freeze: str = setting(
        "none",
        "none; encoder: only the head is trained; or the name of a part such as layer2: frozen up to and with it",
    )
    optimiser: FinetuneOptimiser = setting(FinetuneOptimiser(), "optimiser and schedule")
    head_learning_rate: float = setting(1.0, "rate of the head, as a multiple of the encoder's", gt=0)
    epochs: int = setting(50, "passes over the labelled images that are used", ge=1)
    max_steps: int | None = setting(None, "stop after this many steps, if that is less than the epochs", ge=1)
    batch_size: int = setting(128, "images in a global batch, at most all there are; of triplet P x K instead", ge=2)
    classes_per_batch: int = setting(
        8, "P: classes in a global batch of a loss that compares images, at most all there are", ge=2
    )
    images_per_class: int = setting(8, "K: images of each of these classes", ge=2)
    gradient_clip: float | None = setting(None, "largest norm of the whole gradient", gt=0)
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the encoder's arithmetic; the loss is always fp32")
    channels_last: bool = setting(
        True, "memory format of the encoder, where torch is safe with it (at 8 channels or more)"
    )
    record_every_steps: int = setting(10, "steps that one line of metrics.jsonl is the mean of", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)
    log_every_seconds: float = setting(10.0, "between two lines of progress", hashed=False, ge=0)
    checkpoint_every_steps: int = setting(200, "steps between two checkpoints", hashed=False, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (), "experiment trackers, by Accelerate", hashed=False
    )

    @model_validator(mode="after")
    def _check(self) -> "Finetune":
        new = self.encoder == "random" or self.encoder.startswith("timm:")
        if new and self.projector_layers:
            raise ValueError(f"projector_layers: only a pretrained encoder has a projector, {self.encoder} has none")
        if self.encoder == "random" and self.architecture.pretrained:
            raise ValueError("architecture.pretrained: a random encoder has no published weights; say timm:NAME")
        if self.freeze == "encoder" and not self.loss.has_head:
            raise ValueError(f"freeze: encoder leaves nothing to train: {self.loss.name} has no head")
        return self

    @property
    def images_per_batch(self) -> int:
        """Of the global batch, where there are so many."""
        if self.loss.batches == "plain":
            return self.batch_size
        return self.classes_per_batch * self.images_per_class

    def without_effect(self) -> set[str]:
        idle = {"batch_size"} if self.loss.batches == "class_balanced" else {"classes_per_batch", "images_per_class"}
        if self.encoder != "random":
            idle |= {"architecture", "image_size"}
        elif self.views is not None:
            idle |= {"image_size"}
        return idle | ({"label_subset"} if self.label_fraction == 1 else set())

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        pixels = inputs["views"].sample_bytes / 12 if "views" in inputs else self.image_size**2
        weights, maps = weight_bytes(self.architecture), map_bytes(self.architecture, pixels)
        if "encoder" in inputs:  # the stage that made it told both
            weights, maps = inputs["encoder"].disk_bytes / 6, inputs["encoder"].sample_bytes
        shards = inputs["shards"] if "shards" in inputs else Estimate()
        scalar_bytes = {"fp32": 1.0, "bf16": 0.5}[self.precision]
        batch = 1.3 * self.images_per_batch * maps * scalar_bytes
        canvases = CANVASES * self.images_per_batch * shards.sample_bytes
        memory_bytes = int(LIBRARIES_BYTES + 4 * weights + batch + canvases)
        return Estimate(shards.samples, int(maps), int(6 * weights), memory_bytes)
