"""From a configuration to the objects that it describes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from reid_train.config import TrainConfig
from reid_train.model.batch_norm import convert
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import load_backbone
from reid_train.regularization import AdaptiveL2, ConstantL2
from reid_train.training import schedule


def model(config: TrainConfig, identities: int) -> ReidNet:
    """The network with its initial weights: a function of the configuration and its seed."""
    network = ReidNet(
        config.model.backbone,
        identities=identities,
        stripes=config.model.stripes,
        seed=config.seed,
    )
    load_backbone(network, config.model.weights)
    return convert(network) if config.model.batch_norm == "global" else network


def regularizer(config: TrainConfig, network: ReidNet) -> AdaptiveL2 | ConstantL2 | None:
    """The regularizer of the configured mode; None for none."""
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


def optimizer(
    config: TrainConfig, network: ReidNet, regularizer: AdaptiveL2 | ConstantL2 | None
) -> torch.optim.Adam:
    """Adam over the weights and, if they are learnt, θ (METHOD §5)."""
    o = config.optimizer
    if isinstance(regularizer, AdaptiveL2):
        groups = regularizer.parameter_groups(
            o.learning_rate, config.regularization.theta_lr_multiplier
        )
    else:
        groups = [{"params": list(network.parameters()), "lr": o.learning_rate}]
    for group in groups:
        group["multiplier"] = group["lr"] / o.learning_rate
    return torch.optim.Adam(groups, betas=(o.beta1, o.beta2), eps=o.epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, epoch: int) -> None:
    """The learning rate of a total epoch, each phase starting its schedule at 0 (METHOD §5)."""
    o = config.optimizer
    local = epoch if epoch < o.frozen_epochs else epoch - o.frozen_epochs
    length = o.frozen_epochs if epoch < o.frozen_epochs else o.epochs
    rate = {
        "step": lambda: schedule.learning_rate(
            local,
            peak=o.learning_rate,
            minimum=o.minimum_learning_rate,
            warmup=o.warmup_epochs,
            every=o.decay_every,
        ),
        "cosine": lambda: schedule.cosine(
            local, length, peak=o.learning_rate, minimum=o.minimum_learning_rate
        ),
        "constant": lambda: o.learning_rate,
    }[o.schedule]()
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]


def set_precision(config: TrainConfig) -> None:
    """Make float32 mean float32, if it was asked for: cuDNN takes TF32 by itself."""
    if config.precision == "float32":
        torch.backends.cudnn.allow_tf32 = False


def autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the context that the network runs in: bfloat16 where asked for and to be had."""
    if config.precision == "float32" or (config.precision == "auto" and not _has_bf16(device)):
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()
