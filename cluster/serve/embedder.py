"""The deployment that embeds: photos of queries in batches, and the gallery in the background."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray import serve

from cluster.serve.settings import Settings
from data_shards.loading.decode import decode_into
from reid_train.commands.runtime import Runtime, known_thresholds, open_runtime
from reid_train.evaluation.thresholds import Thresholds

MODELS = 2  # that a replica keeps: the one in use, and the one that follows it
WAIT_SECONDS = 0.01  # for more photos to join a batch


@dataclass(frozen=True)
class ModelFacts:
    """What a search must know of a model."""

    height: int
    width: int
    batch: int
    embedding_size: int
    weights: str
    thresholds: dict[str, Any] | None  # as JSON has them
    runtime: str = "torch"

    @property
    def measured(self) -> Thresholds | None:
        """The model's thresholds."""
        return None if self.thresholds is None else Thresholds.from_json(self.thresholds)


class Embedder:
    """A replica with the model in use, and the next one while the gallery is embedded for it.

    Models are named by their version, so that every answer is of the model that was asked for.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(max(1, settings.cpus_per_replica))
        self.settings = settings
        self.models: dict[str, Runtime] = {}
        self.pool = ThreadPoolExecutor(1)  # one forward pass at a time; the loop stays free

    async def describe(self, model: str) -> dict[str, Any]:
        """The facts of a model, loaded if it is not yet."""

        def facts() -> ModelFacts:
            runtime = self._model(model)
            known = known_thresholds(model, self.settings.tracking_uri, runtime.facts)
            size = runtime.height, runtime.width, runtime.batch, runtime.embedding_size
            engine = "onnx" if runtime.embedder is None else "torch"
            return ModelFacts(*size, runtime.weights, known.to_json() if known else None, engine)

        return asdict(await self._in_pool(facts))

    async def embed_photo(self, model: str, data: bytes) -> np.ndarray:
        """Decode and embed an image file: (D,) float32. Raises `DataError` for no image."""
        runtime = self.models.get(model) or await self._in_pool(self._model, model)
        pixels = np.empty((runtime.height, runtime.width, 3), np.uint8)
        await asyncio.to_thread(decode_into, data, pixels)
        return await self._photos((model, pixels))  # the decorator joins calls into lists

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=WAIT_SECONDS)
    async def _photos(self, asked: list[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for model in {name for name, _ in asked}:  # two, while one follows the other
            which = [i for i, (name, _) in enumerate(asked) if name == model]
            rows = await self.embed_pixels(model, np.stack([asked[i][1] for i in which]))
            found |= dict(zip(which, rows, strict=True))
        return [found[i] for i in range(len(asked))]

    async def embed_pixels(self, model: str, images: np.ndarray) -> np.ndarray:
        """Embed images of the model's size, (N, H, W, 3) uint8: (N, D) float32."""
        return await self._in_pool(lambda: self._model(model)(images))

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def _model(self, name: str) -> Runtime:
        """A model; loaded if need be, in place of the one that was not used for longest."""
        runtime = self.models.pop(name, None)
        if runtime is None:
            while len(self.models) >= MODELS:
                del self.models[next(iter(self.models))]
            options = self.settings.device, self.settings.tracking_uri, self.settings.runtime
            runtime = open_runtime(name, *options)
        self.models[name] = runtime
        return runtime
