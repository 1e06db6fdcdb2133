"""Squared norms of weights and their gradients: the arithmetic of L2 regularization.

It holds for real and complex weights of any floating point type, for frozen, empty and sharded
ones, and for weights with sparse gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid_train.model.sharding import local_part


def add_scaled_weights(weights: Sequence[nn.Parameter], scales: Tensor) -> Tensor:
    """Add s_n · w_n to the gradient of each trainable weight, without waiting for a GPU.

    Args:
        weights: n weights. A missing gradient is created; a sparse one becomes dense.
        scales: s, (n,), float32 or float64.

    Returns:
        ‖w_n‖², (n,), of the type and on the device of `scales`; 0 for frozen weights. For a sharded
        weight, of this rank's part.
    """
    devices = list(dict.fromkeys(local_part(weight).device for weight in weights))
    if devices == [scales.device]:
        return _add(weights, scales)
    squares = torch.zeros_like(scales)
    for device in devices:
        chosen = [i for i, weight in enumerate(weights) if local_part(weight).device == device]
        index = torch.tensor(chosen, device=scales.device)
        own = _add([weights[i] for i in chosen], scales[index].to(device))
        squares[index] = own.to(scales.device)
    return squares


def squared_norm(weight: Tensor) -> Tensor:
    """Return the differentiable Σ|w|², a float32 or float64 scalar: the readable reference."""
    return _real(weight).to(_norm_dtype(weight)).square().sum()


def _add(weights: Sequence[nn.Parameter], scales: Tensor) -> Tensor:
    """Do the work for weights on one device, that of `scales`."""
    squares = [scales.new_zeros(())] * len(weights)
    trainable = [i for i, weight in enumerate(weights) if weight.requires_grad]
    if scales.device.type == "cpu":
        # Tensor by tensor and not list by list: the norm leaves the weight in the cache for the
        # sum. (On the CPU the list operations are loops, too.)
        numbers = scales.tolist()
        for i in trainable:
            squares[i] = _accurate_squared_norm(local_part(weights[i])).to(scales.dtype)
            _add_one(weights[i], numbers[i])
        return torch.stack(squares)
    for i, square in zip(trainable, _add_lists(weights, trainable, scales), strict=True):
        squares[i] = square
    return torch.stack(squares)


def _add_lists(weights: Sequence[nn.Parameter], chosen: list[int], scales: Tensor) -> list[Tensor]:
    """Do the work for the chosen weights by operations on lists; return their ‖w‖².

    The scales stay on the device, as tensors of no dimension, so that nothing waits for them.
    """
    factors = scales.unbind()
    gradients, parts, factors_of_parts = [], [], []
    for i in chosen:
        weight = weights[i]
        if _dense_gradient(weight) and _norm_dtype(weight) == _real(local_part(weight)).dtype:
            gradients.append(local_part(weight.grad))  # type: ignore[arg-type]
            parts.append(local_part(weight))
            factors_of_parts.append(factors[i])
        else:
            _add_one(weight, factors[i])
    if parts:
        torch._foreach_addcmul_(gradients, parts, factors_of_parts)  # pyright: ignore[reportPrivateImportUsage]
    norms: dict[int, Tensor] = {}
    values = {i: _real(local_part(weights[i])) for i in chosen}
    for dtype in dict.fromkeys(_norm_dtype(value) for value in values.values()):
        alike = [i for i in chosen if _norm_dtype(values[i]) == dtype]
        found = torch._foreach_norm([values[i] for i in alike], 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
        norms |= {i: norm.square().to(scales.dtype) for i, norm in zip(alike, found, strict=True)}
    return [norms[i] for i in chosen]


def _add_one(weight: nn.Parameter, scale: float | Tensor) -> None:
    part = local_part(weight)
    if _dense_gradient(weight):
        gradient = local_part(weight.grad)  # type: ignore[arg-type]
        if isinstance(scale, float):
            gradient.add_(part, alpha=scale)
        else:  # the product in float32: in bfloat16 the scale would lose its digits
            gradient.add_(part.to(torch.promote_types(part.dtype, torch.float32)) * scale)
    elif weight.grad is not None:
        weight.grad = part * scale + weight.grad


def _dense_gradient(weight: nn.Parameter) -> bool:
    """Create a missing gradient; return whether there is one, and dense."""
    if weight.grad is None:
        if weight.numel() == 0:  # as a rank's part in FSDP1, to which no gradient may be given
            return False
        weight.grad = torch.zeros_like(weight)
    return weight.grad.layout == torch.strided


def _accurate_squared_norm(weight: Tensor) -> Tensor:
    """Return ‖w‖² of a tensor on the CPU, a float32 or float64 scalar.

    By rows, because the CPU's norm adds all elements up in a few float32 lanes: over the 19 million
    of a reduction convolution it is 0.1 % too small, and slower.
    """
    weight = _real(weight)
    dtype = _norm_dtype(weight)
    if weight.ndim > 1:
        # Moving the channels to the end flattens a channels_last weight without a copy.
        rows = weight if weight.is_contiguous() else weight.movedim(1, -1)
        weight = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=dtype)
    flat = weight.to(dtype).reshape(-1)
    return torch.dot(flat, flat)


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of 2; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    """Return the real type that a norm is computed in: float32, or float64."""
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return torch.promote_types(dtype, torch.float32)
