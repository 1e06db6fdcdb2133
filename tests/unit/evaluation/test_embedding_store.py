"""Files of embeddings: parts are read as they were written, and damage is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError, StorageError
from data_shards.storage import open_storage
from reid_train.evaluation import embedding_store as embeddings
from reid_train.evaluation.embedding_store import (
    JOB,
    EmbeddingFiles,
    EmbeddingTable,
    part_key,
    read_embeddings,
    write_part,
)


def table(count: int = 30, dimensions: int = 4, seed: int = 0) -> EmbeddingTable:
    draw = np.random.default_rng(seed)
    return EmbeddingTable(
        draw.standard_normal((count, dimensions)).astype(np.float32),
        draw.integers(0, 5, count),
        draw.integers(0, 3, count),
        draw.choice(["query", "gallery", "train"], count),
        np.array([f"{i}.jpg" for i in range(count)]),
    )


def write(folder: Path, *tables: EmbeddingTable) -> str:
    for number, part in enumerate(tables):
        write_part(open_storage(str(folder)), part_key(number), part)
    return str(folder)


def write_columns(folder: Path, **columns) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "features.parquet")
    return str(folder / "features.parquet")


@pytest.mark.parametrize("rows", [3, 8192])
def test_parts_are_read_as_they_were_written(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(embeddings, "ROWS", rows)
    parts = [table(seed=i) for i in range(3)]
    query, gallery, labels = read_embeddings(write(tmp_path, *parts))
    for found, pid, camid, split in (
        (query, labels.query_pid, labels.query_camid, "query"),
        (gallery, labels.gallery_pid, labels.gallery_camid, "gallery"),
    ):
        masks = [part.split == split for part in parts]
        for got, name in ((found, "embedding"), (pid, "pid"), (camid, "camid")):
            expected = [getattr(part, name)[mask] for part, mask in zip(parts, masks, strict=True)]
            np.testing.assert_array_equal(got, np.concatenate(expected))


@pytest.mark.parametrize("size", [1, 5, 100])
def test_blocks_do_not_depend_on_row_groups(tmp_path, monkeypatch, size):
    monkeypatch.setattr(embeddings, "ROWS", 4)
    files = EmbeddingFiles.open(write(tmp_path, table(), table(seed=1)))
    whole = files.read("gallery")
    first, stop = 2, len(whole) - 3
    found = list(files.blocks("gallery", first, stop, size))
    assert [at for at, _ in found] == list(range(first, stop, size))
    for at, block in found:
        np.testing.assert_array_equal(block, whole[at : min(at + size, stop)])


def test_splits_are_read_one_after_another(tmp_path):
    files = EmbeddingFiles.open(write(tmp_path, table(), table(seed=1)))
    both = np.concatenate([files.read("query"), files.read("gallery")])
    np.testing.assert_array_equal(files.read("query", "gallery"), both)


def test_other_systems_list_columns_are_read(tmp_path):
    url = write_columns(
        tmp_path,
        embedding=[[1.0, 2.0], [3.0, 4.0]],
        pid=pa.array([1, 1], pa.int32()),
        camid=pa.array([0, 1], pa.int8()),
        split=["query", "gallery"],
    )
    query, gallery, labels = read_embeddings(url)
    np.testing.assert_array_equal(np.concatenate([query, gallery]), [[1, 2], [3, 4]])
    assert labels.gallery_camid.tolist() == [1]


def test_npz_is_read(tmp_path):
    arrays = {
        "query_embedding": np.eye(2, dtype=np.float32), "query_pid": [0, 1],
        "query_camid": [0, 0], "gallery_embedding": np.ones((3, 2), np.float32),
        "gallery_pid": [0, 1, 2], "gallery_camid": [1, 1, 1],
    }  # fmt: skip
    np.savez(tmp_path / "features.npz", **arrays)
    query, gallery, labels = read_embeddings(str(tmp_path / "features.npz"))
    assert query.shape == (2, 2)
    assert gallery.shape == (3, 2)
    assert labels.gallery_pid.tolist() == [0, 1, 2]


def test_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", query_embedding=np.array([{}, None], object))
    with pytest.raises(DataError, match=r"bad\.npz cannot be read"):
        read_embeddings(str(tmp_path / "bad.npz"))


def test_npz_without_a_column_is_an_error(tmp_path):
    np.savez(tmp_path / "bad.npz", query_embedding=np.eye(2))
    with pytest.raises(DataError, match="has no gallery_embedding, query_pid"):
        read_embeddings(str(tmp_path / "bad.npz"))


def test_nan_is_an_error_that_names_the_row(tmp_path):
    # Parquet of another system: our own writer would not have written it.
    values = np.ones((30, 4), np.float32)
    values[17, 2] = np.nan
    url = write_columns(
        tmp_path, embedding=values.tolist(), pid=[0] * 30, camid=[0] * 30, split=["gallery"] * 30
    )
    with pytest.raises(DataError, match="embedding 17 has NaN"):
        EmbeddingFiles.open(url).read("gallery")


def test_nan_is_not_written(tmp_path):
    values = np.full((30, 4), np.inf, np.float32)
    with pytest.raises(DataError, match="NaN or infinite"):
        write(tmp_path, replace(table(), embedding=values))
    assert not list(tmp_path.iterdir())


def test_differing_dimensions_between_parts_are_an_error(tmp_path):
    with pytest.raises(DataError, match="5 dimensions, the parts before it of 4"):
        EmbeddingFiles.open(write(tmp_path, table(), table(dimensions=5)))


def test_differing_dimensions_within_a_part_are_an_error(tmp_path):
    url = write_columns(
        tmp_path, embedding=[[1.0, 2.0], [3.0]], pid=[1, 1], camid=[0, 1],
        split=["query", "gallery"],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"row 0 \+ 1: an embedding of 1 dimensions"):
        read_embeddings(url)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pid": [1], "camid": [0], "split": ["query"]}, "must have one column embedding"),
        (
            {"embedding": [[1.0]], "pid": ["a"], "camid": [0], "split": ["query"]},
            "column pid must hold integers",
        ),
        (
            {"embedding": [[1.0]], "pid": [1], "camid": [None], "split": ["query"]},
            "column camid has missing values",
        ),
        (
            {"embedding": [1.0], "pid": [1], "camid": [0], "split": ["query"]},
            "must hold lists of float32",
        ),
        (
            {"embedding": [[1.0]], "pid": [1], "camid": [0], "split": ["query"]},
            "gallery is empty",
        ),
    ],
)
def test_wrong_columns_are_an_error(tmp_path, columns, message):
    url = write_columns(tmp_path, **columns)
    with pytest.raises(DataError, match=message):
        read_embeddings(url)


def test_a_truncated_file_is_an_error(tmp_path):
    write(tmp_path, table())
    path = tmp_path / part_key(0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        EmbeddingFiles.open(str(tmp_path))


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no embeddings at"):
        EmbeddingFiles.open(str(tmp_path))
    with pytest.raises(StorageError, match="there is no file"):
        EmbeddingFiles.open(str(tmp_path / "none.parquet"))


def test_parts_of_a_job_that_has_not_ended_are_an_error(tmp_path):
    write(tmp_path, table(), table())
    (tmp_path / JOB).write_text('{"parts": 3}')
    with pytest.raises(DataError, match="has 2 of 3 parts: run `embed` again"):
        EmbeddingFiles.open(str(tmp_path))
    (tmp_path / JOB).write_text('{"parts": 2}')
    assert len(EmbeddingFiles.open(str(tmp_path)).pid) == 2 * len(table().pid)


def test_a_folder_within_a_folder_of_parts_is_none_of_its_parts(tmp_path):
    write(tmp_path, table())
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", table())
    assert len(EmbeddingFiles.open(str(tmp_path)).pid) == len(table().pid)


def test_validation_split_of_a_file_is_measured_as_query_and_gallery(tmp_path):
    part = table()
    names = {"train": "validation_query", "query": "validation_gallery", "gallery": "query"}
    renamed = replace(part, split=np.array([names[name] for name in part.split]))
    files = EmbeddingFiles.open(write(tmp_path, renamed), "validation")
    np.testing.assert_array_equal(files.read("query"), part.embedding[part.split == "train"])
    np.testing.assert_array_equal(files.read("gallery"), part.embedding[part.split == "query"])
    np.testing.assert_array_equal(files.labels.query_pid, part.pid[part.split == "train"])
