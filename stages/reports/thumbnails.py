"""Images as data URIs: thumbnails, the contact sheet, a confusion matrix of many classes."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.images.display import displayed

SMALL = 48
"""Up to this many pixels on the long side an image stays as it is, as PNG: JPEG would blur it."""
LONG_SIDE = 96
SHEET_BYTES = 1_000_000
SHEET_WIDTH = 1600
RIGHT, WRONG = (59, 130, 246), (234, 88, 12)
"""Colours of a matrix: visible on white and on black."""


def thumbnail(image: NDArray[np.uint8]) -> dict[str, object]:
    """A small copy of an image [C, H, W].

    Returns:
        {"uri", "width", "height", "small"}; small images want to be shown with their pixels kept sharp.
    """
    picture = Image.fromarray(displayed(image.transpose(1, 2, 0)))
    small = max(picture.size) <= SMALL
    if not small:
        picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    uri = _uri(picture, "PNG") if small else _uri(picture, "JPEG", quality=80)
    return {"uri": uri, "width": picture.width, "height": picture.height, "small": small}


def contact_sheet(data: bytes) -> dict[str, object]:
    """The contact sheet as it is, or as a smaller JPEG where it is large: {"uri", "width", "height"}."""
    with Image.open(io.BytesIO(data)) as picture:
        if len(data) <= SHEET_BYTES:
            uri = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
            return {"uri": uri, "width": picture.width, "height": picture.height}
        sheet = picture.convert("RGB")
    sheet.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH), Image.Resampling.LANCZOS)
    return {"uri": _uri(sheet, "JPEG", quality=85), "width": sheet.width, "height": sheet.height}


def matrix_picture(shares: NDArray[np.float64]) -> dict[str, object]:
    """A matrix [C, C] of shares from 0 to 1, a pixel a cell; opacity says how much, so that it fits light and dark."""
    # The square root lifts the few percent that errors are; the diagonal would hide them otherwise.
    opacity = np.round(255 * np.sqrt(np.clip(shares, 0, 1))).astype(np.uint8)
    pixels = np.empty((*opacity.shape, 4), dtype=np.uint8)
    pixels[..., :3] = WRONG
    pixels[np.eye(len(opacity), dtype=bool), :3] = RIGHT
    pixels[..., 3] = opacity
    return {"uri": _uri(Image.fromarray(pixels), "PNG"), "width": len(opacity), "height": len(opacity)}


def _uri(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
