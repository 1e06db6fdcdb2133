"""Embeddings in memory: the nearest of a query, exact or by an approximate index."""

from __future__ import annotations

import importlib
import logging
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.errors import ConfigError, DataError
from reid_train.evaluation import similarity
from reid_train.evaluation.kernels import topk
from reid_train.evaluation.kernels.rank_counts import Vectors
from reid_train.evaluation.measures import COSINE
from reid_train.evaluation.similarity import Features, check_features

logger = logging.getLogger(__name__)

BLOCK = 1 << 14  # gallery images of a product: the scores of a few queries stay in the cache
LINKS, BUILD_DEPTH, DEPTH = 32, 200, 256  # of the graph: neighbours, and candidates looked at
SAMPLE, SAMPLE_K = 200, 10  # queries that the recall is measured on, and its k


class Nearest(NamedTuple):
    """The nearest rows of each of Q queries, most similar first."""

    row: np.ndarray  # (Q, k) int32; −1 where there are fewer
    similarity: np.ndarray  # (Q, k) float64, cosine; −∞ where there are fewer
    exact: bool


class Approximate(NamedTuple):
    """An HNSW graph of FAISS (Malkov and Yashunin, TPAMI 2020), and how good it is."""

    graph: Any
    recall: float  # share of the exact `SAMPLE_K` nearest that it finds
    seconds: float  # that building it took


class Index:
    """Embeddings that grow and shrink while they are searched, from any thread.

    A removed row keeps its number and is never found again.
    """

    def __init__(self, dimensions: int, expected: int = 0) -> None:
        self.count = 0
        self.approximate: Approximate | None = None
        # Room for a quarter more; the system gives memory to what is written only.
        room = expected * 5 // 4
        self._embedding = np.empty((room, dimensions), np.float32)
        self._scale, self._kept = np.empty(room), np.zeros(room, bool)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return int(self._kept[: self.count].sum())

    def add(self, embedding: np.ndarray) -> range:
        """Append (n, D) float32 embeddings; return their rows."""
        features = check_features("gallery", embedding)
        dimensions = self._embedding.shape[1]
        if features.embedding.shape[1] != dimensions:
            found = features.embedding.shape[1]
            raise DataError(f"the model gives {dimensions:,} dimensions, and these have {found:,}")
        with self._lock:
            first, stop = self.count, self.count + len(features)
            if stop > len(self._kept):
                # A search holds the arrays that it began with: grow into others.
                more = max(stop, len(self._kept) * 5 // 4) - len(self._kept)
                self._embedding = np.concatenate(
                    [self._embedding, np.empty((more, dimensions), np.float32)]
                )
                self._scale = np.concatenate([self._scale, np.empty(more)])
                self._kept = np.concatenate([self._kept, np.zeros(more, bool)])
            self._embedding[first:stop] = features.embedding
            self._scale[first:stop] = features.scale
            self._kept[first:stop] = True
            if self.approximate is not None:
                self.approximate.graph.add(_unit(features))
            self.count = stop
        return range(first, stop)

    @property
    def kept(self) -> np.ndarray:
        """Whether each row is still there, (count,) bool."""
        return self._kept[: self.count]

    def remove(self, row: int) -> None:
        """Never find a row again."""
        self._kept[row] = False

    def vector(self, row: int) -> np.ndarray:
        """The embedding of a row, (D,) float32."""
        return self._embedding[row]

    def nearest(self, query: np.ndarray, k: int, wanted: np.ndarray | None = None) -> Nearest:
        """The k most similar rows of each query.

        Exact: a float32 product finds candidates with a bound on its error, and exact scores in
        float64 order them. Rows of equal similarity keep their order.

        Args:
            query: (Q, D) float32 embeddings.
            k: how many rows to find.
            wanted: (count or fewer,) bool, the rows to search; later rows are not searched. None
                searches all, by the graph if there is one.
        """
        asked = check_features("query", query)
        if wanted is None and self.approximate is not None:
            return self._by_graph(asked, k)
        return self._exactly(asked, k, wanted)

    def _exactly(self, query: Features, k: int, wanted: np.ndarray | None = None) -> Nearest:
        with self._lock:
            count = self.count if wanted is None else min(self.count, len(wanted))
            embedding, scale = self._embedding[:count], self._scale[:count]
            for array in (embedding, scale):  # as `Features` are: one compiled kernel for both
                array.flags.writeable = False
            keep = self._kept[:count].copy()
        if wanted is not None:
            keep &= wanted[:count]
        kept, queries = int(keep.sum()), len(query)
        k = min(k, kept)
        if not k:
            return Nearest(np.empty((queries, 0), np.int32), np.empty((queries, 0)), True)
        found = topk.Candidates(
            score=np.empty((queries, 4 * k), np.float32),
            item=np.empty((queries, 4 * k), np.int32),
            count=np.zeros(queries, np.int64),
            limit=np.full(queries, np.inf, np.float32),
            furthest=np.full(queries, -np.inf, np.float32),
        )
        slack = similarity.tolerance(query, query, COSINE, certain=True)
        search = topk.Search(k, COSINE, query.vectors, Vectors(embedding, scale), slack)
        left = torch.from_numpy(-_unit(query))
        with similarity.full_precision():
            for first in range(0, count, BLOCK):
                rows = slice(first, min(first + BLOCK, count))
                if not (wants := keep[rows]).any():
                    continue
                # This way round, a few queries take little longer than one.
                scores = torch.mm(torch.from_numpy(self._embedding[rows]), left.T).numpy().T
                scores = np.multiply(scores, scale[rows].astype(np.float32), order="C")
                if not wants.all():
                    scores[:, ~wants] = np.inf
                topk.offer_columns(scores, 0, first, found, search)
        row, score = np.empty((queries, k), np.int32), np.empty((queries, k))
        topk.settle(found, search, 0, row, score)
        return Nearest(row, -score, True)

    def build_graph(self) -> Approximate:
        """Build the approximate index of all rows, and measure its recall on rows as queries.

        Raises `ConfigError` if FAISS is not installed.
        """
        faiss = _faiss()
        began = time.monotonic()
        graph = faiss.IndexHNSWFlat(self._embedding.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = BUILD_DEPTH, DEPTH
        done = 0
        while True:  # rows that are added meanwhile come last, under the lock
            with self._lock:
                stop = self.count
                rows = Features.of(self._embedding[done : min(stop, done + BLOCK)])
                if done + BLOCK >= stop:
                    graph.add(_unit(rows))
                    self.approximate = Approximate(graph, 0.0, 0.0)
                    break
            graph.add(_unit(rows))
            done += len(rows)
        seconds = time.monotonic() - began
        recall = self._recall()
        logger.info(
            "HNSW over %d embeddings, built in %.1f s: recall@%d %.4f against exact",
            *(self.count, seconds, SAMPLE_K, recall),
        )
        self.approximate = Approximate(graph, recall, seconds)
        return self.approximate

    def _recall(self) -> float:
        """Share of the exact nearest that the graph finds, of rows moved halfway to another.

        A row is its own nearest, which is too easy to find, and the mean of two is among neither's.
        """
        rng = np.random.default_rng(0)
        rows = np.flatnonzero(self._kept[: self.count])
        a, b = (rng.choice(rows, min(SAMPLE, len(rows))) for _ in range(2))
        units = [_unit(Features.of(self._embedding[rows])) for rows in (a, b)]
        query = check_features("sample", units[0] + units[1])
        exact, found = (find(query, SAMPLE_K).row for find in (self._exactly, self._by_graph))
        hits = [len(np.intersect1d(*rows)) for rows in zip(exact, found, strict=True)]
        return float(np.sum(hits) / exact.size)

    def _by_graph(self, query: Features, k: int) -> Nearest:
        faiss = _faiss()
        assert self.approximate is not None
        with self._lock:  # the graph cannot be searched while it grows
            embedding, scale = self._embedding, self._scale
            bits = np.packbits(self._kept[: self.count], bitorder="little")
            only = faiss.IDSelectorBitmap(bits)
            options = faiss.SearchParametersHNSW(sel=only, efSearch=max(DEPTH, 2 * k))
            _, row = self.approximate.graph.search(_unit(query), k, params=options)
        # The order is exact, among the rows that were found.
        vectors = embedding[row].astype(np.float64)
        cosine = (vectors @ query.embedding.astype(np.float64)[:, :, None])[..., 0]
        cosine = np.where(row < 0, -np.inf, cosine * scale[row] * query.scale[:, None])
        order = np.argsort(-cosine, axis=1, kind="stable")
        row, cosine = (np.take_along_axis(values, order, axis=1) for values in (row, cosine))
        return Nearest(row.astype(np.int32), cosine, False)


def _faiss() -> Any:
    """The package, without the types that it has wrong. Raises `ConfigError` if it is missing."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ConfigError(
            "--approximate-above needs the package faiss-cpu: pip install -e '.[serve]'"
        ) from None


def _unit(features: Features) -> np.ndarray:
    """Vectors of length 1, (n, D) float32."""
    return (features.embedding * features.scale[:, None]).astype(np.float32)
