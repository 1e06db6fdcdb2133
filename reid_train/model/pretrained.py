"""Pretrained weights for the backbone: by name, from a path, or from object storage."""

from __future__ import annotations

import io
import logging
import pickle
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision import models

from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.storage import open_file
from reid_train.model.network import ReidNet

logger = logging.getLogger(__name__)

DOWNLOAD_TRIES = 3
DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
RETRY_WAIT = 1.0  # seconds, doubled at each try


def load_backbone(network: ReidNet, source: str) -> None:
    """Set a network's backbone from pretrained weights; its heads stay as they are.

    Args:
        network: whose backbone, both copies of the last stage included, is set.
        source: "none" leaves the initial weights; "imagenet" means torchvision's IMAGENET1K_V1
            for this backbone; anything else is a path or an s3:// URL of a ResNet's state dict in
            torchvision's names, .safetensors or .pt / .pth. Its classifier is dropped.

    Raises:
        ConfigError: "imagenet" cannot be downloaded, or the file's type is unknown.
        DataError: the file is broken, needs pickle, or does not fit the backbone.
        StorageError: the file is not there or cannot be read.
    """
    if source == "none":
        return
    state = _imagenet(network.backbone) if source == "imagenet" else read_state(source)
    network.load_backbone(fitted(state, network.backbone_shapes(), source))


def read_state(source: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pt or .pth file, at a path or an s3:// URL."""
    name = source.rpartition("/")[2]
    if not name.endswith((".safetensors", ".pt", ".pth")):
        raise ConfigError(
            f"weights: {source!r} is neither 'imagenet', 'none', nor a path or s3:// URL that ends "
            "in .safetensors, .pt or .pth"
        )
    try:
        storage, key = open_file(source)
        content = storage.read(key)
    except ObjectMissing:
        raise ObjectMissing(
            f"weights: {source} is not there; --model.weights is 'imagenet', 'none', or a path or "
            "s3:// URL of a state dict"
        ) from None
    if name.endswith(".safetensors"):
        try:
            return safetensors.torch.load(content)
        except SafetensorError as error:
            raise DataError(f"weights: {source} is not a safetensors file: {error}") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"weights: {source} holds more than tensors, and running a pickle from outside is "
            "refused: save its state dict as .safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"weights: {source} cannot be read: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"weights: {source} is not a state dict: a mapping of names to tensors")
    return dict(state)


def fitted(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """Return exactly the tensors that a backbone wants.

    Args:
        state: tensors by torchvision's names, with or without DDP's "module." before them.
        shapes: what is wanted.
        source: where the state is from, for the error.

    Raises:
        DataError: tensors are missing, left over or of another shape.
    """
    found = {name.removeprefix("module."): value for name, value in state.items()}
    found = {name: value for name, value in found.items() if not name.startswith("fc.")}
    for name in shapes:  # files from before torch 0.4.1 do not count batches
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.tensor(0))
    problems = {
        "missing": [name for name in shapes if name not in found],
        "not of this backbone": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} for {tuple(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        )
        raise DataError(f"weights: {source} does not fit the backbone: {listed}")
    return found


def _imagenet(backbone: str) -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights, from its cache or the network."""
    url = models.get_model_weights(backbone)["IMAGENET1K_V1"].url
    for attempt in range(1, DOWNLOAD_TRIES + 1):
        try:
            with _socket_timeout(DOWNLOAD_TIMEOUT):
                return torch.hub.load_state_dict_from_url(
                    url, map_location="cpu", progress=False, check_hash=True, weights_only=True
                )
        except (OSError, RuntimeError) as error:
            logger.warning("weights: try %d of %d: %s: %s", attempt, DOWNLOAD_TRIES, url, error)
            if attempt == DOWNLOAD_TRIES:
                raise ConfigError(
                    f"weights: ImageNet weights of {backbone} cannot be downloaded from {url} "
                    f"({error}): fetch that file elsewhere and give its path or s3:// URL instead "
                    "of 'imagenet', or 'none' to start from random weights"
                ) from error
            time.sleep(RETRY_WAIT * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound the waits of sockets made inside, which torch.hub leaves unbounded."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
