"""TIFF that Pillow cannot read or does not read in full: many channels, deep colour, channels as pages."""

import io

from stages.images.reading import Reading, Samples, UnreadableImage, upright

try:
    import tifffile
except ImportError:  # an extra
    tifffile = None

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GREY_INVERTED, GREY, RGB, SEPARATED = 0, 1, 2, 5
"""Photometric interpretations (TIFF 6.0, section 8)."""
ALPHA_SAMPLES = (1, 2)
"""Kinds of extra samples that are opacity (TIFF 6.0, section 18)."""
ORIENTATION_TAG = 274


def read_tiff(content: bytes, reading: Reading) -> Samples:
    """The first image of a TIFF, upright, in its own depth.

    Channels may lie pixel by pixel, plane by plane, or be pages that the file's metadata (OME, ImageJ) call channels.

    Raises:
        UnreadableImage: tifffile is not installed, the image is too large, or has other channels than are wanted.
    """
    if tifffile is None:
        raise UnreadableImage("a TIFF that only the package tifffile reads: pip install tifffile")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        photometric = int(page.photometric)
        if photometric not in (GREY_INVERTED, GREY, RGB, SEPARATED):
            raise UnreadableImage(f"TIFF with the photometric interpretation {photometric}")
        image, axes = page, page.axes
        if reading.channels > 1 and _is_channels_of_pages(file.series[0].axes):
            image, axes = file.series[0], file.series[0].axes
        size = dict(zip(axes, image.shape, strict=True))
        if not {"Y", "X"} <= size.keys() or not size.keys() <= {"Y", "X", "S", "C"} or {"S", "C"} <= size.keys():
            raise UnreadableImage(f"TIFF with the axes {axes}: only height, width and channels are read")
        reading.refuse_large(size["Y"], size["X"])
        (channel_axis,) = set(axes) - {"Y", "X"} or {None}
        channels = 1 if channel_axis is None else size[channel_axis]
        mode = _mode(photometric, channels, tuple(int(kind) for kind in page.extrasamples))
        if mode is None or reading.channels not in (1, 3):
            reading.refuse_channels(channels, f"TIFF, {image.dtype}")
        values = image.asarray()
        tag = page.tags.get(ORIENTATION_TAG)
        orientation = 1 if tag is None else int(tag.value)
    if channel_axis is None:
        values, axes = values[..., None], axes + "S"
    order = [axes.index("Y"), axes.index("X"), axes.index(channel_axis or "S")]
    return Samples(upright(values.transpose(order), orientation), mode, photometric == GREY_INVERTED)


def _is_channels_of_pages(axes: str) -> bool:
    """Whether a series of pages is one image, with channels by name."""
    return "C" in axes and set(axes) <= {"Y", "X", "C"}


def _mode(photometric: int, channels: int, extra_samples: tuple[int, ...]) -> str | None:
    """What the channels mean; None where the file does not say."""
    has_alpha = len(extra_samples) == 1 and extra_samples[0] in ALPHA_SAMPLES
    if photometric == RGB:
        return {3: "RGB", 4: "RGBA" if has_alpha or not extra_samples else None}.get(channels)
    if photometric == SEPARATED:
        return None
    return {1: "L", 2: "LA" if has_alpha else None}.get(channels)
