"""Evaluate on three real Ray workers and a real S3 server, against one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from cluster.local.s3_server import S3Server
from data_shards.errors import ConfigError, DataError
from data_shards.storage import open_storage
from reid_train.evaluation import embedding_store as embeddings
from reid_train.evaluation import evaluate as stages
from reid_train.evaluation import neighbours
from reid_train.evaluation.embedding_store import (
    EmbeddingFiles,
    EmbeddingTable,
    part_key,
    write_part,
)
from reid_train.evaluation.evaluate import Measurement, evaluate, evaluate_files
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.metrics import RankingResult
from reid_train.evaluation.tasks import divided

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
    assert found.summary() == expected.summary()
    np.testing.assert_array_equal(found.cmc, expected.cmc)
    np.testing.assert_array_equal(found.average_precision, expected.average_precision)
    np.testing.assert_array_equal(found.first_match_rank, expected.first_match_rank)


def spread_and_local(files: EmbeddingFiles, measures: Measures) -> tuple[Measurement, Measurement]:
    """On three workers, and in this process."""
    return (
        evaluate_files(files, measures, workers=3),
        evaluate(files.read("query"), files.read("gallery"), files.labels, measures),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small enough that each of the three workers has several tasks."""
    monkeypatch.setattr(neighbours, "BLOCK", 128)
    monkeypatch.setattr(stages, "BLOCK", 100)
    monkeypatch.setattr(stages, "ACCEPT_BLOCK", 128)


@pytest.mark.parametrize(
    "measures",
    [
        Measures(),
        Measures(rerank=True),
        Measures(expand=5),
        Measures(augment=5, metric="euclidean"),
        Measures(expand=3, augment=4, rerank=True, metric="euclidean"),
    ],
    ids=["ranking", "re-ranking", "expansion", "augmentation", "all"],
)
def test_three_workers_measure_as_one_process_does(files, measures):
    spread, local = spread_and_local(files, measures)
    assert_same_bits(spread.result, local.result)


@pytest.mark.parametrize("expand", [0, 3])
def test_three_workers_count_camera_pairs_as_one_process_does(files, expand):
    spread, local = spread_and_local(files, Measures(camera_pairs=True, expand=expand))
    assert list(spread.pairs) == list(local.pairs)
    for pair, result in local.pairs.items():
        assert_same_bits(spread.pairs[pair], result)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_three_workers_count_false_accepts_as_one_process_does(files, metric):
    spread, local = spread_and_local(
        files, Measures(false_accept_rates=(0.001, 0.01, 0.1), metric=metric)
    )
    assert spread.result.tar_at_far == local.result.tar_at_far


def test_progress_advances_by_tasks_to_its_end(files):
    seen = []
    evaluate_files(files, Measures(), workers=3, progress=lambda *told: seen.append(told))
    ranking = [(done, total) for stage, done, total in seen if stage == "ranking"]
    assert ranking[0] == (0, GALLERY)
    assert ranking[-1] == (GALLERY, GALLERY)
    assert len(ranking) > 1 + 3


def test_more_neighbours_than_images_are_an_error(files):
    with pytest.raises(ConfigError, match="1 ≤ k ≤ 1500"):
        evaluate_files(files, Measures(expand=2000), workers=3)


@pytest.mark.parametrize("measures", [Measures(), Measures(rerank=True)], ids=["rank", "rerank"])
def test_an_error_in_a_worker_comes_out_as_itself(files, tmp_path, measures):
    for key, _ in files.storage.list():
        (tmp_path / key).write_bytes(files.storage.read(key))
    broken = EmbeddingFiles.open(str(tmp_path))
    (tmp_path / part_key(3)).write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="part-000003"):
        evaluate_files(broken, measures, workers=3)


def test_tasks_have_consecutive_blocks_all_and_evenly():
    tasks = divided(list(range(100)), 3, lambda block: 1)
    assert list(itertools.chain(*tasks)) == list(range(100))
    assert [len(task) for task in tasks] == [33, 34, 33]
