"""Ranking against sorting the whole distance matrix: time, peak memory, growth.

python tests/benchmarks/ranking.py [--sizes small medium market1501] [--dimensions 4096]
    [--no-naive] [--device cuda]
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from retrieval import SIZES, Problem, Stopwatch, in_child, line, multiply, timed

from reid_train.evaluation import ranking, similarity


def naive(problem: Problem, device: str) -> dict[str, float]:
    """The whole matrix, sorted, as peers do; always on the CPU."""
    unit = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (problem.query, problem.gallery)
    ]
    distance = 1 - unit[0] @ unit[1].T
    order = np.argsort(distance, axis=1, kind="stable")
    labels, precisions, first = problem.labels, [], []
    for i, row in enumerate(order):
        same = labels.gallery_pid[row] == labels.query_pid[i]
        junk = same & (labels.gallery_camid[row] == labels.query_camid[i])
        rank = np.flatnonzero(same[~junk]) + 1
        if len(rank):
            precisions.append(np.mean(np.arange(1, len(rank) + 1) / rank))
            first.append(rank[0] == 1)
    return {"mAP": float(np.mean(precisions)), "rank-1": float(np.mean(first))}


def ours(problem: Problem, device: str) -> dict[str, float]:
    """Counting, and how much of its time is the product (a GPU's is not told apart)."""
    product = Stopwatch(similarity, "quick_scores")
    result = ranking.rank(problem.query, problem.gallery, problem.labels, device=device)
    found = {"mAP": result.mAP, "rank-1": float(result.cmc[0])}
    if device == "cpu":
        found |= {"product": product.seconds, "product cpu": product.cpu}
    return found


def product(problem: Problem, device: str) -> dict[str, float]:
    """`torch.mm` alone; of a part of the queries where they are many."""
    every = 1 if len(problem.query) < 5_000 or device != "cpu" else 4
    return {"share": multiply(problem.query, problem.gallery, every, device)}


WAYS = {"ours": ours, "naive": naive, "torch.mm": product}


def main() -> None:
    """Print a table of sizes and ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[:3])
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--dimensions", type=int, default=2048, help="of the embeddings")
    parser.add_argument("--device", default="cpu", help="of the product and the counting")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "SIZE"))
    options = parser.parse_args()
    device = options.device
    if options.child:
        way, size = options.child
        if way == "ours" or device != "cpu":  # compile, load the device's library
            WAYS[way](Problem.draw("small", options.dimensions), device)
        problem = Problem.draw(size, options.dimensions)
        print(json.dumps(timed(lambda: WAYS[way](problem, device))))
        return
    for size in options.sizes:
        queries, gallery, _ = SIZES[size]
        print(f"{size}: {queries:,} × {gallery:,} × {options.dimensions:,}, {device}")
        for way in WAYS:
            if way == "naive" and options.no_naive:
                continue
            settings = "--device", device, "--dimensions", str(options.dimensions)
            found = in_child(__file__, way, size, *settings)
            print(line(way, found), flush=True)


if __name__ == "__main__":
    main()
