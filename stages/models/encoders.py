"""Encoders by name: ResNets of any width, and every classification model of torchvision and timm without its head."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from stages.models.pooling import POOLINGS, AveragePooling, PoolingKind
from stages.models.stem import RGB_CHANNELS, UnusableBackbone, draw_stem, inflate

TIMM_PREFIX = "timm:"
PUBLISHED_WIDTH = 64
RESNET_LAYOUTS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
"""Blocks of each of the four stages (He et al. 2016, table 1); resnet10 halves resnet18."""


@dataclass(frozen=True)
class Weights:
    """Where an encoder's weights come from, and the normalisation of images that they were made with."""

    source: str = "initialised"
    licence: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Encoder(nn.Module):
    """Images [B, C, H, W] -> embeddings [B, D]."""

    embedding_size: int
    """D"""
    weights: Weights = Weights()

    def library_module(self) -> nn.Module:
        """The module whose parameters have the names that torchvision or timm gives them; files hold these names."""
        return self


class ResNet(Encoder):
    """A ResNet of any width without its classifier; parameters named as in torchvision.

    The small stem (a 3x3 convolution of stride 1, no pooling) is for images of CIFAR's size (Chen et al. 2020, B.9).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        width: int,
        small_stem: bool,
        channels: int = RGB_CHANNELS,
    ):
        super().__init__()
        if small_stem:
            self.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _resnet_stage(block, width, width, depths[0], stride=1)
        self.layer2 = _resnet_stage(block, width * block.expansion, 2 * width, depths[1], stride=2)
        self.layer3 = _resnet_stage(block, 2 * width * block.expansion, 4 * width, depths[2], stride=2)
        self.layer4 = _resnet_stage(block, 4 * width * block.expansion, 8 * width, depths[3], stride=2)
        self.pool: nn.Module = AveragePooling()
        self.embedding_size = 8 * width * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 8 x width x expansion]"""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.pool(maps)


class LibraryEncoder(Encoder):
    """A model of torchvision or timm that gives embeddings."""

    def __init__(self, model: nn.Module, embedding_size: int, weights: Weights):
        super().__init__()
        self.model = model
        self.embedding_size = embedding_size
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D]"""
        return self.model(images)

    def library_module(self) -> nn.Module:
        return self.model


def build_encoder(
    backbone: str,
    width: int,
    small_stem_up_to: int,
    pretrained: bool,
    image_size: int,
    channels: int = RGB_CHANNELS,
) -> Encoder:
    """Build an encoder; new weights are drawn from torch's global generator.

    Args:
        backbone: `resnet10`, `resnet18`, ... `resnet152`, another classification model of torchvision, or `timm:NAME`.
        width: channels of a ResNet's first stage; 64 for everything else.
        small_stem_up_to: a ResNet for images of this many pixels or less has a small stem.
        pretrained: take the library's published weights (downloaded on first use).
        image_size: height and width of the images, in pixels.
        channels: of the images. Where they are not 3, published weights are inflated (see `inflate_stem`), and their
            mean and std, which are of red, green and blue, do not hold.

    Raises:
        UnusableBackbone: no such model, or it does not go with width, image size or published weights.
    """
    try:
        encoder = _build(backbone, width, small_stem_up_to, pretrained, image_size, channels)
    except OSError as error:  # of the download: both libraries' clients raise kinds of it
        reason = " ".join(str(error).split())
        raise UnusableBackbone(f"the published weights of {backbone} cannot be had: {reason}") from error
    if pretrained and channels != RGB_CHANNELS:
        inflate_stem(encoder, channels)
    return encoder


def set_pooling(encoder: Encoder, kind: PoolingKind) -> None:
    """Let a ResNet end with another pooling; embeddings keep their size. One of the same kind stays as it is.

    Raises:
        UnusableBackbone: the encoder is no ResNet.
    """
    module = encoder.library_module()
    if not isinstance(module, ResNet):
        raise UnusableBackbone(f"pooling: only {', '.join(RESNET_LAYOUTS)} can have another ({kind}); leave it out")
    if not isinstance(module.pool, POOLINGS[kind]):
        module.pool = POOLINGS[kind]().to(next(module.parameters()).device)


def pooling_of(encoder: Encoder) -> PoolingKind:
    """What `set_pooling` set; the library's own counts as `average`."""
    module = encoder.library_module()
    kind = type(module.pool) if isinstance(module, ResNet) else AveragePooling
    return next(name for name, one in POOLINGS.items() if one is kind)


def inflate_stem(encoder: Encoder, channels: int) -> None:
    """Let an encoder of RGB images take images of other channels, see `stem.inflate`; their mean and std are forgotten.

    Raises:
        UnusableBackbone: the encoder does not start with a convolution of RGB images.
    """
    inflate(encoder.library_module(), channels)
    encoder.weights = replace(encoder.weights, mean=None, std=None)


def match_channels(encoder: Encoder, channels: int, wanted: int) -> bool:
    """Make an encoder of `channels` fit images of `wanted` channels; whether it had to be inflated for that.

    Raises:
        UnusableBackbone: they differ, and the encoder is not one of RGB images.
    """
    if channels == wanted:
        return False
    if channels != RGB_CHANNELS:
        raise UnusableBackbone(
            f"the encoder takes images of {channels} channels and the shards have {wanted}: only an encoder of RGB "
            "images can start on others; name another, or shard with the encoder's `channels`"
        )
    inflate_stem(encoder, wanted)
    return True


def _build(
    backbone: str, width: int, small_stem_up_to: int, pretrained: bool, image_size: int, channels: int
) -> Encoder:
    """An encoder of so many channels, or one of 3 channels where it is pretrained."""
    if pretrained:
        channels = RGB_CHANNELS
    if backbone in RESNET_LAYOUTS:
        return _build_resnet(backbone, width, image_size <= small_stem_up_to, pretrained, channels)
    require_backbone(backbone)
    of_timm = backbone.startswith(TIMM_PREFIX)
    if width != PUBLISHED_WIDTH:
        raise UnusableBackbone(f"width {width}: only {', '.join(RESNET_LAYOUTS)} have a width; {backbone} takes 64")
    if of_timm:
        return _build_from_timm(backbone, pretrained, image_size, channels)
    return _build_from_torchvision(backbone, pretrained, image_size, channels)


def require_backbone(backbone: str) -> None:
    """Raises UnusableBackbone, with the nearest names, if there is no backbone of that name."""
    of_timm = backbone.startswith(TIMM_PREFIX)
    known = RESNET_LAYOUTS.keys() | set(_torchvision_names())
    exists = timm.is_model(backbone.removeprefix(TIMM_PREFIX)) if of_timm else backbone in known
    if not exists:
        raise UnusableBackbone(f"no backbone {backbone!r}; {_nearest(backbone)}")


def torchvision_options(backbone: str, image_size: int) -> dict[str, Any]:
    """What `torchvision.models.get_model` has to be told beside the name."""
    if backbone.startswith("vit_"):
        return {"image_size": image_size}
    if backbone.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    if backbone in ("googlenet", "inception_v3"):
        # The published weights expect the input transformed; a module that loads what they became must do the same.
        return {"transform_input": True}
    return {}


def timm_options(name: str, image_size: int) -> dict[str, Any]:
    """What `timm.create_model` has to be told beside the name: only models of a fixed input size ask for it."""
    published = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if published is not None and published.fixed_input_size else {}


def classifier_path(model: nn.Module) -> str:
    """Where the last layer of a torchvision model is."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]


def load_published_weights(encoder: ResNet, state: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a torchvision ResNet into ours, strictly; its classifier is left out."""
    encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})


def _build_resnet(backbone: str, width: int, small_stem: bool, pretrained: bool, channels: int) -> ResNet:
    block, depths = RESNET_LAYOUTS[backbone]
    encoder = ResNet(block, depths, width, small_stem, channels)
    if not pretrained:
        return encoder
    if width != PUBLISHED_WIDTH or backbone == "resnet10":
        raise UnusableBackbone(f"pretrained: nobody published weights of {backbone} with width {width}")
    if small_stem:
        raise UnusableBackbone(
            f"pretrained: the published weights of {backbone} have the large stem; set small_stem_up_to to 0 to keep it"
        )
    published = models.get_model_weights(backbone)["DEFAULT"]
    load_published_weights(encoder, _published_state(backbone, published))
    encoder.weights = _torchvision_weights(published)
    return encoder


def _published_state(backbone: str, published: models.WeightsEnum) -> Mapping[str, Tensor]:
    """The weights that torchvision publishes, downloaded where they are not in torch's cache.

    Raises:
        OSError: they cannot be had.
        UnusableBackbone: what lies in the cache is something else.
    """
    try:
        return published.get_state_dict(check_hash=True, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises nearly every type there is on what is no file of weights
        path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(published.url).name
        raise UnusableBackbone(
            f"pretrained: {path} holds no weights of {backbone} ({type(error).__name__}): delete it, and it is "
            "downloaded anew"
        ) from error


def _resnet_stage(
    block: type[BasicBlock | Bottleneck], channels_in: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` blocks, the first with the stride; each gives planes x expansion channels."""
    channels_out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        projection = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))
    first = block(channels_in, planes, stride, shortcut)
    return nn.Sequential(first, *(block(channels_out, planes) for _ in range(depth - 1)))


def _build_from_torchvision(backbone: str, pretrained: bool, image_size: int, channels: int) -> Encoder:
    published = models.get_model_weights(backbone)["DEFAULT"] if pretrained else None
    options = torchvision_options(backbone, image_size)
    if "transform_input" in options:
        options["init_weights"] = not pretrained
    if published is not None:
        # torchvision's own functions unpickle whatever lies in the cache: not before it was found to be weights alone.
        _published_state(backbone, published)
    try:
        model = models.get_model(backbone, weights=published, **options)
    except (AssertionError, ValueError) as error:
        raise _unfit(backbone, image_size, error) from error
    for name in ("aux_logits", "aux1", "aux2", "AuxLogits"):  # second classifiers of googlenet and inception_v3
        if hasattr(model, name):
            setattr(model, name, None)
    _remove_classifier(model)
    if channels != RGB_CHANNELS:
        draw_stem(model, channels)
    weights = Weights() if published is None else _torchvision_weights(published)
    return LibraryEncoder(model, _measure_embedding(backbone, model, image_size, channels), weights)


def _build_from_timm(backbone: str, pretrained: bool, image_size: int, channels: int) -> Encoder:
    name = backbone.removeprefix(TIMM_PREFIX)
    try:
        published = timm.get_pretrained_cfg(name)
        if pretrained and not timm.is_model_pretrained(name):
            raise UnusableBackbone(f"pretrained: timm has no weights of {name}")
        options: dict[str, Any] = timm_options(name, image_size)
        if channels != RGB_CHANNELS:
            options["in_chans"] = channels
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise _unfit(backbone, image_size, error) from error
    except Exception as error:
        if not pretrained or isinstance(error, OSError | UnusableBackbone):
            raise
        reason = " ".join(str(error).split())
        raise UnusableBackbone(f"pretrained: the weights of {backbone} cannot be read: {reason}") from error
    weights = Weights()
    if pretrained and published is not None:
        source = f"timm {published.architecture}.{published.tag}"
        weights = Weights(source, published.license, _three(published.mean), _three(published.std))
    return LibraryEncoder(model, _measure_embedding(backbone, model, image_size, channels), weights)


def _remove_classifier(model: nn.Module) -> None:
    """Put identities in place of a torchvision model's last layer and of the dropout in front of it.

    What stands before the last layer (a norm, a hidden layer) belongs to the embedding, as in torchvision's names.
    """
    parent_path, _, name = classifier_path(model).rpartition(".")
    parent = model.get_submodule(parent_path)
    siblings = list(parent.named_children())
    position = [sibling for sibling, _ in siblings].index(name)
    parent.add_module(name, nn.Identity())
    if position > 0 and isinstance(siblings[position - 1][1], nn.Dropout):
        parent.add_module(siblings[position - 1][0], nn.Identity())


def _measure_embedding(backbone: str, model: nn.Module, image_size: int, channels: int) -> int:
    """Send one image through: the size of its embedding, and an early word about sizes that the model refuses."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            embedding = model(torch.zeros(1, channels, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _unfit(backbone, image_size, error) from error
    model.train(was_training)
    if embedding.ndim != 2:
        raise UnusableBackbone(f"{backbone} gives maps of shape {[*embedding.shape]}, not one embedding an image")
    return embedding.shape[1]


def _torchvision_weights(published: models.WeightsEnum) -> Weights:
    preprocessing = published.transforms()
    source = f"torchvision {type(published).__name__}.{published.name}"
    return Weights(source, published.meta.get("license"), _three(preprocessing.mean), _three(preprocessing.std))


def _three(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _unfit(backbone: str, image_size: int, error: Exception) -> UnusableBackbone:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnusableBackbone(f"{backbone} cannot be built for images of {image_size} pixels: {reason}")


def _torchvision_names() -> list[str]:
    return models.list_models(module=models)


def _nearest(backbone: str) -> str:
    """Say which names come nearest to one that does not exist."""
    name = backbone.removeprefix(TIMM_PREFIX)
    if name == backbone and timm.is_model(name):
        return f"timm has it: {TIMM_PREFIX}{name}"
    own = {candidate: candidate for candidate in (*RESNET_LAYOUTS, *_torchvision_names())} if name == backbone else {}
    known = own | {candidate: TIMM_PREFIX + candidate for candidate in timm.list_models() if candidate not in own}
    close = difflib.get_close_matches(name, own, n=3) or difflib.get_close_matches(name, known, n=3)
    if not close:
        return f"say {', '.join(RESNET_LAYOUTS)}, another model of torchvision, or {TIMM_PREFIX}NAME"
    return f"nearest: {', '.join(known[candidate] for candidate in close)}"
