"""Ranking and re-ranking on three real Ray workers and a real S3 server, against one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from cluster.s3 import S3Server
from data_shards.errors import DataError
from data_shards.storage import open_storage
from reid_train.evaluation import embeddings, neighbours, reranking
from reid_train.evaluation.distance_ranking import rank_distances
from reid_train.evaluation.distributed import (
    rank_distributed,
    rerank_distributed,
    shares_of,
)
from reid_train.evaluation.embeddings import (
    EmbeddingFiles,
    EmbeddingTable,
    part_key,
    write_part,
)
from reid_train.evaluation.metrics import RankingResult
from reid_train.evaluation.ranking import rank
from reid_train.evaluation.reranking import rerank

QUERIES, GALLERY, DIMENSIONS = 60, 1500, 64


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[str]:
    """A bucket's URL, and Ray with three workers that can reach it."""
    s3_server.create_bucket("embeddings")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        yield "s3://embeddings"
        ray.shutdown()


@pytest.fixture(scope="module")
def files(bucket: str) -> EmbeddingFiles:
    """Noisy embeddings of 40 people, half of the gallery twice, in parts of 200 rows."""
    draw = np.random.default_rng(0)
    count = QUERIES + GALLERY
    pid = draw.integers(0, 40, count)
    embedding = draw.standard_normal((40, DIMENSIONS))[pid] + 2 * draw.standard_normal(
        (count, DIMENSIONS)
    )
    twins = QUERIES + np.arange(0, GALLERY, 4)
    embedding[twins + 1] = embedding[twins]
    split = np.where(np.arange(count) < QUERIES, "query", "gallery")
    table = EmbeddingTable(embedding.astype(np.float32), pid, draw.integers(0, 3, count), split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "ROWS", 90)
        for number, first in enumerate(range(0, count, 200)):
            rows = slice(first, first + 200)
            part = EmbeddingTable(
                table.embedding[rows], table.pid[rows], table.camid[rows], table.split[rows]
            )
            write_part(open_storage(bucket), part_key(number), part)
    return EmbeddingFiles.open(bucket)


def assert_same_bits(found: RankingResult, expected: RankingResult) -> None:
    assert (found.mAP, found.mINP, found.valid) == (expected.mAP, expected.mINP, expected.valid)
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    np.testing.assert_array_equal(found.average_precision, expected.average_precision)
    np.testing.assert_array_equal(found.first_match_rank, expected.first_match_rank)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_three_workers_rank_as_one_process_does(files, metric):
    labels = files.labels
    expected = rank(
        files.read("query"), files.read("gallery"), labels.query_pid, labels.query_camid,
        labels.gallery_pid, labels.gallery_camid, metric=metric,
    )  # fmt: skip
    assert_same_bits(rank_distributed(files, workers=3, metric=metric), expected)


def test_three_workers_rerank_as_one_process_does(files, monkeypatch):
    # Small enough that each of the three has several.
    monkeypatch.setattr(neighbours, "TILE", 20)
    monkeypatch.setattr(reranking, "CHUNK", 16)
    query, gallery, labels = files.read("query"), files.read("gallery"), files.labels
    expected = rank_distances(rerank(query, gallery), labels)
    assert_same_bits(rerank_distributed(query, gallery, labels, workers=3), expected)


def test_an_error_in_a_worker_comes_out_as_itself(files, tmp_path):
    for key, _ in files.storage.list():
        (tmp_path / key).write_bytes(files.storage.read(key))
    broken = EmbeddingFiles.open(str(tmp_path))
    (tmp_path / part_key(3)).write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="part-000003"):
        rank_distributed(broken, workers=3)


def test_shares_are_consecutive_complete_and_even():
    shares = shares_of(list(range(100)), 3, lambda item: 1)
    assert list(itertools.chain(*shares)) == list(range(100))
    assert [len(share) for share in shares] == [33, 34, 33]
