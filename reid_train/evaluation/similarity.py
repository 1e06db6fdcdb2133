"""Similarity of embeddings: quick scores from a matrix product, exact ones from the host's loops.

A score orders the gallery of a query; smaller is closer. Cosine: −q·g / ‖q‖‖g‖. Euclidean: the
squared distance. The product gives the cosine's score, and ‖g‖² − 2 q·g for the Euclidean one: the
missing ‖q‖² is the same for the whole gallery of a query.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from data_shards.errors import DataError
from reid_train.evaluation.ground_truth import Labels, as_array, read_only
from reid_train.evaluation.kernels.rank_counts import Vectors, norms
from reid_train.evaluation.measures import COSINE, EUCLIDEAN

SHORTEST, LONGEST = 1e-30, 1e18  # lengths that float32 can invert and square
CPU = torch.device("cpu")
_UNIT, _UNIT64 = (float(np.finfo(dtype).eps) / 2 for dtype in (np.float32, np.float64))
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Features:
    """Embeddings (N, D) float32, with 1/‖x‖ (0 for a zero vector) and ‖x‖ of each, float64."""

    embedding: np.ndarray
    scale: np.ndarray
    norm: np.ndarray

    def __post_init__(self) -> None:
        read_only(self, "embedding", "scale", "norm")

    @classmethod
    def of(cls, embedding: np.ndarray) -> Self:
        norm = np.empty(len(embedding))
        in_threads(lambda a, b: norms(embedding[a:b], norm[a:b]), len(embedding))
        return cls(embedding, np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0), norm)

    @classmethod
    def joined(cls, *parts: "Features") -> Self:
        """One after another, copied."""
        arrays = zip(*((part.embedding, part.scale, part.norm) for part in parts), strict=True)
        return cls(*map(np.concatenate, arrays))

    def __len__(self) -> int:
        return len(self.norm)

    def __getitem__(self, rows: slice | np.ndarray) -> Self:
        """Consecutive rows, as views, or listed ones, copied."""
        return type(self)(self.embedding[rows], self.scale[rows], self.norm[rows])

    @property
    def vectors(self) -> Vectors:
        """What the compiled loops need for exact scores."""
        return Vectors(self.embedding, self.scale)


def check_inputs(
    query: object, gallery: object, labels: Labels | None = None
) -> tuple[Features, Features]:
    """Check all arrays that are measured together, before anything is computed.

    Embeddings are (Q, D) and (G, D) real numbers; lengths are 0 or from 1e-30 to 1e18. Raises
    `DataError` that names the array, its shape, and what is wanted.
    """
    rows = check_shapes(query, gallery, labels)
    return check_features("query", rows[0]), check_features("gallery", rows[1])


def check_shapes(
    query: object, gallery: object, labels: Labels | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The part of `check_inputs` that does not look at values."""
    found = _matrix("query", query), _matrix("gallery", gallery)
    if found[0].shape[1] != found[1].shape[1]:
        raise DataError(
            f"query embeddings have {found[0].shape[1]} dimensions, those of the gallery "
            f"{found[1].shape[1]}: are they of the same model?"
        )
    if labels is not None:
        pids = labels.query_pid, labels.gallery_pid
        for name, rows, pid in zip(("query", "gallery"), found, pids, strict=True):
            if len(rows) != len(pid):
                raise DataError(
                    f"{name}: {len(rows)} embeddings but {len(pid)} labels: each row of the array "
                    f"of shape {rows.shape} needs one label"
                )
    return found


def _matrix(name: str, embedding: object) -> np.ndarray:
    """`embedding` as an (N, D) array of real numbers, N and D at least 1."""
    rows = as_array(f"{name} embeddings", embedding, "(N, D)")
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "fiu":
        raise DataError(
            f"{name} embeddings must be a matrix of numbers of shape (N, D), one row an image, N "
            f"and D at least 1, not {rows.dtype} of shape {rows.shape}"
        )
    return rows


def check_features(
    name: str, embedding: object, first: int = 0, total: int | None = None
) -> Features:
    """`embedding` as `Features` in one piece of memory.

    Raises `DataError` if it is not a matrix of numbers, or for the first row with NaN, infinite
    values or a length that float32 cannot square or invert. In the error, rows count from `first`,
    and there are `total` of them.
    """
    rows = _matrix(name, embedding)
    with np.errstate(over="ignore"):
        features = Features.of(np.ascontiguousarray(rows, np.float32))
    # A row's length shows what is in it: the squares of float32 values never overflow float64.
    norm, shape = features.norm, (total or len(rows), rows.shape[1])
    if len(wrong := np.flatnonzero(~np.isfinite(norm))):
        raise DataError(
            f"{name} embedding {first + wrong[0]} has NaN or infinite values ({len(wrong)} such "
            f"rows, array of shape {shape}): was the training unstable, or half precision used?"
        )
    if len(wrong := np.flatnonzero(((norm < SHORTEST) & (norm > 0)) | (norm > LONGEST))):
        raise DataError(
            f"{name} embedding {first + wrong[0]} has length {norm[wrong[0]]:.1e} ({len(wrong)} "
            f"such rows, array of shape {shape}): lengths must be 0, or from {SHORTEST:.0e} to "
            f"{LONGEST:.0e}; scale the embeddings"
        )
    return features


def left_operand(
    query: Features, metric: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Queries as `quick_scores` takes them: −q/‖q‖ for the cosine, −2q for Euclidean."""
    factor = -query.scale if metric == COSINE else np.full(len(query), -2.0)
    return _operand(query.embedding, factor, device, dtype)


def right_operand(
    block: Features, metric: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A block of the gallery as `quick_scores` takes it: g/‖g‖ for the cosine, else g."""
    return _operand(block.embedding, block.scale if metric == COSINE else None, device, dtype)


def _operand(
    embedding: np.ndarray, factor: np.ndarray | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        operand = torch.from_numpy(embedding).to(device).to(dtype)
    if factor is not None:
        operand = operand * torch.from_numpy(factor)[:, None].to(device, dtype)
    on_host = device.type == "cpu" and dtype == torch.float32
    if on_host and torch.backends.mkldnn.is_available():
        # oneDNN's product is 2 to 3 times MKL's on AMD, and on a par with it on Intel.
        return operand.to_mkldnn()
    return operand


def quick_scores(
    left: torch.Tensor, right: torch.Tensor, block: Features, metric: int
) -> torch.Tensor:
    """Scores (B, W), of operands made from (B, D) queries and this (W, D) block, of their dtype."""
    if left.is_mkldnn:
        scores = torch.nn.functional.linear(left, right).to_dense()
    else:
        scores = torch.mm(left, right.T)
    if metric == EUCLIDEAN:
        scores += torch.from_numpy(block.norm**2).to(scores)
    return scores


def tolerance(
    query: Features,
    block: Features,
    metric: int,
    *,
    certain: bool = False,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """How far a quick score may be from the exact one, for each query: (B,) float64.

    √D u ‖q‖‖g‖ is the probabilistic bound for a product in precision u that adds its terms one
    after another (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). It holds for roundings without
    bias. Embeddings that all point much the same way, as pooled features do, were seen to exceed it
    1.4 times. So four times is allowed, plus the rounding of operands and result. A larger
    tolerance only means that more pairs are scored again.

    Embeddings that are nearly one constant, as of a network that has just begun to learn, add equal
    terms with equal roundings: `certain` gives D u ‖q‖‖g‖, which always holds. So does the bound
    for float64, where the product's error and that of the exact score are alike, and both tiny.
    """
    dimension = query.embedding.shape[1]
    if dtype == torch.float64:
        # Twice the sum of the two errors. Of the Euclidean terms none is above (‖q‖ + ‖g‖)².
        both = 4 * (dimension + 8) * _UNIT64
        longest = block.norm.max(initial=0.0)
        return both * (np.ones(len(query)) if metric == COSINE else (query.norm + longest) ** 2)
    product = ((dimension if certain else 4 * np.sqrt(dimension)) + 8) * _UNIT
    if metric == COSINE:
        return np.full(len(query), product)
    furthest = block.norm.max(initial=0.0)
    # The exact score that it is compared with has an error, too; short embeddings underflow.
    exact = 16 * np.finfo(np.float64).eps * (query.norm + furthest) ** 2 + 4 * dimension * _TINY
    return 2 * product * query.norm * furthest + 16 * _UNIT * furthest**2 + exact


def tolerance_at(score: np.ndarray, tolerance: np.ndarray, metric: int) -> np.ndarray:
    """The part of a pair's `tolerance` that is left if one of the two compared scores is known.

    A rounding is bounded by the partial sum S in which it happens. If s is the whole sum, then by
    Cauchy and Schwarz |S| ≤ p and |s − S| ≤ ‖q‖‖g‖ − p for some p, so |S| ≤ (‖q‖‖g‖ + |s|) / 2.
    To compare two scores, knowing either is enough: the tolerance grows more slowly than the score.
    """
    if metric == COSINE:
        return tolerance * (1 + np.abs(score)) / 2
    return tolerance  # the score does not tell ‖g‖


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in full float32, whatever precision training has set."""
    mkldnn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    backends = torch.backends.cuda.matmul, mkldnn
    before = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Precision was set by backend, PyTorch's newer way; the older setting has no effect then.
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
    """As many threads as products use, each with single-threaded products.

    Threads that share one product wait for each other by spinning, on cores that the loops after
    it need.
    """
    before = torch.get_num_threads()
    with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def in_threads(function: Callable[[int, int], object], count: int) -> None:
    """Call `function(first, stop)` on consecutive parts of `range(count)`, one thread each.

    For compiled loops that release the interpreter's lock.
    """
    threads = min(torch.get_num_threads(), os.cpu_count() or 1, max(count, 1))
    if threads == 1:  # starting a thread takes longer than a search of a small gallery
        function(0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, edges[:-1], edges[1:]))
