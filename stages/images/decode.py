"""Image bytes to RGB pixels, in one place: `decode_rgb` for images from outside, `decode_stored` for those in shards.

JPEG goes through simplejpeg (libjpeg-turbo), everything else through Pillow.
"""

import io
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Larger images are refused by their header, before they are decoded: Pillow's own limit, 512 MiB as RGB."""

JPEG_START = b"\xff\xd8\xff"
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (EXIF 2.32, table 6)."""

# libjpeg's remarks on files that every viewer shows whole; all its other warnings mean that pixels are missing.
HARMLESS_IN_JPEG = re.compile(r"\b\d{1,2} extraneous bytes|JFIF revision|Adobe color transform|Invalid SOS parameters")
DEEP_RAW_MODE = re.compile(r";16[BLN]$")  # 16 bits a channel; BGR;16 is 5-6-5
TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


class UnreadableImage(ValueError):
    """An image that cannot be used; the message is one short reason, the same on every machine."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image in memory.

    Attributes:
        pixels: uint8 [H, W, 3], upright, RGB.
        is_jpeg: the source is a JPEG.
        is_exact: a JPEG whose bytes, decoded plainly, are these pixels: no rotation, other size or colours, no repair.
        subsampling: of a JPEG's chroma (`444`, `422`, `420`, ..., `Gray`), else `444`.
    """

    pixels: np.ndarray
    is_jpeg: bool
    is_exact: bool
    subsampling: str


def decode_rgb(content: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Upright RGB pixels, uint8 [H, W, 3], of an image file's bytes.

    EXIF orientation is applied, transparency laid over `background`, and of several frames the first is taken.

    Raises:
        UnreadableImage: damaged, no image, too large, or of 16 or 32 bits a channel.
    """
    return decode(content, background).pixels


def decode(content: bytes, background: tuple[int, int, int], caps: tuple[int, int] | None = None) -> Decoded:
    """Like `decode_rgb`, and says how the source was coded.

    Args:
        caps: longest short and long side that will be wanted, in pixels: a JPEG of more than twice that is decoded at
            a half, a quarter or an eighth, still at least twice as large as wanted (several times faster).
    """
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        if content.startswith(JPEG_START):
            return _decode_jpeg(content, background, caps)
        return Decoded(_decode_by_pillow(content, background), is_jpeg=False, is_exact=False, subsampling="444")
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known kind") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"too large: more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's plugins raise nearly every type there is on damaged files
        raise UnreadableImage(_reason(error)) from error


def decode_stored(content: bytes | memoryview, is_jpeg: bool, buffer: np.ndarray | None = None) -> np.ndarray:
    """Pixels, uint8 [H, W, 3], of an image as shards hold it: plain JPEG, or 8-bit RGB in a PNG.

    Args:
        buffer: contiguous uint8 [H, W, 3] that a JPEG is decoded into; the result then shares its memory.

    Raises:
        ValueError, OSError, SyntaxError: the image is damaged.
    """
    if is_jpeg:
        return simplejpeg.decode_jpeg(content, "RGB", buffer=buffer)
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def capped_size(height: int, width: int, max_short_side: int, max_long_side: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio within both caps: never larger than before, at least 1 pixel."""
    short, long = min(height, width), max(height, width)
    if short <= max_short_side and long <= max_long_side:
        return height, width
    scale = min(Fraction(max_short_side, short), Fraction(max_long_side, long))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _decode_jpeg(content: bytes, background: tuple[int, int, int], caps: tuple[int, int] | None) -> Decoded:
    try:
        header = simplejpeg.decode_jpeg_header(content, strict=False)
    except ValueError:  # rare samplings that libjpeg decodes and turbojpeg does not describe
        header = None
    if header is None or header[2] not in ("YCbCr", "RGB", "Gray"):
        # Pillow knows that Adobe writes CMYK inverted.
        pixels = _decode_by_pillow(content, background)
        return Decoded(pixels, is_jpeg=True, is_exact=False, subsampling="444")
    height, width = int(header[0]), int(header[1])
    _refuse_large(height, width)
    wanted = (height, width) if caps is None else capped_size(height, width, *caps)
    least_height, least_width = min(height, 2 * wanted[0]), min(width, 2 * wanted[1])
    is_exact = True
    try:
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=least_height, min_width=least_width)
    except ValueError as error:
        if not HARMLESS_IN_JPEG.search(str(error)):
            raise
        pixels = simplejpeg.decode_jpeg(content, "RGB", min_height=least_height, min_width=least_width, strict=False)
        is_exact = False
    is_exact &= pixels.shape[:2] == (height, width)
    if b"Exif\0\0" in content or b"tiff:Orientation" in content:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            orientation = _orientation(image)
        if orientation in TRANSPOSITIONS:
            pixels = np.asarray(Image.fromarray(pixels).transpose(TRANSPOSITIONS[orientation]))
            is_exact = False
    return Decoded(pixels, is_jpeg=True, is_exact=is_exact, subsampling=header[3])


def _decode_by_pillow(content: bytes, background: tuple[int, int, int]) -> np.ndarray:
    # Only formats that Pillow decodes by itself: others start programs (Ghostscript for EPS).
    with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
        _refuse_large(image.height, image.width)
        _refuse_deep(image)
        image.load()
        orientation = _orientation(image)
        if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
            canvas = Image.new("RGBA", image.size, (*background, 255))
            upright: Image.Image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        else:
            upright = image.convert("RGB")
    if orientation in TRANSPOSITIONS:
        upright = upright.transpose(TRANSPOSITIONS[orientation])
    return np.asarray(upright)


def _reason(error: Exception) -> str:
    """One line without memory addresses, the same on every machine."""
    message = re.sub(r" at 0x[0-9a-f]+", "", str(error)).split("\n")[0][:200]
    return message if re.search("[a-z]{3}", message) else f"the file is damaged ({type(error).__name__})"


def _refuse_large(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UnreadableImage(f"too large: {width} x {height} pixels, more than {MAX_PIXELS:,}")


def _refuse_deep(image: Image.Image) -> None:
    """Refuse images of more than 8 bits a channel: which part of their range matters is not known."""
    deep = image.mode == "F" or image.mode.startswith("I")
    # Pillow cuts 16-bit colour to its high byte without a word; only the raw mode tells.
    for tile in getattr(image, "tile", ()):
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        deep |= bool(arguments) and DEEP_RAW_MODE.search(str(arguments[0])) is not None
        deep |= tile.codec_name.startswith("ppm") and arguments[-1] > 255
    if deep:
        kind = "float" if image.mode == "F" else "16-bit or 32-bit"
        raise UnreadableImage(f"{kind} image ({image.format}, mode {image.mode}): convert it to 8 bits a channel")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF; the pixels are sound
        return 1
