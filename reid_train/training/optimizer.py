"""The regularizer, Adam over weights and θ, and the learning rate by epoch."""

import math

import torch

from reid_train.config import TrainConfig
from reid_train.model.network import ReidNet
from reid_train.regularization import AdaptiveL2, ConstantL2

Regularizer = AdaptiveL2 | ConstantL2


def build_regularizer(config: TrainConfig, network: ReidNet) -> Regularizer | None:
    """Return the regularizer of the configured mode; None if the mode is "none"."""
    r = config.regularization
    if r.mode == "adaptive":
        return AdaptiveL2(
            network,
            r.amplitude,
            amplitudes=r.amplitudes.given(),
            saturation=r.saturation,
            exclude=r.exclude,
        )
    if r.mode == "constant":
        return ConstantL2(network, r.factor, exclude=r.exclude)
    return None


def build_optimizer(
    config: TrainConfig, network: ReidNet, regularizer: Regularizer | None
) -> torch.optim.Adam:
    """Return Adam over the weights and, in the adaptive mode, θ."""
    o = config.optimizer
    if isinstance(regularizer, AdaptiveL2):
        multiplier = config.regularization.theta_lr_multiplier
        groups = regularizer.parameter_groups(o.learning_rate, multiplier)
    else:
        groups = [{"params": list(network.parameters()), "lr": o.learning_rate}]
    for group in groups:
        group["multiplier"] = group["lr"] / o.learning_rate
    return torch.optim.Adam(groups, betas=(o.beta1, o.beta2), eps=o.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: int) -> None:
    """Set the rate of an epoch, counted over both phases; each phase starts its schedule at 0."""
    o = config.optimizer
    frozen = epoch < o.frozen_epochs
    local = epoch if frozen else epoch - o.frozen_epochs
    bounds = {"peak": o.learning_rate, "minimum": o.minimum_learning_rate}
    rate = o.learning_rate
    if o.schedule == "step":
        rate = step_rate(local, warmup=o.warmup_epochs, every=o.decay_every, **bounds)
    elif o.schedule == "cosine":
        rate = cosine_rate(local, o.frozen_epochs if frozen else o.epochs, **bounds)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


def step_rate(
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
        peak: rate at the last epoch of the warm-up.
        minimum: rate at the start of the warm-up, and the lowest after the drops.
        warmup: epochs of the warm-up.
        every: epochs between drops.
        decay: factor of a drop.
    """
    if epoch < warmup:
        return peak if warmup == 1 else minimum + (peak - minimum) * epoch / (warmup - 1)
    return max(minimum, peak * decay ** ((epoch - warmup) // every))


def cosine_rate(epoch: int, epochs: int, *, peak: float = 2e-4, minimum: float = 2e-6) -> float:
    """Return the learning rate of an epoch: half a cosine from `peak` down to `minimum`.

    Args:
        epoch: counted from 0 within the phase.
        epochs: number of epochs of the phase.
        peak: rate at epoch 0.
        minimum: rate at epoch `epochs - 1`.
    """
    progress = min(epoch / max(epochs - 1, 1), 1.0)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
