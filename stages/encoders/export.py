"""An encoder for use without this package: weights under a library's own names, and what it takes to use them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from stages.encoders.ready import PREPROCESSING_FILE, ReadyEncoder
from stages.encoders.usage import preprocessing, usage
from stages.models import save_model
from stages.models.encoders import (
    PUBLISHED_WIDTH,
    RESNET_LAYOUTS,
    TIMM_PREFIX,
    classifier_path,
    timm_options,
    torchvision_options,
)

WEIGHTS_FILE = "model.safetensors"
README_FILE = "README.md"
OWN_FILES = {
    WEIGHTS_FILE,
    PREPROCESSING_FILE,
    README_FILE,
    "model.json",
    "encoder.safetensors",
    "neck.safetensors",
    "bottleneck.safetensors",
}
TOLERANCE = 1e-4
"""Largest difference of an output from ours, as a share of the largest output."""


class Unexportable(ValueError):
    """The encoder cannot be what was asked for; the message says what works."""

    exit_code = 2


@dataclass(frozen=True)
class Target:
    """A library's model of the same architecture.

    Attributes:
        code: lines of Python that make it, as `model`.
        build: makes it.
    """

    code: str
    build: Callable[[], nn.Module]


def export(ready: ReadyEncoder, folder: Path, kind: str) -> list[str]:
    """Write weights, preprocessing.json and README.md to a folder that is new, empty, or holds an earlier export.

    The folder appears complete. Weights are contiguous, channels first. Of torchvision and timm, the model that the
    README describes is built, given the weights strictly, and held against ours.

    Args:
        kind: torchvision, timm or safetensors.

    Returns:
        Names of the files.

    Raises:
        Unexportable: the library has no such architecture, or the folder holds other things.
    """
    if kind != "safetensors" and ready.storage.window is not None:
        raise Unexportable(
            f"{ready.reference}: its images need the window {[*ready.storage.window]}, which {kind} knows nothing of; "
            "--format safetensors works"
        )
    target = None if kind == "safetensors" else TARGETS[kind](ready)
    _check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    private = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    private.mkdir()
    try:
        if target is None:
            card = ready.card.model_copy(update={"projector": None, "head": None})
            save_model(private, card, ready.encoder, None)
        else:
            state = ready.encoder.library_module().state_dict()
            weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
            _check_output(ready, target, weights)
            save_file(weights, private / WEIGHTS_FILE)
        facts = preprocessing(ready)
        (private / PREPROCESSING_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        text = usage(ready, kind, None if target is None else target.code, WEIGHTS_FILE)
        (private / README_FILE).write_text(text, encoding="utf-8")
        names = sorted(path.name for path in private.iterdir())
        if folder.is_dir():
            shutil.rmtree(folder)
        private.rename(folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return names


def _check_folder(folder: Path) -> None:
    """Only what an export wrote is ever replaced."""
    if folder.is_file():
        raise Unexportable(f"{folder}: is a file; name a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there and (not there <= OWN_FILES or PREPROCESSING_FILE not in there):
        other = min(there - OWN_FILES, default=min(there))
        raise Unexportable(f"{folder}: holds other things ({other}), which stay; name a new or an empty folder")


@torch.no_grad()
def _check_output(ready: ReadyEncoder, target: Target, weights: Mapping[str, torch.Tensor]) -> None:
    """Strictly load the weights where they will be used, and compare."""
    model = target.build()
    model.load_state_dict(weights, strict=True)
    size = ready.card.image_size
    images = torch.randn(2, len(ready.card.mean), size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = ready.cpu()(images), model.eval()(images)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
    assert difference < TOLERANCE, f"the model of the library gives other outputs, by {difference:.1e}"


def _torchvision(ready: ReadyEncoder) -> Target:
    card = ready.card
    backbone, reason = card.architecture.backbone, _what_no_library_has(ready)
    if backbone.startswith(TIMM_PREFIX):
        reason = f"{backbone} is a model of timm"
    elif len(card.mean) != 3:
        reason = f"its models take 3 channels, and this encoder takes {len(card.mean)}"
    elif backbone in RESNET_LAYOUTS:
        if backbone == "resnet10":
            reason = "it has no resnet10"
        elif card.architecture.width == PUBLISHED_WIDTH and _has_small_stem(ready):
            reason = f"its {backbone} has no small stem (this encoder looks at {card.image_size} pixels)"
    if reason:
        others = "safetensors" if _what_no_library_has(ready) else "timm or safetensors"
        raise Unexportable(f"{ready.reference} cannot be a model of torchvision: {reason}; --format {others} works")
    options = torchvision_options(backbone, card.image_size)
    if "transform_input" in options:
        options |= {"aux_logits": False, "init_weights": False}

    def build() -> nn.Module:
        model = models.get_model(backbone, **options)
        model.set_submodule(classifier_path(model), nn.Identity())
        return model

    code = (
        "from torchvision import models\n\n"
        f"model = models.get_model({_arguments(backbone, options)})\n"
        f'model.set_submodule("{classifier_path(models.get_model(backbone, **options))}", torch.nn.Identity())\n'
    )
    return Target(code, build)


def _timm(ready: ReadyEncoder) -> Target:
    card = ready.card
    backbone, reason, others = card.architecture.backbone, _what_no_library_has(ready), "safetensors"
    is_resnet = backbone in RESNET_LAYOUTS
    if not reason and not is_resnet and not backbone.startswith(TIMM_PREFIX):
        reason = f"{backbone} is a model of torchvision"
        others = "torchvision or safetensors" if len(card.mean) == 3 else "safetensors"
    if reason:
        raise Unexportable(f"{ready.reference} cannot be a model of timm: {reason}; --format {others} works")
    channels = len(card.mean)
    name = "resnet18" if backbone == "resnet10" else backbone.removeprefix(TIMM_PREFIX)
    options: dict[str, Any] = {} if is_resnet else timm_options(name, card.image_size)
    if backbone == "resnet10":
        options["layers"] = RESNET_LAYOUTS[backbone][1]
    if channels != 3:
        options["in_chans"] = channels
    small_stem = is_resnet and _has_small_stem(ready)

    def build() -> nn.Module:
        model = timm.create_model(name, num_classes=0, **options)
        if small_stem:
            model.set_submodule("conv1", nn.Conv2d(channels, PUBLISHED_WIDTH, 3, 1, 1, bias=False))
            model.set_submodule("maxpool", nn.Identity())
        return model

    code = f"import timm\n\nmodel = timm.create_model({_arguments(name, {'num_classes': 0} | options)})\n"
    if small_stem:
        code += (
            "# The stem for small images, which timm has no argument for (Chen et al. 2020, B.9).\n"
            f"model.conv1 = torch.nn.Conv2d({channels}, {PUBLISHED_WIDTH}, kernel_size=3, stride=1, padding=1, "
            "bias=False)\nmodel.maxpool = torch.nn.Identity()\n"
        )
    return Target(code, build)


TARGETS = {"torchvision": _torchvision, "timm": _timm}


def _what_no_library_has(ready: ReadyEncoder) -> str:
    """The reason why the encoder fits neither library, or nothing."""
    card = ready.card
    if getattr(card, "neck", None) is not None:
        return "it ends with layers of its projector"
    if getattr(card, "bottleneck", False):
        return "it ends with a batch norm"
    if getattr(card, "pooling", "average") != "average":
        return f"its pooling is {card.pooling}"
    if card.architecture.backbone in RESNET_LAYOUTS and card.architecture.width != PUBLISHED_WIDTH:
        return f"it has width {card.architecture.width}, published is {PUBLISHED_WIDTH}"
    return ""


def _has_small_stem(ready: ReadyEncoder) -> bool:
    return ready.card.image_size <= ready.card.architecture.small_stem_up_to


def _arguments(name: str, options: Mapping[str, Any]) -> str:
    return ", ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in options.items())])
