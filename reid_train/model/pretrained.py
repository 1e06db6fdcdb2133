"""Build the network, its backbone with pretrained weights: by name, from a path or storage."""

import io
import logging
import pickle
import socket
import time
import warnings
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision import models

from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.storage import open_file
from reid_train.config import TIMM, TrainConfig
from reid_train.model.backbones import own_tensors, pretrained_tensors
from reid_train.model.network import ReidNet

logger = logging.getLogger(__name__)

ENDINGS = (".safetensors", ".pt", ".pth")  # of the names of weight files
DOWNLOAD_TRIES = 3
DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
RETRY_WAIT = 1.0  # seconds, doubled at each try


def build_model(config: TrainConfig, identities: int) -> ReidNet:
    """Return the network with its initial weights, which depend only on the configuration.

    Args:
        config: its `model` section and its seed are used.
        identities: number of training identities, the classes of every classifier.

    Raises:
        ReidError: the pretrained weights cannot be read or do not fit the backbone.
    """
    network = ReidNet.from_config(config, identities)
    load_backbone(network, config.model.weights)
    return network


def load_backbone(network: ReidNet, source: str) -> None:
    """Set a network's backbone from pretrained weights; its heads stay as they are.

    Args:
        network: its backbone is set, with both copies of the last stage.
        source: "none" leaves the initial weights; "imagenet" means torchvision's IMAGENET1K_V1
            for a ResNet, and timm's weights for a model of timm; anything else is a path or an
            s3:// URL of a state dict (see `read_state`) in torchvision's or timm's names, or in
            names that timm converts. Its classifier is dropped.

    Raises:
        ReidError: as `read_state` and `fitted`; or "imagenet" cannot be downloaded.
    """
    if source == "none":
        return
    name, image = network.backbone, network.image
    if source != "imagenet":
        state = {_without_wrappers(key): value for key, value in read_state(source).items()}
        own = own_tensors(name, image, state, source)
    elif name.startswith(TIMM):
        own = pretrained_tensors(name, image)
    else:
        own = own_tensors(name, image, _imagenet(name), source)
    network.load_backbone(fitted(own, network.backbone_shapes(), source))


def read_state(source: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .pt or .pth file, at a path or an s3:// URL.

    Its content decides how it is read, not its name. Nothing but tensors is unpickled.

    Raises:
        ConfigError: the name has none of the three endings.
        DataError: the file is not a state dict.
        StorageError: the file is not there or cannot be read.
    """
    if not source.endswith(ENDINGS):
        raise ConfigError(
            f"weights: {source!r} is neither 'imagenet', 'none', nor a path or s3:// URL that ends "
            "in .safetensors, .pt or .pth"
        )
    try:
        storage, name = open_file(source)
        content = storage.read(name)
    except ObjectMissing:
        raise ObjectMissing(
            f"weights: {source} is not there; --model.weights is 'imagenet', 'none', or a path or "
            "s3:// URL of a state dict"
        ) from None
    if (found := _not_weights(content)) is not None:
        raise DataError(
            f"weights: {source} is {found}, not a file of weights: get the file itself, and save "
            "its state dict as .safetensors or .pth"
        )
    if not _is_safetensors(content):
        return _state_dict(_torch(content, source), source)
    try:
        return _state_dict(safetensors.torch.load(content), source)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"weights: {source} is a damaged safetensors file: {error}") from error


# What a wrong or failed download begins with.
SIGNATURES = {
    b"version https://git-lfs.github.com/": "a Git LFS pointer (run git lfs pull)",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras saves",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF file",
}


def _not_weights(content: bytes) -> str | None:
    """Return what a file is if it is something well known and not weights."""
    if not content:
        return "empty"
    for start, name in SIGNATURES.items():
        if content.startswith(start):
            return name
    # PyTorch's files from before version 0.4 are tar archives, too.
    torch_members = (b"sys_info", b"pickle", b"storages", b"tensors")
    if content[257:262] == b"ustar" and content[:512].split(b"\0", 1)[0] not in torch_members:
        return "a tar archive"
    if content.startswith(b"PK\x03\x04") and b"data.pkl" not in content:
        return "a ZIP archive or the beginning of one"
    text = content[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document (an object store's error?)"
    if text.startswith((b"{", b"[")) and not _is_safetensors(content):
        return "JSON"
    readable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in content[:1000])
    return "text" if readable == len(content[:1000]) else None


def _is_safetensors(content: bytes) -> bool:
    """Return whether a file begins as safetensors do: the header's length, then JSON."""
    return len(content) > 8 and content[8:9] == b"{" and content[6:8] == b"\0\0"


def _torch(content: bytes, source: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        pickled = content[:1] == b"\x80" and content[1:2] <= b"\x05"
        if pickled or content.startswith(b"PK\x03\x04"):
            raise DataError(
                f"weights: {source} holds more than tensors, and running a pickle from outside is "
                "refused: save its state dict as .safetensors"
            ) from error
        raise DataError(
            f"weights: {source} is neither safetensors nor a file of torch.save; it begins with "
            f"{content[:8]!r}"
        ) from error
    except Exception as error:  # a damaged file leads to errors of any type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"weights: {source} is damaged or cut off: {reason[0][:100]}") from error


def _state_dict(state: object, source: str) -> dict[str, Tensor]:
    """Return the tensors by name, out of what training programs wrap them in."""
    for key in ("state_dict", "model_state_dict", "model", "net", "network", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    wrong = f"weights: {source} is not a state dict"
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise DataError(f"{wrong}, a mapping of names to tensors, but a {kind}")
    if not state:
        raise DataError(f"weights: {source} is an empty state dict")
    for name, value in state.items():
        if not isinstance(name, str):
            raise DataError(f"{wrong}: it has the key {name!r}, not a name")
        if not isinstance(value, Tensor):
            kind, others = type(value).__name__, ", ".join(str(key) for key in list(state)[:5])
            raise DataError(f"{wrong}: {name} is a {kind}, not a tensor; it has {others}")
    return dict(state)


def fitted(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """Return the tensors of a state that should have those of `shapes`.

    A `DataError` says which are missing, left over, of another shape, or not finite.
    """
    found = dict(state)
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
    broken = [name for name, value in found.items() if not torch.isfinite(value).all()]
    if broken:
        raise DataError(
            f"weights: {source} has values that are not finite in {', '.join(broken[:3])}: the "
            "training that wrote it diverged; give an earlier file"
        )
    return found


def _without_wrappers(name: str) -> str:
    """Return a parameter's name without what DDP, torch.compile and trainers put before it."""
    while (shorter := name.removeprefix("module.").removeprefix("_orig_mod.")) != name:
        name = shorter
    return name.removeprefix("model.").removeprefix("backbone.").removeprefix("encoder.")


def _imagenet(backbone: str) -> dict[str, Tensor]:
    """Return torchvision's ImageNet weights, from its cache or the network."""
    url = models.get_model_weights(backbone)["IMAGENET1K_V1"].url
    for attempt in range(1, DOWNLOAD_TRIES + 1):
        before = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub would wait without a bound
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
        finally:
            socket.setdefaulttimeout(before)
    raise AssertionError("unreachable")
