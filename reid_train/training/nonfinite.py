"""Skip optimizer steps whose gradient is not finite, without a host sync."""

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.errors import DataError

logger = logging.getLogger(__name__)


class NonFiniteFilter:
    """Decides on the device which optimizer steps are taken.

    A step whose gradient is not finite is skipped. Once more steps were skipped than are allowed,
    every later step is skipped too, until `check` reads the losses and stops the run. The averaged
    gradient is the same on every rank, so every rank decides alike.

    The step goes through a `torch.amp.GradScaler` whose scale stays 1: with fused Adam it leaves
    weights and moments alone, without a host sync, if a gradient is not finite.

    `allowed` steps may be skipped in a run; it has skipped `skipped` already. The model's running
    statistics are restored after a skipped step. In float16 (`half`) a second scaler multiplies
    the loss, so that small gradients do not vanish. A gradient that is not finite at a scale above
    1 only lowers the scale: its step is skipped and not counted (Micikevicius et al., ICLR 2018).
    """

    def __init__(self, allowed: int, skipped: int, model: nn.Module, *, half: bool = False) -> None:
        device = next(model.parameters()).device
        self.allowed, self.skipped = allowed, skipped
        self._count = torch.tensor(skipped, device=device)
        self._scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        self.loss_scaler = torch.amp.GradScaler(device.type, enabled=half)
        # If no step may be skipped, the first one ends the run and its statistics are never used.
        self._buffers = [b for b in model.buffers() if b.is_floating_point()] if allowed else []
        self._before: list[Tensor] = []

    def before_forward(self) -> None:
        """Remember the running statistics."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss that `backward` is called on."""
        return self._scaler.scale(self.loss_scaler.scale(loss))

    def unscale(self, optimizer: torch.optim.Adam) -> None:
        """Divide the gradients by the loss's scale, before the regularizer adds its own."""
        self.loss_scaler.unscale_(optimizer)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Adam, norm: Tensor) -> Tensor:
        """Step fused Adam, or leave weights, moments and running statistics as they were.

        Given the norm of the whole gradient, return 1 if it is not finite at a scale of 1, −1 if it
        is not finite and the scale is lowered, else 0: a scalar tensor.
        """
        not_finite = ~torch.isfinite(norm)
        bad = not_finite & (self.loss_scaler.scale(torch.ones_like(norm)) <= 1.0)
        self._count += bad
        skip = not_finite | (self._count > self.allowed)
        # The scaler skips exactly when it finds a gradient that is not finite: give it one.
        gradient = next(
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        )
        gradient.masked_fill_(skip, torch.nan)
        self._scaler.unscale_(optimizer)
        self._scaler.step(optimizer)
        self._scaler.update(1.0)
        self.loss_scaler.update()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip, before, buffer))
        return bad.int() - (not_finite & ~bad).int()

    def check(
        self,
        rows: np.ndarray,
        names: Sequence[str],
        first: int,
        images: Callable[[int], list[str]],
        saved_step: int | None,
        *,
        log: bool,
    ) -> None:
        """Count skipped steps, and raise a `DataError` at the first that may not be skipped.

        `rows` (n, m) holds the losses of recent steps from the global step `first` on, named by
        `names` (m - 1), and in its last column what `step` returned. In float16 a loss that is not
        finite counts as well at a scale above 1: no lower scale mends the forward pass. `images`
        returns the names of a step's images; `saved_step` is that of the last checkpoint.
        """
        for step, (*losses, mark) in enumerate(rows.tolist(), first):
            finite = math.isfinite(sum(losses))
            if finite and mark < 1:
                continue
            skipped = mark != 0  # and else the weights took a step in spite of the loss
            values = [f"{name} {loss:.4g}" for name, loss in zip(names, losses, strict=True)]
            found = (
                f"the {'gradient' if finite else 'loss'} is not finite at step {step} "
                f"({', '.join(values)}; images {', '.join(images(step))})"
            )
            self.skipped += skipped
            if skipped and self.skipped <= self.allowed:
                if log:
                    logger.warning(
                        "%s: skipped, %d of at most %d", found, self.skipped, self.allowed
                    )
                continue
            saved = "none yet" if saved_step is None else f"after step {saved_step}"
            raise DataError(
                f"{found}; last good checkpoint: {saved}. Train under another --name with a lower "
                "--optimizer.learning-rate or with --optimizer.clip-norm, or resume with "
                f"--optimizer.skip-nonfinite {max(10, 2 * self.allowed)}"
            )
