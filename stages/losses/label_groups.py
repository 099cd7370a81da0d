"""Rows by their labels, without waiting for the device."""

import torch
from torch import Tensor


def group_numbers(labels: Tensor) -> Tensor:
    """Numbers from 0 for rows of equal labels; a row whose label is below 0 has a number of its own: int64 [N].

    Found by sorting, and not by `unique`, whose result has a size that the host would have to wait for.
    """
    ordered, order = labels.sort()
    starts = (ordered[1:] != ordered[:-1]) | (ordered[1:] < 0)
    numbers = torch.cat([starts.new_zeros(1, dtype=torch.int64), starts.cumsum(0)])
    return torch.empty_like(numbers).scatter_(0, order, numbers)


def turns_in_groups(labels: Tensor) -> Tensor:
    """How many rows of the same label stand before each: int64 [N]."""
    ordered, order = labels.sort(stable=True)
    places = torch.arange(len(labels), device=labels.device)
    is_first = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    turns = places - torch.where(is_first, places, 0).cummax(dim=0).values
    return torch.empty_like(turns).scatter_(0, order, turns)
