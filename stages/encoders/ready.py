"""A trained encoder with its preprocessing: what `open_store().load(REF)` gives."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stages.images.decode import capped_size
from stages.images.encode import Storage, encode, resized
from stages.images.reading import UnreadableImage
from stages.models import DamagedModel, Encoder, ModelCard, load_encoder
from stages.models.card import CARD_FILE
from stages.views import CENTRE, Square, evaluation_view

PREPROCESSING_FILE = "preprocessing.json"
STORED = Storage(max_short_side=512, max_long_side=1024, jpeg_quality=95, background=(255, 255, 255))
"""As the stage `shard` stores images unless its settings say otherwise."""
UNLIMITED = 2**31
"""Pixels of a side: tiles are not scaled down."""

ImageLike = str | Path | bytes | Image.Image | np.ndarray | Tensor


class NotAnEncoder(ValueError):
    """The artifact that was named holds no encoder."""

    exit_code = 2


class ReadyEncoder(nn.Module):
    """An encoder in evaluation mode, and the one view of an image that it looks at.

    Attributes:
        card: what is known of the encoder (architecture, image size, mean and std, ...).
        storage: how the images that it was trained on were stored; `preprocess` does the same to other images.
        reference: its name in the store, or the folder that it was read from.
    """

    def __init__(self, encoder: Encoder, card: ModelCard, storage: Storage, reference: str):
        super().__init__()
        self.encoder = encoder.eval()
        self.card, self.storage, self.reference = card, storage, reference

    @property
    def embedding_size(self) -> int:
        """Numbers in an embedding, D."""
        return self.card.embedding_size

    @property
    def learned_from_tiles(self) -> bool:
        """Whether its images were parts of larger ones; `preprocess` does not cut."""
        return self.storage.max_long_side >= UNLIMITED

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images, float [B, C, h, w] -> embeddings [B, D]."""
        return self.encoder(images)

    def preprocess(self, image: ImageLike) -> Tensor:
        """The view of an image that the stage `embed` takes: stored alike, central square, resized, normalised.

        Args:
            image: a path, the bytes of a file, a PIL image, or upright pixels: a uint8 array [H, W, C] or tensor
                [C, H, W].
        Returns:
            float32 [C, h, w]
        Raises:
            UnreadableImage: a file that is damaged or no image, with the reason.
            OSError: a path that cannot be read.
            ValueError: pixels of another type or shape.
        """
        return self.looks(image, (CENTRE,))[0]

    def looks(self, image: ImageLike, places: Sequence[Square]) -> Tensor:
        """The same for several squares of an image: float32 [squares, C, h, w]"""
        pixels = torch.from_numpy(np.array(self._pixels(image))).permute(2, 0, 1)[None]
        card = self.card
        views = [
            evaluation_view(
                pixels, None, card.image_size, card.mean, card.std, card.interpolation, card.antialias, square
            )
            for square in places
        ]
        return torch.cat(views)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """uint8 [H, W, C] as shards would hold it."""
        if isinstance(image, Tensor):
            image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
        if isinstance(image, np.ndarray):
            return self._capped(image)
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        try:
            return encode(_png(image) if isinstance(image, Image.Image) else image, self.storage).pixels
        except UnreadableImage as error:
            raise UnreadableImage(error.for_encoder) from error

    def _capped(self, pixels: np.ndarray) -> np.ndarray:
        channels = len(self.card.mean)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise ValueError(
                f"pixels are uint8, an array [H, W, {channels}] or a tensor [{channels}, H, W], not {pixels.dtype} "
                f"{list(pixels.shape)} (an array's order)"
            )
        before = pixels.shape[0], pixels.shape[1]
        height, width = capped_size(*before, self.storage.max_short_side, self.storage.max_long_side)
        return pixels if (height, width) == before else resized(pixels, height, width)


def load_artifact(files: Path, reference: str, made_by: Mapping[str, Mapping[str, Any]]) -> ReadyEncoder:
    """The encoder of an artifact.

    Args:
        files: of the artifact.
        reference: its name.
        made_by: by stage, the settings of what it was made of: those of `shard` say how its images were stored.

    Raises:
        NotAnEncoder: the artifact is something else.
        DamagedModel: its files do not fit each other.
    """
    if not (files / CARD_FILE).is_file():
        raise NotAnEncoder(
            f"{reference} holds no encoder: name the step of a pretrain or finetune stage (`simclr ls` lists them)"
        )
    try:
        storage = _storage(made_by.get("shard", {}))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedModel(f"{reference}: the record of its shards, settings: cannot be used: {error}") from error
    return _ready(files, reference, storage)


def load_folder(folder: Path | str) -> ReadyEncoder:
    """The encoder that `simclr export REF DIR --format safetensors` wrote to a folder.

    Raises:
        NotAnEncoder: nothing was exported there, or in another format.
        DamagedModel: its files do not fit each other.
    """
    folder = Path(folder)
    try:
        preprocessing = json.loads((folder / PREPROCESSING_FILE).read_bytes())
        storage = _storage(preprocessing["storage"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise NotAnEncoder(
            f"{folder}: no encoder was exported there ({PREPROCESSING_FILE}: storage: {error})"
        ) from error
    if not (folder / CARD_FILE).is_file():
        raise NotAnEncoder(f"{folder}: was exported for another library; its README.md says how it is loaded")
    return _ready(folder, str(folder), storage)


def storage_facts(storage: Storage) -> dict[str, Any]:
    """A storage as plain data, under the names of the settings of the stage `shard`."""
    return {
        "max_short_side": storage.max_short_side,
        "max_long_side": storage.max_long_side,
        "jpeg_quality": storage.jpeg_quality,
        "background": list(storage.background),
        "channels": storage.channels,
        "window": storage.window and list(storage.window),
        "max_megapixels": storage.max_pixels / 1e6,
    }


def _storage(known: Mapping[str, Any]) -> Storage:
    """From settings of the stage `shard`; what is not among them is as usual.

    Raises:
        KeyError, TypeError, ValueError, IndexError: a value is of another kind than that setting's.
    """
    facts = storage_facts(STORED) | dict(known)
    is_tiled = facts.get("tile") is not None  # the encoder knows images at full size; here they stay whole
    window = facts["window"]
    for name in ("max_short_side", "max_long_side", "jpeg_quality", "channels"):
        if type(facts[name]) is not int or not 0 < facts[name] <= UNLIMITED:
            raise ValueError(f"{name}: {facts[name]!r} is no count")
    return Storage(
        max_short_side=UNLIMITED if is_tiled else facts["max_short_side"],
        max_long_side=UNLIMITED if is_tiled else facts["max_long_side"],
        jpeg_quality=facts["jpeg_quality"],
        background=tuple(facts["background"]),
        channels=facts["channels"],
        window=None if window is None else (window[0], window[1]),
        max_pixels=round(facts["max_megapixels"] * 1e6),
    )


def _ready(files: Path, reference: str, storage: Storage) -> ReadyEncoder:
    encoder, card = load_encoder(files)
    return ReadyEncoder(encoder.requires_grad_(False), card, storage, reference).eval()  # type: ignore[return-value]


def _png(image: Image.Image) -> bytes:
    """An image of Pillow as the bytes of a file, so that orientation, transparency and depth go the way of files."""
    exif = image.getexif()
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "F"):
        image = image.convert("RGBA" if "a" in image.mode.lower() else "RGB")  # CMYK, YCbCr, ...
    file = io.BytesIO()
    if image.mode == "F":
        image.save(file, "TIFF", exif=exif)
    else:
        image.save(file, "PNG", exif=exif, compress_level=1)
    return file.getvalue()
