"""Retrieval while training: embed query and gallery on all workers, rank on the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from data_shards.dataset import Dataset
from data_shards.loader import split_batches
from reid_train.config import TrainConfig
from reid_train.evaluation.extract import Autocast, embed_batches, gather_rows
from reid_train.evaluation.ranking import rank as rank_gallery
from reid_train.evaluation.ranking import top_matches
from reid_train.model.network import ReidNet
from reid_train.training.context import Worker

QUERIES, MATCHES = 8, 10
"""Rows and columns of the rank-list picture."""
THREADS = 16
"""Of ranking, where the machine has as many cores."""


@dataclass(frozen=True)
class Validation:
    """Metrics by name, and the rank list of a few queries; both empty except on rank 0."""

    metrics: dict[str, float] = field(default_factory=dict)
    rank_list: dict[str, np.ndarray] = field(default_factory=dict)


def validate(
    config: TrainConfig, dataset: Dataset, worker: Worker, model: ReidNet, autocast: Autocast
) -> Validation:
    """Measure the model on the query and gallery splits, each image embedded exactly once.

    Collective: every rank calls it.
    """
    query, gallery = dataset.index("query"), dataset.index("gallery")
    if len(query) == 0 or len(gallery) == 0:
        return Validation()
    embeddings = []
    for split, index in (("query", query), ("gallery", gallery)):
        batches = split_batches(
            dataset,
            worker.cache,
            split,
            rank=worker.rank,
            world=worker.world,
            batch=config.evaluation.batch,
            height=config.image.height,
            width=config.image.width,
            workers=config.loader.workers,
        )
        part = embed_batches(
            model, batches, worker.device, mirror=config.evaluation.mirror, autocast=autocast
        )
        embeddings.append(gather_rows(part, len(index), worker.rank, worker.world))
    if worker.rank > 0:
        return Validation()
    found, base = (part.numpy() for part in embeddings)
    metric = config.evaluation.metric
    with _all_cores():
        result = rank_gallery(
            found,
            base,
            query.pid,
            query.camid,
            gallery.pid,
            gallery.camid,
            metric=metric,
            device=worker.device,
        )
    rows = _spread(result.average_precision)
    matches = top_matches(
        found[rows],
        base,
        query.pid[rows],
        query.camid[rows],
        gallery.pid,
        gallery.camid,
        k=MATCHES,
        metric=metric,
    )
    rank_list = {
        "query": rows,
        "gallery": matches,
        "similarity": _cosine(found[rows], base[matches]),
    }
    return Validation(result.summary(), rank_list)


def _cosine(query: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Cosine similarity (q, k) of queries (q, D) and their matches (q, k, D)."""
    products = np.einsum("qd,qkd->qk", query, matches)
    lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(matches, axis=2)
    return products / np.maximum(lengths, 1e-12)


@contextmanager
def _all_cores() -> Iterator[None]:
    """The other workers wait for this one to rank, and Ray gave it one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, min(os.cpu_count() or 1, THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spread(average_precision: np.ndarray) -> np.ndarray:
    """A few queries from the best found to the worst, so that the picture does not flatter."""
    valid = np.flatnonzero(~np.isnan(average_precision))
    order = valid[np.argsort(-average_precision[valid], kind="stable")]
    return order[np.linspace(0, len(order) - 1, min(QUERIES, len(order))).astype(int)]
