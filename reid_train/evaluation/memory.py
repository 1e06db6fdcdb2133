"""Estimate the memory that an evaluation takes, to print it before it is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reid_train.evaluation import neighbours, ranking, verification
from reid_train.evaluation.embedding_store import ROWS
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.reranking import CHUNK, ENCODED, KEPT
from reid_train.evaluation.tasks import TASKS

_PROGRAM = 1.25e9  # bytes of Python, torch, Ray and the compiled loops
_ALLOCATORS = 1.1  # what they keep for themselves
_ROW = 40 * 6 * 8  # bytes of a re-ranked image's sparse row, at k1 = 20 and k2 = 6


def _accepting(row: int) -> int:
    """Bytes that false accept rates take."""
    block = verification.BLOCK
    return row * block + 4 * CHUNK * block + 16 * verification.BINS


def memory_needed(queries: int, gallery: int, dimensions: int, measures: Measures) -> int:
    """Bytes that `evaluate` takes at most, about, with reading the embeddings and holding them."""
    row, count = 4 * dimensions, queries + gallery
    held = row * count
    # A row group as it is read, decoded, and as a matrix.
    ranked = row * (queries + 3 * ranking.BLOCK) + 8 * CHUNK * ranking.BLOCK
    stages = [3 * row * min(ROWS, count), ranked]
    if measures.false_accept_rates:
        stages.append(row * queries + _accepting(row))
    if measures.camera_pairs:
        stages.append(ranked + row * gallery)
    if measures.compares_all:
        held *= 2  # the arrays that were given, and both in one
    if k := max(measures.expand, measures.augment):
        stages.append(row * count + _neighbours(k, count, row))
        held += row * (queries * bool(measures.expand) + gallery * bool(measures.augment))
    if measures.rerank:
        scores = 4 * queries * gallery
        # Scores that are not kept are computed again. Operands are let go of before there are rows,
        # but not all of their memory is given back.
        kept = scores if scores <= KEPT else 4 * neighbours.BLOCK * gallery
        stages.append(
            row * count + _rows(count) + kept + 2 * CHUNK * gallery
            + _neighbours(measures.reranking.needed, count, row)
        )  # fmt: skip
    return int(_PROGRAM + _ALLOCATORS * (held + max(stages)))


def _rows(count: int) -> int:
    """Bytes of all sparse rows, by row and by column, and of those that are being made."""
    return _ROW * (3 * count + 2 * ENCODED)


def _neighbours(k: int, count: int, row: int, threads: int | None = None) -> int:
    """Bytes of the buffers and results of `nearest_neighbours`, and of each thread's blocks."""
    threads, block = threads or torch.get_num_threads(), neighbours.BLOCK
    return (32 + 12) * k * count + threads * block * (row + 8 * block)


@dataclass(frozen=True)
class ClusterMemory:
    """Bytes that `evaluate_files` takes at most, about, with several workers.

    Args:
        driver, worker: of the driver, and of each worker.
        node: what the workers of a node share, in Ray's object store.
    """

    driver: int
    worker: int
    node: int


def cluster_memory(
    queries: int, gallery: int, dimensions: int, measures: Measures, workers: int
) -> ClusterMemory:
    """What a driver, each worker and each node need; arguments as for `memory_needed`."""
    row, count, block = 4 * dimensions, queries + gallery, ranking.BLOCK
    # A row group as it is read, decoded, and as a matrix; a block and its operand.
    reading = row * (3 * ROWS + 2 * block)
    ranked = row * queries + reading + 8 * CHUNK * block
    if measures.false_accept_rates:
        ranked += row * verification.BLOCK + _accepting(row)
    if measures.camera_pairs:
        ranked += 2 * row * (gallery // (TASKS * workers) + ROWS)
    if not measures.compares_all:
        driver = _PROGRAM + 2 * row * queries
        return ClusterMemory(int(driver), int(_PROGRAM + _ALLOCATORS * ranked), row * queries)
    k = max(measures.reranking.needed * measures.rerank, measures.expand, measures.augment)
    held, found = row * count, _neighbours(k, count, row, threads=1)
    # The task that reads holds all embeddings; the tasks that compare hold operands of all.
    worker, node = max(held + max(reading, found), ranked), held + 12 * k * count
    if measures.rerank:
        distances = (4 * neighbours.BLOCK + 2 * CHUNK) * gallery
        worker = held + max(worker - held, _rows(count), distances)
        node += _ROW * count
    if measures.expand or measures.augment:
        worker = max(worker, 2 * held)  # all means, before they are put together
        node += held  # before and after
    driver = _PROGRAM + 5 * 12 * k * count
    return ClusterMemory(int(driver), int(_PROGRAM + _ALLOCATORS * worker), int(node))
