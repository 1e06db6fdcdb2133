"""Adaptive L2 regularization: one trainable factor λ for every tensor of a model.

    L_λ(P) = L(P) + Σ_n λ_n ‖w_n‖²      λ_n = A · clip(θ_n / (2c) + 1/2, 0, 1)

Ni, Fang, Huttunen, "Adaptive L2 Regularization in Person Re-Identification", ICPR 2020,
arXiv 2007.07875. In use:

    regularizer = AdaptiveL2(model, amplitude=0.005)
    optimizer = torch.optim.Adam(regularizer.parameter_groups(lr=2e-4), eps=1e-7)
    loss.backward(); regularizer.add_gradients(); optimizer.step()

Call `add_gradients()` once per optimizer step, after the last `backward()` and before clipping:

    for batch in micro_batches:
        scaler.scale(loss(batch) / len(micro_batches)).backward()
    scaler.unscale_(optimizer)          # only with a GradScaler
    regularizer.add_gradients()
    clip_grad_norm_(parameters, 1.0)    # if at all
    scaler.step(optimizer)
    scaler.update()

`optimizer.zero_grad()` and `model.zero_grad()` both do: θ's gradient is set at each step, not
accumulated. In data parallelism (DDP) nothing is communicated, because the penalty depends only on
the weights, which are equal on all ranks. For sharded weights (FSDP, DTensor) the ranks exchange
one number per tensor. Keep the regularizer outside the module that DDP or FSDP wraps: θ is not part
of the model's forward pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_shards.errors import ConfigError, DataError
from reid_train.model.step_order import StepOrder
from reid_train.model.tracked_parameters import KINDS, TrackedParameters
from reid_train.model.weight_gradients import (
    add_scaled_weights,
    create_gradients,
    local_part,
    squared_norm,
)


class _L2(nn.Module, ABC):
    """Σ λ_n ‖w_n‖² over a model's tensors; subclasses define λ.

    The model is referred to, not registered: `state_dict()` holds nothing of it, and `.to()` moves
    nothing of it. If the model's parameters are replaced under the same names, as by
    `load_state_dict(assign=True)`, `to_empty` or `fully_shard`, the new ones are used.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__()
        self._tracked = TrackedParameters(model, exclude)
        self._last_penalty: Tensor | None = None
        self._order = StepOrder()

    @property
    def names(self) -> tuple[str, ...]:
        """The regularized tensors, in the order of θ and λ."""
        return self._tracked.names

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each of them is: "kernel", "bias", "gamma" or "beta"."""
        return self._tracked.kinds

    @abstractmethod
    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32 in the order of `names`, on the device of the first weight."""

    @abstractmethod
    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return the optimizer's groups: all weights of the model, and θ where there is one."""

    def factors(self) -> dict[str, float]:
        """Return λ by tensor name. This waits for the device: call it for logs, not every step."""
        return dict(zip(self.names, self.factor_vector().tolist(), strict=True))

    def penalty(self) -> Tensor:
        """Return Σ λ_n ‖w_n‖² as a differentiable scalar: the readable reference.

        Frozen tensors (`requires_grad` false) are left out.

        Raises:
            ConfigError: the model's parameters have changed, or FSDP1 has sharded them.
        """
        tracked = self._tracked
        tracked.follow()
        factors = self.factor_vector()
        total = factors.new_zeros(())
        for factor, weight, groups in zip(factors, tracked.weights, tracked.groups, strict=True):
            if not weight.requires_grad:
                continue
            square = squared_norm(weight)
            if (full_tensor := getattr(square, "full_tensor", None)) is not None:
                square = full_tensor()
            elif groups:
                raise ConfigError(
                    "regularizer: penalty() cannot be differentiated through FSDP1: use "
                    "add_gradients() and last_penalty"
                )
            total = total + factor * square.to(total)
        return total

    @property
    def last_penalty(self) -> Tensor:
        """The penalty at the last `add_gradients`: a detached scalar, read without waiting."""
        if self._last_penalty is not None:
            return self._last_penalty
        self._tracked.follow()
        factors = self.factor_vector().detach()
        squares = [
            squared_norm(local_part(w.detach())).to(factors) * w.requires_grad
            for w in self._tracked.weights
        ]
        return torch.dot(factors, self._tracked.summed_over_shards(torch.stack(squares)))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to `.grad` of the weights, and set θ's, once per step.

        The closed form of `penalty().backward()`: ∂/∂w_n = 2 λ_n w_n, and
        ∂/∂θ_n = A ‖w_n‖² / (2c) inside the clip's range, else 0. A missing `.grad` is created. A
        sparse one becomes dense, because the penalty's is dense. Frozen tensors get no gradient,
        and their θ gets 0. Nothing waits for the device.

        Raises:
            ConfigError: the model's parameters have changed, or a GradScaler divided the penalty's
                gradient.
        """
        with self.checked():
            self.add_unchecked()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Around `add_unchecked`: what `add_gradients` does that torch.compile cannot."""
        self._tracked.follow()
        weights, theta = self._tracked.weights, getattr(self, "theta", torch.empty(0))
        self._order.begin(weights, theta)
        create_gradients((*weights, theta))
        yield
        self._order.end(weights, theta)

    def add_unchecked(self) -> None:
        """Add the gradients, by operations on tensors only. All `.grad` have been created."""
        factors, weights = self.factor_vector(), self._tracked.weights
        squares = self._tracked.summed_over_shards(add_scaled_weights(weights, 2 * factors))
        self._last_penalty = torch.dot(factors, squares)
        self._set_factor_gradient(squares)

    def _set_factor_gradient(self, squares: Tensor) -> None:
        """Set the gradient of what λ is made from, given ∂/∂λ_n = ‖w_n‖², (n,)."""

    def _weight_group(self, lr: float) -> dict[str, Any]:
        """Return the optimizer's group of all weights, including excluded and frozen ones."""
        weights = self._tracked.for_optimizer()
        return {"params": weights, "lr": lr, "weight_decay": 0.0, "name": "weights"}


class AdaptiveL2(_L2):
    """Adaptive L2 regularization of any module: λ_n = A · clip(θ_n / (2c) + 1/2, 0, 1).

    Every parameter is included: the weight of a convolution, linear or embedding layer is a kernel,
    the weight and bias of a norm are γ and β, a layer scale is a γ, any other bias is a bias, and
    anything else counts as a kernel, such as position embeddings and class tokens. A shared
    parameter counts once, under its first name. Parameters may be of any floating point or complex
    type, frozen, sparse in their gradients, or sharded by FSDP. `state_dict()` holds only θ;
    `theta_by_name` and `load_theta` carry the names too.

    Args:
        model: the module to regularize. It may be compiled, or wrapped in DDP or FSDP; FSDP1
            needs `use_orig_params=True`.
        amplitude: A, for all kinds of tensor; λ starts at A / 2.
        amplitudes: A for some kinds, by "kernel", "bias", "gamma", "beta".
        saturation: c; outside |θ| < c the factor is constant.
        exclude: parameters to leave out, as `fnmatch` patterns on their names.

    Raises:
        ConfigError: an amplitude or c is out of range, a kind is unknown, a pattern matches
            nothing, nothing is left to regularize, or FSDP1 has flattened the parameters.
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
        self._amplitudes = [by_kind[kind] for kind in self.kinds]
        self._make_tensors(self._tracked.weights[0].device)

    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32, differentiable in θ."""
        position = self._position()  # this may move the amplitudes, too
        # hardtanh and not clamp: its gradient is zero at the very ends of the range too.
        return self.amplitudes * F.hardtanh(position, 0.0, 1.0)

    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return two groups: the model's weights (all, also excluded and frozen ones) and θ.

        Args:
            lr: learning rate of the weights.
            theta_lr_multiplier: θ's learning rate divided by the weights'; 1 as published.
        """
        theta_lr = lr * theta_lr_multiplier
        self._order.learns = theta_lr != 0
        theta = {"params": [self.theta], "lr": theta_lr, "weight_decay": 0.0, "name": "theta"}
        return [self._weight_group(lr), theta]

    def saturated(self, factors: np.ndarray) -> dict[str, list[str]]:
        """Return the names of tensors with λ, of `factor_vector`, at an end, "0" or "A"."""
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

    def _make_tensors(self, device: torch.device) -> None:
        amplitudes = torch.tensor(self._amplitudes, dtype=torch.float32, device=device)
        self.register_buffer("amplitudes", amplitudes, persistent=False)
        self.theta = nn.Parameter(torch.zeros(len(self.names), device=device))

    def _position(self) -> Tensor:
        """θ on the clip's scale: inside (0, 1) λ moves with it."""
        device = self._tracked.weights[0].device
        if self.theta.device != device:  # the model was moved after the regularizer was made
            if self.theta.is_meta:  # and had no values before
                self._make_tensors(device)
            self.to(device)
        return self.theta / (2 * self.saturation) + 0.5

    def _set_factor_gradient(self, squares: Tensor) -> None:
        position = self._position()
        inside = (position > 0) & (position < 1)
        gradient = squares * self.amplitudes * inside / (2 * self.saturation)
        if self.theta.grad is None:  # θ has just been made, on the device of the weights
            self.theta.grad = gradient
        else:
            self.theta.grad.copy_(gradient)


class ConstantL2(_L2):
    """The baseline: one constant λ, `factor`, for all tensors (in the loss, not decoupled decay).

    `model`, `exclude` and the errors are as in `AdaptiveL2`.
    """

    def __init__(self, model: nn.Module, factor: float, *, exclude: Sequence[str] = ()) -> None:
        super().__init__(model, exclude)
        self._order.learns = False
        _check_number("factor", factor, least=0.0)
        self.factor = factor

    def factor_vector(self) -> Tensor:
        return torch.full((len(self.names),), self.factor, device=self._tracked.weights[0].device)

    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return one group, the model's weights; there is no θ for the multiplier to apply to."""
        return [self._weight_group(lr)]


def _check_number(what: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"regularizer: {what} is {value}, must be a number of at least {least:g}")
