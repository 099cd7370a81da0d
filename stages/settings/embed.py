"""Settings of the stage `embed`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pipeline.settings import LIBRARIES_BYTES, Estimate, StageSettings, artifact, setting
from stages.settings.architecture import Architecture

WIDEST_EMBEDDING = 2048  # a ResNet-50's; most are narrower


class Embed(StageSettings):
    """Features of every image: the backbone in evaluation mode on one deterministic resize and centre crop."""

    stage_version: ClassVar[int] = 2
    uses_ranks: ClassVar[bool] = True
    lower_for_memory: ClassVar[tuple[str, ...]] = ("batch_size",)

    shards: str = artifact("shard", description="images to embed, all splits")
    encoder: str = artifact(
        "pretrain",
        "finetune",
        description="a pretrained encoder, `random` (as initialised from the seed), `pixels`, or `timm:NAME`",
        literals=("random", "pixels"),
        prefixes=("timm:",),
    )
    views: str | None = artifact(
        "augment", default=None, description="a view policy that gives `random` and `pixels` their size of images"
    )
    architecture: Architecture = setting(Architecture(), "of a `random` encoder")
    image_size: int = setting(32, "pixels, for `random` and `pixels` without `views`; an encoder brings its own", ge=1)
    mirror: bool = setting(False, "the mean over each image and its mirror image (of embeddings)")
    crops: Literal[1, 5] = setting(1, "5: the mean over the centre and the four corners, of 0.875 of the short side")
    batch_size: int = setting(500, "images in a batch", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)

    def without_effect(self) -> set[str]:
        if self.encoder == "random":
            idle = set()
        else:
            idle = {"architecture"} if self.encoder == "pixels" else {"architecture", "image_size"}
        return idle if self.views is None else idle | {"image_size"}

    def depends_on_seed(self) -> bool:
        return self.encoder == "random"

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        shards = inputs["shards"] if "shards" in inputs else Estimate()
        row_bytes = 4 * 3 * self.image_size**2 if self.encoder == "pixels" else 4 * WIDEST_EMBEDDING
        # A batch on its canvas, and the batch after it.
        memory_bytes = LIBRARIES_BYTES + 2 * self.batch_size * shards.sample_bytes
        return Estimate(shards.samples, row_bytes, shards.samples * row_bytes, memory_bytes)
