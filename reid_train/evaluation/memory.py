"""What measuring takes in memory, said before it is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reid_train.evaluation.embedding_store import ROWS
from reid_train.evaluation.evaluate import Measures
from reid_train.evaluation.neighbours import TILE
from reid_train.evaluation.ranking import BLOCK
from reid_train.evaluation.reranking import CHUNK, ENCODED, KEPT
from reid_train.evaluation.task_pool import SHARES
from reid_train.evaluation.verification import BINS, STRETCH

_PROGRAM = 1.25e9  # bytes of Python, torch, Ray and the compiled loops
_AIR = 1.1  # what allocators keep for themselves
_ROW = 40 * 6 * 8  # bytes of a re-ranked image's sparse row, at k1 = 20 and k2 = 6


def memory_needed(queries: int, gallery: int, dimensions: int, measures: Measures) -> int:
    """Bytes that `measure` takes at most, about, with the embeddings read and given."""
    row, count = 4 * dimensions, queries + gallery
    held = row * count
    # A row group as it is read, decoded, and as a matrix.
    stages = [3 * row * min(ROWS, count), row * (queries + 3 * BLOCK) + 8 * CHUNK * BLOCK]
    if measures.false_accept_rates:
        stages.append(row * (queries + STRETCH) + 4 * CHUNK * STRETCH + 16 * BINS)
    if measures.camera_pairs:
        stages.append(stages[1] + row * gallery)
    if k := max(measures.expand, measures.augment):
        stages.append(2 * held + _nearest(k, count, row))  # both sides as one, and its operands
        held += row * (queries * bool(measures.expand) + gallery * bool(measures.augment))
    if measures.rerank:
        scores = 4 * queries * gallery
        # Scores that are not kept are computed again. Operands were let go of before there are
        # rows, but not all of their memory is given back.
        stage = row * count + _rows(count) + (scores if scores <= KEPT else 4 * TILE * gallery)
        stage += _nearest(measures.reranking.needed, count, row) + 2 * CHUNK * gallery
        stages.append(row * count + stage)  # both sides as one
    return int(_PROGRAM + _AIR * (held + max(stages)))


def _rows(count: int) -> int:
    """Bytes of all sparse rows, by row and by column, and of those that are being made."""
    return _ROW * (3 * count + 2 * ENCODED)


def _nearest(k: int, count: int, row: int, threads: int | None = None) -> int:
    """Bytes of buffers and results of `nearest_neighbours`; for each thread of rows, and of a tile,
    twice."""
    threads = threads or torch.get_num_threads()
    return (32 + 12) * k * count + threads * TILE * (row + 8 * TILE)


@dataclass(frozen=True)
class DistributedMemory:
    """Bytes that `measure_distributed` takes at most, about.

    Args:
        driver, worker: of the driver, and of each worker.
        node: what the workers of a node share, in Ray's object store.
    """

    driver: int
    worker: int
    node: int


def distributed_memory(
    queries: int, gallery: int, dimensions: int, measures: Measures, workers: int
) -> DistributedMemory:
    """What a driver, each worker and each node need; arguments as for `memory_needed`."""
    row, count = 4 * dimensions, queries + gallery
    # A row group as it is read, decoded, and as a matrix; a block and its operand.
    reading = row * (3 * ROWS + 2 * BLOCK)
    ranking = row * queries + reading + 8 * CHUNK * BLOCK
    if measures.false_accept_rates:
        ranking += 2 * row * STRETCH + 4 * CHUNK * STRETCH + 16 * BINS
    if measures.camera_pairs:
        ranking += 2 * row * (gallery // (SHARES * workers) + ROWS)
    k = max(measures.reranking.needed * measures.rerank, measures.expand, measures.augment)
    if k == 0:
        return DistributedMemory(
            int(_PROGRAM + 2 * row * queries), int(_PROGRAM + _AIR * ranking), row * queries
        )
    held, nearest = row * count, _nearest(k, count, row, threads=1)
    # Who reads, holds it all once; who compares, has operands of it all.
    worker, node = held + max(reading, nearest), held + 12 * k * count
    if measures.rerank:
        worker = max(worker, held + _rows(count), held + (4 * TILE + 2 * CHUNK) * gallery)
        node += _ROW * count
    else:
        worker = max(worker, ranking)
    if measures.expand or measures.augment:
        node += 2 * held  # before, the new stretches, and after
    return DistributedMemory(
        int(_PROGRAM + 5 * 12 * k * count), int(_PROGRAM + _AIR * worker), int(node)
    )
