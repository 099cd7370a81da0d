"""What a trained encoder is (model.json), and its weights on disk."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.models.bottleneck import BottleneckedEncoder, build_bottleneck
from stages.models.encoders import Encoder, UnusableBackbone, Weights, build_encoder, pooling_of, set_pooling
from stages.models.heads import Head, HeadKind, build_head
from stages.models.neck import NeckedEncoder, build_neck
from stages.models.pooling import PoolingKind
from stages.models.projector import build_projector
from stages.models.tensor_file import DamagedTensors, read_tensors
from stages.views import Policy

CARD_FILE = "model.json"
ENCODER_FILE = "encoder.safetensors"
PROJECTOR_FILE = "projector.safetensors"
NECK_FILE = "neck.safetensors"
BOTTLENECK_FILE = "bottleneck.safetensors"
HEAD_FILE = "head.safetensors"

LATER = ("pooling", "bottleneck")
"""Fields that came to the format later."""

Colour = tuple[float, ...]


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


class NeckCard(ProjectorCard):
    """The arguments of `build_neck`: the projector, and how many of its layers the encoder ends with."""

    kept: int


class PseudoLabelsCard(_Part):
    """The images that were learned with a class that a classifier gave them."""

    train: int
    test: int
    """Images of the test split; from 1 on scores on test are transductive."""
    digest: str
    """Of their keys and these classes (`labels_digest`)."""


class LabelsCard(_Part):
    """The labelled training images that an encoder saw: a subset of `label_subset`."""

    loss: str
    fraction: float
    subset: int
    seed: int
    samples: int
    digest: str
    """Of their keys and classes (`labels_digest`)."""
    pseudo: PseudoLabelsCard | None = None
    """What was learned beside them; the labels behind that are entries of their own, before this one."""

    @model_serializer(mode="wrap")
    def _as_it_was_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `pseudo`, which came to the format later, where there is none."""
        return {name: value for name, value in serialise(self).items() if name != "pseudo" or value is not None}


class HeadCard(_Part):
    """What a loss trained on the embeddings: the arguments of `build_head`, embedding size apart, and the labels behind
    it."""

    kind: HeadKind
    classes: int
    """0 of a head of pairs."""
    centres: int = 1
    """Of each class."""
    scale: float | None = None
    """Length that embeddings are brought to before it."""
    names: tuple[str, ...] | None = None
    """Of the classes; None where an early version of the stage wrote it: then they are those of the shards."""
    learned_from: LabelsCard | None = None
    """None where an early version of the stage wrote it: then it is the last of the encoder's `labels_seen`."""


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
    """Of the normalisation, by channel, in 0 to 1."""
    std: Colour
    interpolation: Literal["bilinear", "bicubic", "nearest"]
    antialias: bool
    projector: ProjectorCard | None
    parameters: int
    """Numbers in the encoder's parameters."""
    weights: WeightsCard
    channels: int = 3
    """Of the images: 3 is RGB, 1 is grey."""
    neck: NeckCard | None = None
    """Layers of a projector that the encoder ends with; they count in embedding_size and parameters."""
    labels_seen: tuple[LabelsCard, ...] = ()
    """One entry for each fine-tuning that is behind these weights (not the head's), the first one first, and before it
    those of the classifier that gave it pseudo-labels; none: no label was seen."""
    head: HeadCard | None = None
    pooling: PoolingKind = "average"
    bottleneck: bool = False
    """Whether the encoder ends with a batch norm; it counts in parameters."""

    @model_validator(mode="after")
    def _check(self) -> "ModelCard":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have a value for each of {self.channels} channels")
        return self

    def to_json(self) -> str:
        """The text of model.json; what came to the format later is left out where it is as it always was before."""
        later = {name for name in LATER if getattr(self, name) == type(self).model_fields[name].default}
        return json.dumps(self.model_dump(mode="json", exclude=later), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "ModelCard":
        """Read the text of model.json. Raises pydantic.ValidationError where it is not one."""
        return cls.model_validate_json(text)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def make_card(
    kind: Literal["pretrain", "finetune"],
    encoder: Encoder,
    architecture: ArchitectureCard,
    policy: Policy,
    labels_seen: tuple[LabelsCard, ...] = (),
    projector: ProjectorCard | None = None,
    head: HeadCard | None = None,
) -> ModelCard:
    """Describe an encoder that was trained on views by `policy`."""
    inner = encoder.inner if isinstance(encoder, BottleneckedEncoder) else encoder
    return ModelCard(
        kind=kind,
        architecture=architecture,
        embedding_size=encoder.embedding_size,
        image_size=policy.image_size,
        mean=policy.mean,
        std=policy.std,
        interpolation=policy.interpolation,
        antialias=policy.antialias,
        projector=projector,
        parameters=count_parameters(encoder),
        weights=WeightsCard(source=encoder.weights.source, licence=encoder.weights.licence),
        channels=len(policy.mean),
        neck=NeckCard(**inner.shape) if isinstance(inner, NeckedEncoder) else None,
        labels_seen=labels_seen,
        head=head,
        pooling=pooling_of(encoder),
        bottleneck=inner is not encoder,
    )


def architecture_at(card: ModelCard, image_size: int) -> ArchitectureCard:
    """The architecture of an encoder that goes on with images of another size: the stem stays what it is.

    Raises:
        UnusableBackbone: its weights are for the size that it was built for.
    """
    if image_size == card.image_size:
        return card.architecture
    limit = card.architecture.small_stem_up_to
    kept = max(limit, image_size) if card.image_size <= limit else min(limit, image_size - 1)
    architecture = card.architecture.model_copy(update={"small_stem_up_to": kept})
    unfit = UnusableBackbone(
        f"a {architecture.backbone} that was trained on images of {card.image_size} pixels takes none of {image_size}"
    )
    with torch.random.fork_rng(devices=[]):
        then = build_encoder(**card.architecture.model_dump() | {"pretrained": False}, image_size=card.image_size)
        try:
            now = build_encoder(**architecture.model_dump() | {"pretrained": False}, image_size=image_size)
        except UnusableBackbone as error:
            raise unfit from error
    if _difference(then.state_dict(), now.state_dict()):
        raise unfit
    return architecture


def save_model(
    folder: Path, card: ModelCard, encoder: Encoder, projector: nn.Module | None, head: nn.Module | None = None
) -> None:
    """Write model.json, encoder.safetensors and what there is of projector, neck, bottleneck and head into a folder.

    The encoder's tensors have the names of torchvision or timm. Equal weights give equal bytes, on any device and in
    any memory format.
    """
    (folder / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    save_file(_state_for_disk(encoder.library_module()), folder / ENCODER_FILE)
    if projector is not None:
        save_file(_state_for_disk(projector), folder / PROJECTOR_FILE)
    if isinstance(encoder, BottleneckedEncoder):
        save_file(_state_for_disk(encoder.norm), folder / BOTTLENECK_FILE)
        encoder = encoder.inner
    if isinstance(encoder, NeckedEncoder):
        save_file(_state_for_disk(encoder.neck), folder / NECK_FILE)
    if head is not None:
        save_file(_state_for_disk(head), folder / HEAD_FILE)


def load_encoder(folder: Path) -> tuple[Encoder, ModelCard]:
    """Build the encoder that `folder` describes and load its weights strictly; it is in evaluation mode, on the CPU.

    Raises:
        DamagedModel: a file is missing or damaged, or the weights are not those of the architecture in model.json.
    """
    card = load_card(folder)
    try:
        architecture = card.architecture.model_dump() | {"pretrained": False}
        encoder = build_encoder(**architecture, image_size=card.image_size, channels=card.channels)
        if card.pooling != "average":
            set_pooling(encoder, card.pooling)
    except UnusableBackbone as error:
        raise DamagedModel(f"{folder / CARD_FILE}: {error}") from error
    if card.neck is not None:
        shape = card.neck.model_dump()
        encoder = NeckedEncoder(encoder, build_neck(encoder.embedding_size, **shape), shape)
    if card.bottleneck:
        encoder = BottleneckedEncoder(encoder, build_bottleneck(encoder.embedding_size))
    if encoder.embedding_size != card.embedding_size:
        raise DamagedModel(
            f"{folder / CARD_FILE} says embedding_size {card.embedding_size}, and its architecture gives "
            f"{encoder.embedding_size}; run the stage that made it again"
        )
    if count_parameters(encoder) != card.parameters:
        raise DamagedModel(
            f"{folder / CARD_FILE} says {card.parameters:,} parameters, and its architecture has "
            f"{count_parameters(encoder):,}; run the stage that made it again"
        )
    load_weights(encoder.library_module(), folder / ENCODER_FILE)
    inner = encoder
    if isinstance(encoder, BottleneckedEncoder):
        load_weights(encoder.norm, folder / BOTTLENECK_FILE)
        inner = encoder.inner
    if isinstance(inner, NeckedEncoder):
        load_weights(inner.neck, folder / NECK_FILE)
    encoder.weights = Weights(card.weights.source, card.weights.licence, card.mean, card.std)
    return encoder.eval(), card


def keep_projector_layers(encoder: Encoder, card: ModelCard, folder: Path, layers: int) -> NeckedEncoder:
    """An encoder that ends with the first `layers` layers of its projector, in evaluation mode.

    Args:
        encoder, card: of `load_encoder(folder)`; the card has a projector of so many layers.

    Raises:
        DamagedModel: the projector cannot be read, or is not the one in model.json.
    """
    assert card.projector is not None
    shape = card.projector.model_dump()
    projector = build_projector(encoder.embedding_size, **shape)
    load_weights(projector, folder / PROJECTOR_FILE)
    neck = build_neck(encoder.embedding_size, **shape, kept=layers)
    neck.load_state_dict({name: projector.state_dict()[name] for name in neck.state_dict()})
    return NeckedEncoder(encoder, neck, shape | {"kept": layers}).eval()


def load_head(folder: Path, card: ModelCard) -> Head:
    """The trained head of an encoder: embeddings [N, D] -> scores [N, classes], or of pairs. The card has one."""
    assert card.head is not None
    head = build_head(card.head.kind, card.embedding_size, card.head.classes, card.head.centres, card.head.scale)
    load_weights(head, folder / HEAD_FILE)
    return head.eval()


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
        state = read_tensors(path)
    except DamagedTensors as error:
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
