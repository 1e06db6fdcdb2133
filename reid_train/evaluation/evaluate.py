"""Evaluate embeddings: from what to measure to a measurement that is written as JSON.

A pool runs each stage's tasks over blocks of images or pairs, here or on Ray's workers. To rank
Parquet embeddings on a cluster, tasks stream the gallery from storage. Re-ranking, expansion and
augmentation compare all images with all: one task reads all embeddings, and each node holds them
once in Ray's shared memory.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from data_shards.errors import ConfigError
from data_shards.progress import Progress, silent
from data_shards.records import NO_CAMERA
from reid_train.evaluation import neighbours, reranking
from reid_train.evaluation.camera_pairs import count_by_camera, metrics_by_cameras
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.ground_truth import Labels, find_ground_truth
from reid_train.evaluation.measures import COSINE, Measures, metric_code
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import Block
from reid_train.evaluation.ranking import BLOCK, count_before, score_matches
from reid_train.evaluation.similarity import Features, check_inputs
from reid_train.evaluation.tasks import Joined, Pool, Separate, ranges
from reid_train.evaluation.thresholds import Thresholds
from reid_train.evaluation.verification import BLOCK as ACCEPT_BLOCK
from reid_train.evaluation.verification import count_distances, rates_of

# What the stages count in progress; the others count images.
UNITS = {"distances": "queries"}
UNITS |= dict.fromkeys(("neighbours", "expansion", "augmentation"), "pairs")


@dataclass(frozen=True)
class Measurement:
    """What was measured, and of how much.

    `pairs` are the metrics by (query camera, gallery camera), as if there were only these two.
    """

    result: RankingResult  # of the re-ranked gallery, if that was asked for
    queries: int
    gallery: int
    dimensions: int
    measures: Measures
    plain: RankingResult | None = None  # before re-ranking, if there was one
    pairs: dict[tuple[int, int], RankingResult] = field(default_factory=dict)
    thresholds: Thresholds | None = None  # if they were asked for
    datasets: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics, if merged

    def to_json(self) -> dict[str, object]:
        """Metrics, CMC, sizes and settings, as JSON has them."""
        found: dict[str, object] = {"metrics": self.result.summary()}
        if self.plain is not None:
            found["metrics_before_reranking"] = self.plain.summary()
        if self.thresholds is not None:
            found["thresholds"] = self.thresholds.to_json()
        if self.datasets:
            found["datasets"] = self.datasets
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
    _require_cameras(labels, measures)
    features = check_inputs(query, gallery, labels)
    measures.check(len(query), len(gallery))
    source = Separate(*features)
    if measures.compares_all:
        source = Joined(Features.joined(*features), len(query))
    edges = ranges(len(gallery), BLOCK)
    dimensions = features[0].embedding.shape[1]
    return _Stages(Pool(progress=progress), source, edges, labels, measures).run(dimensions)


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
    _require_cameras(labels, measures)
    find_ground_truth(labels)
    measures.check(len(labels.query_pid), len(labels.gallery_pid))
    if workers == 1 or measures.compares_all:
        source = pool.one("reading embeddings", _read, files)
        edges = ranges(len(labels.gallery_pid), BLOCK)
    else:
        source = pool.put(Separate(Features.of(files.read("query")), files))
        edges = [edge for edge in files.edges("gallery") if len(edge)]
    return _Stages(pool, source, edges, labels, measures).run(files.dimensions)


def _require_cameras(labels: Labels, measures: Measures) -> None:
    """Raise `ConfigError` if camera pairs are wanted of images whose camera is not known."""
    if (
        measures.camera_pairs
        and max(labels.query_camid.max(), labels.gallery_camid.max()) >= NO_CAMERA
    ):
        raise ConfigError(
            "--camera-pairs needs the camera of every image, and this dataset was built without "
            "cameras: leave it out"
        )


def _read(files: EmbeddingFiles) -> Joined:
    """All embeddings, in memory."""
    both = Features.of(files.read("query", "gallery"))
    return Joined(both, int(np.count_nonzero(files.split == "query")))


class _Stages:
    """The stages of one evaluation, of a `Source` as `put` gives it; a task reads some `edges`."""

    def __init__(
        self, pool: Pool, source: Any, edges: list[range], labels: Labels, measures: Measures
    ) -> None:
        self.pool, self.source, self.edges = pool, source, edges
        self.labels, self.measures = labels, measures
        self.metric, self.truth = metric_code(measures.metric), find_ground_truth(labels)
        self.queries, self.gallery = len(labels.query_pid), len(labels.gallery_pid)
        self.given_truth = pool.put(self.truth)

    def run(self, dimensions: int) -> Measurement:
        """All stages."""
        measures, plain = self.measures, None
        if measures.expand or measures.augment:
            self._average()
        result, pairs = self._rank()
        if measures.rerank:
            plain, result = result, self._rerank()
        sizes = self.queries, self.gallery, dimensions
        return Measurement(result, *sizes, measures, plain, pairs)

    def _rank(self) -> tuple[RankingResult, dict[tuple[int, int], RankingResult]]:
        """Metrics, and those of camera pairs if they are asked for."""
        measures, edges, pool, metric = self.measures, self.edges, self.pool, self.metric
        given = self.source, self.given_truth, metric
        found = list(pool.map("matches", score_matches, given, edges))
        # Each entry is scored by the one task that has its gallery image.
        scores = pool.put(reduce(np.fmax, [scores for scores, _ in found]))
        before = reduce(np.add, pool.map("ranking", count_before, (*given, scores), edges))
        result, pairs = metrics_of(self.truth.positives(), before, measures.max_rank), {}
        if measures.false_accept_rates:
            blocks = ranges(self.gallery, ACCEPT_BLOCK)
            given = *given, max(longest for _, longest in found)
            counts = pool.map("false accept rates", count_distances, given, blocks)
            rates = rates_of(reduce(np.add, counts), measures.false_accept_rates)
            result = replace(result, tar_at_far=rates)
        if measures.camera_pairs:
            given = self.source, pool.put(self.labels), self.given_truth, metric, scores
            counts = pool.map("camera pairs", count_by_camera, given, edges)
            total = [reduce(np.add, parts) for parts in zip(*counts, strict=True)]
            pairs = metrics_by_cameras(self.labels, total, measures.max_rank)
        return result, pairs

    def _average(self) -> None:
        """Expand queries, augment the gallery, or both."""
        measures, total = self.measures, self.queries + self.gallery
        stages = {
            "expansion": (measures.expand, neighbours.query_gallery_pairs(self.queries, total)),
            "augmentation": (measures.augment, neighbours.all_pairs(total, self.queries)),
        }
        near = [
            self._neighbours(stage, k, COSINE, None, blocks) if k else None
            for stage, (k, blocks) in stages.items()
        ]
        given = self.source, *near, measures.alpha
        self.source = self.pool.one("averaging neighbours", neighbours.averaged, *given)
        self.edges = ranges(self.gallery, BLOCK)

    def _rerank(self) -> RankingResult:
        measures, total = self.measures, self.queries + self.gallery
        alone = self.pool.workers == 1
        kept = reranking.room_for_scores(self.queries, self.gallery) if alone else None
        blocks, k = neighbours.all_pairs(total), measures.needed
        near = self._neighbours("neighbours", k, self.metric, kept, blocks)
        # One task: it takes a hundredth of the time of the products.
        given = self.source, near, measures
        encoding = self.pool.one("encoding neighbours", reranking.encode, *given)
        across = neighbours.blocks_across(self.queries, total)
        given = self.source, encoding, measures, self.given_truth, kept
        count = reranking.count_before_reranked

        def height(row: list[Block]) -> int:  # how many queries a row of blocks has
            return min(row[0].rows.stop, self.queries) - row[0].rows.start

        found = self.pool.map("distances", count, given, across, height)
        before = reduce(np.maximum, found)  # each query is in one task
        return metrics_of(self.truth.positives(), before, measures.max_rank)

    def _neighbours(
        self, stage: str, k: int, metric: int, kept: np.ndarray | None, blocks: list[Block]
    ) -> Any:
        """The nearest neighbours in the pairs of `blocks`, as the pool's `put` gives them."""
        given = self.source, k, metric, kept
        found = self.pool.map(stage, reranking.find_neighbours, given, blocks)
        return self.pool.put(reduce(neighbours.merge, found))
