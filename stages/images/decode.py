"""Image bytes to pixels, in one place: `decode` and `decode_rgb` for images from outside, `decode_stored` for shards.

JPEG goes through simplejpeg (libjpeg-turbo), everything else through Pillow, and TIFF that Pillow does not read in full
through tifffile.
"""

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLESPERPIXEL, TiffImageFile

from stages.images.deep import is_deep, map_to_bytes, read_deep, window_use
from stages.images.reading import MAX_PIXELS, Reading, Samples, UnreadableImage, WindowUse, upright
from stages.images.tiff import TIFF_STARTS, read_tiff

JPEG_START = b"\xff\xd8\xff"
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
ORIENTATION_TAG = 0x0112

# libjpeg's remarks on files that every viewer shows whole; all its other warnings mean that pixels are missing.
HARMLESS_IN_JPEG = re.compile(r"\b\d{1,2} extraneous bytes|JFIF revision|Adobe color transform|Invalid SOS parameters")
TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
WITHOUT_PREMULTIPLICATION = {"RGBa": "RGBA", "La": "LA"}

_raising_the_limit = threading.Lock()


class Decoded(NamedTuple):
    """An image in memory.

    Attributes:
        pixels: uint8 [H, W, C], upright.
        is_jpeg: the source is a JPEG.
        is_exact: a JPEG whose bytes, decoded plainly, are these pixels: no rotation, other size or colours, no repair.
        subsampling: of a JPEG's chroma (`444`, `422`, `420`, ..., `Gray`), else `444`.
        window_use: of an image that a window was for.
    """

    pixels: np.ndarray
    is_jpeg: bool
    is_exact: bool
    subsampling: str
    window_use: WindowUse | None = None


def decode_rgb(content: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Upright RGB pixels, uint8 [H, W, 3], of an image file's bytes.

    EXIF orientation is applied, transparency laid over `background`, and of several frames the first is taken.

    Raises:
        UnreadableImage: damaged, no image, too large, or of 16 or 32 bits a channel.
    """
    return decode(content, Reading(background)).pixels


def decode(content: bytes, reading: Reading, caps: tuple[int, int] | None = None) -> Decoded:
    """Upright pixels of an image file's bytes, and how the file was coded.

    Args:
        reading: channels, window and limits.
        caps: longest short and long side that will be wanted, in pixels: a JPEG of more than twice that is decoded at
            a half, a quarter or an eighth, still at least twice as large as wanted (several times faster).

    Raises:
        UnreadableImage: damaged, no image, too large, deep without a window, or of other channels than wanted.
    """
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        if reading.max_pixels <= MAX_PIXELS:
            return _decode(content, reading, caps)
        with _pixels_up_to(reading.max_pixels):
            return _decode(content, reading, caps)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known kind") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"too large: more than {reading.max_pixels:,} pixels"
        raise UnreadableImage(f"{reason}: raise `max_megapixels`", f"{reason}: make it smaller") from error
    except Exception as error:  # Pillow's plugins raise nearly every type there is on damaged files
        raise UnreadableImage(_reason(error)) from error


def decode_stored(
    content: bytes | memoryview, kind: str, buffer: np.ndarray | None = None, least_size: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Pixels, uint8 [H, W, C], of an image as shards hold it.

    Args:
        kind: `jpg`, plain RGB; `png`, 8-bit RGB or grey; `npy`, uint8 [H, W, C] in numpy's format.
        buffer: contiguous uint8, at least as large, that a JPEG is decoded into; the result then shares its memory.
        least_size: height and width that will do: a JPEG is decoded at the smallest scale of libjpeg's that has them,
            and whole without.

    Raises:
        ValueError, OSError, SyntaxError: the image is damaged.
    """
    if kind == "jpg":
        # By position: that is a tenth faster for small images.
        return simplejpeg.decode_jpeg(content, "RGB", False, False, *least_size, 1, buffer)
    file = io.BytesIO(content)
    if kind == "npy":
        return np.lib.format.read_array(file, allow_pickle=False)
    with Image.open(file, formats=("PNG",)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def capped_size(height: int, width: int, max_short_side: int, max_long_side: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio within both caps: never larger than before, at least 1 pixel."""
    short, long = min(height, width), max(height, width)
    if short <= max_short_side and long <= max_long_side:
        return height, width
    scale = min(Fraction(max_short_side, short), Fraction(max_long_side, long))
    return max(1, round(height * scale)), max(1, round(width * scale))


@contextmanager
def _pixels_up_to(max_pixels: int) -> Iterator[None]:
    """Let Pillow open larger images than usual. Its limit is one for the whole process: so only where more is asked."""
    with _raising_the_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _decode(content: bytes, reading: Reading, caps: tuple[int, int] | None) -> Decoded:
    if content.startswith(JPEG_START) and reading.channels in (1, 3):
        return _decode_jpeg(content, reading, caps)
    pixels, use = _decode_by_pillow(content, reading)
    return Decoded(pixels, is_jpeg=False, is_exact=False, subsampling="444", window_use=use)


def _decode_jpeg(content: bytes, reading: Reading, caps: tuple[int, int] | None) -> Decoded:
    """RGB or grey."""
    try:
        header = simplejpeg.decode_jpeg_header(content, strict=False)
    except ValueError:  # rare samplings that libjpeg decodes and turbojpeg does not describe
        header = None
    if header is None or header[2] not in ("YCbCr", "RGB", "Gray"):
        # Pillow knows that Adobe writes CMYK inverted.
        pixels, _ = _decode_by_pillow(content, reading)
        return Decoded(pixels, is_jpeg=True, is_exact=False, subsampling="444")
    height, width = int(header[0]), int(header[1])
    reading.refuse_large(height, width)
    wanted = (height, width) if caps is None else capped_size(height, width, *caps)
    least_height, least_width = min(height, 2 * wanted[0]), min(width, 2 * wanted[1])
    colours = "RGB" if reading.channels == 3 else "GRAY"
    is_exact = reading.channels == 3
    try:
        pixels = simplejpeg.decode_jpeg(content, colours, min_height=least_height, min_width=least_width)
    except ValueError as error:
        if not HARMLESS_IN_JPEG.search(str(error)):
            raise
        pixels = simplejpeg.decode_jpeg(content, colours, min_height=least_height, min_width=least_width, strict=False)
        is_exact = False
    is_exact &= pixels.shape[:2] == (height, width)
    if b"Exif\0\0" in content or b"tiff:Orientation" in content:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            orientation = _orientation(image)
        if orientation in range(2, 9):
            pixels = upright(pixels, orientation)
            is_exact = False
    return Decoded(pixels, is_jpeg=True, is_exact=is_exact, subsampling=header[3])


def _decode_by_pillow(content: bytes, reading: Reading) -> tuple[np.ndarray, WindowUse | None]:
    """uint8 [H, W, C], upright, and how its values lay to the window."""
    try:
        # Only formats that Pillow decodes by itself: others start programs (Ghostscript for EPS).
        image = Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:
        if not content.startswith(TIFF_STARTS):
            raise
        return _from_samples(read_tiff(content, reading), reading)
    with image:
        reading.refuse_large(image.height, image.width)
        if isinstance(image, TiffImageFile) and not _has_all_channels(image, reading.channels):
            return _from_samples(read_tiff(content, reading), reading)
        use = None
        if is_deep(image):
            pixels, use = _from_samples(read_deep(image, content, reading), reading)
        else:
            image.load()
            pixels = _from_8_bits(image, reading)
        # Pillow and tiff.py turn TIFF on their own.
        return pixels if isinstance(image, TiffImageFile) else upright(pixels, _orientation(image)), use


def _has_all_channels(image: TiffImageFile, channels: int) -> bool:
    """Whether Pillow keeps the channels that are wanted: it passes over those that it has no name for."""
    samples = image.tag_v2.get(SAMPLESPERPIXEL, 1)
    if channels in (1, 3):
        return samples <= len(image.getbands())
    return len(image.getbands()) == channels == samples and not is_deep(image)


def _from_samples(samples: Samples, reading: Reading) -> tuple[np.ndarray, WindowUse | None]:
    """uint8 [H, W, C] of what a file has, by its window, and how its values lay to that."""
    values, mode, _ = map_to_bytes(samples, reading)
    use = window_use(samples, reading)
    channels = values.shape[2]
    if channels == reading.channels:
        return values, use
    if reading.channels not in (1, 3) or mode is None:
        reading.refuse_channels(channels, f"values of the type {samples.values.dtype.name}")
    return _from_8_bits(Image.fromarray(values if channels > 1 else values[..., 0], mode), reading), use


def _from_8_bits(image: Image.Image, reading: Reading) -> np.ndarray:
    """uint8 [H, W, C] of an image that Pillow has loaded."""
    if reading.channels not in (1, 3):
        pixels = np.atleast_3d(np.asarray(image.convert(WITHOUT_PREMULTIPLICATION.get(image.mode, image.mode))))
        reading.refuse_channels(pixels.shape[2], f"{image.format}, mode {image.mode}")
        return pixels
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*reading.background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    if reading.channels == 3:
        return np.asarray(image.convert("RGB"))
    grey = image if image.mode == "L" else image.convert("RGB").convert("L")
    return np.asarray(grey)[..., None]


def _reason(error: Exception) -> str:
    """One line without memory addresses, the same on every machine."""
    message = re.sub(r" at 0x[0-9a-f]+", "", str(error)).split("\n")[0][:200]
    return message if re.search("[a-z]{3}", message) else f"the file is damaged ({type(error).__name__})"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF; the pixels are sound
        return 1
