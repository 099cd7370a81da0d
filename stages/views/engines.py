"""Which engine computes the views of a policy."""

from collections.abc import Callable

from torch import Tensor

from stages.views.draws import Parameters
from stages.views.fused_engine import fused_views
from stages.views.kornia_engine import kornia_views
from stages.views.policy import Engine, Policy

ENGINES: dict[Engine, Callable[[Tensor, Parameters, Policy], Tensor]] = {"kornia": kornia_views, "fused": fused_views}
"""Both can do every policy: images [B, C, H, W], parameters of N views, policy -> float32 [N, C, h, w], normalised."""


def compute_views(images: Tensor, parameters: Parameters, policy: Policy) -> Tensor:
    """Views by the policy's own engine: see ENGINES."""
    return ENGINES[policy.engine](images, parameters, policy)
