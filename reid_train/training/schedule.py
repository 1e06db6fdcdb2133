"""Learning rate by epoch, as the authors set it. Pure functions.

Each phase of a training starts its schedule at epoch 0.
"""

from __future__ import annotations

import math


def learning_rate(
    epoch: int,
    *,
    peak: float = 2e-4,
    minimum: float = 2e-6,
    warmup: int = 10,
    every: int = 30,
    decay: float = 0.1,
) -> float:
    """Return the learning rate of an epoch: linear warm-up, then a drop at each interval.

    Args:
        epoch: counted from 0 within the phase.
        peak: reached at the last epoch of the warm-up.
        minimum: where the warm-up starts, and the least that decay leads to.
        warmup: epochs of the warm-up.
        every: epochs between drops.
        decay: factor of a drop.
    """
    if epoch < warmup:
        return peak if warmup == 1 else minimum + (peak - minimum) * epoch / (warmup - 1)
    return max(minimum, peak * decay ** ((epoch - warmup) // every))


def cosine(epoch: int, epochs: int, *, peak: float = 2e-4, minimum: float = 2e-6) -> float:
    """Return the learning rate of an epoch: half a cosine from peak (first) to minimum (last).

    Args:
        epoch: counted from 0 within the phase.
        epochs: of the phase.
        peak: at epoch 0.
        minimum: at epoch `epochs - 1`.
    """
    progress = min(epoch / max(epochs - 1, 1), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
