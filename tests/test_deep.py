"""Images of more than 8 bits a channel, in full depth, through a window."""

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.images import tiff
from stages.images.decode import decode
from stages.images.deep import map_to_bytes
from stages.images.reading import Reading, Samples, UnreadableImage, WindowUse

WINDOW = (1000.0, 40_000.0)
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def values_of(channels: int, seed: int = 0, height: int = 13, width: int = 9) -> np.ndarray:
    """uint16 [H, W, C], all values equally often: high and low bytes both matter."""
    return np.random.default_rng(seed).integers(0, 65536, (height, width, channels), dtype=np.uint16)


def naive_window(value: float, low: float, high: float) -> int:
    """One value, in Python's own numbers."""
    return round(min(255.0, max(0.0, (float(value) - low) * 255 / (high - low))))


def naive(values: np.ndarray, window: tuple[float, float] = WINDOW) -> np.ndarray:
    mapped = [naive_window(value, *window) for value in values.ravel().tolist()]
    return np.array(mapped, np.uint8).reshape(values.shape)


def paeth(left: int, above: int, corner: int) -> int:
    """PNG specification, section 9.4."""
    guess = left + above - corner
    return min((left, above, corner), key=lambda one: (abs(guess - one), (left, above, corner).index(one)))


def filtered(rows: np.ndarray, bytes_per_pixel: int, first_kind: int) -> bytes:
    """Rows of bytes with all five filters of PNG in turn."""
    lines = [row.tobytes() for row in rows]
    above = bytes(len(lines[0]))
    result = bytearray()
    for number, line in enumerate(lines):
        kind = (number + first_kind) % 5
        result.append(kind)
        for at, byte in enumerate(line):
            left = line[at - bytes_per_pixel] if at >= bytes_per_pixel else 0
            corner = above[at - bytes_per_pixel] if at >= bytes_per_pixel else 0
            guess = (0, left, above[at], (left + above[at]) // 2, paeth(left, above[at], corner))[kind]
            result.append((byte - guess) % 256)
        above = line
    return bytes(result)


def deep_png(values: np.ndarray, interlaced: bool = False) -> bytes:
    """A 16-bit PNG of uint16 [H, W, C], written by hand."""
    height, width, channels = values.shape
    big = values.astype(">u2")
    passes = [big[top::down, left::right] for top, left, down, right in ADAM7] if interlaced else [big]
    data = b"".join(filtered(part, 2 * channels, number) for number, part in enumerate(passes) if part.size)
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, interlaced)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def deep_tiff(values: np.ndarray, **options: Any) -> bytes:
    """A TIFF of [H, W], of [H, W, C] in one page, or as the options say."""
    file = io.BytesIO()
    chosen: dict[str, Any] = {"photometric": "minisblack"}
    if values.ndim == 3:
        chosen["planarconfig"] = "contig"
    tifffile.imwrite(file, values, **(chosen | options))
    return file.getvalue()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_is_read_in_full_depth(channels: int, interlaced: bool):
    values = values_of(channels)
    pixels = decode(deep_png(values, interlaced), Reading(channels=channels, window=WINDOW)).pixels
    assert np.array_equal(pixels, naive(values))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_band_is_not_dropped(dtype: type[np.generic]):
    """Red, green, blue and near infrared: Pillow reads the first three and is silent."""
    values = np.random.default_rng(0).integers(0, 255, (9, 8, 4)).astype(dtype)
    content = deep_tiff(values, photometric="rgb", extrasamples=["unspecified"])
    with pytest.raises(UnreadableImage, match="4 channels"):
        decode(content, Reading(window=WINDOW))
    assert decode(content, Reading(channels=4, window=WINDOW)).pixels.shape == (9, 8, 4)


def test_a_grey_png_as_rgb_has_three_equal_channels():
    values = values_of(1)
    pixels = decode(deep_png(values), Reading(window=WINDOW)).pixels
    assert np.array_equal(pixels, np.repeat(naive(values), 3, axis=2))


def test_deep_colour_as_grey_is_the_luma_of_the_window():
    values = values_of(3)
    pixels = decode(deep_png(values), Reading(channels=1, window=WINDOW)).pixels
    expected = naive(values).astype(float) @ [0.299, 0.587, 0.114]
    assert pixels.shape == (13, 9, 1)
    assert np.abs(pixels[..., 0] - expected).max() <= 0.51


def test_how_values_lie_to_their_window_is_counted():
    values = values_of(4)
    for channels, counted in ((4, values), (3, values[..., :3])):
        use = decode(deep_png(values), Reading(channels=channels, window=WINDOW)).window_use
        outside = sum(not WINDOW[0] - 76 < value < WINDOW[1] + 76 for value in counted.ravel().tolist())
        assert use == WindowUse(counted.size, outside, counted.min(), counted.max())
    half = np.array([[0.7, 0.2]], np.float16)
    use = decode(deep_tiff(half.astype(np.float32)), Reading(channels=1, window=(0.2, 0.7))).window_use
    assert use is not None
    assert use.outside == 0, "what rounding hides is not cut off"
    assert WindowUse.of(half, (0.3, 1e6)).outside == 0
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    assert decode(file.getvalue(), Reading(window=WINDOW)).window_use is None


def test_deep_opacity_goes_by_its_own_range():
    values = np.array([[[30_000, 0], [30_000, 65_535]]], np.uint16)
    pixels = decode(deep_png(values), Reading((1, 2, 3), window=(0, 30_000))).pixels
    assert pixels.tolist() == [[[1, 2, 3], [255, 255, 255]]]
    as_data = decode(deep_png(values), Reading(channels=2, window=(0, 65_535))).pixels
    assert as_data.tolist() == [[[117, 0], [117, 255]]]


def test_an_orientation_holds_for_deep_images_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = values_of(1)[..., 0]
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, kind, exif=exif)
        pixels = decode(file.getvalue(), Reading(channels=1, window=WINDOW)).pixels[..., 0]
        assert np.array_equal(pixels, np.rot90(naive(values), -1)), kind


KINDS = {
    "16 bits": (np.uint16, {}),
    "16 bits, big-endian": (np.uint16, {"byteorder": ">"}),
    "16 bits, deflated": (np.uint16, {"compression": "zlib"}),
    "16 bits with a sign": (np.int16, {}),
    "32 bits": (np.int32, {}),
    "32 bits without a sign": (np.uint32, {}),
    "32 bits, big-endian": (np.uint32, {"byteorder": ">"}),
    "float": (np.float32, {}),
    "float, big-endian": (np.float32, {"byteorder": ">"}),
    "double": (np.float64, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_grey_tiff_of_every_depth(kind: str):
    number_type, options = KINDS[kind]
    values = (values_of(1)[..., 0].astype(np.int64) - 20_000).astype(number_type)
    if kind == "32 bits without a sign":
        values[0, :2] = 2**32 - 1, 2**31  # which a signed type takes for negative
    window = (-500.0, 12_345.5)
    pixels = decode(deep_tiff(values, **options), Reading(channels=1, window=window)).pixels
    assert np.array_equal(pixels[..., 0], naive(values, window))


@pytest.mark.parametrize("number_type", [np.uint16, np.float32])
def test_white_is_zero(number_type: type[np.generic]):
    values = values_of(1)[..., 0].astype(number_type)
    pixels = decode(deep_tiff(values, photometric="miniswhite"), Reading(channels=1, window=WINDOW)).pixels
    assert np.array_equal(pixels[..., 0], 255 - naive(values))


@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}, {"byteorder": ">"}])
def test_deep_colour_tiff(options: dict[str, Any]):
    values = values_of(3)
    stored = values.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else values
    content = deep_tiff(stored, photometric="rgb", **options)
    assert np.array_equal(decode(content, Reading(window=WINDOW)).pixels, naive(values))


@pytest.mark.parametrize("largest", [65_535, 4095, 1023])
def test_pgm_and_ppm_keep_the_values_of_the_file(largest: int):
    """Pillow would stretch 12 bits to 16."""
    window = (100.0, 900.0)
    for channels, (binary, text) in {1: ("P5", "P2"), 3: ("P6", "P3")}.items():
        values = (values_of(channels).astype(np.int64) % (largest + 1)).astype(np.uint16)
        header = f"# scanner 7\n9 13 # width, height\n{largest}\n"
        written = " ".join(map(str, values.ravel().tolist()))
        for content in (
            f"{binary}\n{header}".encode() + values.astype(">u2").tobytes(),
            f"{text}\n{header}{written}\n".encode(),
        ):
            pixels = decode(content, Reading(channels=channels, window=window)).pixels
            assert np.array_equal(pixels, naive(values, window)), (channels, content[:2])
            with pytest.raises(UnreadableImage, match="truncated"):
                decode(content[:100], Reading(channels=channels, window=window))


def test_8_bits_are_not_touched_by_a_window():
    pixels = (values_of(3) % 256).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), Reading(window=(0, 10))).pixels, pixels)


DEEP = {"PNG": deep_png(values_of(1)), "colour PNG": deep_png(values_of(3)), "TIFF": deep_tiff(values_of(5))}


@pytest.mark.parametrize("name", DEEP)
def test_without_a_window_the_setting_is_named(name: str):
    channels = 5 if name == "TIFF" else 3
    with pytest.raises(UnreadableImage, match=r"16-bit.*set `window: \[low, high\]`"):
        decode(DEEP[name], Reading(channels=channels))


@pytest.mark.parametrize("channels", [1, 4])
def test_values_that_are_no_numbers_are_rejected_by_name(channels: int):
    values = values_of(channels).astype(np.float32)
    values[2, 3, channels - 1] = math.nan
    content = deep_tiff(values if channels > 1 else values[..., 0])
    with pytest.raises(UnreadableImage, match="NaN"):
        decode(content, Reading(channels=channels, window=WINDOW))


def test_infinite_values_are_clipped():
    values = np.array([[-math.inf, 0, math.inf]], np.float32)
    assert decode(deep_tiff(values), Reading(channels=1, window=(-1, 1))).pixels.ravel().tolist() == [0, 128, 255]


numbers = st.floats(allow_nan=False, width=32)


@settings(max_examples=50)
@given(st.lists(numbers, min_size=1, max_size=40), numbers, st.floats(2.0**-20, 2.0**40, width=32))
def test_any_window_is_the_formula(values: list[float], low: float, span: float):
    window = (low, low + span)
    if not (math.isfinite(window[1]) and window[1] > low):
        return
    samples = Samples(np.array(values, np.float32).reshape(1, -1, 1), "L")
    mapped = map_to_bytes(samples, Reading(channels=1, window=window)).values
    assert mapped.ravel().tolist() == naive(np.array(values, np.float32), window).ravel().tolist()


def test_large_images_are_mapped_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stages.images.deep.VALUES_AT_ONCE", 30)
    values = values_of(3, height=31)
    assert np.array_equal(map_to_bytes(Samples(values, "RGB"), Reading(window=WINDOW)).values, naive(values))


# Many channels


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("number_type", [np.uint8, np.uint16])
def test_tiff_of_many_channels(channels: int, planar: bool, compression: str | None, number_type: type[np.generic]):
    values = (values_of(channels) >> (8 if number_type is np.uint8 else 0)).astype(number_type)
    content = deep_tiff(
        values.transpose(2, 0, 1) if planar else values,
        planarconfig="separate" if planar else "contig",
        compression=compression,
    )
    pixels = decode(content, Reading(channels=channels, window=WINDOW)).pixels
    assert np.array_equal(pixels, values if number_type is np.uint8 else naive(values))


@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_pages_that_are_channels(kind: str):
    values = values_of(4)
    options: dict[str, Any] = {"ome": True} if kind == "ome" else {"imagej": True}
    content = deep_tiff(values.transpose(2, 0, 1), planarconfig=None, metadata={"axes": "CYX"}, **options)
    assert np.array_equal(decode(content, Reading(channels=4, window=WINDOW)).pixels, naive(values))


def test_pages_without_a_name_are_frames_of_which_the_first_is_taken():
    values = values_of(4)
    content = deep_tiff(values.transpose(2, 0, 1), planarconfig=None)
    assert np.array_equal(decode(content, Reading(channels=1, window=WINDOW)).pixels, naive(values[..., :1]))
    with pytest.raises(UnreadableImage, match=r"1 channel \(TIFF, uint16\), and the setting `channels` is 4"):
        decode(content, Reading(channels=4, window=WINDOW))


def test_an_orientation_holds_for_many_channels():
    values = values_of(5)
    content = deep_tiff(values, extratags=[(274, "H", 1, 8, True)])
    pixels = decode(content, Reading(channels=5, window=WINDOW)).pixels
    assert np.array_equal(pixels, np.rot90(naive(values)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_the_fourth_of_four_channels(kind: str):
    pixels = (values_of(4) >> 8).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert np.array_equal(decode(file.getvalue(), Reading(channels=4)).pixels, pixels)


def test_alpha_is_the_second_of_two_channels():
    pixels = (values_of(2) >> 8).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "LA").save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), Reading(channels=2)).pixels, pixels)


def test_other_counts_are_named():
    rgb, cmyk = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(rgb, "JPEG")
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    for content, channels, found in (
        (rgb.getvalue(), 4, r"3 channels \(JPEG, mode RGB\), and the setting `channels` is 4"),
        (cmyk.getvalue(), 5, r"4 channels \(JPEG, mode CMYK\), and the setting `channels` is 5"),
        (deep_tiff(values_of(7)), 5, r"7 channels \(TIFF, uint16\), and the setting `channels` is 5"),
        (deep_tiff(values_of(7)), 3, r"7 channels \(TIFF, uint16\), and the setting `channels` is 3"),
        (deep_png(values_of(3)), 4, r"3 channels \(.*uint16\), and the setting `channels` is 4"),
    ):
        with pytest.raises(UnreadableImage, match=found):
            decode(content, Reading(channels=channels, window=WINDOW))
    assert decode(cmyk.getvalue(), Reading(channels=4)).pixels.shape == (8, 8, 4)


def test_what_tifffile_would_read_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiff, "tifffile", None)
    with pytest.raises(UnreadableImage, match="pip install tifffile"):
        decode(deep_tiff(values_of(5)), Reading(channels=5, window=WINDOW))
    assert decode(deep_tiff(values_of(1)[..., 0]), Reading(window=WINDOW)).pixels.shape == (13, 9, 3)


def test_many_channels_are_refused_by_their_header_where_they_are_too_large():
    with pytest.raises(UnreadableImage, match="too large: 9 x 13 pixels, more than 100"):
        decode(deep_tiff(values_of(5)), Reading(channels=5, window=WINDOW, max_pixels=100))


def test_larger_images_than_usual_may_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr("stages.images.decode.MAX_PIXELS", 100)
    file = io.BytesIO()
    Image.new("RGB", (16, 10)).save(file, "PNG")
    with pytest.raises(UnreadableImage, match="too large"):
        decode(file.getvalue(), Reading(max_pixels=100))
    assert decode(file.getvalue(), Reading(max_pixels=160)).pixels.shape == (10, 16, 3)
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(UnreadableImage, match="too large"):
        decode(file.getvalue(), Reading(max_pixels=159))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "rowsperstrip": 4}, {"planarconfig": "separate"}])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
def test_a_tiff_that_breaks_off_is_rejected(options: dict[str, Any], share: float):
    values = values_of(5, height=64, width=48)
    content = deep_tiff(values.transpose(2, 0, 1) if "planarconfig" in options else values, **options)
    with pytest.raises(UnreadableImage):
        decode(content[: int(share * len(content))], Reading(channels=5, window=WINDOW))
