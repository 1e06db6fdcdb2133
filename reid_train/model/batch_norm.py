"""Batch normalization with the statistics of the global batch.

In training, every worker normalizes by the mean and variance of all workers' images, and keeps the
same running statistics. So the number of workers changes no loss and no weight beyond rounding. In
evaluation mode, or with one worker, this is plain batch normalization.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from reid_train.model.collectives import world_size


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the images of all workers (Ioffe and Szegedy, ICML 2015).

    It all-reduces once in the forward and once in the backward pass, never waits for the device,
    and compiles without a graph break. Parameters and buffers are those of `nn.BatchNorm2d`. It
    accepts inputs of shape (B, C) or (B, C, …); B may differ between workers.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the batch in the running statistics.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input, of the same shape and dtype."""
        if input.dim() < 2:
            raise ValueError(f"batch norm: input has {input.dim()} dimension(s), needs 2 or more")
        if self.training:
            self.num_batches_tracked.add_(1)
            if world_size() > 1:
                return _Normalize.apply(  # type: ignore[return-value]
                    *(input, self.weight, self.bias, self.running_mean, self.running_var),
                    *(self.eps, self.momentum),
                )
        return F.batch_norm(
            *(input, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, self.momentum, self.eps),
        )


class GlobalBatchNormAct(GlobalBatchNorm):
    """Global batch norm, then dropout and an activation, as in timm's `BatchNormAct2d`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def make_global(module: nn.Module) -> None:
    """Replace all batch norm below a module by global batch norm of the same names and settings."""
    for name, layer in list(module.named_children()):
        if not isinstance(layer, nn.BatchNorm2d):
            make_global(layer)
            continue
        has_act = hasattr(layer, "act")
        kind = GlobalBatchNormAct if has_act else GlobalBatchNorm
        new = kind(layer.num_features, layer.eps, layer.momentum or 0.1)
        if has_act:
            new.drop, new.act = layer.drop, layer.act  # type: ignore[assignment]
        new.load_state_dict(layer.state_dict())
        setattr(module, name, new)


class _Normalize(torch.autograd.Function):
    """Batch norm over all ranks.

    With N the images times pixels of all ranks and x̂ = (x − mean) σ⁻¹, the gradient is

        ∂x = γ σ⁻¹ (∂y − Σ∂y / N − x̂ Σ(∂y x̂) / N)        ∂γ = Σ(∂y x̂)        ∂β = Σ∂y

    In ∂x the sums run over all ranks. ∂γ and ∂β are this rank's: DDP averages them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
    ) -> Tensor:
        mean, var, count = _global_statistics(x, eps)
        running_mean.lerp_(mean.to(running_mean), momentum)
        unbiased = var * (count / (count - 1).clamp(min=1))
        running_var.lerp_(unbiased.to(running_var), momentum)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        saved = _Saved(x, weight, mean, var, count, ctx.eps, ctx.needs_input_grad[0])
        if torch.compiler.is_compiling():
            backward = _backward_compiled
        else:
            backward = _backward_cuda if x.is_cuda else _backward_cpu
        return (*backward(gradients[0], saved), *[None] * 4)


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    x: Tensor  # (B, C, …)
    weight: Tensor  # γ, (C,)
    mean: Tensor  # (C,), of all ranks, as `var`, biased, and `count`, (1,)
    var: Tensor
    count: Tensor
    eps: float
    needs_dx: bool


def _global_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and count (1,), float64, of x (B, C, …) on all ranks.

    The all-reduced sums of x and x² are float64, because float32 has no digits of the variance left
    where the mean is a thousand times the standard deviation.
    """
    channels = x.shape[1]
    mean, var = (value.double() for value in _moments(x, eps))
    own = torch.cat([mean, var + mean.square(), mean.new_ones(1)]) * (x.numel() // channels)
    dist.all_reduce(own)
    total, squares, count = own.split([channels, channels, 1])
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0.0), count


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return this rank's mean and biased variance, (C,), float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # one fused reduction: no float32 copy of x is stored
        var, mean = torch.var_mean(x.to(dtype), [0, *range(2, x.dim())], correction=0)
        return mean, var
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(x, eps)
    else:
        # In training mode this kernel is by far the fastest way to the statistics on a CPU.
        zero = x.new_zeros(x.shape[1], dtype=dtype)
        _, mean, invstd = torch.native_batch_norm(x, zero, zero, None, None, True, 0.0, eps)
    return mean, invstd.pow(-2) - eps


def _backward_compiled(dy: Tensor, saved: _Saved) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ∂x, ∂γ and ∂β from elementary operations, for the compiler to fuse."""
    x, weight, mean, var, count, eps, needs_dx = saved
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    invstd = (var + eps).rsqrt()
    gradient = dy.to(mean.dtype)
    normalized = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
    dweight, dbias = (gradient * normalized).sum(dims), gradient.sum(dims)
    if not needs_dx:
        return None, dweight, dbias
    sums = torch.cat([dbias, dweight])
    dist.all_reduce(sums)
    mean_dy, mean_dyx = (sums / count).to(mean.dtype).view(2, *shape)
    dx = gradient - mean_dy - normalized * mean_dyx
    return (dx * (weight * invstd).view(shape)).to(x.dtype), dweight, dbias


def _backward_cuda(dy: Tensor, saved: _Saved) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ∂x, ∂γ and ∂β by the kernels that PyTorch has for synchronized batch norm on CUDA."""
    x, weight, mean, var, count, eps, needs_dx = saved
    channels, dy, invstd = len(mean), _in_layout_of(x, dy), (var + eps).rsqrt()
    total, total_xmu, dweight, dbias = torch.batch_norm_backward_reduce(
        dy, x, mean, invstd, weight, True, True, True
    )
    if not needs_dx:
        return None, dweight, dbias
    sums = torch.cat([total, total_xmu])
    dist.all_reduce(sums)
    dx = torch.batch_norm_backward_elemt(
        dy, x, mean, invstd, weight, sums[:channels], sums[channels:], count.to(torch.int32)
    )
    return dx, dweight, dbias


def _backward_cpu(dy: Tensor, saved: _Saved) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return ∂x, ∂γ and ∂β by the CPU's kernels for one process.

    The kernel for evaluation mode takes the statistics for constants. The rest of ∂x,
    −γ σ⁻¹ (Σ∂y + x̂ Σ(∂y x̂)) / N, is a batch norm of x with other weights.
    """
    x, weight, mean, var, count, eps, needs_dx = saved
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        *(_in_layout_of(x, dy), x, weight, mean, var, None, None, False, eps, [True, True, True])
    )
    if not needs_dx:
        return None, dweight, dbias
    sums = torch.stack([dweight, dbias])
    dist.all_reduce(sums)
    scale = -weight * (var + eps).rsqrt() / count
    through_var, through_mean = (scale * sums).to(mean.dtype)
    dx += F.batch_norm(x, mean, var, through_var, through_mean, training=False, eps=eps)
    return dx, dweight, dbias


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    """Return dy with its values in the order of x's: kernels are slow, or wrong, otherwise."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return dy.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
