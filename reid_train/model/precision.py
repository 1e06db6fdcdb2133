"""Numerical precision: bfloat16 where the device has it, float16 on older GPUs, true float32."""

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


Precision = Literal["bf16", "fp16", "float32"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def autocast(config: TrainConfig, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a factory of the context that the network runs in on a device."""
    dtype = compute_dtype(config, device)
    if dtype == torch.float32:
        return nullcontext
    return partial(torch.autocast, device.type, dtype=dtype)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context without autocast, for the parts of the network that need float32."""
    # Autocast knows no meta device, on which nothing is computed.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type that the network's convolutions compute in on a device."""
    return DTYPES[precision_on(config, device)]


def precision_on(config: TrainConfig, device: torch.device) -> Precision:
    """The precision of the network on a device; "auto" is bfloat16 if the device has it."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
