"""Images of more than 8 bits a channel: their values in full depth, and the window that maps them to 8 bits."""

import io
import re

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from stages.images.reading import Reading, Samples, UnreadableImage, WindowUse
from stages.images.tiff import read_tiff

DEEP_RAW_MODE = re.compile(r";16[BLN]$")  # 16 bits a channel; BGR;16 is 5-6-5
UNSIGNED_RAW_MODE = "I;32N"  # 32 unsigned bits, which Pillow keeps in a signed mode
WHITE_IS_ZERO = 0  # TIFF 6.0, section 8
PORTABLE_START = re.compile(rb"P[2356]")
PORTABLE_NUMBER = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*(\d+)")
VALUES_AT_ONCE = 2**20


def is_deep(image: Image.Image) -> bool:
    """Whether an image that Pillow has opened has more than 8 bits a channel, by its header."""
    deep = image.mode == "F" or image.mode.startswith("I")
    # Pillow cuts 16-bit colour to its high byte without a word; only the raw mode tells.
    for tile in getattr(image, "tile", ()):
        arguments = _arguments(tile)
        deep |= bool(arguments) and DEEP_RAW_MODE.search(str(arguments[0])) is not None
        deep |= tile.codec_name.startswith("ppm") and arguments[-1] > 255
    if isinstance(image, TiffImageFile):  # planes of 16 bits have raw modes of 8
        deep |= max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
    return deep


def read_deep(image: Image.Image, content: bytes, reading: Reading) -> Samples:
    """All bits of a deep image that Pillow has opened from `content`; TIFF is upright, others are as they are stored.

    Raises:
        UnreadableImage: no window is declared, the file is damaged, or its channels are not those that are wanted.
    """
    kind = "float" if image.mode == "F" else "16-bit or 32-bit"
    named = f"{kind} image ({image.format}, mode {image.mode})"
    reading.refuse_undeclared(named)
    if PORTABLE_START.match(content):
        return _read_portable(content, image.height, image.width)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
        is_unsigned = any(UNSIGNED_RAW_MODE in _arguments(tile) for tile in getattr(image, "tile", ()))
        image.load()
        values = np.asarray(image)
        return Samples((values.view(np.uint32) if is_unsigned else values)[..., None], "L", is_inverted)
    if isinstance(image, TiffImageFile):
        return read_tiff(content, reading)
    if isinstance(image, PngImageFile):
        return _read_png(image, content)
    raise UnreadableImage(f"{named}: only its high bytes can be read; save it as PNG or TIFF")


def map_to_bytes(samples: Samples, reading: Reading) -> Samples:
    """Samples of any depth as uint8; those of 8 bits as they are.

    The window's low becomes 0, its high 255, linearly between, clipped, rounded. Opacity that is to be laid over a
    background is no quantity and goes by its own full range; where alpha is wanted as a channel, the window is for all.

    Raises:
        UnreadableImage: a value is no number, or no window is declared.
    """
    values = samples.values
    if values.dtype == np.uint8:
        return samples._replace(values=255 - values if samples.is_inverted else values, is_inverted=False)
    if values.dtype == np.bool_:
        return map_to_bytes(samples._replace(values=values * np.uint8(255)), reading)
    if values.dtype.kind not in "uif":
        raise UnreadableImage(f"values of the type {values.dtype.name}")
    named = "float" if values.dtype.kind == "f" else f"{8 * values.dtype.itemsize}-bit"
    reading.refuse_undeclared(f"{named} image")
    assert reading.window is not None
    mapped = _map(values, *reading.window)
    if samples.is_inverted:
        np.subtract(255, mapped, out=mapped)
    if _has_opacity(samples, reading):
        mapped[..., -1:] = _map(values[..., -1:], 0, np.iinfo(values.dtype).max)
    return Samples(mapped, samples.mode)


def window_use(samples: Samples, reading: Reading) -> WindowUse | None:
    """How the samples lie to the window, that `map_to_bytes` takes; None where it needs none."""
    values = samples.values
    if values.dtype in (np.uint8, np.bool_) or reading.window is None:
        return None
    return WindowUse.of(values[..., :-1] if _has_opacity(samples, reading) else values, reading.window)


def _has_opacity(samples: Samples, reading: Reading) -> bool:
    """Whether the last channel is laid over a background, by its own full range."""
    return samples.mode in ("LA", "RGBA") and reading.channels in (1, 3) and samples.values.dtype.kind == "u"


def _map(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """[H, W, N] -> uint8 [H, W, N]"""
    mapped = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, VALUES_AT_ONCE // max(1, values[0].size))
    for start in range(0, len(values), rows):  # in parts: float64 takes four times the memory of 16 bits
        part = values[start : start + rows].astype(np.float64)
        if np.isnan(part).any():
            raise UnreadableImage("float image with values that are no numbers (NaN)")
        part = (part - low) * 255 / (high - low)
        mapped[start : start + rows] = np.rint(np.clip(part, 0, 255))
    return mapped


def _read_png(image: PngImageFile, content: bytes) -> Samples:
    """16-bit colour. Pillow decodes it to the high byte of every value; told another byte order, to the low one."""
    (tile,) = image.tile
    if tile.args == "LA;16B":  # has no other order; but its four bytes pass for a pixel of four channels
        return Samples(_png_as(content, "RGBA").view(">u2"), "LA")
    high, low = (_png_as(content, f"{image.mode};16{order}") for order in "BL")
    return Samples(high.astype(np.uint16) << 8 | low, image.mode)


def _png_as(content: bytes, raw_mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.tile = [image.tile[0]._replace(args=raw_mode)]
        return np.array(image)


def _read_portable(content: bytes, height: int, width: int) -> Samples:
    """PGM and PPM, binary or text, in the values that the file has (netpbm.sourceforge.net/doc/pgm.html, ppm.html).

    Pillow stretches them where the largest that the header names is not 65535.
    """
    kind, end = content[:2], 2
    for _ in range(3):  # width, height, largest value
        number = PORTABLE_NUMBER.match(content, end)
        if number is None:
            raise UnreadableImage("the file is damaged (header)")
        end = number.end()
    channels = 3 if kind in (b"P3", b"P6") else 1
    count = height * width * channels
    if kind in (b"P5", b"P6"):
        data = content[end + 1 : end + 1 + 2 * count]
        values = np.frombuffer(data[: len(data) // 2 * 2], dtype=">u2")
    else:
        values = np.array(content[end:].split(maxsplit=count)[:count], dtype=np.uint16)
    if len(values) < count:
        raise UnreadableImage("image file is truncated")
    return Samples(values.reshape(height, width, channels), "RGB" if channels == 3 else "L")


def _arguments(tile: object) -> tuple:
    """Of Pillow's decoder; the first is the raw mode."""
    arguments = getattr(tile, "args", ())
    return arguments if isinstance(arguments, tuple) else (arguments,)
