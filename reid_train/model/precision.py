"""Numerical precision: bfloat16 where the device has it, or true float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch

from reid_train.config import TrainConfig


def set_precision(config: TrainConfig) -> None:
    """Turn TF32 off in cuDNN if the configuration asks for float32; cuDNN uses it by default."""
    if config.precision == "float32":
        torch.backends.cudnn.allow_tf32 = False


def autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a factory of the context that the network runs in on a device."""
    if precision_on(config, device) == "float32":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)


def precision_on(config: TrainConfig, device: torch.device) -> Literal["bf16", "float32"]:
    """The precision of the network on a device; "auto" is bfloat16 if the device has it."""
    if config.precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16")
        return "bf16" if has_bf16 else "float32"
    return config.precision
