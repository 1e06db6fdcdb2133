"""What the network of a configuration weighs and costs, counted on the meta device.

The real `ReidNet` runs forward and backward without memory or arithmetic: bytes are exact, floating
point operations are those of convolutions and matrix products, as PyTorch counts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from reid_train.config import TrainConfig
from reid_train.model.network import ReidNet

PhaseName = Literal["heads", "all"]
"""The backbone frozen, or everything trained."""
PHASES: tuple[PhaseName, ...] = ("heads", "all")

_BATCH = 2  # images shown to the network: batch norm takes no single one


@dataclass(frozen=True)
class Phase:
    """What training costs in one phase.

    Attributes:
        flops: floating point operations of an image, forward and backward.
        activations: bytes that an image's forward pass keeps for backward, in float32.
        gradients: bytes that the workers average at each step.
        moments: bytes that a checkpoint has beside the weights: Adam's moments and counters, θ and
            its own, the number of the step.
        collectives: small exchanges at each batch, which all workers wait for.
    """

    flops: float
    activations: int
    gradients: int
    moments: int
    collectives: int


@dataclass(frozen=True)
class Network:
    """What does not depend on the phase, and the two phases.

    Attributes:
        weights: bytes of parameters and buffers, as a checkpoint has them.
        embedding: D, numbers in an embedding.
        flops: floating point operations of an image's forward pass.
        phases: by name.
    """

    weights: int
    embedding: int
    flops: float
    phases: dict[PhaseName, Phase]

    def checkpoint(self, phase: PhaseName) -> int:
        """Bytes of a checkpoint's tensors; curves and file headers come on top."""
        return self.weights + self.phases[phase].moments


def describe(config: TrainConfig, identities: int) -> Network:
    """Count what a configuration's network takes for so many training identities."""
    model, image = config.model, config.image
    adaptive = config.regularization.mode == "adaptive"
    return _describe(
        model.backbone,
        identities,
        model.stripes,
        image.height,
        image.width,
        model.batch_norm == "global",
        adaptive,
    )


@lru_cache
def _describe(
    backbone: str,
    identities: int,
    stripes: int,
    height: int,
    width: int,
    global_norm: bool,
    adaptive: bool,
) -> Network:
    with torch.device("meta"):
        model = ReidNet(backbone, identities, stripes=stripes)
        image = torch.empty(_BATCH, 3, height, width)
    phases, forward = {}, 0.0
    for name in PHASES:
        model.freeze_backbone(name == "heads")
        forward, total, kept = _run(model, image)
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = 8 + sum(2 * p.nbytes + 4 for p in trained)
        if adaptive:  # θ: a number a tensor, its two moments, and one counter for all
            moments += 3 * 4 * len(list(model.parameters())) + 4
        norms = sum(isinstance(m, _BatchNorm) and m.training for m in model.modules())
        heads = 1 + stripes
        phases[name] = Phase(
            flops=total / _BATCH,
            activations=kept // _BATCH,
            gradients=sum(p.nbytes for p in trained),
            moments=moments,
            # Forward and backward of each norm and of each head's gathered features; the labels.
            collectives=2 * norms * global_norm + 2 * heads + 1,
        )
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return Network(weights, model.embedding_size, forward / _BATCH, phases)


def _run(model: ReidNet, image: torch.Tensor) -> tuple[float, float, int]:
    """Operations forward, and both ways; bytes kept in between, parameters left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(image)
        forward = counter.get_total_flops()
        sum(part.sum() for part in (*output.pooled, *output.logits)).backward()  # type: ignore[union-attr]
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
        parameter.grad = None
    total = counter.get_total_flops()
    return forward, total, sum(storage.nbytes() for storage in kept.values())
