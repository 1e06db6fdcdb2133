"""Find mistakes in the order of a training step that would only show as a worse model."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_shards.errors import ConfigError
from reid_train.model.weight_gradients import local_part

logger = logging.getLogger(__name__)

STUCK_CALLS = 100  # of `add_gradients`, by which the optimizer must have moved θ


class StepOrder:
    """Compares what the first `add_gradients` set with what the second and the 100th find.

    The values come to the host by copies that nobody waits for.
    """

    def __init__(self) -> None:
        self.learns = True  # whether the optimizer should move θ
        self._calls = 0
        self._without_backward = 0
        self._first: list[Tensor] = []  # copies of a gradient and of θ, and that gradient itself
        self._read: list[Tensor] = []  # the same, and θ now: on the host, or on their way to it
        self._copied: torch.Event | None = None
        self._cleared = False

    def begin(self, weights: Sequence[nn.Parameter], theta: Tensor) -> None:
        """Look at the state before a call of `add_gradients`; `theta` is empty if there is none.

        A `ConfigError` says that what the first call set was divided before the optimizer used it.
        """
        self._calls += 1
        if self._calls <= 2:
            trainable = [weight for weight in weights if weight.requires_grad]
            self._without_backward += bool(trainable) and all(w.grad is None for w in trainable)
        if self._calls == 2 and self._without_backward == 2:
            logger.warning(
                "regularizer: no parameter has a gradient at add_gradients(): call it after "
                "backward(), with a regularizer made from the model that is trained, not of a copy"
            )
        if self._first and self._calls in (2, STUCK_CALLS):
            values = [value.flatten() for value in (*self._first, theta.detach())]
            self._first[2] = self._first[0]  # lets go of the gradient
            self._read = [value.to("cpu", non_blocking=True) for value in values]
            self._cleared = theta.grad is None
            if not values[0].is_cpu:
                self._copied = torch.Event(values[0].device)
                self._copied.record()
        if self._read and (self._copied is None or self._copied.query()):
            read, self._read, self._copied = self._read, [], None
            self._check(*(value.tolist() for value in read))

    def end(self, weights: Sequence[nn.Parameter], theta: Tensor) -> None:
        """Note what the first call has set: θ's gradient, or a small one of the weights'."""
        if self._calls > 1:
            return
        gradient = theta.grad
        if not theta.numel():
            gradients = [g for weight in weights if (g := weight.grad) is not None]
            large = [g for g in gradients if g.numel() >= 16 and g.dtype.is_floating_point]
            gradient = local_part(min(large, key=Tensor.numel)) if large else None
        if gradient is not None and not gradient.is_meta:
            self._first = [gradient.clone(), theta.detach().clone(), gradient]

    def _check(self, before: list, theta_before: list, now: list, theta_now: list) -> None:
        is_second = self._calls < STUCK_CALLS
        if is_second:
            if (divisor := _power_of_two(before, now)) is not None:
                raise ConfigError(
                    f"regularizer: the gradients were divided by {divisor:g} after add_gradients()"
                    ", and the penalty's with them. With a GradScaler, call "
                    "scaler.unscale_(optimizer) before add_gradients(); divide by the number of "
                    "micro-batches before it, too"
                )
            self.learns = self.learns and any(before)
        if not self.learns or theta_now != theta_before:
            return
        if not is_second:
            logger.warning(
                "regularizer: no step has moved θ in %d calls of add_gradients(): make the "
                "optimizer from parameter_groups(), and call add_gradients() before its step()",
                STUCK_CALLS,
            )
        elif not self._cleared:
            logger.warning(
                "regularizer: add_gradients() was called twice, and the optimizer did not move θ "
                "in between: call it once per optimizer step, after the last backward()"
            )


def _power_of_two(before: Sequence[float], now: Sequence[float]) -> float | None:
    """Return d if now = before / d throughout, with d a power of two above 1."""
    pairs = [(a, b) for a, b in zip(before, now, strict=True) if a != 0.0]
    if not pairs or pairs[0][1] == 0.0:
        return None
    ratio = pairs[0][0] / pairs[0][1]
    is_power = ratio > 1.0 and math.frexp(ratio)[0] == 0.5
    return ratio if is_power and all(a == b * ratio for a, b in pairs) else None
