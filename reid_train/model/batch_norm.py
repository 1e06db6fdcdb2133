"""Batch normalization whose statistics are those of the global batch.

With it, how many workers a batch is spread over changes no loss and no weight beyond rounding: in
training each worker normalises by the mean and variance of all workers' images, and the running
statistics are equal on all of them. In evaluation mode, as a frozen backbone is, or with one
worker, it is plain batch normalization.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction
from torch.nn.modules.batchnorm import _BatchNorm

from reid_train.model.collectives import world_size

M = TypeVar("M", bound=nn.Module)


class GlobalBatchNorm(_BatchNorm):
    """Batch normalization over the images of all workers, on CPU (gloo) and CUDA (NCCL).

    Parameters, buffers and options are those of `nn.BatchNorm2d`, for inputs (B, C) or
    (B, C, …). torch's own SyncBatchNorm does not run on the CPU. Ioffe and Szegedy, ICML 2015.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of 2 or more dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, of its shape and dtype."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        return self._synchronized(input)

    @torch.compiler.disable()
    def _synchronized(self, input: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain average of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        state = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum)
        if input.is_cuda:
            group = dist.group.WORLD
            return SyncBatchNormFunction.apply(input, *state, group, world_size())  # type: ignore
        return _GlobalBatchNorm.apply(input, *state)  # type: ignore[return-value]


def convert(model: M) -> M:
    """Make every BatchNorm1d, 2d and 3d of a model a `GlobalBatchNorm`, in place; return it.

    Names, parameters and buffers stay the same objects, so optimizers, regularizers and state
    dicts made before or after fit.
    """
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = GlobalBatchNorm  # the same state, another forward
    return model


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm over a process group from the CPU's kernels for a single process.

    Forward: each rank's mean and variance, combined as Chan, Golub and LeVeque (1983) do; then
    the evaluation-mode kernel with the result. Backward: that kernel's gradient, which takes the
    statistics for constants, plus what flows through them:
    −γ σ⁻¹ (Σ dy + x̂ Σ dy x̂) / N, sums over all ranks, which is a batch norm of x once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
    ) -> Tensor:
        mean, var, count = _global_statistics(x, eps)
        if running_mean is not None and running_var is not None:
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dy = gradients[0].contiguous(memory_format=layout)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat([dweight, dbias]).to(var.dtype)
            dist.all_reduce(sums)
            scale = (var + ctx.eps).rsqrt() / -count
            if weight is not None:
                scale = scale * weight
            through_var, through_mean = sums.chunk(2)
            dx += F.batch_norm(
                x, mean, var, scale * through_var, scale * through_mean, training=False, eps=ctx.eps
            )
        wanted = ctx.needs_input_grad
        return (
            dx if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            *[None] * 4,
        )


def _global_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and count () of x (B, C, …) over all ranks."""
    channels = x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    unused = x.new_zeros(2, channels, dtype=dtype)
    # In training mode this kernel is by far the fastest way to the statistics on a CPU.
    _, mean, invstd = torch.native_batch_norm(x, None, None, unused[0], unused[1], True, 0.0, eps)
    own = torch.cat([mean, invstd.pow(-2) - eps, mean.new_tensor([x.numel() / channels])])
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    means, variances, counts = torch.stack(parts).split([channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, var.clamp(min=0.0), count
