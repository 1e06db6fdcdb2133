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

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import is_
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel

from data_shards.errors import ConfigError, DataError
from reid_train.model.sharding import local_part, shard_groups
from reid_train.model.weight_gradients import add_scaled_weights, squared_norm

logger = logging.getLogger(__name__)

KINDS = ("kernel", "bias", "gamma", "beta")
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
# What torch.compile, FSDP1 and activation checkpointing insert into the names of parameters.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
STUCK_CALLS = 100
"""Calls of `add_gradients` by which the optimizer must have moved θ."""


class _L2(nn.Module, ABC):
    """Σ λ_n ‖w_n‖² over a model's tensors; subclasses define λ.

    The model is referred to, not registered: `state_dict()` holds nothing of it, and `.to()` moves
    nothing of it. Each call checks that the model still has the same parameters. If they were
    replaced under the same names (`load_state_dict(assign=True)`, `to_empty`, `fully_shard`), it
    uses the new ones, or raises an error where an optimizer may hold the old ones.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__()
        self._model = (_unwrapped(model),)  # a module would be registered, a tuple is not
        self._exclude = tuple(exclude)
        self._groups_given = False
        self._look_up()
        for pattern in self._exclude:
            if not any(fnmatchcase(name, pattern) for name in self._all_names):
                raise ConfigError(
                    f"regularizer: exclude pattern {pattern!r} matches no parameter; names look "
                    f"like {', '.join(self._all_names[:3])}"
                )
        if not self.names:
            raise ConfigError("regularizer: the model has no parameter left to regularize")
        self._last_penalty: Tensor | None = None
        self._calls = 0
        self._calls_without_backward = 0
        self._first_gradient: tuple[Tensor, Tensor] | None = None

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
        self._follow_model()
        factors = self.factor_vector()
        total = factors.new_zeros(())
        for factor, weight, groups in zip(factors, self._weights, self._groups, strict=True):
            if weight.requires_grad:
                square = squared_norm(weight)
                if groups and not hasattr(square, "full_tensor"):
                    raise ConfigError(
                        "regularizer: penalty() cannot be differentiated through FSDP1: use "
                        "add_gradients() and last_penalty"
                    )
                square = square.full_tensor() if groups else square  # type: ignore[operator]
                total = total + factor * square.to(total)
        return total

    @property
    def last_penalty(self) -> Tensor:
        """The penalty at the last `add_gradients`: a detached scalar, read without waiting."""
        if self._last_penalty is not None:
            return self._last_penalty
        self._follow_model()
        factors = self.factor_vector().detach()
        squares = [
            squared_norm(local_part(w.detach())).to(factors) * w.requires_grad
            for w in self._weights
        ]
        return torch.dot(factors, self._summed_over_shards(torch.stack(squares)))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to `.grad` of the weights, and set θ's, once per step.

        The closed form of `penalty().backward()`: ∂/∂w_n = 2 λ_n w_n, and
        ∂/∂θ_n = A ‖w_n‖² / (2c) inside the clip's range, else 0. A missing `.grad` is created. A
        sparse one becomes dense, because the penalty's is dense. Frozen tensors get no gradient,
        and their θ gets 0. Nothing waits for the device, but for the second call, which reads back
        what became of the first one's gradient, to find steps in the wrong order.

        Raises:
            ConfigError: the model's parameters have changed, or a GradScaler divided the penalty's
                gradient.
        """
        self._follow_model()
        self._calls += 1
        self._check_order()
        factors = self.factor_vector()
        squares = self._summed_over_shards(add_scaled_weights(self._weights, 2 * factors))
        self._last_penalty = torch.dot(factors, squares)
        self._set_factor_gradient(squares)
        watched = self._watched_gradient() if self._calls == 1 else None
        if watched is not None:
            self._first_gradient = watched, watched.clone()

    def _set_factor_gradient(self, squares: Tensor) -> None:
        """Set the gradient of what λ is made from, given ∂/∂λ_n = ‖w_n‖², (n,)."""

    def _watched_gradient(self) -> Tensor | None:
        """Return a gradient by which `_check_order` finds out what was done to all of them."""
        gradients = [w.grad for w in self._weights if w.grad is not None]
        small = [g for g in gradients if g.numel() >= 16 and g.dtype.is_floating_point]
        return local_part(min(small, key=Tensor.numel)) if small else None

    def _check_order(self) -> None:
        """Look for mistakes that would otherwise only show as a worse model."""
        if self._calls > 2:
            return
        trainable = [weight for weight in self._weights if weight.requires_grad]
        if trainable and all(weight.grad is None for weight in trainable):
            self._calls_without_backward += 1
        if self._calls == 1:
            return
        if self._calls_without_backward == 2:
            logger.warning(
                "regularizer: no parameter has a gradient at add_gradients(): call it after "
                "backward(), with a regularizer made from the model that is trained, not of a copy"
            )
        if self._first_gradient is not None and not self._first_gradient[0].is_meta:
            now, before = (gradient.flatten().tolist() for gradient in self._first_gradient)
            if (divisor := _power_of_two(before, now)) is not None:
                raise ConfigError(
                    f"regularizer: the gradients were divided by {divisor:g} after "
                    "add_gradients(), and the penalty's with them. With a GradScaler, call "
                    "scaler.unscale_(optimizer) before add_gradients(); divide by the number of "
                    "micro-batches before it, too"
                )
        self._first_gradient = None

    def _summed_over_shards(self, squares: Tensor) -> Tensor:
        """Return ‖w_n‖² of whole tensors, (n,), from those of this rank's parts."""
        for group in dict.fromkeys(group for groups in self._groups for group in groups):
            sharded = [group in groups for groups in self._groups]
            if all(sharded):
                dist.all_reduce(squares, group=group)
            else:
                index = torch.tensor(sharded).nonzero().squeeze(1).to(squares.device)
                part = squares[index]
                dist.all_reduce(part, group=group)
                squares[index] = part
        return squares

    def _look_up(self) -> None:
        """Find the model's parameters, and those to regularize."""
        model = self._model[0]
        groups = shard_groups(model)
        tensors = list(_named_tensors(model))
        self._all_names = tuple(name for name, _, _ in tensors)
        self._all_weights = tuple(weight for _, _, weight in tensors)
        self._shapes = tuple(weight.shape for weight in self._all_weights)
        included = [
            tensor
            for tensor in tensors
            if not any(fnmatchcase(tensor[0], pattern) for pattern in self._exclude)
        ]
        self.names = tuple(name for name, _, _ in included)
        self.kinds = tuple(kind for _, kind, _ in included)
        self._weights = tuple(weight for _, _, weight in included)
        self._groups = tuple(groups.get(id(weight), ()) for weight in self._weights)

    def _follow_model(self, *, new_optimizer: bool = False) -> None:
        """Look the parameters up again if the model has replaced them.

        Args:
            new_optimizer: the optimizer, too, is about to get the new ones.

        Raises:
            ConfigError: names or shapes have changed, or an optimizer may hold the old parameters.
        """
        weights = list(self._model[0].parameters())
        if (
            len(weights) == len(self._all_weights)
            and all(map(is_, weights, self._all_weights))
            and all(w.shape == shape for w, shape in zip(weights, self._shapes, strict=True))
        ):
            return
        now = {name: weight for name, _, weight in _named_tensors(self._model[0])}
        before = dict(zip(self._all_names, self._all_weights, strict=True))
        shapes = dict(zip(self._all_names, self._shapes, strict=True))
        changes = [
            *(f"{name} is gone" for name in before if name not in now),
            *(f"{name} is new" for name in now if name not in before),
            *(
                f"{name} was {tuple(shapes[name])} and is {tuple(weight.shape)}"
                for name, weight in now.items()
                if name in shapes and weight.shape != shapes[name]
            ),
        ]
        if changes:
            raise ConfigError(
                "regularizer: the model's parameters have changed since the regularizer was made "
                f"({'; '.join(changes[:3])}{'; …' if len(changes) > 3 else ''}): make it, and then "
                "the optimizer, once the model has all its layers, parametrizations and FSDP"
            )
        if self._groups_given and not new_optimizer:
            replaced = [name for name, weight in before.items() if now[name] is not weight]
            raise ConfigError(
                f"regularizer: {len(replaced)} parameters (first {replaced[0]}) were replaced after "
                "parameter_groups(), so the optimizer updates the old ones: make the optimizer "
                "again, from parameter_groups()"
            )
        self._look_up()

    def _weight_group(self, lr: float) -> dict[str, Any]:
        """Return the optimizer's group of all weights, including excluded and frozen ones."""
        self._follow_model(new_optimizer=True)
        self._groups_given = True
        weights = list(self._all_weights)
        return {"params": weights, "lr": lr, "weight_decay": 0.0, "name": "weights"}


class AdaptiveL2(_L2):
    """Adaptive L2 regularization of any module: λ_n = A · clip(θ_n / (2c) + 1/2, 0, 1).

    Every parameter is included: the weight of a convolution, linear or embedding layer is a kernel,
    the weight and bias of a norm are γ and β, any other bias is a bias, and anything else counts as
    a kernel. A shared parameter counts once, under its first name. Parameters may be of any
    floating point or complex type, frozen, sparse in their gradients, or sharded by FSDP.
    `state_dict()` holds only θ; `theta_by_name` and `load_theta` carry the names too.

    Args:
        model: the module to regularize, which may be compiled or wrapped in DDP or FSDP. FSDP1 needs
            `use_orig_params=True`.
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
        self._learns = True
        self._first_theta: Tensor | None = None
        self._make_tensors(self._weights[0].device)

    def factor_vector(self) -> Tensor:
        """Return λ, (n,) float32, differentiable in θ."""
        position = self._position()
        # hardtanh and not clamp: its gradient is zero at the very ends of the range too.
        return self.amplitudes * F.hardtanh(position, 0.0, 1.0)

    def parameter_groups(self, lr: float, theta_lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
        """Return two groups: the model's weights (all, also excluded and frozen ones) and θ.

        Args:
            lr: learning rate of the weights.
            theta_lr_multiplier: θ's learning rate divided by the weights'; 1 as published.
        """
        self._learns = lr * theta_lr_multiplier != 0
        theta_lr = lr * theta_lr_multiplier
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
        device = self._weights[0].device
        if self.theta.device != device:  # the model was moved after the regularizer was made
            if self.theta.is_meta:  # and had no values before
                self._make_tensors(device)
            self.to(device)
        return self.theta / (2 * self.saturation) + 0.5

    def _set_factor_gradient(self, squares: Tensor) -> None:
        position = self._position()
        inside = (position > 0) & (position < 1)
        gradient = squares * self.amplitudes * inside / (2 * self.saturation)
        if self.theta.grad is None:
            self.theta.grad = gradient
        else:
            self.theta.grad.copy_(gradient)

    def _watched_gradient(self) -> Tensor | None:
        return self.theta.grad

    def _check_order(self) -> None:
        first = self._first_gradient
        super()._check_order()
        if self._calls == 1:
            self._first_theta = self.theta.detach().clone()
        if self._calls not in (2, STUCK_CALLS) or self._first_theta is None or self.theta.is_meta:
            return
        if first is not None:
            self._learns = self._learns and bool(first[1].any())
        if not self._learns or self.theta.tolist() != self._first_theta.tolist():
            return
        if self._calls == STUCK_CALLS:
            logger.warning(
                "regularizer: no step has moved θ in %d calls of add_gradients(): make the "
                "optimizer from parameter_groups(), and call add_gradients() before its step()",
                self._calls,
            )
        elif self.theta.grad is not None:
            logger.warning(
                "regularizer: add_gradients() was called twice, and the optimizer did not move θ "
                "in between: call it once per optimizer step, after the last backward()"
            )


class ConstantL2(_L2):
    """The baseline: the same constant λ for all tensors (in the loss, not decoupled decay).

    Args:
        model: the module to regularize.
        factor: λ.
        exclude: parameters to leave out, as `fnmatch` patterns on their names.

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
        return [self._weight_group(lr)]


def _power_of_two(before: Sequence[float], now: Sequence[float]) -> float | None:
    """Return d if now = before / d throughout, with d a power of two above 1."""
    pairs = [(a, b) for a, b in zip(before, now, strict=True) if a != 0.0]
    if not pairs or pairs[0][1] == 0.0:
        return None
    ratio = pairs[0][0] / pairs[0][1]
    is_power = ratio > 1.0 and math.frexp(ratio)[0] == 0.5
    return ratio if is_power and all(a == b * ratio for a, b in pairs) else None


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile, DDP and DataParallel."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
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
                parts = [part for part in name.split(".") if part not in WRAPPERS]
                yield ".".join(parts), _kind(module, parts[-1]), parameter


def _kind(owner: nn.Module, name: str) -> str:
    if isinstance(owner, NORMS):
        return "beta" if name == "bias" else "gamma"
    return "bias" if "bias" in name else "kernel"


def _check_number(what: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"regularizer: {what} is {value}, must be a number of at least {least:g}")
