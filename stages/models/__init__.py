"""Encoders, projector, optimisers, batch norm across processes, and models on disk."""

from stages.models.batch_norm import BatchNorm, convert_batch_norm
from stages.models.bottleneck import BottleneckedEncoder, build_bottleneck
from stages.models.card import (
    ArchitectureCard,
    DamagedModel,
    HeadCard,
    LabelsCard,
    ModelCard,
    NeckCard,
    ProjectorCard,
    PseudoLabelsCard,
    WeightsCard,
    architecture_at,
    count_parameters,
    keep_projector_layers,
    load_card,
    load_encoder,
    load_head,
    load_weights,
    make_card,
    save_model,
)
from stages.models.encoders import (
    Encoder,
    UnusableBackbone,
    Weights,
    build_encoder,
    inflate_stem,
    match_channels,
    set_pooling,
)
from stages.models.heads import build_head
from stages.models.memory_format import choose_memory_format
from stages.models.optimisation import Optimisation
from stages.models.optimisers import Lars, build_optimiser, learning_rate_at, scaled_learning_rate
from stages.models.projector import build_projector

__all__ = [
    "ArchitectureCard",
    "BatchNorm",
    "BottleneckedEncoder",
    "DamagedModel",
    "Encoder",
    "HeadCard",
    "LabelsCard",
    "Lars",
    "ModelCard",
    "NeckCard",
    "Optimisation",
    "ProjectorCard",
    "PseudoLabelsCard",
    "UnusableBackbone",
    "Weights",
    "WeightsCard",
    "architecture_at",
    "build_bottleneck",
    "build_encoder",
    "build_head",
    "build_optimiser",
    "build_projector",
    "choose_memory_format",
    "convert_batch_norm",
    "count_parameters",
    "inflate_stem",
    "keep_projector_layers",
    "learning_rate_at",
    "load_card",
    "load_encoder",
    "load_head",
    "load_weights",
    "make_card",
    "match_channels",
    "save_model",
    "scaled_learning_rate",
    "set_pooling",
]
