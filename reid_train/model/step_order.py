"""Find mistakes in the order of a training step that would only show as a worse model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError

logger = logging.getLogger(__name__)

STUCK_CALLS = 100
"""Calls of `add_gradients` by which the optimizer must have moved θ."""


class StepOrder:
    """Compares what `add_gradients` did with what it finds at later calls.

    What it looks at comes to the host by copies that nobody waits for.

    Attributes:
        learns: whether the optimizer should move θ.
    """

    def __init__(self) -> None:
        self.learns = True
        self._calls = 0
        self._without_backward = 0
        self._gradient: tuple[Tensor, Tensor] | None = None
        self._theta: Tensor | None = None
        self._reading: _Reading | None = None

    def begin(self, weights: Sequence[nn.Parameter], theta: Tensor | None) -> None:
        """Look at the state before a call of `add_gradients`.

        Args:
            weights: that are regularized.
            theta: θ, if there is one.

        Raises:
            ConfigError: what the first call set was divided before the optimizer used it.
        """
        self._calls += 1
        if self._calls <= 2:
            trainable = [weight for weight in weights if weight.requires_grad]
            self._without_backward += bool(trainable) and all(w.grad is None for w in trainable)
        if self._calls == 2:
            if self._without_backward == 2:
                logger.warning(
                    "regularizer: no parameter has a gradient at add_gradients(): call it after "
                    "backward(), with a regularizer made from the model that is trained, not of a "
                    "copy"
                )
            self._reading = _read(self._gradient, self._theta, theta)
            self._gradient = None
        elif self._calls == STUCK_CALLS:
            self._reading = _read(None, self._theta, theta)
        if self._reading is not None and self._reading.has_arrived():
            reading, self._reading = self._reading, None
            self._check(reading)

    def end(self, gradient: Tensor | None, theta: Tensor | None) -> None:
        """Note what the first call has set.

        Args:
            gradient: a small gradient that was set, which stands for all of them.
            theta: θ, if there is one.
        """
        if self._calls == 1 and gradient is not None and not gradient.is_meta:
            self._gradient = gradient, gradient.clone()
            self._theta = None if theta is None else theta.detach().clone()

    def _check(self, reading: _Reading) -> None:
        before, now = reading.gradient_before.tolist(), reading.gradient_now.tolist()
        if (divisor := _power_of_two(before, now)) is not None:
            raise ConfigError(
                f"regularizer: the gradients were divided by {divisor:g} after add_gradients(), "
                "and the penalty's with them. With a GradScaler, call scaler.unscale_(optimizer) "
                "before add_gradients(); divide by the number of micro-batches before it, too"
            )
        if reading.is_first:
            self.learns = self.learns and any(before)
        if not self.learns or reading.theta_now.tolist() != reading.theta_before.tolist():
            return
        if not reading.is_first:
            logger.warning(
                "regularizer: no step has moved θ in %d calls of add_gradients(): make the "
                "optimizer from parameter_groups(), and call add_gradients() before its step()",
                STUCK_CALLS,
            )
        elif not reading.cleared:
            logger.warning(
                "regularizer: add_gradients() was called twice, and the optimizer did not move θ "
                "in between: call it once per optimizer step, after the last backward()"
            )


class _Reading(NamedTuple):
    """Values of two calls, on the host or on their way to it."""

    gradient_before: Tensor
    gradient_now: Tensor
    theta_before: Tensor
    theta_now: Tensor
    cleared: bool  # θ's gradient, in between
    is_first: bool
    copied: torch.Event | None

    def has_arrived(self) -> bool:
        """Return whether the values can be read without waiting."""
        return self.copied is None or self.copied.query()


def _read(
    gradient: tuple[Tensor, Tensor] | None, theta_before: Tensor | None, theta: Tensor | None
) -> _Reading | None:
    """Begin to copy what was set, and θ, to the host."""
    if gradient is None and theta_before is None:
        return None
    none = torch.empty(0)
    now, before = gradient if gradient is not None else (none, none)
    if theta is None or theta_before is None:
        theta, theta_before = none, torch.ones(1)  # unequal: nothing is to be said about θ
    tensors = [value.detach().flatten() for value in (before, now, theta_before, theta)]
    on_host = [value.to("cpu", non_blocking=True) for value in tensors]
    device = next((value.device for value in tensors if value.device.type != "cpu"), None)
    copied = None
    if device is not None:
        copied = torch.Event(device)
        copied.record()
    return _Reading(
        *(on_host[0], on_host[1], on_host[2], on_host[3]),
        cleared=theta.grad is None,
        is_first=gradient is not None,
        copied=copied,
    )


def _power_of_two(before: Sequence[float], now: Sequence[float]) -> float | None:
    """Return d if now = before / d throughout, with d a power of two above 1."""
    pairs = [(a, b) for a, b in zip(before, now, strict=True) if a != 0.0]
    if not pairs or pairs[0][1] == 0.0:
        return None
    ratio = pairs[0][0] / pairs[0][1]
    is_power = ratio > 1.0 and math.frexp(ratio)[0] == 0.5
    return ratio if is_power and all(a == b * ratio for a, b in pairs) else None
