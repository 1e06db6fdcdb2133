"""Compute embeddings with a trained model: the code that a served model runs.

This module and its imports need only torch, torchvision, NumPy, OpenCV, pydantic and safetensors,
and timm for a backbone of timm.
`registry.py` records their versions in each registered model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_shards.errors import DataError
from reid_train import transforms
from reid_train.config import TrainConfig
from reid_train.model.network import ReidNet

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Embedder:
    """A trained network that turns crops of people into embeddings.

    Args:
        network: the network with its trained weights.
        config: the training's configuration: size of the input, mirror images, batch.
        device: where to run; None takes a GPU if there is one.
    """

    def __init__(
        self, network: ReidNet, config: TrainConfig, device: torch.device | str | None = None
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device).to(memory_format=torch.channels_last).eval()
        self.config = config

    @classmethod
    def from_folder(cls, folder: str | Path, device: torch.device | str | None = None) -> Self:
        """Read `model.safetensors` and `config.json` from a folder, such as a checkpoint.

        Raises:
            DataError: a file is missing or damaged, or the weights are another network's.
            ConfigError: the configuration is of another version.
        """
        folder = Path(folder)
        try:
            text = (folder / CONFIG).read_bytes()
            state = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder} is not a model: {error}; a model is a folder with {WEIGHTS} and "
                f"{CONFIG}, such as a checkpoint"
            ) from error
        config = TrainConfig.from_json(text, str(folder / CONFIG))
        try:
            identities = len(state["global_head.classifier.weight"])
            network = ReidNet.from_config(config, identities)
            network.load_state_dict(state)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise DataError(
                f"{folder / WEIGHTS} does not hold the network of its {CONFIG}: {reason}"
            ) from error
        return cls(network, config, device)

    @property
    def embedding_size(self) -> int:
        """D, the length of an embedding."""
        return self.network.embedding_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed images.

        Args:
            images: (N, H, W, 3) uint8, RGB, of any one size; resized as in training. Also nested
                lists of that shape, as JSON has them.

        Returns:
            (N, D) float32, not normalised: compare by cosine.

        Raises:
            DataError: another shape or type.
        """
        images = require_images(images)
        embeddings = np.empty((len(images), self.embedding_size), np.float32)
        image, evaluation = self.config.image, self.config.evaluation
        for start in range(0, len(images), evaluation.batch):
            rows = slice(start, start + evaluation.batch)
            part = torch.from_numpy(resize(images[rows], image.height, image.width))
            with _true_float32():
                found = embed(self.network, part.to(self.device), mirror=evaluation.mirror)
            embeddings[rows] = found.cpu().numpy()
        return embeddings

    @torch.no_grad()
    def activations(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return where the network responds in N images (H, W, 3) uint8: (N, h, w) float32."""
        size = self.config.image
        sized = np.concatenate([resize(image[None], size.height, size.width) for image in images])
        pixels = torch.from_numpy(sized).to(self.device)
        normal = transforms.normalize(pixels, pixels=self.network.pixels)
        with _true_float32():
            return self.network.activation(normal).cpu().numpy()


@contextmanager
def _true_float32() -> Iterator[None]:
    """Have convolutions compute in float32 on GPUs, where cuDNN's default is TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def embed(
    model: ReidNet,
    image: torch.Tensor,
    *,
    mirror: bool = True,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Return the embeddings (B, D) float32 of a batch (B, H, W, 3) uint8, on the model's device.

    The model is in evaluation mode. `mirror` averages with the embeddings of the mirror images.
    `autocast` returns the context that the network runs in.
    """
    pixels = transforms.normalize(image, pixels=model.pixels)
    with autocast():
        embedding = model.embed(pixels).float()
        if mirror:
            embedding = (embedding + model.embed(pixels.flip(3)).float()) / 2
    return embedding


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (N, H, W, 3) uint8 to (N, height, width, 3), as `data_shards.loading.decode` does."""
    if images.shape[1:3] == (height, width):
        return np.ascontiguousarray(images)
    shrinks = images.shape[1] > 2 * height and images.shape[2] > 2 * width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = np.empty((len(images), height, width, 3), np.uint8)
    for image, out in zip(images, resized, strict=True):
        cv2.resize(image, (width, height), dst=out, interpolation=interpolation)
    return resized


def require_images(images: object) -> np.ndarray:
    """Return (N, H, W, 3) uint8 images as an array; lists of one such shape are converted.

    For another shape or type, a `DataError` says how to convert it.
    """
    wanted = "images must be (N, H, W, 3) uint8, RGB with values from 0 to 255"
    if isinstance(images, list | tuple):
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise DataError(
                f"{wanted}, not a list of images of several sizes: resize them to one size and use "
                "numpy.stack(images)"
            ) from error
        if images.dtype.kind in "iu" and images.size and images.min() >= 0 and images.max() <= 255:
            images = images.astype(np.uint8)
    if not isinstance(images, np.ndarray):
        raise DataError(f"{wanted}, not {type(images).__name__}: convert them to a NumPy array")
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3:
        if len(images) and not images.size:
            raise DataError(f"{wanted}, not {images.shape}: these images have no pixels")
        return images
    advice = " and ".join(filter(None, (_shape_advice(images.shape), _type_advice(images))))
    raise DataError(f"{wanted}, not {images.shape} {images.dtype}{': ' if advice else ''}{advice}")


def _shape_advice(shape: tuple[int, ...]) -> str:
    """How to make a shape (N, H, W, 3), or nothing."""
    match shape:
        case (_, 3, _, last) if last != 3:
            return "move the channels last with images.transpose(0, 2, 3, 1)"
        case (_, _, 3):
            return "make one image a batch with images[None]"
        case (3, _, _):
            return "make one image a batch with images.transpose(1, 2, 0)[None]"
        case (_, _, _, 4):
            return "drop the alpha channel with images[..., :3]"
        case (_, _, _, 1):
            return "repeat the grey channel with images.repeat(3, axis=3)"
    return "an empty batch is numpy.empty((0, H, W, 3), numpy.uint8)" if 0 in shape else ""


def _type_advice(images: np.ndarray) -> str:
    """How to make values uint8, or nothing."""
    if images.dtype == np.uint8 or not images.size:
        return ""
    if images.dtype.kind not in "biuf":
        return "use an array of numbers; images of several sizes must be resized to one"
    low, high = images.min(), images.max()
    if images.dtype.kind == "f" and 0 <= low <= high <= 1:
        return "scale the values with (255 * images).round().astype(numpy.uint8)"
    if 0 <= low <= high <= 255:
        return "convert the values with images.round().astype(numpy.uint8)"
    return f"use pixel values without normalization (these are from {low:.4g} to {high:.4g})"
