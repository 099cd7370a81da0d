"""Settings of the stage `embed`."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pipeline.settings import Estimate, StageSettings, artifact, setting
from stages.settings.architecture import Architecture

WIDEST_EMBEDDING = 2048  # a ResNet-50's; most are narrower


class Embed(StageSettings):
    """Features of every image: the backbone in evaluation mode on one deterministic resize and centre crop."""

    stage_version: ClassVar[int] = 1

    shards: str = artifact("shard", description="images to embed, all splits")
    encoder: str = artifact(
        "pretrain",
        "finetune",
        description="a pretrained encoder, `random` (as initialised from the seed), `pixels`, or `timm:NAME`",
        literals=("random", "pixels"),
        prefixes=("timm:",),
    )
    architecture: Architecture = setting(Architecture(), "of a `random` encoder")
    image_size: int = setting(32, "pixels, for `random` and `pixels`; an encoder brings its own", ge=1)
    batch_size: int = setting(500, "images in a batch", ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where to compute", hashed=False)
    workers: int = setting(2, "threads that read and decode", hashed=False, ge=1)

    def depends_on_seed(self) -> bool:
        return self.encoder == "random"

    def estimate(self, inputs: Mapping[str, Estimate]) -> Estimate:
        samples = inputs["shards"].samples if "shards" in inputs else 0
        pixels = self.encoder == "pixels"
        row_bytes = 4 * 3 * self.image_size**2 if pixels else 4 * WIDEST_EMBEDDING
        return Estimate(samples, row_bytes, samples * row_bytes)
