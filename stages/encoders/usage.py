"""What stands beside exported weights: preprocessing.json, and a README whose code runs as printed."""

from typing import Any

from stages.encoders.ready import ReadyEncoder, storage_facts
from stages.views import EVALUATION_CROP
from stages.views.policy import SMALL_IMAGE_SIZE

TORCH_MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}
OPAQUE_MODES = {1: "L", 3: "RGB"}


def preprocessing(ready: ReadyEncoder) -> dict[str, Any]:
    """How an image becomes what the encoder looks at, and how images were stored before."""
    card = ready.card
    share = 1.0 if card.image_size <= SMALL_IMAGE_SIZE else EVALUATION_CROP
    return {
        "format": 1,
        "size": card.image_size,
        "channels": len(card.mean),
        "scale": [0.0, 1.0],
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "antialias": card.antialias,
        "crop": {"kind": "central square", "share_of_short_side": share},
        "storage": storage_facts(ready.storage),
    }


def usage(ready: ReadyEncoder, kind: str, code: str | None, weights_file: str) -> str:
    """The text of README.md.

    Args:
        kind: torchvision, timm or safetensors.
        code: lines that make the library's model; None where this package builds it.
    """
    card = ready.card
    source = f"It started from {card.weights.source}, licence: {card.weights.licence or 'not stated'}. "
    storage, limits = ready.storage, ""
    if not ready.learned_from_tiles:
        limits = (
            f"Images larger than {storage.max_short_side} x {storage.max_long_side} pixels (short and long side) were "
            "scaled down to that before they were learned from; "
        )
    program = _own_program() if code is None else _library_program(ready, code, weights_file)
    return (
        f"# {ready.reference}, for {kind}\n\n"
        f"{card.architecture.backbone}, {card.parameters:,} parameters: images of {card.image_size} pixels -> "
        f"{card.embedding_size} numbers. {'' if card.weights.source == 'initialised' else source}"
        "Normalise the embeddings before you compare them by their dot products.\n\n"
        f"```python\n{program}```\n\n"
        f"{limits}preprocessing.json holds all numbers.\n"
    )


def _own_program() -> str:
    return (
        "import torch\n"
        "from stages.encoders.ready import load_folder  # of simclr-pipeline\n\n"
        'model = load_folder(".")  # the folder of this file\n'
        "with torch.no_grad():\n"
        '    embedding = model(model.preprocess("image.jpg")[None])  # [1, D]\n'
        "print(embedding.shape)\n"
    )


def _library_program(ready: ReadyEncoder, code: str, weights_file: str) -> str:
    card = ready.card
    share = preprocessing(ready)["crop"]["share_of_short_side"]
    mode = TORCH_MODES[card.interpolation]
    antialias = card.antialias and card.interpolation != "nearest"
    library, _, made = code.partition("\n\n")
    return f'''import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
{library}

{made}model.load_state_dict(load_file("{weights_file}"))  # strict
model.eval()


def preprocess(path):
    """[{len(card.mean)}, {card.image_size}, {card.image_size}]: the central square, resized, normalised."""
    image = ImageOps.exif_transpose(Image.open(path))
{_channels(ready)}    side = round(min(image.size) * {share})
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = np.array(image.crop((left, top, left + side, top + side))).reshape(side, side, -1)
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None] / 255
    size = ({card.image_size}, {card.image_size})
    pixels = torch.nn.functional.interpolate(pixels, size, mode="{mode}", antialias={antialias})
    mean, std = torch.tensor({list(card.mean)}), torch.tensor({list(card.std)})
    return ((pixels[0].clamp(0, 1) - mean[:, None, None]) / std[:, None, None])


with torch.no_grad():
    embedding = model(preprocess("image.jpg")[None])  # [1, {card.embedding_size}]
print(embedding.shape)
'''


def _channels(ready: ReadyEncoder) -> str:
    """Lines that bring an image to the encoder's channels, as `decode` does."""
    channels = len(ready.card.mean)
    if channels not in OPAQUE_MODES:
        return '    image = image.convert("RGBA")\n' if channels == 4 else ""
    background = (*ready.storage.background, 255)
    return (
        f'    canvas = Image.new("RGBA", image.size, {background})  # under what is transparent\n'
        f'    image = Image.alpha_composite(canvas, image.convert("RGBA")).convert("{OPAQUE_MODES[channels]}")\n'
    )
