"""Adaptive L2 regularization: one trainable factor for every tensor of a model.

    L_λ(P) = L(P) + Σ_n λ_n ‖w_n‖²      λ_n = A · clip(θ_n / (2c) + 1/2, 0, 1)

Ni, Fang, Huttunen, "Adaptive L2 Regularization in Person Re-Identification", ICPR 2020,
arXiv 2007.07875. In use:

    regularizer = AdaptiveL2(model, amplitude=0.005)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(lr=2e-4), eps=1e-7)
    loss.backward(); regularizer.add_gradients(); optimizer.step()

The order of one optimizer step: accumulate every micro-batch's gradient, (unscale, if a gradient
scaler is in use), `add_gradients()` once, clip, step. The penalty depends on weights alone, so
under data parallelism each rank adds the same gradient to the averaged one and θ stays equal on
all ranks without an all-reduce. θ takes no part in the model's forward: keep the regularizer
outside the module that DistributedDataParallel wraps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from data_shards.errors import ConfigError, DataError

KINDS = ("kernel", "bias", "gamma", "beta")


class _L2(nn.Module, ABC):
    """Σ λ_n ‖w_n‖² over a model's tensors; what λ is, a subclass says.

    The tensors are referred to, not registered: `state_dict()` holds nothing of the model, and
    `.to()` moves nothing of it. They are looked up once, so a model whose parameters are replaced
    by new objects needs a new regularizer (`.to()`, `load_state_dict` and `torch.compile` keep
    them; freezing is looked up at each call).
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__()
        tensors = list(_named_tensors(_unwrapped(model)))
        for pattern in exclude:
            if not any(fnmatchcase(name, pattern) for name, _, _ in tensors):
                raise ConfigError(
                    f"regularizer: exclude pattern {pattern!r} matches no parameter; names look "
                    f"like {', '.join(name for name, _, _ in tensors[:3])}"
                )
        included = [
            tensor
            for tensor in tensors
            if not any(fnmatchcase(tensor[0], pattern) for pattern in exclude)
        ]
        if not included:
            raise ConfigError("regularizer: the model has no parameter left to regularize")
        self.names = tuple(name for name, _, _ in included)
        self.kinds = tuple(kind for _, kind, _ in included)
        self._weights = tuple(weight for _, _, weight in included)
        self._all_weights = tuple(weight for _, _, weight in tensors)
        self._last_penalty: Tensor | None = None

    @abstractmethod
    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32 in the order of `names`, on the weights' device."""

    @abstractmethod
    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return the optimizer's groups: all weights of the model, and θ where there is one."""

    def factors(self) -> dict[str, float]:
        """Return λ by tensor name (waits for the device: for logs, not for every step)."""
        return dict(zip(self.names, self.factor_vector().tolist(), strict=True))

    def penalty(self) -> Tensor:
        """Return Σ λ_n ‖w_n‖² as a differentiable float32 scalar: the readable reference.

        Frozen tensors (`requires_grad` false) are left out.
        """
        factors = self.factor_vector()
        total = factors.new_zeros(())
        for factor, weight in zip(factors.unbind(), self._weights, strict=True):
            if weight.requires_grad:
                total = total + factor * weight.float().square().sum()
        return total

    @property
    def last_penalty(self) -> Tensor:
        """The penalty that the last `add_gradients` saw: a detached scalar, no wait, no cost."""
        if self._last_penalty is None:
            return self.penalty().detach()
        return self._last_penalty

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to `.grad` of the weights and of θ, once an optimizer step.

        The closed form of `penalty().backward()`: ∂/∂w_n = 2 λ_n w_n, and
        ∂/∂θ_n = A ‖w_n‖² / (2c) inside the clip's range, else 0. A missing `.grad` is created.
        Frozen tensors get nothing, nor does their θ. No wait for the device.
        """
        factors = self.factor_vector()
        squares = _add_scaled_weights(self._weights, 2 * factors)
        self._last_penalty = torch.dot(factors, squares)
        self._add_factor_gradient(squares)

    def _add_factor_gradient(self, squares: Tensor) -> None:
        """Pass ∂/∂λ_n = ‖w_n‖², (n,), on to whatever λ is made from."""


class AdaptiveL2(_L2):
    """Adaptive L2 regularization of any module: λ_n = A · clip(θ_n / (2c) + 1/2, 0, 1).

    Included: every parameter (a convolution's, linear or embedding layer's weight is a kernel, a
    norm's weight and bias are γ and β, any other bias is a bias, anything else counts as a
    kernel), a shared one once, under its first name. `state_dict()` holds θ alone;
    `theta_by_name` and `load_theta` carry the names along.

    Args:
        model: whose parameters are regularized; compiled or DDP-wrapped is fine.
        amplitude: A, for all kinds of tensor; λ starts at A / 2.
        amplitudes: A for single kinds, by "kernel", "bias", "gamma", "beta".
        saturation: c; outside |θ| < c the factor is constant.
        exclude: parameters left out, as `fnmatch` patterns on their names.

    Raises:
        ConfigError: an amplitude or c is not a sensible number, a kind is unknown, a pattern
            matches nothing, or nothing is left to regularize.
    """

    amplitudes: Tensor

    def __init__(
        self,
        model: nn.Module,
        amplitude: float = 0.005,
        *,
        amplitudes: Mapping[str, float] | None = None,
        saturation: float = 2.5,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(model, exclude)
        by_kind = dict.fromkeys(KINDS, amplitude) | dict(amplitudes or {})
        if unknown := sorted(by_kind.keys() - set(KINDS)):
            raise ConfigError(f"regularizer: no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
        for kind, value in by_kind.items():
            _check_number(f"amplitude of {kind}", value, least=0.0)
        _check_number("saturation", saturation, least=1e-6)
        self.saturation = saturation
        device = self._weights[0].device
        vector = torch.tensor([by_kind[kind] for kind in self.kinds], dtype=torch.float32)
        self.register_buffer("amplitudes", vector.to(device), persistent=False)
        self.theta = nn.Parameter(torch.zeros(len(self.names), device=device))

    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32, differentiable in θ."""
        position = self._position()
        # hardtanh and not clamp: its gradient is zero at the very ends of the range too.
        return self.amplitudes * F.hardtanh(position, 0.0, 1.0)

    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return two groups: the model's weights (all, also excluded and frozen ones) and θ.

        Args:
            lr: learning rate of the weights.
            theta_lr_multiplier: θ's learning rate over the weights'; 1 as published.
        """
        theta_lr = lr * theta_lr_multiplier
        return [
            *_weight_group(self._all_weights, lr),
            {"params": [self.theta], "lr": theta_lr, "weight_decay": 0.0, "name": "theta"},
        ]

    def saturated(self, factors: np.ndarray) -> dict[str, list[str]]:
        """Return the tensors whose λ, of `factor_vector`, is at an end of its range: "0" or "A"."""
        amplitudes = self.amplitudes.cpu().numpy()
        ends = {"0": factors <= 0, "A": factors >= amplitudes}
        return {
            end: [self.names[i] for i in np.flatnonzero(reached & (amplitudes > 0))]
            for end, reached in ends.items()
        }

    def theta_by_name(self) -> dict[str, float]:
        """Return θ by tensor name."""
        return dict(zip(self.names, self.theta.tolist(), strict=True))

    @torch.no_grad()
    def load_theta(self, theta: Mapping[str, float]) -> None:
        """Set θ from what `theta_by_name` returned.

        Raises:
            DataError: the names are not this model's.
        """
        if missing := [name for name in self.names if name not in theta]:
            raise DataError(f"theta: none saved for {missing[0]} ({len(missing)} missing)")
        if extra := [name for name in theta if name not in set(self.names)]:
            raise DataError(f"theta: saved for {extra[0]}, not in this model ({len(extra)} such)")
        self.theta.copy_(torch.tensor([theta[name] for name in self.names]))

    def _position(self) -> Tensor:
        """θ on the clip's scale: inside (0, 1) λ moves with it."""
        device = self._weights[0].device
        if self.theta.device != device:
            self.to(device)  # the model was moved after the regularizer was made
        return self.theta / (2 * self.saturation) + 0.5

    def _add_factor_gradient(self, squares: Tensor) -> None:
        position = self._position()
        inside = (position > 0) & (position < 1)
        gradient = squares * self.amplitudes * inside / (2 * self.saturation)
        _gradient(self.theta).add_(gradient)


class ConstantL2(_L2):
    """The baseline: the same constant λ for all tensors (in the loss, not decoupled decay).

    Args:
        model: whose parameters are regularized.
        factor: λ.
        exclude: parameters left out, as `fnmatch` patterns on their names.

    Raises:
        ConfigError: as `AdaptiveL2`.
    """

    def __init__(self, model: nn.Module, factor: float, *, exclude: Sequence[str] = ()) -> None:
        super().__init__(model, exclude)
        _check_number("factor", factor, least=0.0)
        self.factor = factor

    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32."""
        return torch.full((len(self.names),), self.factor, device=self._weights[0].device)

    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return one group, the model's weights; there is no θ for the multiplier to apply to."""
        return _weight_group(self._all_weights, lr)


def _weight_group(weights: Sequence[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    return [{"params": list(weights), "lr": lr, "weight_decay": 0.0, "name": "weights"}]


def _add_scaled_weights(weights: Sequence[nn.Parameter], scales: Tensor) -> Tensor:
    """Add scale_n · w_n to each trainable weight's gradient; return ‖w_n‖² (0 where frozen)."""
    zero = scales.new_zeros(())
    squares = [zero] * len(weights)
    if scales.device.type == "cpu":
        # Tensor by tensor and not list by list: the norm leaves the weight in the cache for the
        # sum. (On the CPU the list operations are loops, too.)
        for i, (weight, scale) in enumerate(zip(weights, scales.tolist(), strict=True)):
            if weight.requires_grad:
                squares[i] = _squared_norm(weight)
                _gradient(weight).add_(weight, alpha=scale)
        return torch.stack(squares)
    trainable = [i for i, weight in enumerate(weights) if weight.requires_grad]
    if trainable:
        # The factors stay on the device, as tensors of no dimension: nothing waits for them.
        chosen: list[Tensor] = [weights[i] for i in trainable]
        gradients = [_gradient(weights[i]) for i in trainable]
        factors = scales.unbind()
        torch._foreach_addcmul_(  # pyright: ignore[reportPrivateImportUsage]
            gradients, chosen, [factors[i] for i in trainable]
        )
        norms = torch._foreach_norm(chosen, 2, torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        for i, norm in zip(trainable, norms, strict=True):
            squares[i] = norm
    return torch.stack(squares).square_()


def _squared_norm(weight: Tensor) -> Tensor:
    """Return ‖w‖² of a tensor on the CPU, a float32 scalar.

    By rows, because the CPU's norm adds all elements up in a few float32 lanes: over the 19 million
    of a reduction convolution it is 0.1 % too small, and slower.
    """
    if weight.ndim > 1:
        # Moving the channels to the end flattens a channels_last weight without a copy.
        rows = weight if weight.is_contiguous() else weight.movedim(1, -1)
        weight = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32)
    flat = weight.float().view(-1)
    return torch.dot(flat, flat)


def _gradient(weight: nn.Parameter) -> Tensor:
    """Return `.grad`, made if there is none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's and DDP's wrappers, whose names are the user's."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (name, kind, parameter), in the order of `named_parameters`, each parameter once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield name, _kind(module, name.rpartition(".")[2]), parameter


def _kind(owner: nn.Module, name: str) -> str:
    if isinstance(owner, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return "beta" if name == "bias" else "gamma"
    return "bias" if "bias" in name else "kernel"


def _check_number(what: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"regularizer: {what} is {value}, must be a number of at least {least:g}")
