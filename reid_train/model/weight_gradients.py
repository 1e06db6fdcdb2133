"""Squared norms of weights and their gradients: the arithmetic of L2 regularization.

It holds for real and complex weights of any floating point type, for frozen, empty and sharded
ones, and for weights with sparse gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Types in which a product with a float32 scale keeps the scale's digits."""


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def squared_norm(weight: Tensor) -> Tensor:
    """Return the differentiable Σ|w|², a float32 or float64 scalar: the readable reference."""
    return _real(weight).to(_norm_dtype(weight)).square().sum()


def create_gradients(tensors: Sequence[Tensor]) -> None:
    """Create the missing `.grad` of trainable tensors, all zeros."""
    for tensor in tensors:
        # To a rank's empty part in FSDP1 none may be given.
        if tensor.requires_grad and tensor.grad is None and tensor.numel():
            tensor.grad = torch.zeros_like(tensor)


def add_scaled_weights(weights: Sequence[nn.Parameter], scales: Tensor) -> Tensor:
    """Add s_n · w_n to the gradient of each trainable weight, without waiting for a GPU.

    A sparse gradient becomes dense; `create_gradients` creates missing ones. `scales` is s, (n,),
    float32 or float64. Return ‖w_n‖², (n,), of the type and on the device of `scales`: 0 for frozen
    weights; for a sharded weight, of this rank's part.
    """
    squares = [scales.new_zeros(())] * len(weights)
    devices = dict.fromkeys(weight.device for weight in weights)
    for device in devices:
        chosen = [i for i, w in enumerate(weights) if w.requires_grad and w.device == device]
        own = [weights[i] for i in chosen]
        if device.type == "cpu" and not torch.compiler.is_compiling():
            numbers = scales.tolist()
            found = _add_each(own, [numbers[i] for i in chosen])
        else:
            factors = scales.to(device).unbind()
            found = _add_lists(own, [factors[i] for i in chosen])
        for i, square in zip(chosen, found, strict=True):
            squares[i] = square
    if len(devices) > 1:
        squares = [square.to(scales.device) for square in squares]
    return torch.stack(squares).to(scales.dtype)


def _add_each(weights: Sequence[nn.Parameter], scales: Sequence[float]) -> list[Tensor]:
    """Do the work on the CPU and return ‖w‖².

    Tensor by tensor and not list by list: the norm leaves the weight in the cache for the sum. (On
    the CPU the list operations are loops, too.)
    """
    squares = []
    for weight, scale in zip(weights, scales, strict=True):
        part = local_part(weight)
        squares.append(_accurate_squared_norm(part))
        _add_one(weight, part, _gradient(weight, part), scale)
    return squares


def _add_lists(weights: Sequence[nn.Parameter], scales: Sequence[Tensor]) -> list[Tensor]:
    """Do the work by operations on lists and return ‖w‖²; nothing waits for the device.

    torch.compile makes few kernels of them, also on the CPU.
    """
    parts = [local_part(weight) for weight in weights]
    targets, values, factors = [], [], []
    for weight, part, scale in zip(weights, parts, scales, strict=True):
        gradient = _gradient(weight, part)
        if part.dtype in EXACT and gradient is not None and gradient.layout == torch.strided:
            targets.append(gradient)
            values.append(part)
            factors.append(scale)
        else:
            _add_one(weight, part, gradient, scale)
    if targets:
        torch._foreach_addcmul_(targets, values, factors)  # pyright: ignore[reportPrivateImportUsage]
    if parts and parts[0].is_cpu:
        return [_accurate_squared_norm(part) for part in parts]
    squares = [torch.empty(0)] * len(parts)
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, part in enumerate(parts):
        by_dtype.setdefault(_norm_dtype(part), []).append(i)
    for dtype, places in by_dtype.items():
        norms = torch._foreach_norm([_real(parts[i]) for i in places], 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(norms, norms)  # pyright: ignore[reportPrivateImportUsage]
        for i, square in zip(places, norms, strict=True):
            squares[i] = square
    return squares


def _add_one(
    weight: nn.Parameter, part: Tensor, gradient: Tensor | None, scale: float | Tensor
) -> None:
    """Add scale · w to a weight's gradient; `part` is this rank's part of the weight."""
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        weight.grad = part * scale + gradient
    elif isinstance(scale, float):
        gradient.add_(part, alpha=scale)
    else:  # the product in float32: in bfloat16 the scale would lose its digits
        gradient.add_(part.to(_norm_dtype(part)) * scale)


def _gradient(weight: nn.Parameter, part: Tensor) -> Tensor | None:
    """Return this rank's part of `.grad`; None if it is missing, as for an empty part in FSDP1."""
    gradient = weight.grad
    return gradient if gradient is None or part is weight else local_part(gradient)


def _accurate_squared_norm(weight: Tensor) -> Tensor:
    """Return ‖w‖² of a tensor on the CPU, a float32 or float64 scalar.

    By rows, because the CPU's norm adds all elements up in a few float32 lanes: over the 19 million
    of a reduction convolution it is 0.1 % too small, and slower.
    """
    weight, dtype = _real(weight), _norm_dtype(weight)
    if weight.ndim > 1:
        # Moving the channels to the end flattens a channels_last weight without a copy.
        rows = weight if weight.is_contiguous() else weight.movedim(1, -1)
        weight = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=dtype)
    if weight.ndim == 0 or weight.dtype != dtype:
        weight = weight.to(dtype).reshape(-1)
    return torch.dot(weight, weight)


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of 2; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    """Return the real type that a norm is computed in: float32, or float64."""
    dtype = tensor.dtype
    if dtype == torch.float32:
        return dtype
    return torch.promote_types(dtype.to_real() if dtype.is_complex else dtype, torch.float32)
