"""Tensors of all processes, with gradients: what losses over the global batch are made of."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gather_rows(rows: Tensor) -> Tensor:
    """[n, ...] of each process -> [processes x n, ...] in order of rank, the same on every one.

    All processes must have the same n. Backward: a process's rows get the sum of what all processes' gathered copies
    were given.
    """
    return rows if world()[1] == 1 else _GatherRows.apply(rows)


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of every process's value, the same bits on every one.

    Backward passes the gradient on unchanged. A mean over equal shares of the global batch thus leaves, on each
    process, `processes` times its part of the mean's derivative, which is what DDP's averaging of gradients expects.
    """
    return value if world()[1] == 1 else _MeanOverProcesses.apply(value)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world()[1], *rows.shape)
        distributed.all_gather([*gathered.unbind()], rows.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        rank, processes = world()
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(processes)[rank]


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total / world()[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient
