"""Settings of the stage `pretrain`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pipeline.settings import LIBRARIES_BYTES, Estimate, Settings, StageSettings, artifact, setting
from stages.settings.architecture import Architecture


class Projector(Settings):
    """The head g of SimCLR, dropped after pretraining (Chen et al. 2020, section 4.2)."""

    layers: int = setting(2, "linear layers, each but the last followed by batch norm and ReLU", ge=1, le=4)
    hidden: int = setting(512, "width of the layers but the last", ge=1)
    dimension: int = setting(128, "width of the last layer", ge=2)


class Optimiser(Settings):
    """Optimiser and learning-rate schedule (warm-up, then cosine to zero, per step)."""

    name: Literal["lars", "sgd", "adamw"] = setting("lars", "LARS: You et al. 2017")
    learning_rate: float = setting(1.0, "before scaling by the batch size", gt=0)
    scaling: Literal["linear", "square_root", "none"] = setting(
        "linear", "linear: rate x batch / 256; square_root: rate x sqrt(batch); none: the rate as it is"
    )
    momentum: float = setting(0.9, "of SGD and LARS", ge=0, lt=1)
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


class Pretrain(StageSettings):
    """SimCLR: two views of each image, NT-Xent over the global batch (Chen et al. 2020)."""

    stage_version: ClassVar[int] = 2

    shards: str = artifact("shard", description="images to learn from: their training part")
    views: str = artifact("augment", description="the view policy")
    encoder: str | None = artifact(
        "pretrain", "finetune", default=None, description="an encoder to start from, instead of a new one"
    )
    architecture: Architecture = setting(Architecture(), "of a new encoder")
    projector: Projector = setting(Projector(), "the head that the loss sees")
    optimiser: Optimiser = setting(Optimiser(), "optimiser and schedule")
    epochs: int = setting(200, "passes over the training images", ge=1)
    max_steps: int | None = setting(None, "stop after this many steps, if that is less than the epochs", ge=1)
    batch_size: int = setting(512, "images in a global batch: each gives two views", ge=2)
    temperature: float = setting(0.5, "of NT-Xent", gt=0)
    gradient_clip: float | None = setting(None, "largest norm of the whole gradient", gt=0)
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the encoder's arithmetic; the loss is always fp32")
    channels_last: bool = setting(True, "memory format of the encoder")
    online_probe: bool = setting(True, "where labels exist: a linear probe beside, behind a stopped gradient")
    record_every_steps: int = setting(10, "steps that one line of metrics.jsonl is the mean of", ge=1)
    health_every_epochs: int = setting(1, "epochs between two measurements of RankMe; the last is always taken", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to train", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)
    log_every_seconds: float = setting(10.0, "between two lines of progress", hashed=False, ge=0)
    checkpoint_every_steps: int = setting(200, "steps between two checkpoints", hashed=False, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = setting(
        (), "experiment trackers, by Accelerate", hashed=False
    )

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        pixels = inputs["views"].sample_bytes / 12 if "views" in inputs else 224**2
        weights = 4 * PARAMETERS.get(self.architecture.backbone, 30e6) * (self.architecture.width / 64) ** 2
        if pixels > self.architecture.small_stem_up_to**2:
            pixels /= 16
        maps = MAPS.get(self.architecture.backbone, 110) * self.architecture.width * pixels * 4
        scalar_bytes = {"fp32": 1.0, "bf16": 0.5}[self.precision]
        batch = 2 * self.batch_size * maps * scalar_bytes + 16 * (2 * self.batch_size) ** 2
        shards = inputs["shards"] if "shards" in inputs else Estimate()
        canvases = 2 * self.batch_size * shards.sample_bytes  # of this batch and the next
        memory_bytes = int(LIBRARIES_BYTES + 4 * weights + 1.3 * batch + canvases)
        # Two checkpoints of weights and momentum lie on disk beside the result.
        return Estimate(shards.samples, 0, int(6 * weights), memory_bytes)
