"""Evaluate embeddings: from what to measure to a measurement that is written as JSON.

There is one way for one process and for a cluster. The work of each stage is divided into tasks
over blocks of the gallery, or of the product of all images with all. A pool runs the tasks, here or
on Ray's workers, and their results are combined. To rank Parquet embeddings on a cluster, tasks
stream the gallery from storage. Re-ranking, expansion and augmentation compare all images with all:
one task reads all embeddings, and each node holds them once in Ray's shared memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import attrgetter
from typing import Any

import numpy as np

from data_shards.progress import Progress, silent
from reid_train.evaluation.camera_pairs import count_by_camera, metrics_by_cameras
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.expansion import averaged, gallery_neighbours
from reid_train.evaluation.ground_truth import Labels, find_ground_truth
from reid_train.evaluation.kernels.rank_counts import COSINE
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import (
    Block,
    Neighbours,
    all_pairs,
    blocks_across,
    merge,
    query_gallery_pairs,
)
from reid_train.evaluation.ranking import BLOCK, count_before, ranks_of, score_matches
from reid_train.evaluation.reranking import (
    encode,
    find_neighbours,
    rank_reranked,
    room_for_scores,
)
from reid_train.evaluation.similarity import Features, check_inputs, metric_code
from reid_train.evaluation.tasks import (
    Joined,
    Pool,
    Range,
    Separate,
    Streamed,
    length,
    ranges,
    read_all,
)
from reid_train.evaluation.verification import BLOCK as ACCEPT_BLOCK
from reid_train.evaluation.verification import count_distances, rates_of

UNITS = {
    "neighbours": "pairs",
    "expansion": "pairs",
    "augmentation": "pairs",
    "distances": "queries",
}
"""What the stages count in progress; the others count images."""


@dataclass(frozen=True)
class Measurement:
    """What was measured, and of how much.

    Args:
        result: the metrics; of the re-ranked gallery if that was asked for.
        queries, gallery, dimensions: sizes.
        measures: the settings.
        plain: the metrics before re-ranking, if there was one.
        pairs: metrics by (query camera, gallery camera), as if there were only these two.
    """

    result: RankingResult
    queries: int
    gallery: int
    dimensions: int
    measures: Measures
    plain: RankingResult | None = None
    pairs: dict[tuple[int, int], RankingResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Metrics, CMC, sizes and settings, as JSON has them."""
        found: dict[str, object] = {"metrics": self.result.summary()}
        if self.plain is not None:
            found["metrics_before_reranking"] = self.plain.summary()
        return found | {
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


def evaluate(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    measures: Measures,
    *,
    progress: Progress = silent,
) -> Measurement:
    """Measure how well the gallery answers the queries.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        labels: identities and cameras.
        measures: what to measure.
        progress: called with each stage.

    Raises:
        DataError: NaN or infinite embeddings, other shapes or types, or no query with a match.
        ConfigError: settings out of range, or too large for so few images.
    """
    measures.check()
    features = check_inputs(query, gallery, labels)
    measures.check(len(query), len(gallery))
    source = Separate(*features)
    if measures.compares_all:
        source = Joined(Features.joined(*features), len(query))
    edges = ranges(len(gallery), BLOCK)
    stages = _Stages(Pool(progress=progress), source, edges, labels, measures)
    return stages.run(features[0].embedding.shape[1])


def evaluate_files(
    files: EmbeddingFiles, measures: Measures, *, workers: int = 1, progress: Progress = silent
) -> Measurement:
    """`evaluate` embeddings in Parquet files, to the same bits.

    Args:
        files: query and gallery, on storage that every worker reaches.
        workers: Ray tasks that run at a time; 1 is this process, without Ray.
    """
    measures.check()
    labels, pool = files.labels, Pool(workers, progress)
    find_ground_truth(labels)
    measures.check(len(labels.query_pid), len(labels.gallery_pid))
    if workers == 1 or measures.compares_all:
        source = pool.one("reading embeddings", read_all, files)
        edges = ranges(len(labels.gallery_pid), BLOCK)
    else:
        source = pool.put(Streamed(Features.of(files.read("query")), files))
        edges = [(a, b) for a, b in files.edges("gallery") if a < b]
    return _Stages(pool, source, edges, labels, measures).run(files.dimensions)


class _Stages:
    """The stages of one evaluation.

    Args:
        pool: runs the tasks.
        source: a `tasks.Source`, as the pool's `put` gives it.
        edges: the ranges of the gallery that tasks read at a time.
        labels, measures: as in `evaluate`.
    """

    def __init__(
        self, pool: Pool, source: Any, edges: list[Range], labels: Labels, measures: Measures
    ) -> None:
        self.pool, self.source, self.edges = pool, source, edges
        self.labels, self.measures = labels, measures
        self.queries, self.gallery = len(labels.query_pid), len(labels.gallery_pid)
        self.truth = find_ground_truth(labels)
        self.given_truth = pool.put(self.truth)

    def run(self, dimensions: int) -> Measurement:
        """All stages."""
        measures, plain = self.measures, None
        if measures.expand or measures.augment:
            self._replace()
        result, pairs = self._rank()
        if measures.rerank:
            plain, result = result, self._rerank()
        sizes = self.queries, self.gallery, dimensions
        return Measurement(result, *sizes, measures, plain, pairs)

    def _rank(self) -> tuple[RankingResult, dict[tuple[int, int], RankingResult]]:
        """Metrics, and those of camera pairs if they are asked for."""
        measures, edges, metric = self.measures, self.edges, self.measures.metric
        given = self.source, self.given_truth, metric
        found = list(self.pool.map("matches", score_matches, given, edges, length))
        # Each entry is scored by the one task that has its gallery image.
        scores = self.pool.put(reduce(np.fmax, [scores for scores, _ in found]))
        counts = self.pool.map("ranking", count_before, (*given, scores), edges, length)
        ranks = ranks_of(self.truth, reduce(np.add, counts))
        result, pairs = metrics_of(self.truth.positives(), ranks, measures.max_rank), {}
        if measures.false_accept_rates:
            blocks = ranges(self.gallery, ACCEPT_BLOCK)
            given = *given, max(longest for _, longest in found)
            counts = self.pool.map("false accept rates", count_distances, given, blocks, length)
            rates = rates_of(reduce(np.add, counts), measures.false_accept_rates)
            result = replace(result, tar_at_far=rates)
        if measures.camera_pairs:
            given = self.source, self.pool.put(self.labels), self.given_truth, metric, scores
            counts = self.pool.map("camera pairs", count_by_camera, given, edges, length)
            total = [reduce(np.add, parts) for parts in zip(*counts, strict=True)]
            pairs = metrics_by_cameras(self.labels, total, measures.max_rank)
        return result, pairs

    def _replace(self) -> None:
        """Expand queries, augment the gallery, or both."""
        measures, near = self.measures, [None, None]
        if k := measures.expand:
            blocks = query_gallery_pairs(self.queries, self.queries + self.gallery)
            given = self.source, k, COSINE, None
            found = self._neighbours("expansion", find_neighbours, given, blocks)
            near[0] = self.pool.put(found.rows(0, self.queries))
        if k := measures.augment:
            given, blocks = (self.source, k, COSINE), all_pairs(self.gallery)
            found = self._neighbours("augmentation", gallery_neighbours, given, blocks)
            near[1] = self.pool.put(found)
        self.source = self.pool.one(
            "averaging neighbours", averaged, self.source, *near, measures.alpha
        )
        self.edges = ranges(self.gallery, BLOCK)

    def _rerank(self) -> RankingResult:
        settings, code = self.measures.reranking, metric_code(self.measures.metric)
        total = self.queries + self.gallery
        kept = room_for_scores(self.queries, self.gallery) if self.pool.workers == 1 else None
        given = self.source, settings.needed, code, kept
        near = self.pool.put(
            self._neighbours("neighbours", find_neighbours, given, all_pairs(total))
        )
        # One task: it takes a hundredth of the time of the products.
        encoding = self.pool.one("encoding neighbours", encode, self.source, near, settings, code)
        given = self.source, encoding, settings, code, self.given_truth, kept
        across = blocks_across(self.queries, total)
        found = self.pool.map("distances", rank_reranked, given, across, self._height)
        ranks = reduce(np.add, found)
        return metrics_of(self.truth.positives(), ranks, self.measures.max_rank)

    def _neighbours(
        self, stage: str, function: Any, given: tuple, blocks: list[Block]
    ) -> Neighbours:
        return reduce(merge, self.pool.map(stage, function, given, blocks, attrgetter("pairs")))

    def _height(self, blocks: list[Block]) -> int:
        """How many queries a row of blocks has."""
        return min(blocks[0].rows[1], self.queries) - blocks[0].rows[0]
