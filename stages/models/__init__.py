"""Encoders, projector, optimisers, batch norm across processes, and models on disk."""

from stages.models.batch_norm import BatchNorm, convert_batch_norm
from stages.models.card import (
    ArchitectureCard,
    DamagedModel,
    ModelCard,
    ProjectorCard,
    WeightsCard,
    count_parameters,
    load_card,
    load_encoder,
    load_weights,
    save_model,
)
from stages.models.encoders import Encoder, UnusableBackbone, Weights, build_encoder
from stages.models.optimisers import Lars, build_optimiser, learning_rate_at, scaled_learning_rate
from stages.models.projector import build_projector

__all__ = [
    "ArchitectureCard",
    "BatchNorm",
    "DamagedModel",
    "Encoder",
    "Lars",
    "ModelCard",
    "ProjectorCard",
    "UnusableBackbone",
    "Weights",
    "WeightsCard",
    "build_encoder",
    "build_optimiser",
    "build_projector",
    "convert_batch_norm",
    "count_parameters",
    "learning_rate_at",
    "load_card",
    "load_encoder",
    "load_weights",
    "save_model",
    "scaled_learning_rate",
]
