"""Embeddings to scores: quick ones by a float32 matrix product, exact ones in float64.

A score orders the gallery of a query; smaller is closer. Cosine: −q·g / ‖q‖‖g‖. Euclidean: the
squared distance. The product gives the cosine's score, and ‖g‖² − 2 q·g for the Euclidean one,
whose missing ‖q‖² is the same for the whole gallery of a query.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data_shards.errors import ConfigError, DataError
from reid_train.evaluation.ground_truth import read_only
from reid_train.evaluation.kernels import rank_counts as counting

Metric = Literal["cosine", "euclidean"]
METRICS: dict[str, int] = {"cosine": counting.COSINE, "euclidean": counting.EUCLIDEAN}
_UNIT = float(np.finfo(np.float32).eps) / 2


def metric_code(metric: str) -> int:
    """The kernels' number for a metric. Raises `ConfigError`."""
    if metric not in METRICS:
        raise ConfigError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    return METRICS[metric]


def checked_side(name: str, embedding: np.ndarray, first: int = 0) -> Side:
    """`embedding` as (N, D) float32 in one piece of memory, with its lengths.

    Args:
        name: what to call it in an error.
        first: number of its first row, for an error in a part of something larger.

    Raises:
        DataError: not a matrix of numbers, or NaN or infinite (the first such row is named).
    """
    embedding = np.asarray(embedding)
    if embedding.ndim != 2 or embedding.dtype.kind not in "fiu":
        raise DataError(
            f"{name} embeddings must be a matrix of numbers, one row an image, "
            f"not {embedding.dtype} of shape {embedding.shape}"
        )
    side = Side.of(np.ascontiguousarray(embedding, np.float32))
    # A row's length shows what is in it: no sum of squares of float32 is too great for float64.
    wrong = np.flatnonzero(~np.isfinite(side.norm))
    if len(wrong):
        raise DataError(
            f"{name} embedding {first + wrong[0]} has NaN or infinite values ({len(wrong)} such "
            "rows): was the training unstable, or half precision used?"
        )
    return side


@dataclass(frozen=True)
class Side:
    """Embeddings with what scores need beside them: 1/‖x‖ (0 for a zero vector) and ‖x‖."""

    embedding: np.ndarray
    scale: np.ndarray
    norm: np.ndarray

    def __post_init__(self) -> None:
        read_only(self, "embedding", "scale", "norm")

    @classmethod
    def of(cls, embedding: np.ndarray) -> Side:
        norm = np.empty(len(embedding))
        in_threads(lambda a, b: counting.norms(embedding[a:b], norm[a:b]), len(embedding))
        return cls(embedding, np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0), norm)

    @classmethod
    def joined(cls, *sides: Side) -> Side:
        """One after another, copied."""
        return cls(
            np.concatenate([side.embedding for side in sides]),
            np.concatenate([side.scale for side in sides]),
            np.concatenate([side.norm for side in sides]),
        )

    def rows(self, first: int, stop: int) -> Side:
        """A stretch of it, as views."""
        return Side(self.embedding[first:stop], self.scale[first:stop], self.norm[first:stop])

    def only(self, wanted: np.ndarray) -> Side:
        """Those of a mask (N,), copied."""
        return Side(self.embedding[wanted], self.scale[wanted], self.norm[wanted])


def check_dimensions(query: Side, gallery: Side) -> None:
    """Raise `DataError` where the two have different dimensions."""
    dimensions = query.embedding.shape[1], gallery.embedding.shape[1]
    if dimensions[0] != dimensions[1]:
        raise DataError(
            f"query embeddings have {dimensions[0]} dimensions, those of the gallery "
            f"{dimensions[1]}: are they of the same model?"
        )


def left_operand(query: Side, metric: int, device: torch.device) -> torch.Tensor:
    """A few queries as `quick_scores` wants them: −q/‖q‖ for the cosine, −2q for Euclidean."""
    factor = -query.scale if metric == counting.COSINE else np.full(len(query.norm), -2.0)
    return _operand(query.embedding, factor, device)


def right_operand(block: Side, metric: int, device: torch.device) -> torch.Tensor:
    """A stretch of the gallery as `quick_scores` wants it: g/‖g‖ for the cosine, else g."""
    return _operand(block.embedding, block.scale if metric == counting.COSINE else None, device)


def _operand(
    embedding: np.ndarray, factor: np.ndarray | None, device: torch.device
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        operand = torch.from_numpy(embedding).to(device)
    if factor is not None:
        operand = operand * torch.from_numpy(factor)[:, None].to(device).float()
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN's product is 2 to 3 times MKL's on AMD, and on a par with it on Intel.
        return operand.to_mkldnn()
    return operand


def quick_scores(left: torch.Tensor, right: torch.Tensor, block: Side, metric: int) -> torch.Tensor:
    """Scores (B, W) float32, of operands made from (B, D) queries and this (W, D) block."""
    if left.is_mkldnn:
        scores = torch.nn.functional.linear(left, right).to_dense()
    else:
        scores = torch.mm(left, right.T)
    if metric == counting.EUCLIDEAN:
        scores += torch.from_numpy(block.norm**2).float().to(scores.device)
    return scores


def tolerance(query: Side, block: Side, metric: int, *, certain: bool = False) -> np.ndarray:
    """How far a quick score may be from the exact one, for each query: (B,) float64.

    √D u ‖q‖‖g‖ is the probabilistic bound for a product in precision u that adds its terms one
    after another (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). It holds for roundings without
    bias: of embeddings that all point much the same way, as pooled features do, 1.4 times as much
    was seen, so four times is allowed, plus the rounding of operands and result. More only means
    that more pairs are scored again.

    Embeddings that are nearly one constant, as of a network that has just begun to learn, add equal
    terms, whose roundings are equal too: `certain` gives D u ‖q‖‖g‖, which always holds.
    """
    dimension = query.embedding.shape[1]
    product = ((dimension if certain else 4 * np.sqrt(dimension)) + 8) * _UNIT
    if metric == counting.COSINE:
        return np.full(len(query.norm), product)
    furthest = block.norm.max(initial=0.0)
    exact = (
        16 * np.finfo(np.float64).eps * (query.norm + furthest) ** 2
    )  # of what it is compared to
    return 2 * product * query.norm * furthest + 16 * _UNIT * furthest**2 + exact


def tolerance_at(score: np.ndarray, tolerance: np.ndarray, metric: int) -> np.ndarray:
    """What is left of a pair's `tolerance` where its score is known, or what it is compared to.

    A rounding is no greater than the partial sum S that it happens in allows. If s is the whole
    sum, then by Cauchy and Schwarz |S| ≤ p and |s − S| ≤ ‖q‖‖g‖ − p for some p, so that
    |S| ≤ (‖q‖‖g‖ + |s|) / 2. Of two scores, that of the one is enough to compare them: the
    tolerance grows less than the score does.
    """
    if metric == counting.COSINE:
        return tolerance * (1 + np.abs(score)) / 2
    return tolerance  # whose ‖g‖ is not known from the score


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in float32 proper, whatever the training around has allowed."""
    mkldnn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backends = torch.backends.cuda.matmul, mkldnn
    before = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by backend, which is PyTorch's newer way: the older setting has no say then.
        older = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def single_threaded_pool() -> Iterator[ThreadPoolExecutor]:
    """As many threads as products take, in each of which products take one.

    A thread that shares its products waits for the others by spinning, on a core that the loops
    after them would need.
    """
    before = torch.get_num_threads()
    with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def in_threads(function: Callable[[int, int], object], count: int) -> None:
    """Call `function(first, stop)` on consecutive pieces of `range(count)`, a thread each.

    For compiled loops that let go of the interpreter's lock.
    """
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, max(count, 1))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        function(0, count)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, edges[:-1], edges[1:]))
