"""What torch.compile compiles of a step: the network, and the work on the gradients after it."""

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.training.context import WorkerContext
from reid_train.training.optimizer import Regularizer

logger = logging.getLogger(__name__)


def compiles(config: TrainConfig, device: str) -> bool:
    """Return whether a run on a device, "cpu" or any GPU, is compiled; auto: where that pays.

    On GPUs a step is bound by the launches of its kernels, which compiling saves. On CPUs it is
    bound by the convolutions, which stay the same.
    """
    if config.compile == "auto":
        return device not in ("cpu", "meta") and not config.deterministic
    return config.compile == "on"


def find_compiler(config: TrainConfig, device: torch.device) -> bool:
    """Return whether to compile on this machine, which needs a C compiler, and Triton for a GPU.

    Raises:
        ConfigError: `--compile on` and one of them is missing.
    """
    if not compiles(config, device.type):
        return False
    own = os.environ.get("CC" if device.type == "cuda" else "CXX")
    known = ("gcc", "clang") if device.type == "cuda" else ("g++", "clang++")
    missing = [] if any(map(shutil.which, (own, *known) if own else known)) else [known[0]]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("the Python package triton")
    if not missing:
        return True
    if config.compile == "on":
        raise ConfigError(
            f"--compile on needs {' and '.join(missing)}: install it, or give --compile off"
        )
    logger.warning("not compiled, so slower: %s missing on this machine", " and ".join(missing))
    return False


def _compile(function: Any, config: TrainConfig) -> Any:
    # In deterministic mode the compiler chooses no kernel by timing it. Not `fullgraph`: a backbone
    # that cannot be one graph is slower, but works.
    options: Any = {"deterministic": True} if config.deterministic else None
    return torch.compile(function, dynamic=False, options=options)


def wrap(
    model: nn.Module, config: TrainConfig, context: WorkerContext, *, compiled: bool
) -> nn.Module:
    """Return the model, compiled if asked for, and in DDP if there are several workers.

    While DDP runs the forward pass, torch.compile cuts the graph where DDP's buckets of gradients
    end. So the exchange of the first buckets runs beside the rest of the backward pass.
    """
    if compiled:
        torch.compiler.reset()  # the phase before has filled caches of limited size
        model = _compile(model, config)
    if context.world == 1:
        return model
    exact = config.deterministic or context.device.type == "cpu"
    with warnings.catch_warnings():
        # PyTorch 2.14 renames the setting; the older name works from 2.11 on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[context.device] if context.device.type == "cuda" else None,
            # Global statistics are the same on every rank already.
            broadcast_buffers=config.model.batch_norm == "local",
            gradient_as_bucket_view=True,
            # Without it DDP rebuilds its buckets after the first step. With three workers or more
            # the sums depend on the buckets, and a resumed run would differ in its first step.
            find_unused_parameters=exact,
        )


def make_finish(
    config: TrainConfig,
    regularizer: Regularizer | None,
    optimizer: torch.optim.Optimizer,
    *,
    compiled: bool,
) -> Callable[[], Tensor]:
    """Return a function that adds the penalty's gradients, clips, and returns the norm before that.

    The gradients, all together, are those of the optimizer's parameters.
    """
    clip_norm = config.optimizer.clip_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def finish() -> Tensor:
        if regularizer is not None:
            regularizer.add_unchecked()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        return norm

    run = _compile(finish, config) if compiled else finish

    def checked() -> Tensor:
        with nullcontext() if regularizer is None else regularizer.checked():
            return run()

    return checked
