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
from typing import Any

import numpy as np

from data_shards.progress import Progress, silent
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.ground_truth import (
    Labels,
    find_ground_truth,
    split_by_camera,
)
from reid_train.evaluation.kernels.rank_counts import COSINE
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.metrics import RankingResult, metrics_by_query_camera, metrics_of
from reid_train.evaluation.neighbours import (
    Block,
    Neighbours,
    Range,
    all_pairs,
    blocks_across,
    merge,
    query_gallery_pairs,
    ranges,
)
from reid_train.evaluation.ranking import BLOCK, ranks_of
from reid_train.evaluation.reranking import room_for_scores
from reid_train.evaluation.similarity import Features, check_inputs, metric_code
from reid_train.evaluation.task_pool import LocalPool, Pool, RayPool
from reid_train.evaluation.tasks import (
    Joined,
    Separate,
    Streamed,
    accept_task,
    camera_task,
    count_task,
    distance_task,
    encode_all,
    gallery_neighbour_task,
    longest_task,
    match_task,
    neighbour_task,
    read_all,
    replaced,
)
from reid_train.evaluation.verification import BLOCK as ACCEPT_BLOCK
from reid_train.evaluation.verification import rates_of

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
    return _Evaluation(LocalPool(progress), labels, measures).run(
        source, edges, features[0].embedding.shape[1]
    )


def evaluate_files(
    files: EmbeddingFiles, measures: Measures, *, workers: int = 1, progress: Progress = silent
) -> Measurement:
    """`evaluate` embeddings in Parquet files, to the same bits.

    Args:
        files: query and gallery, on storage that every worker reaches.
        workers: Ray tasks that run at a time; 1 does without Ray.
    """
    measures.check()
    labels = files.labels
    find_ground_truth(labels)
    measures.check(len(labels.query_pid), len(labels.gallery_pid))
    pool = RayPool(workers, progress) if workers > 1 else LocalPool(progress)
    if workers > 1 and not measures.compares_all:
        source = pool.put(Streamed(Features.of(files.read("query")), files))
        edges = [(a, b) for a, b in files.edges("gallery") if a < b]
    else:
        source, edges = pool.one("reading", read_all, files), ranges(len(labels.gallery_pid), BLOCK)
    return _Evaluation(pool, labels, measures).run(source, edges, files.dimensions)


class _Evaluation:
    """The stages of one evaluation. A source is a `tasks.Source`, or what a pool makes of it."""

    def __init__(self, pool: Pool, labels: Labels, measures: Measures) -> None:
        self.pool, self.labels, self.measures = pool, labels, measures
        self.queries, self.gallery = len(labels.query_pid), len(labels.gallery_pid)
        self.truth = find_ground_truth(labels)
        self.shared_truth = pool.put(self.truth)

    def run(self, source: Any, edges: list[Range], dimensions: int) -> Measurement:
        """All stages.

        Args:
            edges: the ranges of the gallery that are read at a time.
        """
        measures = self.measures
        if measures.expand or measures.augment:
            source = self._replace(source)
        result, pairs = self._rank(source, edges)
        plain = None
        if measures.rerank:
            plain, result = result, self._rerank(source)
        sizes = self.queries, self.gallery, dimensions
        return Measurement(result, *sizes, measures, plain, pairs)

    def _rank(
        self, source: Any, edges: list[Range]
    ) -> tuple[RankingResult, dict[tuple[int, int], RankingResult]]:
        """Metrics, and those of camera pairs if they are asked for."""
        metric, max_rank = self.measures.metric, self.measures.max_rank
        given = source, self.shared_truth, metric
        # Each entry is scored by the one task that has its gallery image.
        scores = reduce(np.fmax, self.pool.map("matches", match_task, given, edges, _length))
        shared_scores = self.pool.put(scores)
        given = *given, shared_scores
        before = reduce(np.add, self.pool.map("ranking", count_task, given, edges, _length))
        result = metrics_of(self.truth.positives(), ranks_of(self.truth, before), max_rank)
        if self.measures.false_accept_rates:
            result = replace(result, tar_at_far=self._accept(source, edges))
        pairs = {}
        if self.measures.camera_pairs:
            labels = self.pool.put(self.labels)
            given = source, labels, self.shared_truth, metric, shared_scores
            counts = self.pool.map("camera pairs", camera_task, given, edges, _length)
            for (camera, _, part), *parts in zip(
                split_by_camera(self.labels), *counts, strict=True
            ):
                own = find_ground_truth(part)
                ranks = ranks_of(own, reduce(np.add, parts))
                found = metrics_by_query_camera(part.query_camid, own.positives(), ranks, max_rank)
                pairs |= {(asked, camera): metrics for asked, metrics in found.items()}
        return result, dict(sorted(pairs.items()))

    def _accept(self, source: Any, edges: list[Range]) -> dict[float, float]:
        """True accept rate by false accept rate."""
        metric, longest = self.measures.metric, 0.0
        if metric == "euclidean":
            longest = max(self.pool.map("lengths", longest_task, (source,), edges, _length))
        given = source, self.shared_truth, metric, longest
        blocks = ranges(self.gallery, ACCEPT_BLOCK)
        counts = self.pool.map("false accept rates", accept_task, given, blocks, _length)
        return rates_of(reduce(np.add, counts), self.measures.false_accept_rates)

    def _replace(self, source: Any) -> Any:
        """Expand queries, augment the gallery, or both."""
        measures, near = self.measures, [None, None]
        total = self.queries + self.gallery
        if k := measures.expand:
            blocks = query_gallery_pairs(self.queries, total)
            given = source, k, COSINE, None
            found = self._neighbours("expansion", neighbour_task, given, blocks)
            near[0] = self.pool.put(found.rows(0, self.queries))
        if k := measures.augment:
            blocks = all_pairs(self.gallery)
            found = self._neighbours(
                "augmentation", gallery_neighbour_task, (source, k, COSINE), blocks
            )
            near[1] = self.pool.put(found)
        return self.pool.one("averaging", replaced, source, *near, measures.alpha)

    def _rerank(self, source: Any) -> RankingResult:
        settings, code = self.measures.reranking, metric_code(self.measures.metric)
        total = self.queries + self.gallery
        local = isinstance(self.pool, LocalPool)
        kept = room_for_scores(self.queries, self.gallery) if local else None
        given = source, settings.needed, code, kept
        near = self._neighbours("neighbours", neighbour_task, given, all_pairs(total))
        # One task: it takes a hundredth of the time of the products.
        encoding = self.pool.one(
            "encoding", encode_all, source, self.pool.put(near), settings, code
        )
        given = source, encoding, settings, code, self.shared_truth, kept
        across = blocks_across(self.queries, total)
        ranks = reduce(np.add, self.pool.map("distances", distance_task, given, across, self._rows))
        return metrics_of(self.truth.positives(), ranks, self.measures.max_rank)

    def _neighbours(self, stage: str, task: Any, given: tuple, blocks: list[Block]) -> Neighbours:
        return reduce(merge, self.pool.map(stage, task, given, blocks, lambda block: block.pairs))

    def _rows(self, blocks: list[Block]) -> int:
        return min(blocks[0].rows[1], self.queries) - blocks[0].rows[0]


def _length(edge: Range) -> int:
    return edge[1] - edge[0]
