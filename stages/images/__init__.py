"""Images: decoding, sources, shards and the order of samples."""

from stages.images.decode import UnreadableImage, decode_rgb
from stages.images.index import DamagedShard, read_summary
from stages.images.order import Order, order
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
