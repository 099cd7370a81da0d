"""Image files as they should not be: of every kind that folders have in them, and changed at random."""

import io
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.image_files import find_or_make

ORIENTATION_TAG, TURNED = 0x0112, 6  # EXIF: to be shown turned by 90 degrees
GIGAPIXEL = (40_000, 25_000)
"""Width and height."""
HEADERS = 700
"""Bytes at the beginning of a file in which most of what is no pixel lies."""


@cache
def jpegs(kind: str) -> list[bytes]:
    """Fifty JPEG files, `small` or `large` ones: of data/ where it is there, else made."""
    with tempfile.TemporaryDirectory() as scratch:
        root, files, _ = find_or_make(kind, None, 50, Path(scratch))
        return [(root / file).read_bytes() for file in files]


def picture(number: int, height: int = 48, width: int = 64) -> Image.Image:
    """Coloured squares under a fine texture, another one for each number."""
    random = np.random.default_rng(number)
    squares = np.kron(random.integers(30, 226, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1), dtype=int))
    return Image.fromarray((squares[:height, :width] + random.integers(-20, 21, (height, width, 1))).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """Of one bit a pixel; the data need not fit."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def unreadable() -> dict[str, tuple[bytes, str]]:
    """By name of the file: its content, and what the reason must say."""
    jpeg, (width, height) = saved(picture(1), "JPEG"), GIGAPIXEL
    huge_jpeg = bytearray(jpeg)
    start = huge_jpeg.index(b"\xff\xc0")
    huge_jpeg[start + 5 : start + 9] = struct.pack(">HH", height, width)
    black = zlib.compressobj(9)
    rows = b"".join(black.compress(bytes(height // 100 * (1 + width // 8))) for _ in range(100)) + black.flush()
    text = PngInfo()
    text.add_text("Comment", "a" * 20_000_000, zip=True)
    tiff = saved(Image.new("1", (8, 8)), "TIFF")
    too_large = "too large: 40000 x 25000 pixels"
    return {
        "empty.jpg": (b"", "the file is empty"),
        "page.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", "not an image of a known kind"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "Premature end of JPEG file"),
        "deep.png": (saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"), "16-bit or 32-bit image"),
        "bomb.png": (png(width, height, rows), "too large"),
        "small bomb.png": (png(width, height, rows[:4_000]), "too large"),
        "bomb.jpg": (bytes(huge_jpeg), too_large),
        "bomb.ppm": (b"P6\n40000 25000\n255\n" + bytes(99), "too large"),
        "bomb.bmp": (b"BM" + struct.pack("<IIIIiiHH6I", 99, 0, 54, 40, width, height, 1, 24, *[0] * 6), "too large"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", width, height) + saved(picture(2), "GIF")[10:], "too large"),
        "bomb.tiff": (resized_tiff(tiff, width, height), "too large"),
        "text.png": (saved(picture(3), "PNG", pnginfo=text), "too large"),
    }  # fmt: skip


def resized_tiff(content: bytes, width: int, height: int) -> bytes:
    """A little-endian TIFF whose header tells another size."""
    changed = bytearray(content)
    (directory,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, directory)
    for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from("<H", content, entry)
        if tag in (256, 257):  # TIFF 6.0: ImageWidth, ImageLength
            struct.pack_into("<HIHH", changed, entry + 2, 1, 0, 0, 0)
            struct.pack_into("<HII", changed, entry + 2, 4, 1, width if tag == 256 else height)
    return bytes(changed)


def unusual() -> dict[str, tuple[bytes, tuple[int, int]]]:
    """By name of the file: what can be read, and the height and width of what is stored."""
    one, other = picture(4), picture(5)
    glass = one.copy()
    glass.putalpha(Image.linear_gradient("L").resize(one.size))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = TURNED
    frames = {"save_all": True, "append_images": [other, one]}
    return {
        "cmyk.jpg": (saved(one.convert("CMYK"), "JPEG"), (48, 64)),
        "palette.png": (saved(one.quantize(16), "PNG"), (48, 64)),
        "alpha.png": (saved(glass, "PNG"), (48, 64)),
        "animated.gif": (saved(one, "GIF", **frames), (48, 64)),
        "animated.webp": (saved(one, "WEBP", **frames), (48, 64)),
        "turned.jpg": (saved(one, "JPEG", exif=exif), (64, 48)),
        "one row.png": (saved(picture(6, 1, 3_000), "PNG"), (1, 1_024)),
        "one column.jpg": (saved(picture(7, 700, 1), "JPEG"), (700, 1)),
        "one pixel.gif": (saved(picture(8, 1, 1), "GIF"), (1, 1)),
    }


def others() -> list[tuple[str, bytes]]:
    """Whole files of every kind but JPEG that are read: (suffix, content)."""
    one, grey = picture(9), picture(10).convert("L")
    glass = one.convert("RGBA")
    frames = {"save_all": True, "append_images": [picture(11)]}
    made: list[tuple[str, Image.Image, str, Mapping[str, Any]]] = [
        ("png", one, "PNG", {}),
        ("png", glass, "PNG", {}),
        ("png", grey, "PNG", {}),
        ("png", one.quantize(16), "PNG", {"transparency": 3}),
        ("webp", one, "WEBP", {}),
        ("webp", glass, "WEBP", {"lossless": True}),
        ("webp", one, "WEBP", frames),
        ("gif", one, "GIF", {}),
        ("gif", one, "GIF", frames | {"transparency": 3}),
        ("bmp", one, "BMP", {}),
        ("bmp", one.quantize(16), "BMP", {}),
        ("ppm", one, "PPM", {}),
        ("tiff", one, "TIFF", {}),
        ("tiff", glass, "TIFF", {"compression": "tiff_lzw"}),
        ("tiff", one, "TIFF", {"compression": "jpeg"}),
        ("tiff", grey, "TIFF", {"compression": "tiff_deflate"}),
    ]
    return [(suffix, saved(image, kind, **options)) for suffix, image, kind, options in made]


def fuzzed(contents: Sequence[bytes], random: np.random.Generator) -> bytes:
    """One of the files, changed: bytes flipped, cut off, left out, put in, zeroed, or another's from a place on."""
    content = bytearray(contents[int(random.integers(len(contents)))])
    start, length = int(random.integers(len(content))), int(random.integers(1, 100))
    match random.integers(8):
        case 0 | 1 | 2:
            last = len(content) if length % 2 else min(len(content), HEADERS)
            for place in random.integers(last, size=random.integers(1, 21)):
                content[place] ^= int(random.integers(1, 256))
        case 3:
            del content[start:]
        case 4:
            del content[start : start + length]
        case 5:
            content[start:start] = random.bytes(length)
        case 6:
            content[start : start + length] = bytes(len(content[start : start + length]))
        case _:
            other = contents[int(random.integers(len(contents)))]
            content[start:] = other[random.integers(len(other)) :]
    return bytes(content)
