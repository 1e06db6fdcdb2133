"""Squared norms of weights and their gradients: the arithmetic of L2 regularization.

It holds for real and complex weights of any floating point type, for frozen, empty and sharded
ones, and for weights with sparse gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid_train.model.sharding import local_part

EXACT = (torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Types in which a product with a float32 scale keeps the scale's digits."""


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
            part = local_part(weights[i])
            squares[i] = _accurate_squared_norm(part)
            _add_one(weights[i], part, numbers[i])
        return torch.stack(squares).to(scales.dtype)
    # The scales stay on the device, as tensors of no dimension, so that nothing waits for them.
    factors = scales.unbind()
    norms = _add_lists([weights[i] for i in trainable], [factors[i] for i in trainable])
    for i, norm in zip(trainable, norms, strict=True):
        squares[i] = norm
    return torch.stack(squares).to(scales.dtype).square_()


def _add_lists(weights: Sequence[nn.Parameter], scales: Sequence[Tensor]) -> list[Tensor]:
    """Do the work for trainable weights by operations on lists; return their ‖w‖."""
    parts = [local_part(weight) for weight in weights]
    gradients = [_gradient(weight, part) for weight, part in zip(weights, parts, strict=True)]
    alike = [
        n
        for n, (part, gradient) in enumerate(zip(parts, gradients, strict=True))
        if part.dtype in EXACT and gradient is not None and gradient.layout == torch.strided
    ]
    if alike:
        targets = [gradient for n in alike if (gradient := gradients[n]) is not None]
        torch._foreach_addcmul_(  # pyright: ignore[reportPrivateImportUsage]
            targets, [parts[n] for n in alike], [scales[n] for n in alike]
        )
    for n in sorted(set(range(len(parts))) - set(alike)):
        _add_one(weights[n], parts[n], scales[n])
    values = [_real(part) for part in parts]
    norms = list(scales)  # replaced below
    for dtype in dict.fromkeys(_norm_dtype(value) for value in values):
        chosen = [n for n, value in enumerate(values) if _norm_dtype(value) == dtype]
        found = torch._foreach_norm([values[n] for n in chosen], 2, dtype)  # pyright: ignore[reportPrivateImportUsage]
        for n, norm in zip(chosen, found, strict=True):
            norms[n] = norm
    return norms


def _add_one(weight: nn.Parameter, part: Tensor, scale: float | Tensor) -> None:
    """Add scale · w to a weight's gradient; `part` is this rank's part of the weight."""
    gradient = _gradient(weight, part)
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        weight.grad = part * scale + gradient
    elif isinstance(scale, float):
        gradient.add_(part, alpha=scale)
    else:  # the product in float32: in bfloat16 the scale would lose its digits
        gradient.add_(part.to(_norm_dtype(part)) * scale)


def _gradient(weight: nn.Parameter, part: Tensor) -> Tensor | None:
    """Return this rank's part of `.grad`, created if it is missing."""
    gradient = weight.grad
    if gradient is None:
        if weight.numel() == 0:  # as a rank's part in FSDP1, to which no gradient may be given
            return None
        weight.grad = gradient = torch.zeros_like(weight)
    return gradient if part is weight else local_part(gradient)


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
    flat = (weight.float() if dtype == torch.float32 else weight.double()).reshape(-1)
    return torch.dot(flat, flat)


def _real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of 2; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    """Return the real type that a norm is computed in: float32, or float64."""
    dtype = tensor.dtype
    if dtype == torch.float32:
        return dtype
    return torch.promote_types(dtype.to_real() if dtype.is_complex else dtype, torch.float32)
