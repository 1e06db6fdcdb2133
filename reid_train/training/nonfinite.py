"""What is not finite never reaches the weights: such a step's update is left out, on the device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from data_shards.errors import DataError

logger = logging.getLogger(__name__)


class Guard:
    """Decides, without waiting for the device, which updates are made.

    A step whose gradient is not finite is skipped; once more steps were skipped than are allowed,
    so is every later one, until the loop looks and stops. The averaged gradient is the same on
    every rank, so every rank decides alike.

    Args:
        allowed: steps that may be skipped in a run.
        skipped: steps that the run has skipped already.
        model: whose running statistics a skipped step must not change either.
    """

    def __init__(self, allowed: int, skipped: int, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.allowed = allowed
        self.skipped = skipped
        self._count = torch.tensor(skipped, device=device)
        # With nothing allowed the first skipped step ends the run: its statistics are never used.
        self._buffers = [b for b in model.buffers() if b.is_floating_point()] if allowed else []
        self._before: list[Tensor] = []

    def before_forward(self) -> None:
        """Remember the running statistics."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Adam, norm: Tensor) -> Tensor:
        """Step the optimizer, or leave weights, moments and statistics as they were.

        Args:
            optimizer: fused Adam, which takes what gradient scalers tell it: `found_inf`.
            norm: scalar, of the whole gradient.

        Returns:
            Scalar bool: the gradient is not finite.
        """
        bad = ~torch.isfinite(norm)
        self._count += bad
        skip = bad | (self._count > self.allowed)
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip, before, buffer))
        return bad

    def check(
        self,
        rows: np.ndarray,
        first: int,
        images: Callable[[int], list[str]],
        kept_step: int | None,
        *,
        say: bool,
    ) -> None:
        """Look at recent steps, and stop at the first that is wrong and may not be skipped.

        Args:
            rows: (n, 4), as `Meter.read` gives them.
            first: global step of the first row.
            images: gives the names of a step's images.
            kept_step: global step of the last checkpoint.
            say: log what is skipped.

        Raises:
            DataError: names the step, its images, and the last checkpoint.
        """
        for step, (cross_entropy, triplet, penalty, bad) in enumerate(rows.tolist(), first):
            finite = math.isfinite(cross_entropy + triplet + penalty)
            if finite and not bad:
                continue
            found = (
                f"the {'gradient' if finite else 'loss'} is not finite at step {step} "
                f"(cross-entropy {cross_entropy:.4g}, triplet {triplet:.4g}, penalty "
                f"{penalty:.4g}; images {', '.join(images(step))})"
            )
            self.skipped += bool(bad)
            if bad and self.skipped <= self.allowed:
                if say:
                    count = f"{self.skipped} of at most {self.allowed}"
                    logger.warning("%s: skipped, %s", found, count)
                continue
            kept = "none yet" if kept_step is None else f"after step {kept_step}"
            raise DataError(
                f"{found}; last good checkpoint: {kept}. Train under another --name with a lower "
                "--optimizer.learning-rate or with --optimizer.clip-norm, or resume with "
                f"--optimizer.skip-nonfinite {max(10, 2 * self.allowed)}"
            )


def require_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse to write a checkpoint that nothing could go on from.

    Raises:
        DataError: names the first tensor with a value that is not finite.
    """
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"no checkpoint written: {name} has values that are not finite; the one before it "
                "is good. Train with a lower --optimizer.learning-rate or with "
                "--optimizer.clip-norm, or check the memory of the machine"
            )
