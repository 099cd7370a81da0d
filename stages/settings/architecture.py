"""The architecture of an encoder: shared by the stages that build one."""

from pipeline.settings import Settings, setting


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
