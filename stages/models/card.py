"""What a trained encoder is (model.json), and its weights on disk."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.models.encoders import Encoder, UnusableBackbone, Weights, build_encoder

CARD_FILE = "model.json"
ENCODER_FILE = "encoder.safetensors"
PROJECTOR_FILE = "projector.safetensors"

Colour = tuple[float, float, float]


class DamagedModel(ValueError):
    """The files of a model cannot be read, or do not fit each other."""

    exit_code = 4


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ArchitectureCard(_Part):
    """The arguments of `build_encoder`, image size apart."""

    backbone: str
    width: int
    small_stem_up_to: int
    pretrained: bool


class ProjectorCard(_Part):
    """The arguments of `build_projector`, embedding size apart."""

    layers: int
    hidden: int
    dimension: int


class WeightsCard(_Part):
    """Where the encoder started: `initialised`, or the name of published weights with their licence, if known."""

    source: str
    licence: str | None


class ModelCard(_Part):
    """All that later stages need to know of an encoder: they guess nothing."""

    format: Literal[1] = 1
    kind: Literal["pretrain", "finetune"]
    architecture: ArchitectureCard
    embedding_size: int
    image_size: int
    """Height and width of the images that it was trained on, in pixels."""
    mean: Colour
    """Of the normalisation, RGB in 0 to 1."""
    std: Colour
    interpolation: Literal["bilinear", "bicubic", "nearest"]
    antialias: bool
    projector: ProjectorCard | None
    parameters: int
    """Numbers in the encoder's parameters."""
    weights: WeightsCard

    def to_json(self) -> str:
        """The text of model.json."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelCard":
        """Read the text of model.json. Raises pydantic.ValidationError where it is not one."""
        return cls.model_validate_json(text)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def save_model(folder: Path, card: ModelCard, encoder: Encoder, projector: nn.Module | None) -> None:
    """Write model.json, encoder.safetensors and, if there is one, projector.safetensors into an existing folder.

    The encoder's tensors have the names of torchvision or timm. Equal weights give equal bytes, on any device and in
    any memory format.
    """
    (folder / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    save_file(_state_for_disk(encoder.library_module()), folder / ENCODER_FILE)
    if projector is not None:
        save_file(_state_for_disk(projector), folder / PROJECTOR_FILE)


def load_encoder(folder: Path) -> tuple[Encoder, ModelCard]:
    """Build the encoder that `folder` describes and load its weights strictly; it is in evaluation mode, on the CPU.

    Raises:
        DamagedModel: a file is missing or damaged, or the weights are not those of the architecture in model.json.
    """
    card = load_card(folder)
    try:
        encoder = build_encoder(**(card.architecture.model_dump() | {"pretrained": False}), image_size=card.image_size)
    except UnusableBackbone as error:
        raise DamagedModel(f"{folder / CARD_FILE}: {error}") from error
    if encoder.embedding_size != card.embedding_size:
        raise DamagedModel(
            f"{folder / CARD_FILE} says embedding_size {card.embedding_size}, and its architecture gives "
            f"{encoder.embedding_size}; run the stage that made it again"
        )
    load_weights(encoder.library_module(), folder / ENCODER_FILE)
    encoder.weights = Weights(card.weights.source, card.weights.licence, card.mean, card.std)
    return encoder.eval(), card


def load_card(folder: Path) -> ModelCard:
    """Read model.json. Raises DamagedModel where it is missing or no card."""
    path = folder / CARD_FILE
    try:
        return ModelCard.from_json(path.read_bytes())
    except OSError as error:
        raise DamagedModel(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DamagedModel(f"{path} is no model card of this version: {where}: {first['msg']}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module: every name and shape must match.

    Raises:
        DamagedModel: it cannot be read, or does not match; the message says how.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedModel(f"cannot read weights of {path}: {error}") from error
    difference = _difference(module.state_dict(), state)
    if difference:
        raise DamagedModel(f"{path} does not fit the model: {difference}; run the stage that made it again")
    module.load_state_dict(state)


def _state_for_disk(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _difference(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """The first tensor that is missing, not wanted, or of another shape or type, and how many more there are."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not of this model" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        one, other = wanted[name], found[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            faults.append(f"{name} is {_describe(other)} and should be {_describe(one)}")
    if not faults:
        return ""
    first = min(faults)
    return first if len(faults) == 1 else f"{first}, and {len(faults) - 1} more"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}"
