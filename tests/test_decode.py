import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from stages.images.decode import capped_size, decode, decode_rgb, decode_stored
from stages.images.encode import Storage, encode
from stages.images.reading import MAX_PIXELS, Reading, UnreadableImage

WHITE = (255, 255, 255)
RGB = Reading()
LARGE = Storage(max_short_side=512, max_long_side=1024, jpeg_quality=95, background=WHITE)


def picture(height: int = 24, width: int = 17, channels: int = 3) -> np.ndarray:
    """A smooth picture without symmetry, uint8 [H, W, C]."""
    rows, columns = np.mgrid[:height, :width]
    planes = [(rows * (7 + 3 * c) + columns * (11 - 2 * c) + 40 * c) % 256 for c in range(channels)]
    return np.stack(planes, axis=2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    return saved(Image.fromarray(pixels), "JPEG", quality=90, **options)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def with_orientation(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(Image.fromarray(picture()), kind, exif=exif, **options)


def over(background: tuple[int, int, int], colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colour laid over a background, by the formula."""
    share = alpha[..., None] / 255
    return colour * share + np.array(background) * (1 - share)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"keep_rgb": True}])
def test_a_plain_jpeg_is_exact(options: dict[str, object]):
    content = jpeg(picture(), **options)
    image = decode(content, RGB)
    assert image.is_jpeg
    assert image.is_exact
    assert np.array_equal(image.pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_grey_jpeg_becomes_rgb():
    content = jpeg(picture()[..., 0])
    image = decode(content, RGB)
    assert image.is_exact
    assert image.pixels.shape == (24, 17, 3)
    assert np.array_equal(image.pixels[..., 0], image.pixels[..., 2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind: str, orientation: int):
    content = with_orientation(kind, orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert expected.shape[:2] == ((24, 17) if orientation < 5 else (17, 24))
    image = decode(content, RGB)
    assert np.array_equal(image.pixels, expected)
    assert image.is_exact == (kind == "JPEG" and orientation == 1)


def test_damaged_exif_is_no_reason_to_refuse_an_image():
    content = with_orientation("JPEG", 6)
    start = content.index(b"Exif\0\0") + 6
    damaged = content[:start] + b"\xff" * 8 + content[start + 8 :]
    assert decode_rgb(damaged).shape == (24, 17, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_the_background(kind: str):
    rgba = picture(channels=4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = saved(Image.fromarray(rgba), kind, **options)
    for background in (WHITE, (10, 200, 30)):
        expected = over(background, rgba[..., :3], rgba[..., 3])
        assert np.abs(decode_rgb(content, background) - expected).max() <= 1


def test_grey_with_alpha():
    pixels = picture(channels=2)
    content = saved(Image.fromarray(pixels, "LA"), "PNG")
    expected = over((0, 0, 255), np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1])
    assert np.abs(decode_rgb(content, (0, 0, 255)) - expected).max() <= 1


def test_a_transparent_palette_entry_shows_the_background():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    plain = decode_rgb(saved(image, "PNG"))
    assert plain.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]]
    for kind in ("PNG", "GIF"):
        content = saved(image, kind, transparency=1)
        assert decode_rgb(content, (1, 2, 3)).tolist() == [[[255, 0, 0], [1, 2, 3]], [[1, 2, 3], [255, 0, 0]]]


def test_a_transparent_colour_shows_the_background():
    pixels = np.array([[[9, 8, 7], [50, 60, 70]]], np.uint8)
    content = saved(Image.fromarray(pixels), "PNG", transparency=(9, 8, 7))
    assert decode_rgb(content, (1, 2, 3)).tolist() == [[[1, 2, 3], [50, 60, 70]]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str):
    image = Image.fromarray(np.full((16, 16, 3), (200, 40, 90), np.uint8)).convert("CMYK")
    pixels = decode_rgb(saved(image, kind))
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_black_and_white(kind: str):
    bits = picture()[..., 0] > 90
    assert np.array_equal(decode_rgb(saved(Image.fromarray(bits), kind)), np.repeat(bits[..., None] * 255, 3, axis=2))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 3
    assert np.array_equal(decode_rgb(content), np.broadcast_to([255, 0, 0], (5, 6, 3)))


DEEP = {
    "grey PNG": saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"),
    "colour PNG": png(2, 1, 16, 2, b"\0" + b"\x12\x34" * 6),
    "colour PNG with alpha": png(2, 1, 16, 6, b"\0" + b"\x12\x34" * 8),
    "grey PNG with alpha": png(2, 1, 16, 4, b"\0" + b"\x12\x34" * 4),
    "grey TIFF": saved(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "TIFF"),
    "32-bit TIFF": saved(Image.fromarray(np.full((4, 4), 40_000, np.int32)), "TIFF"),
    "float TIFF": saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
    "grey PGM": b"P5\n2 1\n65535\n" + b"\x12\x34" * 2,
    "colour PPM": b"P6\n2 1\n65535\n" + b"\x12\x34" * 6,
    "colour PPM as text": b"P3\n1 1\n65535\n1 2 3\n",
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_a_channel_are_refused_by_name(name: str):
    with pytest.raises(UnreadableImage, match="float image" if "float" in name else "16-bit or 32-bit image"):
        decode_rgb(DEEP[name])


def test_16_bits_a_pixel_are_not_16_bits_a_channel():
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + struct.pack("<HH", 0xF800, 0x001F)
    assert decode_rgb(content).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def large_jpeg() -> bytes:
    content = bytearray(jpeg(picture()))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(content)


@pytest.mark.parametrize(
    "make",
    [large_jpeg, lambda: png(20_000, 20_000, 8, 2, b""), lambda: b"P6\n20000 20000\n255\n"],
    ids=["jpeg", "png", "ppm"],
)
def test_a_bomb_is_refused_by_its_header(make: Callable[[], bytes]):
    with pytest.raises(UnreadableImage, match=f"too large.*{MAX_PIXELS:,}"):
        decode_rgb(make())


def flipped_jpeg() -> bytes:
    """A JPEG whose coded pixels break off early."""
    content = bytearray(jpeg(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
    content[len(content) // 2 : len(content) // 2 + 2] = b"\xff\xd9"
    return bytes(content)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 Not Found</html>", "known kind"),
    "a program for Ghostscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known kind"),
    "the start of a JPEG": (jpeg(picture())[:200], "damaged"),
    "half a JPEG": (jpeg(picture(64, 64))[:-300], "Premature end"),
    "a JPEG with a hole": (flipped_jpeg(), "Corrupt JPEG|Premature"),
    "half a PNG": (saved(Image.fromarray(picture(64, 64)), "PNG")[:-400], "truncated"),
    "a PNG without pixels": (png(4, 4, 8, 2, b""), "truncated"),
    "half a GIF": (saved(Image.fromarray(picture(64, 64)), "GIF")[:-400], "truncated"),
    "half a WebP": (saved(Image.fromarray(picture(64, 64)), "WEBP")[:-100], "."),
    "half a TIFF": (saved(Image.fromarray(picture(64, 64)), "TIFF")[:500], "."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_failure_has_a_short_reason(name: str):
    content, reason = BROKEN[name]
    with pytest.raises(UnreadableImage, match=reason) as first:
        decode_rgb(content)
    with pytest.raises(UnreadableImage) as second:
        decode_rgb(bytes(bytearray(content)))
    assert str(first.value) == str(second.value)
    assert "\n" not in str(first.value)
    assert " at 0x" not in str(first.value)


@given(st.binary(max_size=64), st.integers(0, 3))
def test_random_bytes_are_refused(content: bytes, start: int):
    with pytest.raises(UnreadableImage):
        decode_rgb([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"][start] + content)


def test_what_viewers_overlook_is_accepted_but_encoded_again():
    content = jpeg(picture())
    with_rubbish = content[:-2] + b"abc" * 10 + content[-2:]
    with pytest.raises(ValueError, match=r"\d\d extraneous bytes"):
        simplejpeg.decode_jpeg(with_rubbish)
    image = decode(with_rubbish, RGB)
    assert not image.is_exact
    assert np.array_equal(image.pixels, decode_rgb(content))
    stored = encode(with_rubbish, LARGE)
    assert not stored.is_copied
    simplejpeg.decode_jpeg(stored.content)


def test_decode_stored_fills_a_buffer():
    content = jpeg(picture())
    buffer = np.zeros((2, 24, 17, 3), np.uint8)
    pixels = decode_stored(memoryview(content), "jpg", buffer=buffer[1])
    assert np.shares_memory(pixels, buffer)
    assert np.array_equal(buffer[1], decode_rgb(content))
    assert not buffer[0].any()


# What is stored


@pytest.mark.parametrize("pixels", [picture(), picture()[..., 0]], ids=["colour", "grey"])
def test_a_jpeg_that_needs_no_change_is_copied(pixels: np.ndarray):
    content = jpeg(pixels)
    stored = encode(content, LARGE)
    assert stored.content is content
    assert stored.is_copied
    assert np.array_equal(stored.pixels, decode_rgb(content))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_jpeg_that_needs_a_change_stays_a_jpeg(subsampling: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg(picture(60, 40), exif=exif, subsampling=subsampling)
    stored = encode(content, LARGE)
    assert not stored.is_copied
    assert stored.format == "jpg"
    assert b"Exif" not in stored.content
    assert stored.pixels.shape == (40, 60, 3)
    assert np.array_equal(stored.pixels, decode_stored(stored.content, "jpg"))
    assert simplejpeg.decode_jpeg_header(stored.content)[3] == subsampling.replace(":", "")
    assert np.abs(stored.pixels.astype(int) - decode_rgb(content)).mean() < 8


def test_better_quality_is_closer():
    exif = Image.Exif()
    exif[0x0112] = 3
    content = jpeg(picture(64, 64), exif=exif)
    stored = [encode(content, Storage(512, 1024, quality, WHITE)) for quality in (30, 99)]
    errors = [np.abs(one.pixels.astype(int) - decode_rgb(content)).mean() for one in stored]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_stays_lossless(kind: str):
    stored = encode(saved(Image.fromarray(picture()), kind), LARGE)
    assert stored.format == "png"
    assert np.array_equal(decode_stored(stored.content, "png"), picture())
    assert np.array_equal(stored.pixels, picture())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_scaled_down(kind: str):
    content = saved(Image.fromarray(picture(300, 200)), kind)
    stored = encode(content, Storage(max_short_side=100, max_long_side=120, jpeg_quality=95, background=WHITE))
    assert stored.pixels.shape == (120, 80, 3)
    assert not stored.is_copied
    assert np.array_equal(stored.pixels, decode_stored(stored.content, "jpg" if kind == "JPEG" else "png"))


@pytest.mark.parametrize("size", [(101, 50), (399, 400), (700, 500), (1601, 1203)])
def test_a_large_jpeg_is_decoded_at_a_fraction_and_looks_the_same(size: tuple[int, int]):
    rows, columns = np.mgrid[: size[0], : size[1]]
    smooth = 127 + 100 * np.sin(rows / size[0] * 9)[..., None] * np.cos(columns / size[1] * 7)[..., None]
    content = jpeg(np.repeat(smooth, 3, axis=2).astype(np.uint8))
    whole, reduced = decode(content, RGB), decode(content, RGB, (100, 100))
    height, width = capped_size(*size, 100, 100)
    assert reduced.is_exact == (size[0] <= 200)
    assert min(size[0], 2 * height) <= reduced.pixels.shape[0] <= size[0]
    assert min(size[1], 2 * width) <= reduced.pixels.shape[1] <= size[1]
    stored = encode(content, Storage(100, 100, 95, WHITE))
    expected = Image.fromarray(whole.pixels).resize((width, height), Image.Resampling.LANCZOS)
    assert stored.pixels.shape == (height, width, 3)
    assert np.abs(stored.pixels.astype(int) - np.asarray(expected)).max() <= 6


sides = st.integers(1, 5000)


@given(sides, sides, sides, sides)
def test_caps_keep_the_aspect_ratio(height: int, width: int, max_short: int, max_long: int):
    new_height, new_width = capped_size(height, width, max_short, max_long)
    assert 1 <= new_height <= height
    assert 1 <= new_width <= width
    assert min(new_height, new_width) <= max_short
    assert max(new_height, new_width) <= max_long
    scale = min(1, max_short / min(height, width), max_long / max(height, width))
    assert abs(new_height - max(1, height * scale)) <= 0.5 + 1e-9
    assert abs(new_width - max(1, width * scale)) <= 0.5 + 1e-9
    if min(height, width) <= max_short and max(height, width) <= max_long:
        assert (new_height, new_width) == (height, width)
