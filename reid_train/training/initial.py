"""The weights that a run starts from if they are another training's: all but its classifiers.

A run keeps them in a file of its own, so that a worker that starts again does not depend on where
they came from.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from data_shards.errors import DataError
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import fitted
from reid_train.regularization import AdaptiveL2

CLASSIFIER = "classifier.weight"  # ends the names of what depends on the identities
_WEIGHT, _THETA = "model/", "theta/"


@dataclass(frozen=True)
class Initial:
    """Weights and buffers of a network by name, and θ by name if it is kept.

    `source` says in messages what they are.
    """

    source: str
    weights: dict[str, Tensor]
    theta: dict[str, float] | None = None

    @cached_property
    def content(self) -> bytes:
        """The file's content; of the same tensors it is the same."""
        tensors = {_WEIGHT + name: value.contiguous() for name, value in self.weights.items()}
        theta = (self.theta or {}).items()
        tensors |= {_THETA + name: torch.tensor(value) for name, value in theta}
        return safetensors.torch.save(tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> Self:
        """Read what `content` returned."""
        try:
            tensors = safetensors.torch.load(content)
        except SafetensorError as error:
            raise DataError(f"{source} is damaged: {error}") from error
        weights, theta = (
            {name.removeprefix(part): v for name, v in tensors.items() if name.startswith(part)}
            for part in (_WEIGHT, _THETA)
        )
        return cls(source, weights, {name: float(v) for name, v in theta.items()} or None)

    def load(self, model: ReidNet, regularizer: nn.Module | None) -> None:
        """Set weights and buffers, and θ if it is kept; classifiers and their θ stay as they are.

        Raises:
            DataError: they do not fit the network.
        """
        own = model.state_dict()
        shapes = {name: value.shape for name, value in own.items() if not is_classifier(name)}
        weights = {name: v for name, v in self.weights.items() if not is_classifier(name)}
        try:
            model.load_state_dict(own | fitted(weights, shapes, self.source))
            if self.theta is not None and isinstance(regularizer, AdaptiveL2):
                new = {k: v for k, v in regularizer.theta_by_name().items() if is_classifier(k)}
                old = {k: v for k, v in self.theta.items() if not is_classifier(k)}
                regularizer.load_theta(old | new)
        except DataError as error:
            stripes = f"{len(model.reductions)} stripes"
            raise DataError(
                f"--init-from {self.source} does not fit this run's {model.backbone} with "
                f"{stripes}: {error}"
            ) from error


def is_classifier(name: str) -> bool:
    """Return whether a tensor depends on the identities that were trained on."""
    return name.endswith(CLASSIFIER)
