"""`reid_train embed`: what it is told, and what it does in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from data_shards.errors import ConfigError
from data_shards.progress import display, phase
from reid_train.config import LoaderConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Embed:
    """Embed a dataset or a folder of images; write Parquet parts. The same command continues a job.

    python -m reid_train embed --model models:/reid-msmt17@champion --data s3://bucket/msmt17
        --out s3://bucket/embeddings
    """

    model: str
    """models:/name@champion, a checkpoint's or run's folder or s3:// URL, or an ONNX file."""
    data: str
    """Sharded dataset, or a folder of images: s3://bucket/prefix or a folder."""
    out: str
    """Where to write the parts: s3://bucket/prefix or a folder."""
    splits: tuple[str, ...] = ("query", "gallery")
    """Which splits of a dataset. All images of a folder are written as gallery."""
    workers: int = 1
    """Ray workers, each with a copy of the model."""
    cpus_per_worker: int | None = None
    """Cores of each worker; by default the nodes' cores, shared by the workers (with GPUs 1)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda gives each worker a GPU; auto does if enough are free."""
    batch: int | None = None
    """Images that a worker embeds at a time; by default the model's evaluation.batch."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    runtime: Literal["torch", "onnx"] | None = None
    """What runs the model; by default PyTorch, and ONNX Runtime for an ONNX file."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def check_counts(**numbers: int | None) -> None:
    """Raise `ConfigError` for numbers below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, not {number}")


def require_found(
    console: Console,
    models: Iterable[str],
    images: Iterable[str] = (),
    tracking_uri: str | None = None,
) -> None:
    """Look for models and images before PyTorch is loaded: a mistyped name is an error at once.

    Raises:
        ReidError: one of them is not there. Files of embeddings and ONNX files are not looked for.
    """
    from data_shards.images import require_images
    from reid_train.registry.load import require_model

    with display(console) as progress, phase(progress, "looking for models and images"):
        for url in images:
            if not url.endswith((".parquet", ".npz")):
                require_images(url)
        for model in models:
            if not model.endswith(".onnx"):
                require_model(model, tracking_uri)


def embed(settings: Embed, console: Console) -> int:
    """Run the command; return the number of images."""
    cpus = settings.cpus_per_worker
    check_counts(workers=settings.workers, cpus_per_worker=cpus, batch=settings.batch)
    require_found(console, [settings.model], [settings.data], settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch and Ray"):
        from reid_train.commands.embedding_job import embed_dataset

    connect_ray(settings.workers * (cpus or 1), console)
    with display(console) as progress:
        return embed_dataset(settings, progress)


def connect_ray(cpus: int, console: Console) -> None:
    """Connect to the Ray cluster at hand, or start one here, as a phase on the console."""
    import ray

    from data_shards.ray_utils import start_ray

    if not ray.is_initialized():
        with display(console) as progress, phase(progress, "starting Ray"):
            start_ray(cpus)
