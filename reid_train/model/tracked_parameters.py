"""The parameters of a model that are regularized, by name, even if the model replaces them."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from operator import is_

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from data_shards.errors import ConfigError

KINDS = ("kernel", "bias", "gamma", "beta")
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
# Norms that other libraries have of their own, such as timm's RmsNorm2d and GlobalResponseNorm.
NORM_NAME = re.compile(r"Norm(Act)?(\dd)?(Fp32)?$")
# What torch.compile, FSDP1 and activation checkpointing insert into the names of parameters.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

Groups = tuple[dist.ProcessGroup, ...]


class TrackedParameters:
    """Names, kinds and parameters of a model, without those that `exclude` patterns match.

    The model may be compiled or wrapped in DDP or FSDP; names are without what these insert.
    `groups` are the process groups over which each parameter is sharded: none if it is whole.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        self._model, self._exclude = _unwrapped(model), tuple(exclude)
        self._optimizer_made = False
        self._look_up()
        for pattern in self._exclude:
            if not any(fnmatchcase(name, pattern) for name in self._all):
                raise ConfigError(
                    f"regularizer: exclude pattern {pattern!r} matches no parameter; names look "
                    f"like {', '.join(list(self._all)[:3])}"
                )
        if not self.names:
            raise ConfigError("regularizer: the model has no parameter left to regularize")

    def for_optimizer(self) -> list[nn.Parameter]:
        """Return all parameters of the model, also excluded and frozen ones."""
        self._optimizer_made = False
        self.follow()
        self._optimizer_made = True
        return list(self._all.values())

    def follow(self) -> None:
        """Look the parameters up again if the model has replaced them.

        A `ConfigError` says if names or shapes changed, or an optimizer may hold the old ones.
        """
        weights, before = list(self._model.parameters()), self._all
        same = len(weights) == len(before) and all(map(is_, weights, before.values()))
        if same and [weight.shape for weight in weights] == self._shapes:
            return
        now = {name: weight for name, _, weight in _named_tensors(self._model)}
        shapes = dict(zip(before, self._shapes, strict=True))
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
            total = squares.clone()
            dist.all_reduce(total, group=group)
            sharded = [group in groups for groups in self.groups]
            squares = torch.where(torch.tensor(sharded, device=squares.device), total, squares)
        return squares

    def _look_up(self) -> None:
        """Find the model's parameters, and those to regularize."""
        tensors = list(_named_tensors(self._model))
        self._all = {name: weight for name, _, weight in tensors}
        self._shapes = [weight.shape for weight in self._all.values()]
        included = [t for t in tensors if not any(fnmatchcase(t[0], p) for p in self._exclude)]
        self.names = tuple(name for name, _, _ in included)
        self.kinds = tuple(kind for _, kind, _ in included)
        self.weights = tuple(weight for _, _, weight in included)
        groups = _shard_groups(self._model)
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
    if isinstance(owner, NORMS) or NORM_NAME.search(type(owner).__name__):
        return "beta" if name in ("bias", "beta") else "gamma"
    if name in ("gamma", "beta"):  # a layer scale is a gamma
        return name
    return "bias" if "bias" in name else "kernel"


def _shard_groups(model: nn.Module) -> dict[int, Groups]:
    """Return the process groups over which sharded parameters must be summed, by their `id`."""
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.tensor import DTensor

    groups: dict[int, Groups] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):  # outer ones before inner ones
        whole = module.sharding_strategy == ShardingStrategy.NO_SHARD
        group = module.process_group
        for parameter in module.parameters():
            if isinstance(parameter, FlatParameter):
                raise ConfigError(
                    "regularizer: FSDP has merged the model's parameters into flat ones, so none "
                    "has a λ of its own: give FSDP use_orig_params=True, or use fully_shard"
                )
            # FSDP1 marks what it has split, and leaves what it was told to ignore unmarked. PyTorch
            # 2.11 to 2.14; nothing public says it.
            if getattr(parameter, "_fsdp_flattened", False):
                groups[id(parameter)] = () if whole or group is None else (group,)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):  # of FSDP2 or tensor parallelism
            continue
        if any(placement.is_partial() for placement in parameter.placements):
            raise ConfigError(
                f"regularizer: {name} is placed as {parameter.placements}; its value is a sum over "
                "ranks, of which no rank knows the norm. Shard or replicate it"
            )
        split = [n for n, place in enumerate(parameter.placements) if not place.is_replicate()]
        groups[id(parameter)] = tuple(parameter.device_mesh.get_group(n) for n in split)
    return groups
