"""What this rank holds of a parameter that FSDP or tensor parallelism has split over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from data_shards.errors import ConfigError

Groups = tuple[dist.ProcessGroup, ...]


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def shard_groups(model: nn.Module) -> dict[int, Groups]:
    """Find the parameters that are split over ranks.

    Args:
        model: FSDP (1 or 2) or tensor parallelism may have been applied to it, or to parts of it.

    Returns:
        By `id` of each split parameter, the process groups over which its parts must be summed.

    Raises:
        ConfigError: parameters were merged, so that they have no shape or name of their own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    groups = _fsdp1_groups(model)
    for name, parameter in model.named_parameters():
        if found := _mesh_groups(name, parameter):
            groups[id(parameter)] = found
    return groups


def _mesh_groups(name: str, parameter: nn.Parameter) -> Groups:
    """Return the groups of a DTensor's shards (FSDP2, tensor parallelism); none for a tensor."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return ()
    if any(placement.is_partial() for placement in parameter.placements):
        raise ConfigError(
            f"regularizer: {name} is placed as {parameter.placements}; its value is a sum over "
            "ranks, of which no rank knows the norm. Shard or replicate it"
        )
    split = [n for n, place in enumerate(parameter.placements) if not place.is_replicate()]
    return tuple(parameter.device_mesh.get_group(dimension) for dimension in split)


def _fsdp1_groups(model: nn.Module) -> dict[int, Groups]:
    """Return the group of each parameter that FullyShardedDataParallel (FSDP1) has split."""
    from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel, ShardingStrategy

    groups: dict[int, Groups] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):  # outer ones before inner ones
        for parameter in module.parameters():
            if isinstance(parameter, FlatParameter):
                raise ConfigError(
                    "regularizer: FSDP has merged the model's parameters into flat ones, so none "
                    "has a λ of its own: give FSDP use_orig_params=True, or use fully_shard"
                )
            # FSDP1 marks what it has split, and leaves what it was told to ignore unmarked. PyTorch
            # 2.11 to 2.14; nothing public says it.
            if getattr(parameter, "_fsdp_flattened", False):
                whole = module.sharding_strategy == ShardingStrategy.NO_SHARD
                group = module.process_group
                groups[id(parameter)] = () if whole or group is None else (group,)
    return groups
