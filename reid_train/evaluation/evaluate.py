"""From embeddings and what to measure of them, to a measurement that travels as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from data_shards.errors import ConfigError
from reid_train.evaluation.camera_pairs import rank_by_camera_pair
from reid_train.evaluation.distance_ranking import rank_distances
from reid_train.evaluation.expansion import augment_gallery, check_expansion, expand_queries
from reid_train.evaluation.ground_truth import Labels
from reid_train.evaluation.metrics import RankingResult
from reid_train.evaluation.ranking import rank
from reid_train.evaluation.reranking import ReRanking, rerank
from reid_train.evaluation.similarity import Metric

Progress = Callable[[str, int, int], object]
"""Told the stage's name, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Measures:
    """What to measure."""

    metric: Metric = "cosine"
    """Distance of the ranking."""
    rerank: bool = False
    """Re-rank by k-reciprocal encoding."""
    k1: int = 20
    """Re-ranking: neighbours looked at for reciprocity."""
    k2: int = 6
    """Re-ranking: neighbours averaged over; 1 leaves that out."""
    weight: float = 0.3
    """Re-ranking: λ, the share of the original distance."""
    expand: int = 0
    """Query expansion: gallery images that join each query; 0 is off."""
    augment: int = 0
    """Database augmentation: gallery images averaged over; 0 is off."""
    alpha: float = 3.0
    """The power of the similarity by which expansion and augmentation weigh."""
    max_rank: int = 50
    """Length of the CMC."""
    false_accept_rates: tuple[float, ...] = ()
    """Give the true accept rate at these false accept rates, too."""
    camera_pairs: bool = False
    """Break the metrics down by the query's and the gallery's camera, too."""

    @property
    def reranking(self) -> ReRanking:
        """The settings of re-ranking."""
        return ReRanking(self.k1, self.k2, self.weight)

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be measured together."""
        if self.rerank and (self.camera_pairs or self.false_accept_rates):
            raise ConfigError(
                "camera pairs and false accept rates are measured without re-ranking: "
                "leave out one of the two"
            )
        if self.rerank:
            self.reranking.check()
        for name, k in (("--expand", self.expand), ("--augment", self.augment)):
            if k < 0:
                raise ConfigError(f"{name} takes a number of images, or 0 for none, not {k}")
            if k:
                check_expansion(k, self.alpha)
        if self.max_rank < 1:
            raise ConfigError(f"the CMC must have a rank at least, not {self.max_rank}")
        if any(not 0 < rate < 1 for rate in self.false_accept_rates):
            raise ConfigError(f"false accept rates lie in (0, 1), not {self.false_accept_rates}")

    def check_sizes(self, queries: int, gallery: int) -> None:
        """Raise `ConfigError` for what cannot be measured of so few images."""
        if self.rerank:
            self.reranking.check(queries + gallery)
        for k in (self.expand, self.augment):
            if k:
                check_expansion(k, self.alpha, gallery)


@dataclass(frozen=True)
class Measurement:
    """What was measured, of how much."""

    result: RankingResult
    queries: int
    gallery: int
    dimensions: int
    measures: Measures
    pairs: dict[tuple[int, int], RankingResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Metrics, CMC, sizes and settings, as JSON has them."""
        return {
            "metrics": self.result.summary(),
            "cmc": self.result.cmc.tolist(),
            "queries": self.queries,
            "queries_with_match": self.result.valid,
            "gallery": self.gallery,
            "dimensions": self.dimensions,
            "measures": asdict(self.measures),
            "camera_pairs": [
                {"query": a, "gallery": b, "queries": r.valid, "metrics": r.summary()}
                for (a, b), r in self.pairs.items()
            ],
        }


def measure(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    measures: Measures,
    progress: Progress = lambda stage, done, total: None,
) -> Measurement:
    """Measure how well the gallery answers the queries.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        labels: identities and cameras.

    Raises:
        DataError, ConfigError: as `rank`, `rerank` and the expansions.
    """
    measures.check()
    if measures.expand:
        query = expand_queries(query, gallery, k=measures.expand, alpha=measures.alpha)
    if measures.augment:
        gallery = augment_gallery(gallery, k=measures.augment, alpha=measures.alpha)
    sizes = len(query), len(gallery), query.shape[1]
    if measures.rerank:
        blocks = rerank(
            query, gallery, measures.reranking, metric=measures.metric, progress=progress
        )
        result = rank_distances(blocks, labels, max_rank=measures.max_rank)
        return Measurement(result, *sizes, measures)
    done = 0

    def compared(pairs: int) -> None:
        nonlocal done
        done += pairs
        progress("ranking", done, len(query) * len(gallery))

    result = rank(
        query, gallery, labels.query_pid, labels.query_camid, labels.gallery_pid,
        labels.gallery_camid, metric=measures.metric, max_rank=measures.max_rank,
        false_accept_rates=measures.false_accept_rates, progress=compared,
    )  # fmt: skip
    pairs = {}
    if measures.camera_pairs:
        pairs = rank_by_camera_pair(
            query, gallery, labels, metric=measures.metric, max_rank=measures.max_rank
        )
    return Measurement(result, *sizes, measures, pairs)
