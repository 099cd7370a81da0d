"""What people are shown of images that are not RGB."""

import numpy as np
from numpy.typing import NDArray


def displayed(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB [H, W, 3] to look at, of [H, W, C]: the first three channels, or the first as grey where there are fewer."""
    if pixels.shape[2] < 3:
        return np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])
