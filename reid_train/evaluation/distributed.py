"""Measuring spread over Ray workers, to the same bits as in one process.

Ranking: a worker streams its shares of the gallery's Parquet row groups from storage, and returns
counts; nobody holds the gallery. Re-ranking, expansion and augmentation compare everything with
everything: one worker reads all embeddings, each node holds them once in Ray's shared memory, and
workers share the tiles of the product. The driver holds labels, ranks, the numbers of neighbours,
and no embeddings but, where it only ranks, those of the queries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import ray

from reid_train.evaluation.camera_pairs import by_query_camera, split_by_camera
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.evaluate import Measurement, Measures, Progress
from reid_train.evaluation.ground_truth import Labels, Matches, find_matches
from reid_train.evaluation.kernels.rank_counts import COSINE, EUCLIDEAN
from reid_train.evaluation.metrics import RankingResult, metrics_of
from reid_train.evaluation.neighbours import (
    Neighbours,
    Tile,
    all_pairs,
    query_gallery_pairs,
    tiles_across,
)
from reid_train.evaluation.ranking import BLOCK, ranks_of
from reid_train.evaluation.similarity import Side, metric_code
from reid_train.evaluation.task_pool import Crew
from reid_train.evaluation.tasks import (
    Streamed,
    Stretch,
    count_pairs_share,
    count_share,
    distance_share,
    distances_share,
    encode_held,
    hold,
    join,
    longest_share,
    mean_share,
    nearest_gallery_share,
    nearest_share,
    score_share,
)
from reid_train.evaluation.verification import STRETCH, rates_of


def measure_distributed(
    files: EmbeddingFiles,
    measures: Measures,
    *,
    workers: int,
    cpus: float = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Measurement:
    """`measure.measure` of embeddings on storage that every worker reaches.

    Args:
        files: query and gallery.
        workers: how many tasks run at a time.
        cpus: of each task.

    Raises:
        DataError, ConfigError: as `measure.measure`.
    """
    measures.check()
    crew, labels = Crew(workers, cpus, progress), files.labels
    matches = find_matches(labels)
    sizes = len(labels.query_pid), len(labels.gallery_pid)
    pairs = {}
    if not (measures.rerank or measures.expand or measures.augment):
        source = ray.put(Streamed(Side.of(files.read("query")), files))
        edges = [(a, b) for a, b in files.edges("gallery") if a < b]
        result, pairs = _rank(crew, source, labels, matches, edges, measures)
        return Measurement(result, *sizes, files.dimensions, measures, pairs)
    measures.check_sizes(*sizes)
    held = crew.one("reading", hold, files)
    if measures.expand or measures.augment:
        query = _expand(crew, held, sizes, measures) if measures.expand else []
        gallery = _augment(crew, held, sizes, measures) if measures.augment else []
        held = crew.one("joining", join, held, len(query), *query, *gallery)
        del query, gallery  # so that Ray lets go of them
    if measures.rerank:
        result = _rerank(crew, held, matches, sizes, measures)
    else:
        edges = _stretches(sizes[1], BLOCK)
        result, pairs = _rank(crew, held, labels, matches, edges, measures)
    return Measurement(result, *sizes, files.dimensions, measures, pairs)


def _rank(
    crew: Crew,
    source: ray.ObjectRef,
    labels: Labels,
    matches: Matches,
    edges: list[Stretch],
    measures: Measures,
) -> tuple[RankingResult, dict[tuple[int, int], RankingResult]]:
    """Metrics, and those of camera pairs where they are asked for.

    Args:
        source: of a `Source`.
        edges: the stretches of the gallery that a worker reads at a time.
    """
    metric, shared = measures.metric, ray.put(matches)
    given = source, shared, metric
    # Each entry was scored by the one worker that has its gallery item.
    scores = reduce(np.fmax, crew.results("matches", score_share, given, edges, _length))
    known = ray.put(scores)
    parts = crew.results("ranking", count_share, (*given, known), edges, _length)
    ranks = ranks_of(matches, reduce(np.add, parts))
    result, pairs = metrics_of(matches.positives(), ranks, measures.max_rank), {}
    if rates := measures.false_accept_rates:
        longest = 0.0  # which only the Euclidean distance needs
        if metric_code(metric) == EUCLIDEAN:
            longest = max(crew.results("lengths", longest_share, (source,), edges, _length))
        stretches = _stretches(len(labels.gallery_pid), STRETCH)
        parts = crew.results(
            "false accept rates", distances_share, (*given, longest), stretches, _length
        )
        result = replace(result, tar_at_far=rates_of(reduce(np.add, parts), rates))
    if measures.camera_pairs:
        given = source, ray.put(labels), shared, metric, known
        counts = crew.results("camera pairs", count_pairs_share, given, edges, _length)
        for (seen_by, _, part), *parts in zip(split_by_camera(labels), *counts, strict=True):
            own = find_matches(part)
            ranks = ranks_of(own, reduce(np.add, parts))
            pairs |= by_query_camera(seen_by, part, own.positives(), ranks, measures.max_rank)
    return result, dict(sorted(pairs.items()))


def _rerank(
    crew: Crew, held: ray.ObjectRef, matches: Matches, sizes: tuple[int, int], measures: Measures
) -> RankingResult:
    settings, code = measures.reranking, metric_code(measures.metric)
    queries, total = sizes[0], sum(sizes)
    given = held, settings.needed, code
    parts = crew.results("neighbours", nearest_share, given, all_pairs(total), _pairs)
    near = reduce(_merge, parts)
    # One task: it takes a hundredth of the time of the products.
    encoding = crew.one("encoding", encode_held, held, ray.put(near), settings, code)
    given = held, encoding, settings, code, ray.put(matches)
    across = tiles_across(queries, total)
    ranks = reduce(np.add, crew.results("distances", distance_share, given, across, _rows))
    return metrics_of(matches.positives(), ranks, measures.max_rank)


def _expand(
    crew: Crew, held: ray.ObjectRef, sizes: tuple[int, int], measures: Measures
) -> list[ray.ObjectRef]:
    """Expanded queries: references to stretches of them, in order."""
    tiles = query_gallery_pairs(sizes[0], sum(sizes))
    given = held, measures.expand, COSINE
    parts = crew.results("expansion", nearest_share, given, tiles, _pairs)
    near = ray.put(reduce(_merge, parts).rows(0, sizes[0]))
    return _means(crew, (held, near, measures.alpha, True), sizes[0])


def _augment(
    crew: Crew, held: ray.ObjectRef, sizes: tuple[int, int], measures: Measures
) -> list[ray.ObjectRef]:
    """The augmented gallery: references to stretches of it, in order."""
    given = held, measures.augment, COSINE
    parts = crew.results("augmentation", nearest_gallery_share, given, all_pairs(sizes[1]), _pairs)
    near = ray.put(reduce(_merge, parts))
    return _means(crew, (held, near, measures.alpha, False), sizes[1])


def _means(crew: Crew, given: tuple, count: int) -> list[ray.ObjectRef]:
    stage = "expanded queries" if given[-1] else "augmented gallery"
    found = dict(crew.start(stage, mean_share, given, _stretches(count, BLOCK), _length))
    return [found[number] for number in sorted(found)]


def _merge(a: Neighbours, b: Neighbours) -> Neighbours:
    return Neighbours.merge([a, b])


def _stretches(count: int, size: int) -> list[Stretch]:
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _length(stretch: Stretch) -> int:
    return stretch[1] - stretch[0]


def _pairs(tile: Tile) -> int:
    return tile.pairs


def _rows(tiles: list[Tile]) -> int:
    return tiles[0].rows[1] - tiles[0].rows[0]
