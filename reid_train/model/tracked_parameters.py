"""The parameters of a model that are regularized, by name, even if the model replaces them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from data_shards.errors import ConfigError
from reid_train.model.sharding import shard_groups

KINDS = ("kernel", "bias", "gamma", "beta")
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
# What torch.compile, FSDP1 and activation checkpointing insert into the names of parameters.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class TrackedParameters:
    """Names, kinds and parameters of a model, without those to exclude.

    Args:
        model: the module, which may be compiled or wrapped in DDP or FSDP.
        exclude: `fnmatch` patterns on names of parameters.

    Attributes:
        names: of the parameters, without what wrappers insert.
        kinds: of the parameters, from `KINDS`.
        weights: the parameters themselves.
        groups: the process groups over which each is sharded; none if it is whole.

    Raises:
        ConfigError: a pattern matches nothing, nothing is left, or FSDP1 has flattened the
            parameters.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        self._model = _unwrapped(model)
        self._exclude = tuple(exclude)
        self._optimizer_made = False
        self._look_up()
        for pattern in self._exclude:
            if not any(fnmatchcase(name, pattern) for name in self._all_names):
                raise ConfigError(
                    f"regularizer: exclude pattern {pattern!r} matches no parameter; names look "
                    f"like {', '.join(self._all_names[:3])}"
                )
        if not self.names:
            raise ConfigError("regularizer: the model has no parameter left to regularize")

    def for_optimizer(self) -> list[nn.Parameter]:
        """Return all parameters of the model, also excluded and frozen ones.

        Raises:
            ConfigError: the model has other parameters than before.
        """
        self._optimizer_made = False
        self.follow()
        self._optimizer_made = True
        return list(self._all_weights)

    def follow(self) -> None:
        """Look the parameters up again if the model has replaced them.

        Raises:
            ConfigError: names or shapes have changed, or an optimizer may hold the old parameters.
        """
        weights = list(self._model.parameters())
        if (
            len(weights) == len(self._all_weights)
            and all(map(is_, weights, self._all_weights))
            and all(w.shape == shape for w, shape in zip(weights, self._shapes, strict=True))
        ):
            return
        now = {name: weight for name, _, weight in _named_tensors(self._model)}
        before = dict(zip(self._all_names, self._all_weights, strict=True))
        shapes = dict(zip(self._all_names, self._shapes, strict=True))
        changes = [
            *(f"{name} is gone" for name in before if name not in now),
            *(f"{name} is new" for name in now if name not in before),
            *(
                f"{name} was {tuple(shapes[name])} and is {tuple(weight.shape)}"
                for name, weight in now.items()
                if name in shapes and weight.shape != shapes[name]
            ),
        ]
        if changes:
            raise ConfigError(
                "regularizer: the model's parameters have changed since the regularizer was made "
                f"({'; '.join(changes[:3])}{'; …' if len(changes) > 3 else ''}): make it, and then "
                "the optimizer, once the model has all its layers, parametrizations and FSDP"
            )
        if self._optimizer_made:
            replaced = [name for name, weight in before.items() if now[name] is not weight]
            raise ConfigError(
                f"regularizer: {len(replaced)} parameters (first {replaced[0]}) were replaced "
                "after parameter_groups(), so the optimizer updates the old ones: make the "
                "optimizer again, from parameter_groups()"
            )
        self._look_up()

    def summed_over_shards(self, squares: Tensor) -> Tensor:
        """Return ‖w_n‖² of whole tensors, (n,), from those of this rank's parts."""
        for group in dict.fromkeys(group for groups in self.groups for group in groups):
            sharded = [group in groups for groups in self.groups]
            if all(sharded):
                dist.all_reduce(squares, group=group)
            else:
                index = torch.tensor(sharded).nonzero().squeeze(1).to(squares.device)
                part = squares[index]
                dist.all_reduce(part, group=group)
                squares[index] = part
        return squares

    def _look_up(self) -> None:
        """Find the model's parameters, and those to regularize."""
        model = self._model
        groups = shard_groups(model)
        tensors = list(_named_tensors(model))
        self._all_names = tuple(name for name, _, _ in tensors)
        self._all_weights = tuple(weight for _, _, weight in tensors)
        self._shapes = tuple(weight.shape for weight in self._all_weights)
        included = [
            tensor
            for tensor in tensors
            if not any(fnmatchcase(tensor[0], pattern) for pattern in self._exclude)
        ]
        self.names = tuple(name for name, _, _ in included)
        self.kinds = tuple(kind for _, kind, _ in included)
        self.weights = tuple(weight for _, _, weight in included)
        self.groups = tuple(groups.get(id(weight), ()) for weight in self.weights)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile, DDP and DataParallel."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (name, kind, parameter), in the order of `named_parameters`, each parameter once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                parts = [part for part in name.split(".") if part not in WRAPPERS]
                yield ".".join(parts), _kind(module, parts[-1]), parameter


def _kind(owner: nn.Module, name: str) -> str:
    if isinstance(owner, NORMS):
        return "beta" if name == "bias" else "gamma"
    return "bias" if "bias" in name else "kernel"
