"""k-reciprocal re-ranking, sparse against dense: time, peak memory, growth.

python tests/benchmarks/reranking.py [--sizes small medium] [--no-naive]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from retrieval import SIZES, Problem, Stopwatch, in_child, line, multiply, timed

from reid_train.evaluation import neighbours, reranking
from reid_train.evaluation.distance_ranking import rank_distances


def naive(problem: Problem, k1: int = 20, k2: int = 6, weight: float = 0.3) -> dict[str, float]:
    """N × N matrices in float32, a row at a time where the paper's formulas are."""
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
    watches = [Stopwatch(module, "quick_scores") for module in (neighbours, reranking)]
    found = metrics(reranking.rerank(problem.query, problem.gallery), problem)
    return found | {
        "product": sum(watch.seconds for watch in watches),
        "product cpu": sum(watch.cpu for watch in watches),
    }


def metrics(blocks, problem: Problem) -> dict[str, float]:
    """mAP and rank-1 of distances."""
    result = rank_distances(blocks, problem.labels)
    return {"mAP": result.mAP, "rank-1": float(result.cmc[0])}


def product(problem: Problem) -> dict[str, float]:
    """`torch.mm` of everything with everything, alone."""
    both = np.concatenate([problem.query, problem.gallery])
    multiply(both, both)
    return {}


WAYS = {"ours": ours, "naive": naive, "torch.mm": product}


def main() -> None:
    """Print a table of sizes and ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "SIZE"))
    options = parser.parse_args()
    if options.child:
        way, size = options.child
        if way == "ours":  # compile
            ours(Problem.draw("small"))
        problem = Problem.draw(size)
        print(json.dumps(timed(lambda: WAYS[way](problem))))
        return
    for size in options.sizes:
        queries, gallery, _ = SIZES[size]
        print(f"{size}: N = {queries + gallery:,} ({queries:,} queries) × 2,048")
        for way in WAYS:
            if way == "naive" and options.no_naive:
                continue
            found = in_child(__file__, way, size)
            print(line(way, found), flush=True)


if __name__ == "__main__":
    main()
