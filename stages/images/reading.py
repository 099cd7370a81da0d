"""How images from outside are read: what is wanted of them, and what is refused."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 178_956_970
"""Larger images are refused by their header, before they are decoded, unless more is asked for: Pillow's own limit."""


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is one short reason, the same on every machine.

    Attributes:
        for_encoder: the reason where an encoder says how images are read, and there are no settings to change.
    """

    def __init__(self, reason: str, for_encoder: str | None = None):
        super().__init__(reason)
        self.for_encoder = for_encoder or reason


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


@dataclass(frozen=True, slots=True)
class WindowUse:
    """How the values of images of more than 8 bits a channel lie to their window.

    Attributes:
        values: how many there are; alpha that is laid over a background is not among them.
        outside: how many of them are below the window's low or above its high, by more than rounding hides.
        smallest, largest: of them.
    """

    values: int = 0
    outside: int = 0
    smallest: float = math.inf
    largest: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray, window: tuple[float, float]) -> "WindowUse":
        """Of one image's values, of any shape."""
        low, high = np.array(window)  # of a type of their own, or float16 would overflow
        half_step = (high - low) / 510
        outside = np.count_nonzero(values < low - half_step) + np.count_nonzero(values > high + half_step)
        return cls(values.size, int(outside), float(values.min()), float(values.max()))

    def __add__(self, other: "WindowUse") -> "WindowUse":
        return WindowUse(
            self.values + other.values,
            self.outside + other.outside,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )


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
            reason = f"too large: {width} x {height} pixels, more than {self.max_pixels:,}"
            raise UnreadableImage(f"{reason}: raise `max_megapixels`", f"{reason}: make it smaller")

    def refuse_channels(self, found: int, where: str) -> None:
        """Raise UnreadableImage where an image has another number of channels than is wanted."""
        if found != self.channels:
            reason = f"{found} channel{'' if found == 1 else 's'} ({where})"
            raise UnreadableImage(
                f"{reason}, and the setting `channels` is {self.channels}",
                f"{reason}, and the encoder takes images of {self.channels}",
            )

    def refuse_undeclared(self, named: str) -> None:
        """Raise UnreadableImage where there is no window for an image of more than 8 bits a channel."""
        if self.window is None:
            raise UnreadableImage(
                f"{named}: set `window: [low, high]`, or convert it to 8 bits a channel",
                f"{named}, and the encoder knows no window for it: convert it to 8 bits a channel",
            )


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (EXIF 2.32, table 6) of [H, W, C]; one that does not exist changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
