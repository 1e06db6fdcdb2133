"""`reid_train export`: a model as one file for other programs, compared before it is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from data_shards.errors import ConfigError, DataError
from data_shards.progress import Progress, display, phase, say
from reid_train.commands.embed import require_found
from reid_train.config import LoaderConfig

if TYPE_CHECKING:
    from rich.console import Console

    from data_shards.dataset import Dataset
    from reid_train.commands.runtime import Runtime

PHOTOS = 16  # that are compared
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}  # of the embedding of an image of the network's size
RESIZED = 5e-2  # of one that is resized: OpenCV rounds otherwise
POINTS = 0.05  # of mAP, in per cent
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}


@dataclass(frozen=True)
class Export:
    """Write a model as one file: uint8 RGB images of any size in, embeddings out.

    python -m reid_train export --model models:/reid-msmt17@champion --out reid.onnx
    """

    model: str
    """models:/name@champion, models:/name/3, or a checkpoint's or run's folder or s3:// URL."""
    out: str
    """The file to write, local or s3://…: NAME.onnx, or NAME.pt2 for torch-export."""
    format: Literal["onnx", "torch-export"] = "onnx"
    """ONNX for any program, or an exported program for torch.export.load."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of the network; embeddings are float32."""
    data: str | None = None
    """Sharded dataset: also compare the mAP of the file with that of PyTorch on its test split."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def check(self) -> None:
        """Raise `ConfigError` for a file name of another format."""
        if not self.out.endswith(SUFFIX[self.format]):
            raise ConfigError(
                f"--out {self.out!r}: a file of --format {self.format} is named "
                f"*{SUFFIX[self.format]}"
            )


class Parity(NamedTuple):
    """How far a file is from PyTorch: ‖difference‖ / ‖embedding‖, the largest of all images."""

    error: float  # of images of the network's size
    resized: float  # of images that the graph resizes
    mean_average_precision: float | None = None
    of_torch: float | None = None


def export(settings: Export, console: Console) -> Parity:
    """Run the command: export, compare, write, and log beside the registered version."""
    settings.check()
    data = [settings.data] if settings.data else []
    require_found(console, [settings.model], data, settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch"):
        from data_shards.dataset import Dataset
        from data_shards.storage import open_file
        from reid_train.commands.measurable import labels_of
        from reid_train.commands.runtime import known_thresholds, weights_digest
        from reid_train.evaluation.ground_truth import find_ground_truth
        from reid_train.model import exported
        from reid_train.model.embedder import Embedder
        from reid_train.registry.attached import attach
        from reid_train.registry.load import fetched
    if settings.format == "onnx":
        exported.require_onnx()
    dataset = None
    if settings.data:
        dataset = Dataset.open(settings.data, cache=settings.loader.node_cache)
        find_ground_truth(labels_of(dataset, "test"))  # raises if there is none, before the work
    storage, key = open_file(settings.out)
    with tempfile.TemporaryDirectory(prefix="reid-export-") as temporary, display(console) as shown:
        path = Path(temporary) / f"reid-{settings.precision}{SUFFIX[settings.format]}"
        with fetched(settings.model, settings.tracking_uri) as folder:
            with phase(shown, "loading the model"):
                embedder = Embedder.from_folder(folder, "cpu")
            weights = weights_digest(folder)
        size, batch = embedder.config.image, embedder.config.evaluation.batch
        facts = {"model": settings.model, "weights": weights, "precision": settings.precision}
        numbers = {"height": size.height, "width": size.width, "batch": batch}
        numbers["dimensions"] = embedder.embedding_size
        facts |= {name: str(number) for name, number in numbers.items()}
        if known := known_thresholds(settings.model, settings.tracking_uri, {}):
            facts["thresholds"] = json.dumps(known.to_json())
        with phase(shown, f"exporting as {settings.format}"):
            exported.export(embedder, path, settings.precision, facts)
        with phase(shown, "comparing with PyTorch"):
            run = exported.open_exported(path)
            parity = compare(embedder, run, _photos(dataset))
        _require(parity, settings.precision)
        if dataset is not None:
            parity = _measure(parity, embedder, run, weights, dataset, settings.loader, shown)
        with phase(shown, "writing"):
            storage.upload(key, path)
        if settings.model.startswith("models:/"):
            opset = {"opset": exported.OPSET} if settings.format == "onnx" else {}
            kept: dict[str, Any] = facts | opset
            kept |= parity._asdict()
            tag = f"export.{settings.format}.{settings.precision}"
            with phase(shown, "logging to MLflow"):
                attach(settings.model, path, tag, kept, settings.tracking_uri)
    say(console, f"{settings.out}: {numbers['dimensions']:,} numbers an image")
    text = f"differs from PyTorch by {parity.error:.1e} of an embedding's length"
    say(console, f"{text}; by {parity.resized:.1e} where it resizes the image")
    if parity.mean_average_precision is not None and parity.of_torch is not None:
        ours, theirs = 100 * parity.mean_average_precision, 100 * parity.of_torch
        say(console, f"mAP {ours:.2f} % from the file, {theirs:.2f} % from PyTorch in float32")
    return parity


def compare(
    embedder: Callable[[np.ndarray], np.ndarray] | Any,
    run: Callable[[np.ndarray], np.ndarray],
    photos: Sequence[np.ndarray],
) -> Parity:
    """Compare an exported file with an `Embedder` on photos, as they are and resized by OpenCV."""
    from reid_train.model.embedder import resize

    def error(images: np.ndarray) -> float:
        expected, found = embedder(images), run(images)
        length = np.linalg.norm(expected, axis=1)
        return float((np.linalg.norm(found - expected, axis=1) / length).max())

    size = embedder.config.image
    sized = np.concatenate([resize(photo[None], size.height, size.width) for photo in photos])
    # Twice and more as large, so that areas are averaged; and each photo as it is.
    large = resize(photos[0][None], 2 * size.height + 9, 2 * size.width + 5)
    others = [error(photo[None]) for photo in photos if photo.shape != sized.shape[1:]]
    return Parity(error(sized), max([error(large), *others]))


def _require(parity: Parity, precision: str) -> None:
    """Raise `DataError` if the file is too far from PyTorch."""
    limits = (parity.error, TOLERANCE[precision]), (parity.resized, RESIZED)
    for error, limit in limits:
        if not error <= limit:  # NaN, too
            raise DataError(
                f"the exported file's embeddings differ from PyTorch's by {error:.1e} of their "
                f"length, and {limit:.0e} is allowed: nothing was written"
                + (". Try --precision fp32" if precision == "fp16" else "")
            )


def _photos(dataset: Dataset | None) -> list[np.ndarray]:
    """Images of the dataset's gallery, or drawn people."""
    from data_shards.loading.decode import decode

    if dataset is not None:
        index = dataset.index("gallery")
        return [decode(dataset.read(index, row)) for row in range(min(PHOTOS, len(index)))]
    from data_shards.sources.synthetic.cameras import Camera, Person

    cameras = [Camera(0, number) for number in range(2)]
    people = [Person(np.random.default_rng([0, number])) for number in range(PHOTOS // 2)]
    rng = np.random.default_rng(0)
    return [decode(camera.photograph(who, rng)) for who in people for camera in cameras]


def _measure(
    parity: Parity,
    embedder: Any,
    run: Callable[[np.ndarray], np.ndarray],
    weights: str,
    dataset: Dataset,
    loader: LoaderConfig,
    progress: Progress,
) -> Parity:
    """Add the mAP of both. Raises `DataError` if they differ."""
    from reid_train.commands.runtime import torch_runtime

    def measured(name: str, engine: Callable[[np.ndarray], np.ndarray]) -> float:
        def shown(stage: str, done: int, total: int) -> None:
            progress(f"{stage} with {name}", done, total)

        runtime = torch_runtime(embedder, weights, engine)
        return _mean_average_precision(runtime, dataset, loader, shown)

    ours, theirs = measured("the file", run), measured("PyTorch", embedder)
    if not 100 * abs(ours - theirs) <= POINTS:
        raise DataError(
            f"the exported file has mAP {100 * ours:.3f} % on {dataset.url} and PyTorch "
            f"{100 * theirs:.3f} %: more than {POINTS} points apart, so nothing was written"
        )
    return parity._replace(mean_average_precision=ours, of_torch=theirs)


def _mean_average_precision(
    runtime: Runtime, dataset: Dataset, loader: LoaderConfig, progress: Progress
) -> float:
    from reid_train.commands.gallery import blocks, open_gallery
    from reid_train.commands.measurable import labels_of
    from reid_train.evaluation.evaluate import evaluate
    from reid_train.evaluation.measures import Measures

    def embedded(split: str) -> np.ndarray:
        parts = blocks(open_gallery(dataset.url, split), runtime, loader, progress)
        return np.concatenate([part.embedding for part in parts])

    labels = labels_of(dataset, "test")
    found = evaluate(embedded("query"), embedded("gallery"), labels, Measures())
    return found.result.mAP
