"""A large index: its columns are made once for a node, and its paths are read when asked for."""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_manifest import make, put

from data_shards import cache as cache_module
from data_shards import index as index_module
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.index import Index
from data_shards.index_file import COLUMNS
from data_shards.manifest import FileInfo, Manifest, sha256
from data_shards.records import SPLITS

ROW_GROUP = 4
BYTES = 10**6  # of the cache


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch) -> None:
    monkeypatch.setattr(index_module, "_ROW_GROUP", ROW_GROUP)
    monkeypatch.setattr(cache_module, "_checked", set())


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A version whose train shards lie before and after the others, as `add` leaves them."""
    sizes = {"train": [[10, 20, 5], [30, 8]], "query": [[5]], "gallery": [[6, 7], [9, 4, 4]]}
    manifest, index = make(sizes, [7, 7, 3, 9, 9, 1])
    order = [0, 3, 2, 4, 1]
    place = {was: now for now, was in enumerate(order)}
    moved = Index(**vars(index) | {"shard": np.array([place[s] for s in index.shard], np.int32)})
    data = Index.concatenated([moved]).to_parquet()
    shards = tuple(manifest.shards[was] for was in order)
    info = FileInfo(name="index.parquet", bytes=len(data), sha256=sha256(data))
    put(manifest.model_copy(update={"shards": shards, "index": info}), data, str(tmp_path / "d"))
    return str(tmp_path / "d")


def rows_of(dataset: Dataset) -> dict[str, list]:
    return {
        f"{split} {name}": np.asarray(getattr(dataset.index(split), name)).tolist()
        for split in SPLITS
        for name in COLUMNS
    }


def expected(url: str) -> dict[str, list]:
    """The same, from all rows of the file at once."""
    manifest = Manifest.from_json(Path(url, "manifest.json").read_bytes())
    whole = Index.from_parquet(Path(url, "index.parquet").read_bytes(), manifest)
    split = np.array([shard.split for shard in manifest.shards])[whole.shard]
    return {
        f"{name} {column}": np.asarray(getattr(whole, column))[split == name].tolist()
        for name in SPLITS
        for column in COLUMNS
    }


def columns_file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache").glob("*.columns")
    return found


def opened(url: str, tmp_path: Path, size: int = BYTES) -> Dataset:
    """Open it as a process does that starts now."""
    cache_module._checked.clear()
    return Dataset.open(url, cache=(tmp_path / "cache", size))


@pytest.mark.parametrize("cached", [False, True])
def test_each_split_has_its_rows_in_shard_order(url, tmp_path, cached):
    dataset = opened(url, tmp_path) if cached else Dataset.open(url)
    assert rows_of(dataset) == expected(url)
    assert (tmp_path / "cache").exists() == cached


def test_columns_are_made_once_for_all_processes_of_a_node(url, tmp_path, monkeypatch):
    first = rows_of(opened(url, tmp_path))
    made = columns_file(tmp_path).stat()
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_open_parquet", pytest.fail)  # it is not even opened
        again = opened(url, tmp_path)
        assert again.index("train").pid.tolist() == first["train pid"]
    assert columns_file(tmp_path).stat().st_ino == made.st_ino
    assert not again.index("train").pid.flags.writeable


@pytest.mark.parametrize("damage", ["a byte", "the end", "everything"])
def test_damaged_columns_are_made_again(url, tmp_path, damage):
    opened(url, tmp_path)
    path = columns_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes({"a byte": data, "the end": data[:-9], "everything": b""}[damage])
    assert rows_of(opened(url, tmp_path)) == expected(url)


def test_columns_count_and_are_removed_as_shards_are(url, tmp_path):
    dataset = opened(url, tmp_path)
    held = columns_file(tmp_path).stat().st_size
    data, name = b"x" * 5000, "shards/other.tar"
    Path(url, name).parent.mkdir()
    Path(url, name).write_bytes(data)

    class Remote:
        url = "remote"

        def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
            path.write_bytes(data)

    shard = FileInfo(name=name, bytes=len(data), sha256=sha256(data))
    room = ShardCache(Remote(), tmp_path / "cache", len(data) + held)  # type: ignore[arg-type]
    room.path(shard)
    assert columns_file(tmp_path).exists()
    tight = ShardCache(Remote(), tmp_path / "cache", len(data) + held - 1)  # type: ignore[arg-type]
    tight.path(shard.model_copy(update={"sha256": sha256(b"another")}))
    assert not list((tmp_path / "cache").glob("*.columns"))
    assert rows_of(dataset) == expected(url)  # where they are mapped they stay


def test_index_for_which_the_cache_is_too_small_is_read_into_memory(url, tmp_path):
    assert rows_of(opened(url, tmp_path, size=100)) == expected(url)
    assert not (tmp_path / "cache").exists()


def test_index_is_read_into_memory_where_it_cannot_be_cached(url, tmp_path, caplog):
    (tmp_path / "cache").write_bytes(b"a file, where a folder should be")
    assert rows_of(opened(url, tmp_path)) == expected(url)
    assert "cannot be cached" in caplog.text


def test_index_of_one_row_group_needs_no_cache(url, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_ROW_GROUP", 100)
    opened(url, tmp_path)
    assert not (tmp_path / "cache").exists()


def test_paths_are_read_by_row_group(url, tmp_path, monkeypatch):
    paths = opened(url, tmp_path).index("gallery").path
    read = []
    file = paths._file
    whole = file._opened()

    class Noting:
        metadata = whole.metadata

        def read_row_group(self, number: int, columns: list[str]):
            read.append((number, *columns))
            return whole.read_row_group(number, columns=columns)

    monkeypatch.setattr(file, "_file", Noting())
    want = expected(url)["gallery path"]
    assert paths[1] == want[1]
    assert paths[-1] == want[-1]
    assert len(read) == 2
    assert {columns for _, columns in read} == {"path"}
    chosen = np.array([4, 0, 3, 0])
    assert list(paths[chosen]) == [want[i] for i in chosen]
    assert list(paths[chosen][1:][np.array([True, False, True])]) == [want[0], want[0]]
    assert (paths == want[2]).tolist() == [path == want[2] for path in want]


def test_another_process_gets_an_index_with_its_paths(url, tmp_path):
    index = opened(url, tmp_path).index("train").select(np.array([3, 1]))
    again = pickle.loads(pickle.dumps(index))
    for field in fields(Index):
        have, want = getattr(again, field.name), np.asarray(getattr(index, field.name))
        assert have.tolist() == want.tolist()
