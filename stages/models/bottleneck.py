"""An encoder that ends with a batch norm (BN-neck)."""

from torch import Tensor, nn

from stages.models.encoders import Encoder


class BottleneckedEncoder(Encoder):
    """Images [B, C, H, W] -> embeddings [B, D], through a batch norm without shift (Luo et al. 2019, "Bag of tricks and
    a strong baseline for deep person re-identification", section 3.5).

    In training losses that compare see what comes in, and losses that classify what comes out; afterwards the encoder
    gives what comes out.
    """

    def __init__(self, inner: Encoder, norm: nn.Module):
        super().__init__()
        self.inner, self.norm = inner, norm
        self.embedding_size, self.weights = inner.embedding_size, inner.weights

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D]"""
        return self.norm(self.inner(images))

    def library_module(self) -> nn.Module:
        return self.inner.library_module()


def build_bottleneck(embedding_size: int) -> nn.Module:
    """[N, D] -> [N, D]: a scale, and no shift, so that a linear classifier's boundary passes through the origin."""
    norm = nn.BatchNorm1d(embedding_size)
    norm.register_parameter("bias", None)
    return norm
