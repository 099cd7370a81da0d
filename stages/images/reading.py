"""How images from outside are read: what is wanted of them, and what is refused."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 178_956_970
"""Larger images are refused by their header, before they are decoded, unless more is asked for: Pillow's own limit."""


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is one short reason, the same on every machine."""


class Samples(NamedTuple):
    """An image as its file has it.

    Attributes:
        values: [H, W, N], upright, of any number type.
        mode: what the channels mean, in Pillow's words (`L`, `LA`, `RGB`, `RGBA`); None where the file does not say.
        is_inverted: the smallest value is white.
    """

    values: np.ndarray
    mode: str | None
    is_inverted: bool = False


@dataclass(frozen=True)
class Reading:
    """What pixels are wanted of an image file.

    Attributes:
        background: RGB under transparent pixels, where transparency is not a channel of its own.
        channels: of the result. 3 is RGB and 1 its luma (ITU-R BT.601); others are taken as the file has them.
        window: (low, high): of images of more than 8 bits a channel, the values that become 0 and 255. Without one they
            are refused, because which part of their range matters is not known.
        max_pixels: height x width that is decoded at most.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    channels: int = 3
    window: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def refuse_large(self, height: int, width: int) -> None:
        """Raise UnreadableImage where an image of this size is larger than `max_pixels`."""
        if height * width > self.max_pixels:
            raise UnreadableImage(
                f"too large: {width} x {height} pixels, more than {self.max_pixels:,}: raise `max_megapixels`"
            )

    def refuse_channels(self, found: int, where: str) -> None:
        """Raise UnreadableImage where an image has another number of channels than is wanted."""
        if found != self.channels:
            plural = "" if found == 1 else "s"
            raise UnreadableImage(f"{found} channel{plural} ({where}), and the setting `channels` is {self.channels}")

    def refuse_undeclared(self, named: str) -> None:
        """Raise UnreadableImage where there is no window for an image of more than 8 bits a channel."""
        if self.window is None:
            raise UnreadableImage(f"{named}: set `window: [low, high]`, or convert it to 8 bits a channel")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (EXIF 2.32, table 6) of [H, W, C]; one that does not exist changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
