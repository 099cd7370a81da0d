"""The architecture of an encoder: shared by the stages that build one."""

import re

from pydantic import model_validator

from pipeline.settings import Settings, setting

RESNET_DEPTHS = (10, 18, 34, 50, 101, 152)


class Architecture(Settings):
    """Which backbone, how wide, with which stem."""

    backbone: str = setting(
        "resnet18",
        "resnet10, resnet18, resnet34, resnet50, ... (thin ones by `width`), any other classification model of "
        "torchvision by its name, or any of timm as `timm:NAME`",
    )
    width: int = setting(64, "channels of the first stage of a ResNet (64 is the published width)", ge=4)
    small_stem_up_to: int = setting(
        64, "inputs of this many pixels or less get a 3x3 stem without pooling (ResNets; Chen et al. 2020, B.9)", ge=0
    )
    pretrained: bool = setting(
        False,
        "start from the library's published weights (their licence is recorded); a ResNet then needs the large stem",
    )

    @model_validator(mode="after")
    def _check(self) -> "Architecture":
        # Other names are known to torchvision and timm only, which are not loaded to check a recipe.
        plain = re.fullmatch(r"resnet(\d+)", self.backbone)
        if plain and int(plain[1]) not in RESNET_DEPTHS:
            raise ValueError(f"backbone: there are ResNets of {', '.join(map(str, RESNET_DEPTHS))} layers")
        if not plain and self.width != 64:
            raise ValueError(f"width: {self.backbone} has only the published width, which is said as 64")
        return self
