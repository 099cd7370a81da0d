"""Every supervised loss by its name in a recipe. A new one is a file here, its settings, and a line."""

from collections.abc import Callable, Mapping
from typing import Any

from stages.losses.classification import BinaryCrossEntropy, CrossEntropy, Focal
from stages.losses.contrastive import Contrastive, Margin
from stages.losses.from_library import LiftedStructure, ProxyAnchor, SoftTriple
from stages.losses.loss import Loss, Task
from stages.losses.margin_softmax import ArcFace, CosFace, OriginalSphereFace, SphereFace
from stages.losses.n_pairs import NPairs
from stages.losses.siamese import PairsConcatenated, PairsCosine, PairsDifference
from stages.losses.similarities import Circle, MultiSimilarity
from stages.losses.supcon import SupCon
from stages.losses.triplet import Triplet

LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": CrossEntropy,
    "bce": BinaryCrossEntropy,
    "focal": Focal,
    "pairs_concatenated": PairsConcatenated,
    "pairs_difference": PairsDifference,
    "pairs_cosine": PairsCosine,
    "contrastive": Contrastive,
    "margin": Margin,
    "triplet": Triplet,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "sphereface_original": OriginalSphereFace,
    "n_pairs": NPairs,
    "supcon": SupCon,
    "multi_similarity": MultiSimilarity,
    "circle": Circle,
    "proxy_anchor": ProxyAnchor,
    "soft_triple": SoftTriple,
    "lifted_structure": LiftedStructure,
}


def build_loss(name: str, options: Mapping[str, Any], task: Task) -> Loss:
    """A loss, and its new head where it has one (drawn from torch's global generator).

    Args:
        options: the settings of the loss, by name.
    """
    return LOSSES[name](task, **options)
