"""Estimate the memory that an evaluation takes, and print it before it is taken."""

from typing import NamedTuple

import psutil
import torch
from rich.console import Console

from data_shards.progress import say
from reid_train.evaluation import neighbours, ranking, verification
from reid_train.evaluation.embedding_store import ROWS
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.reranking import CHUNK, ENCODED, KEPT
from reid_train.evaluation.tasks import TASKS

_PROGRAM = 1.25e9  # bytes of Python, torch, Ray and the compiled loops
_ALLOCATORS = 1.1  # what they keep for themselves
_ROW = 40 * 6 * 8  # bytes of a re-ranked image's sparse row, at k1 = 20 and k2 = 6


class Memory(NamedTuple):
    """Bytes that an evaluation takes at most, about."""

    driver: int  # of this process
    worker: int = 0  # of each Ray worker
    node: int = 0  # shared by the workers of a node


def memory_needed(
    queries: int, gallery: int, dimensions: int, measures: Measures, workers: int = 1
) -> Memory:
    """What `evaluate`, or `evaluate_files` with several workers, takes."""
    row, count = 4 * dimensions, queries + gallery
    held, threads = row * count, torch.get_num_threads() if workers == 1 else 1
    # A row group as it is read, decoded, and as a matrix; blocks and their operands.
    reading = 3 * row * min(ROWS, count)
    ranked = row * (queries + 3 * ranking.BLOCK) + 8 * CHUNK * ranking.BLOCK
    stages = [reading, ranked]
    if measures.false_accept_rates:
        block = verification.BLOCK
        stages.append(row * (queries + 2 * block) + 4 * CHUNK * block + 16 * verification.BINS)
    if measures.camera_pairs:
        images = gallery if workers == 1 else 2 * (gallery // (TASKS * workers) + ROWS)
        stages.append(ranked + row * images)
    k = max(measures.needed * measures.rerank, measures.expand, measures.augment)
    found = 12 * k * count
    if k:
        # Buffers, results and operands; of each thread a block of rows and its scores, twice.
        block = neighbours.BLOCK
        stages.append(held + 32 * k * count + found + threads * block * (row + 8 * block))
    if measures.expand or measures.augment:
        stages.append(2 * held)  # the means, before and after they are put together
    if measures.rerank:
        # Scores that are not kept are computed again. All sparse rows, by row and by column.
        scores = 4 * queries * gallery
        kept = scores if workers == 1 and scores <= KEPT else 4 * neighbours.BLOCK * gallery
        before = stages[-1] if workers == 1 else held  # not all of it is given back
        stages.append(before + _ROW * (3 * count + 2 * ENCODED) + kept + 2 * CHUNK * gallery)
    if workers == 1:
        # The arrays that were given, and both in one.
        held *= 2 if measures.compares_all else 1
        return Memory(int(_PROGRAM + _ALLOCATORS * (held + max(stages))))
    if not measures.compares_all:
        worker = _PROGRAM + _ALLOCATORS * (reading + max(stages))
        return Memory(int(_PROGRAM + 2 * row * queries), int(worker), row * queries)
    node = held + found + _ROW * count * measures.rerank
    node += held * bool(measures.expand or measures.augment)  # before and after
    worker = _PROGRAM + _ALLOCATORS * max(held + reading, *stages)
    return Memory(int(_PROGRAM + 5 * found), int(worker), int(node))


def say_needed(
    queries: int, gallery: int, dimensions: int, measures: Measures, console: Console, workers: int
) -> None:
    """Print how much there is to measure, and the memory that it takes here and in workers."""
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    memory = "memory with re-ranking" if measures.rerank else "memory"
    needed = memory_needed(queries, gallery, dimensions, measures, workers)
    text = f"{needed.driver / 1e9:.1f} GB of {memory}"
    if workers > 1:
        text += (
            f" in the driver, {needed.worker / 1e9:.1f} GB in each of {workers} workers, and "
            f"{needed.node / 1e9:.1f} GB shared by the workers of a node"
        )
    say(
        console,
        f"{queries:,} queries × {gallery:,} gallery images × {dimensions:,} dimensions: at most "
        f"about {text}; {available / 1e9:.1f} GB available here",
    )
    if needed.driver + workers * needed.worker + needed.node > available:
        where = " on one machine" if workers > 1 else ""
        text = f"this may not fit{where}; the machine will swap or stop the program"
        say(console, text, style="yellow")
