"""Random numbers of a loss that do not depend on who draws them."""

import torch
from torch import Tensor, nn


class Draws(nn.Module):
    """Uniform numbers that depend on the step and on the row, not on the process that has it; part of a loss's state.

    A new one takes its key from torch's global generator.
    """

    def __init__(self, dimension: int):
        """dimension: D of the embeddings, for `distance_weighted`."""
        super().__init__()
        self.dimension = dimension
        self.register_buffer("key", torch.randint(2**31, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def advance(self) -> None:
        """Other numbers from here on."""
        self.get_buffer("step").add_(1)

    def uniforms(self, rows: Tensor, count: int) -> Tensor:
        """`count` numbers in [0, 1) for each row of the global batch: int64 [n] -> float64 [n, count]."""
        start = _mix(_mix(self.get_buffer("key") ^ self.get_buffer("step")) ^ rows)[:, None]
        return _mix(start ^ torch.arange(count, device=rows.device)).double() / 2**32


def _mix(values: Tensor) -> Tensor:
    """A hash of 32 bits, in int64 ("lowbias32", Wellons 2018)."""
    values = values & 0xFFFFFFFF
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    values = ((values ^ (values >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return values ^ (values >> 16)
