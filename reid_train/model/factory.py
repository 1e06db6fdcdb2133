"""Build the network that a configuration describes."""

from __future__ import annotations

from reid_train.config import TrainConfig
from reid_train.model.network import ReidNet
from reid_train.model.pretrained import load_backbone


def build_model(config: TrainConfig, identities: int) -> ReidNet:
    """Return the network with its initial weights, which depend only on the configuration.

    Args:
        config: its `model` section and its seed are used.
        identities: number of training identities, the classes of every classifier.

    Raises:
        ReidError: the pretrained weights cannot be read or do not fit the backbone.
    """
    network = ReidNet(
        config.model.backbone,
        identities=identities,
        stripes=config.model.stripes,
        batch_norm=config.model.batch_norm,
        seed=config.seed,
    )
    load_backbone(network, config.model.weights)
    return network
