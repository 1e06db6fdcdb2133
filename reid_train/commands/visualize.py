"""`reid_train visualize`: what it is told, and what it does in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_shards.errors import ConfigError
from data_shards.progress import display, phase, say
from data_shards.records import EVALUATED
from reid_train.commands.embed import require_found
from reid_train.commands.search import require_local
from reid_train.config import LoaderConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Visualize:
    """Draw what a model makes of a dataset: rank lists, activations, a map of embeddings.

    python -m reid_train visualize --model models:/reid-msmt17@champion --data s3://bucket/msmt17
    """

    model: str
    """models:/name@champion, or a checkpoint's or run's folder or s3:// URL."""
    data: str
    """Sharded dataset: s3://bucket/prefix or a folder."""
    split: Literal["test", "validation"] = "test"
    """Whether to look at the test split or the validation split."""
    to: str = "reports/visualize"
    """Folder for the page and its pictures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def visualize(settings: Visualize, console: Console) -> Path:
    """Run the command: embed query and gallery, rank, draw; return the page."""
    require_local("--to", settings.to)
    if settings.model.endswith(".onnx"):
        raise ConfigError(
            f"{settings.model} is an ONNX file, whose maps cannot be seen: give the model that it "
            "was exported from"
        )
    require_found(console, [settings.model], [settings.data], settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch and Numba"):
        import numpy as np

        from data_shards.dataset import Dataset
        from reid_train.commands.gallery import blocks, gallery_of
        from reid_train.commands.measurable import labels_of
        from reid_train.commands.runtime import open_runtime
        from reid_train.evaluation.examples import choose_map, choose_rank_list
        from reid_train.evaluation.ground_truth import find_ground_truth
        from reid_train.evaluation.ranking import rank
        from reid_train.report.page import Row, write_page
        from reid_train.report.pictures import draw_examples
    dataset = Dataset.open(settings.data, cache=settings.loader.node_cache)
    split, labels = dataset.choose_split(settings.split), labels_of(dataset, settings.split)
    find_ground_truth(labels)  # raises if there is none, before the work
    with display(console) as progress:
        with phase(progress, "loading the model"):
            runtime = open_runtime(settings.model, settings.device, settings.tracking_uri)
        assert runtime.embedder is not None
        embedded = []
        for name in EVALUATED[split]:
            parts = blocks(gallery_of(dataset, name), runtime, settings.loader, progress)
            embedded.append(np.concatenate([part.embedding for part in parts]))
        found, base = embedded
        result = rank(found, base, labels, progress=progress)
        chosen = choose_rank_list(found, base, labels, result) | choose_map(base, labels)
        folder = Path(settings.to)
        folder.mkdir(parents=True, exist_ok=True)
        with phase(progress, "drawing"):
            pictures = draw_examples(folder, dataset, split, chosen, runtime.embedder)
    rows = [Row(name, None, value) for name, value in result.summary().items()]
    config = runtime.embedder.config.model_dump(mode="json")
    facts = {"model": settings.model, "dataset": f"{dataset.manifest.name} ({dataset.url})"}
    page = folder / "visualize.html"
    write_page(
        page, f"{settings.model} on {dataset.manifest.name}", rows, pictures, config, facts=facts
    )
    say(console, f"page       {page}")
    return page
