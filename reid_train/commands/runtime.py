"""What runs a model for `search`, `compare` and `export`: PyTorch or ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from data_shards.errors import ConfigError, DataError
from data_shards.storage import LocalStorage, open_file
from data_shards.storage.atomic import file_sha256
from reid_train.evaluation.thresholds import Thresholds
from reid_train.model.embedder import WEIGHTS, Embedder, embed, resize
from reid_train.model.exported import ONNX, open_onnx
from reid_train.model.precision import autocast, set_precision
from reid_train.registry.attached import THRESHOLDS, fetch_attached, find_thresholds
from reid_train.registry.load import fetched

Engine = Literal["torch", "onnx"]


class Runtime(NamedTuple):
    """A model that is ready to embed images of its own size."""

    run: Callable[[np.ndarray], np.ndarray]
    height: int
    width: int
    batch: int  # images to embed at a time
    embedding_size: int
    weights: str  # SHA-256 of the weights, in hex, as `embed` records it
    facts: Mapping[str, str] = {}  # the metadata of an exported file
    embedder: Embedder | None = None  # the model itself, in PyTorch

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed (N, height, width, 3) uint8 images: (N, D) float32."""
        return self.run(images)

    def photos(self, photos: list[np.ndarray]) -> np.ndarray:
        """Embed images of any size, (H, W, 3) uint8: (N, D) float32."""
        sized = [resize(photo[None], self.height, self.width) for photo in photos]
        steps = range(0, len(sized), self.batch)
        return np.concatenate([self(np.concatenate(sized[i : i + self.batch])) for i in steps])


def open_runtime(
    model: str, device: str, tracking_uri: str | None, engine: Engine | None = None
) -> Runtime:
    """Load a model, wherever it is: see `registry.load`, or an exported ONNX file."""
    if uses_onnx(model, engine):
        with fetched_onnx(model, tracking_uri) as path:
            return onnx_runtime(path, device)
    with fetched(model, tracking_uri) as folder:
        embedder = Embedder.from_folder(folder, None if device == "auto" else device)
        weights = weights_digest(folder)
    set_precision(embedder.config)
    options = {
        "mirror": embedder.config.evaluation.mirror,
        "autocast": autocast(embedder.config, embedder.device),
    }

    def run(images: np.ndarray) -> np.ndarray:
        pixels = torch.tensor(images, device=embedder.device)  # a copy: Ray's arrays are read-only
        return embed(embedder.network, pixels, **options).cpu().numpy()

    return torch_runtime(embedder, weights, run)


def torch_runtime(
    embedder: Embedder, weights: str, run: Callable[[np.ndarray], np.ndarray]
) -> Runtime:
    """What `run` computes with a model in PyTorch."""
    size, batch = embedder.config.image, embedder.config.evaluation.batch
    shape = size.height, size.width, batch, embedder.embedding_size
    return Runtime(run, *shape, weights, embedder=embedder)


def onnx_runtime(path: Path, device: str) -> Runtime:
    """An exported ONNX file."""
    run, facts = open_onnx(path, device)
    height, width, batch = (int(facts[name]) for name in ("height", "width", "batch"))
    return Runtime(run, height, width, batch, int(facts["dimensions"]), facts["weights"], facts)


def known_thresholds(
    model: str, tracking_uri: str | None, facts: Mapping[str, str]
) -> Thresholds | None:
    """The thresholds of a model; an ONNX file has them among its facts."""
    if model.endswith(ONNX):
        return Thresholds.from_json(json.loads(facts[THRESHOLDS])) if THRESHOLDS in facts else None
    with tempfile.TemporaryDirectory(prefix="reid-thresholds-") as temporary:
        return find_thresholds(model, Path(temporary), tracking_uri)


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights, in hex."""
    return file_sha256(folder / WEIGHTS)


def uses_onnx(model: str, engine: Engine | None) -> bool:
    """Whether ONNX Runtime runs a model: if it was asked for, or if the model is an ONNX file."""
    is_file = model.endswith(ONNX)
    if is_file and engine == "torch":
        raise ConfigError(f"{model} is an ONNX file: leave out --runtime torch")
    if engine == "onnx" and not is_file and not model.startswith("models:/"):
        raise ConfigError(
            f"--runtime onnx needs an ONNX file, or a registered model that was exported: make "
            f"the file with `export --model {model} --out FILE{ONNX}`"
        )
    return is_file or engine == "onnx"


@contextmanager
def fetched_onnx(model: str, tracking_uri: str | None) -> Iterator[Path]:
    """The ONNX file of a model on this machine, until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="reid-onnx-") as temporary:
        folder = Path(temporary)
        if model.startswith("models:/"):
            tags = [f"export.onnx.{precision}" for precision in ("fp32", "fp16")]
            path = fetch_attached(model, tags, folder, tracking_uri)
            if path is None:
                raise DataError(
                    f"{model} was not exported to ONNX: `export --model {model} --out FILE{ONNX}` "
                    "does it"
                )
            yield path
            return
        storage, key = open_file(model)
        if isinstance(storage, LocalStorage):
            storage.size(key)  # raises if it is not there
            yield storage.root / key
            return
        storage.download(key, folder / key)
        yield folder / key
