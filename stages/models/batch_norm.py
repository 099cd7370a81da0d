"""Batch norm over the batches of all processes, on any device; in a single process it is torch's own.

torch's SyncBatchNorm refuses tensors on the CPU. Here forward gathers each process's mean and variance, backward sums
two vectors over the processes; the work on maps is done by the same native kernels that a single process uses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(_BatchNorm):
    """Batch norm of [N, C] or [N, C, ...] with statistics over all processes (Ioffe and Szegedy 2015).

    Parameters, buffers and their names are those of torch.nn.BatchNorm1d, 2d and 3d.
    """

    def forward(self, input: Tensor) -> Tensor:  # torch's own name of the argument
        """Same shape. While training in several processes every one of them must call this, in the same order."""
        uses_batch = self.training or self.running_mean is None
        if not uses_batch or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(input)
        mean, variance, count = _global_statistics(input.detach())
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._track(mean, variance * count / (count - 1))
        return _Normalise.apply(input, self.weight, self.bias, mean, variance, count, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm takes [N, C, ...], not a tensor of {input.ndim} dimensions")

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # a cumulative mean
            share = self.num_batches_tracked.to(self.running_mean).reciprocal()
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), share)


class BatchNormAct(BatchNorm):
    """Batch norm, drop and activation in one module, as timm has them."""

    def __init__(self, num_features: int, drop: nn.Module, act: nn.Module, **options: Any):
        super().__init__(num_features, **options)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        """Same shape."""
        return self.act(self.drop(super().forward(input)))


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Make every batch norm inside `module` one over all processes; parameters stay the same objects and names.

    Returns `module` itself, or its replacement where it is a batch norm.

    Raises:
        ValueError: a kind of batch norm whose forward pass is not known here.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm):
        return _converted(module)
    for name, child in module.named_children():
        converted = convert_batch_norm(child)
        if converted is not child:
            module.add_module(name, converted)
    return module


def _converted(module: _BatchNorm) -> BatchNorm:
    options = {"eps": module.eps, "momentum": module.momentum, "affine": False, "track_running_stats": False}
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if type(module) in known:
        converted = BatchNorm(module.num_features, **options)
    elif isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        converted = BatchNormAct(module.num_features, drop, act, **options)
    else:
        raise ValueError(f"batch norm across processes: {type(module).__name__} is of an unknown kind")
    converted.affine = module.affine
    converted.track_running_stats = module.track_running_stats
    for name in ("weight", "bias"):
        converted.register_parameter(name, getattr(module, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        converted.register_buffer(name, getattr(module, name))
    return converted.train(module.training)


def _global_statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C, ...] -> mean [C], biased variance [C] and number of values a channel [] over all processes.

    Means and variances are combined rather than sums of squares, which cancel (Chan et al. 1979).
    """
    channels = values.shape[1]
    dtype = torch.promote_types(values.dtype, torch.float32)
    # Scratch buffers tell the kernel to give statistics in this precision; nothing is kept of them.
    scratch = torch.zeros(2, channels, dtype=dtype, device=values.device)
    mean, variance = torch.batch_norm_update_stats(values, scratch[0], scratch[1], 0.0)
    count = torch.full((1,), values.numel() // channels, dtype=dtype, device=values.device)
    packed = torch.cat([mean, variance, count])
    gathered = packed.new_empty(distributed.get_world_size(), 2 * channels + 1)
    distributed.all_gather([*gathered.unbind()], packed)
    means, variances, counts = gathered.split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, variance, count


class _Normalise(torch.autograd.Function):
    """Scale and shift by statistics that are functions of the inputs of all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(values, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(values, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """With y = normalised values and g = gradient: scale (g - mean(g) - y mean(g y)), means over all processes."""
        values, weight, mean, variance, count = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # One fused pass for statistics that are constants: scale g, and this process's sums of g y and of g.
        through, sum_gy, sum_g = torch.ops.aten.native_batch_norm_backward(
            gradient, values, scale, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        means = torch.stack([sum_g, sum_gy])
        distributed.all_reduce(means)
        mean_g, mean_gy = means / count
        inverse_deviation = (variance + ctx.eps).rsqrt()
        factor = -scale * inverse_deviation.square() * mean_gy
        offset = -scale * inverse_deviation * mean_g - factor * mean
        shape = [1, -1] + [1] * (values.ndim - 2)
        grad_values = (through + offset.view(shape)).addcmul_(values, factor.view(shape)).to(values.dtype)
        grad_weight = sum_gy if ctx.needs_input_grad[1] else None
        grad_bias = sum_g if ctx.needs_input_grad[2] else None
        return grad_values, grad_weight, grad_bias, None, None, None, None
