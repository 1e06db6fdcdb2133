"""k-reciprocal re-ranking, sparse against dense: time, peak memory, growth.

python tests/benchmarks/reranking.py [--sizes small medium] [--no-naive] [--dimensions 4096]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from retrieval import SIZES, Problem, Stopwatch, in_child, line, multiply, timed

from reid_train.evaluation import reranking, similarity
from reid_train.evaluation.reranking import rank_distances


def published(problem: Problem, k1: int = 20, k2: int = 6, weight: float = 0.3) -> dict[str, float]:
    """The steps of the implementation that most others copied, one by one.

    Three distance matrices are joined, squared, divided by column and transposed; all rows are
    sorted whole; sets are found a candidate at a time; weights are dense.
    """
    query, gallery = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (problem.query, problem.gallery)
    )
    across, within = 1 - query @ gallery.T, 1 - query @ query.T
    rest = 1 - gallery @ gallery.T
    queries, count = len(query), len(query) + len(gallery)
    original = np.concatenate(
        [np.concatenate([within, across], axis=1), np.concatenate([across.T, rest], axis=1)]
    )
    original = np.power(original, 2).astype(np.float32)
    original = np.transpose(original / np.max(original, axis=0))
    order = np.argsort(original).astype(np.int32)

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        backward = order[forward, : k + 1]
        return forward[np.where(backward == i)[0]]

    weights = np.zeros_like(original)
    for i in range(count):
        near = reciprocal(i, k1)
        expanded = near
        for candidate in near:
            also = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(np.intersect1d(also, near)) > 2 / 3 * len(also):
                expanded = np.append(expanded, also)
        expanded = np.unique(expanded)
        unnormalised = np.exp(-original[i, expanded])
        weights[i, expanded] = unnormalised / np.sum(unnormalised)
    original = original[:queries]
    means = np.zeros_like(weights)
    for i in range(count):
        means[i] = np.mean(weights[order[i, :k2]], axis=0)
    weights = means
    having = [np.where(weights[:, j] != 0)[0] for j in range(count)]
    jaccard = np.zeros_like(original)
    for i in range(queries):
        overlap = np.zeros((1, count), np.float32)
        for j in np.where(weights[i] != 0)[0]:
            overlap[0, having[j]] += np.minimum(weights[i, j], weights[having[j], j])
        jaccard[i] = 1 - overlap / (2 - overlap)
    final = jaccard * (1 - weight) + original * weight
    return metrics([(0, np.ascontiguousarray(final[:, queries:]))], problem)


def naive(problem: Problem, k1: int = 20, k2: int = 6, weight: float = 0.3) -> dict[str, float]:
    """The same with less work: no row sorted further than k1, no copies but the necessary."""
    both = np.concatenate([problem.query, problem.gallery])
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    count, queries = len(both), len(problem.query)
    distance = (1 - both @ both.T) ** 2
    distance /= distance.max(axis=1, keepdims=True)
    order = np.argpartition(distance, range(1, k1 + 1), axis=1)[:, : k1 + 1]

    def reciprocal(i: int, k: int) -> np.ndarray:
        forward = order[i, : k + 1]
        return forward[(order[forward, : k + 1] == i).any(axis=1)]

    weights = np.zeros((count, count), np.float32)
    for i in range(count):
        near = reciprocal(i, k1)
        expanded = near
        for candidate in near:
            also = reciprocal(candidate, round(k1 / 2))
            if 3 * len(np.intersect1d(also, near)) > 2 * len(also):
                expanded = np.append(expanded, also)
        expanded = np.unique(expanded)
        weight_of = np.exp(-distance[i, expanded])
        weights[i, expanded] = weight_of / weight_of.sum()
    weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(count)])
    having = [np.flatnonzero(weights[:, j]) for j in range(count)]
    final = np.empty((queries, count - queries), np.float32)
    for i in range(queries):
        overlap = np.zeros(count, np.float32)
        for j in np.flatnonzero(weights[i]):
            overlap[having[j]] += np.minimum(weights[i, j], weights[having[j], j])
        jaccard = 1 - overlap / (2 - overlap)
        final[i] = (jaccard * (1 - weight) + distance[i] * weight)[queries:]
    return metrics([(0, final)], problem)


def ours(problem: Problem) -> dict[str, float]:
    """Sparse, and how much of its time is products."""
    product = Stopwatch(similarity, "quick_scores")
    found = metrics(reranking.rerank(problem.query, problem.gallery), problem)
    return found | {"product": product.seconds, "product cpu": product.cpu}


def metrics(blocks, problem: Problem) -> dict[str, float]:
    """mAP and rank-1 of distances."""
    result = rank_distances(blocks, problem.labels)
    return {"mAP": result.mAP, "rank-1": float(result.cmc[0])}


def product(both: np.ndarray) -> dict[str, float]:
    """`torch.mm` of everything with everything, alone; of a part of the rows where N is large."""
    return {"share": multiply(both, both, every=1 if len(both) < 50_000 else 8)}


WAYS = {"ours": ours, "published": published, "naive": naive}
PRODUCT = "torch.mm"


def main() -> None:
    """Print a table of sizes and ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--dimensions", type=int, default=2048, help="of the embeddings")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "SIZE"))
    options = parser.parse_args()
    if options.child:
        way, size = options.child
        if way == "ours":  # compile
            ours(Problem.draw("small", options.dimensions))
        problem = Problem.draw(size, options.dimensions)
        if way == PRODUCT:
            both = np.concatenate([problem.query, problem.gallery])
            print(json.dumps(timed(lambda: product(both))))
        else:
            print(json.dumps(timed(lambda: WAYS[way](problem))))
        return
    for size in options.sizes:
        queries, gallery, _ = SIZES[size]
        print(f"{size}: N = {queries + gallery:,} ({queries:,} queries) × {options.dimensions:,}")
        for way in (*WAYS, PRODUCT):
            if way in ("published", "naive") and options.no_naive:
                continue
            found = in_child(__file__, way, size, "--dimensions", str(options.dimensions))
            print(line(way, found), flush=True)


if __name__ == "__main__":
    main()
