"""An encoder that ends inside its projector, as SimCLRv2 starts fine-tuning (Chen et al. 2020, "Big self-supervised
models are strong semi-supervised learners", section 2)."""

from torch import Tensor, nn

from stages.models.encoders import Encoder
from stages.models.projector import build_projector


class NeckedEncoder(Encoder):
    """Images [B, C, H, W] -> embeddings [B, D], by a backbone and the first layers of a projector.

    Attributes:
        shape: the arguments of `build_neck`, embedding size apart.
    """

    def __init__(self, backbone: Encoder, neck: nn.Sequential, shape: dict[str, int]):
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.shape = shape
        self.weights = backbone.weights
        self.embedding_size = shape["hidden"] if shape["kept"] < shape["layers"] else shape["dimension"]

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D]"""
        return self.neck(self.backbone(images))

    def library_module(self) -> nn.Module:
        return self.backbone.library_module()


def build_neck(embedding_size: int, layers: int, hidden: int, dimension: int, kept: int) -> nn.Sequential:
    """The first `kept` layers of `build_projector(embedding_size, layers, hidden, dimension)`, with what follows each.

    A layer but the last ends with its ReLU: SimCLRv2 takes the activation, not the linear output.

    Raises:
        ValueError: the projector has fewer layers.
    """
    if not 1 <= kept <= layers:
        raise ValueError(f"a projector of {layers} layers has no first {kept}")
    projector = build_projector(embedding_size, layers, hidden, dimension)
    names = {f"{part}{layer}" for part in ("linear", "norm", "relu") for layer in range(1, kept + 1)}
    for name, _ in list(projector.named_children()):
        if name not in names:
            delattr(projector, name)
    return projector
