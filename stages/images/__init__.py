"""Images: decoding, sources, shards and the order of samples."""

from typing import TYPE_CHECKING, Any

from stages.images.decode import UnreadableImage, decode_rgb
from stages.images.index import DamagedShard, read_summary
from stages.images.order import Order, order

if TYPE_CHECKING:
    from stages.images.shards import Batch, Sample, Shards, open_shards

__all__ = [
    "Batch",
    "DamagedShard",
    "Order",
    "Sample",
    "Shards",
    "UnreadableImage",
    "decode_rgb",
    "open_shards",
    "order",
    "read_summary",
]


def __getattr__(name: str) -> Any:
    """What reads shards, loaded when it is first asked for: it brings torch along.

    A process that packs images has no use for torch, and would take several times as long to start.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stages.images import shards  # noqa: PLC0415 - that is what this function is for

    return getattr(shards, name)
