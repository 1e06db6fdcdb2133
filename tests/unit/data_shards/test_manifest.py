from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards import cli
from data_shards.dataset import Dataset
from data_shards.errors import DataError
from data_shards.index import Index
from data_shards.manifest import FileInfo, LeftOut, Manifest, ShardInfo, SplitInfo, sha256
from data_shards.records import SPLITS
from data_shards.storage import open_storage


def make(sizes: dict[str, list[list[int]]], pids: list[int]) -> tuple[Manifest, Index]:
    """A manifest and index with images of `sizes[split][shard]` bytes and pids drawn in turn."""
    shards, columns, n = [], {f.name: [] for f in dataclasses.fields(Index)}, 0
    train_pids = []
    for split in (name for name in SPLITS if name in sizes):
        for number, shard in enumerate(sizes[split]):
            offset = 512
            for size in shard:
                pid = pids[n % len(pids)]
                train_pids += [pid] if split == "train" else []
                row = (
                    len(shards),
                    offset,
                    size,
                    pid,
                    split == "train",
                    n % 5,
                    64,
                    128,
                    f"ü/{n}.jpg",
                )
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
                offset, n = offset + size + 1024, n + 1
            shards.append((f"shards/{split}-{number:06d}.tar", split, len(shard), offset))
    label = {pid: i for i, pid in enumerate(sorted(set(train_pids)))}
    pairs = zip(columns["label"], columns["pid"], strict=True)
    columns["label"] = [label[pid] if train else -1 for train, pid in pairs]
    index = Index.from_columns(columns)
    data = index.to_parquet()
    manifest = Manifest(
        name="people",
        source="csv",
        options={"shard_bytes": 1000},
        complete=True,
        content="c" * 64,
        splits={
            split: SplitInfo(images=sum(map(len, shards)), identities=1, cameras=1)
            for split, shards in sizes.items()
        },
        shards=tuple(
            ShardInfo(name=name, split=split, images=images, bytes=size, sha256="a" * 64)
            for name, split, images, size in shards
        ),
        index=FileInfo(name="index.parquet", bytes=len(data), sha256=sha256(data)),
        left_out=(LeftOut(path="x.jpg", reason="broken"),),
    )
    return manifest, index


shard_sizes = st.lists(st.integers(1, 1 << 40), min_size=1, max_size=4)
datasets = st.builds(
    make,
    st.dictionaries(
        st.sampled_from(SPLITS), st.lists(shard_sizes, min_size=1, max_size=3), min_size=1
    ),
    st.lists(st.integers(0, (1 << 63) - 1), min_size=1, max_size=6),
)


@settings(deadline=None, max_examples=50)
@given(datasets)
def test_manifest_and_index_survive_the_round_trip(dataset):
    manifest, index = dataset
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    read = Index.from_parquet(index.to_parquet(), manifest)
    for field in dataclasses.fields(Index):
        want, have = getattr(index, field.name), np.asarray(getattr(read, field.name))
        assert have.dtype == want.dtype
        assert have.tolist() == want.tolist()


@pytest.fixture
def small() -> tuple[Manifest, Index]:
    sizes = {"train": [[10, 20], [30]], "query": [[5]], "gallery": [[6, 7]]}
    return make(sizes, [7, 7, 3, 9, 9, 1])


def test_only_train_has_labels_by_ascending_pid(small):
    _, index = small
    assert index.label.tolist() == [1, 1, 0, -1, -1, -1]


def test_index_bytes_are_the_same_each_time(small):
    assert small[1].to_parquet() == small[1].select(np.arange(len(small[1]))).to_parquet()


def edited(manifest: Manifest, **changes) -> bytes:
    return json.dumps(json.loads(manifest.to_json()) | changes).encode()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"name": 3}, "name"),
        ({"content": "zz"}, "content"),
        ({"shards": []}, "shards"),
        ({"splits": {}}, "add up"),
        ({"index": {"name": "../index", "bytes": 1, "sha256": "a" * 64}}, "inside the dataset"),
        ({"index": {"name": "i", "bytes": -1, "sha256": "a" * 64}}, "index.bytes"),
    ],
)
def test_wrong_manifest_says_where(small, changes, complaint):
    with pytest.raises(DataError, match=complaint):
        Manifest.from_json(edited(small[0], **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(DataError, match=r"manifest\.json is not valid"):
        Manifest.from_json(data)


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "a/../../x.tar", "", "a\\..\\x"])
def test_shard_names_do_not_lead_out(small, name):
    shards = json.loads(small[0].to_json())["shards"]
    shards[0]["name"] = name
    with pytest.raises(DataError, match="inside the dataset"):
        Manifest.from_json(edited(small[0], shards=shards))


def test_shard_listed_twice_is_refused(small):
    shards = json.loads(small[0].to_json())["shards"]
    shards[1]["name"] = shards[0]["name"]
    with pytest.raises(DataError, match="listed twice"):
        Manifest.from_json(edited(small[0], shards=shards))


@pytest.mark.parametrize(
    ("column", "row", "value", "complaint"),
    [
        ("shard", 0, -1, "names no shard"),
        ("shard", 5, 9, "names no shard"),
        ("shard", 1, 1, "more or fewer images than listed"),
        ("shard", 0, 3, "shard order"),
        ("offset", 0, -5, "outside its shard"),
        ("offset", 2, 1 << 62, "outside its shard"),
        ("size", 0, 0, "outside its shard"),
        ("size", 0, -1, "outside its shard"),
        ("size", 0, (1 << 63) - 1, "outside its shard"),
        ("offset", 1, 515, "overlap"),
        ("width", 3, 0, "no pixels"),
        ("pid", 3, -1, "negative"),
        ("camid", 0, -1, "negative"),
        ("label", 0, 0, "labels do not follow"),
        ("label", 4, 0, "outside train has a label"),
    ],
)
def test_index_that_contradicts_the_manifest_is_refused(
    small, column, row, value, complaint, monkeypatch
):
    manifest, index = small
    changed = getattr(index, column).copy()
    changed[row] = value
    for rows_of_a_group in (1, 2, 100):
        monkeypatch.setattr("data_shards.index._ROW_GROUP", rows_of_a_group)
        data = dataclasses.replace(index, **{column: changed}).to_parquet()
        # What a group shows depends on its rows; that it is refused does not.
        with pytest.raises(DataError, match=complaint if rows_of_a_group > 2 else "is not valid"):
            Index.from_parquet(data, manifest)


@pytest.mark.parametrize("data", [b"", b"PAR1 and then nothing", b"\0" * 100])
def test_what_is_no_parquet_is_refused(small, data):
    with pytest.raises(DataError, match="not readable Parquet"):
        Index.from_parquet(data, small[0])


def test_digest_follows_every_field(small):
    manifest = small[0]
    assert manifest.model_copy(update={"name": "others"}).digest != manifest.digest


def test_evaluation_digest_depends_only_on_the_test_images(small):
    manifest = small[0]

    def with_sha(position: int) -> Manifest:
        shards = list(manifest.shards)
        shards[position] = shards[position].model_copy(update={"sha256": "b" * 64})
        return manifest.model_copy(update={"shards": tuple(shards)})

    train, query = 0, 2
    assert with_sha(train).evaluation_digest == manifest.evaluation_digest
    assert with_sha(query).evaluation_digest != manifest.evaluation_digest


def put(manifest: Manifest, index: bytes, url: str) -> None:
    storage = open_storage(url)
    storage.write("manifest.json", manifest.to_json())
    storage.write("index.parquet", index)


def test_opened_dataset_has_an_index_for_each_split(small, tmp_path):
    manifest, index = small
    put(manifest, index.to_parquet(), str(tmp_path))
    dataset = Dataset.open(str(tmp_path))
    assert {s: len(dataset.index(s)) for s in SPLITS} == {
        "train": 3,
        "val": 0,
        "query": 1,
        "gallery": 2,
        "validation_query": 0,
        "validation_gallery": 0,
    }
    assert dataset.index("gallery").size.tolist() == [6, 7]
    assert dataset.identities.tolist() == [3, 7]


def test_opening_nothing_says_how_to_build(tmp_path):
    with pytest.raises(DataError, match="data_shards build"):
        Dataset.open(str(tmp_path))


def test_altered_index_is_found_on_opening(small, tmp_path):
    manifest, index = small
    data = bytearray(index.to_parquet())
    data[100] ^= 1
    put(manifest, bytes(data), str(tmp_path))
    with pytest.raises(DataError, match="damaged"):
        Dataset.open(str(tmp_path))


def test_info_tells_how_a_dataset_was_made_without_digests_and_bookkeeping(capsys, small):
    options = {
        "validation": 0.25,
        "validation_seed": 0,
        "shard_bytes": 1 << 28,
        "least_pid": 12,
        "added": ["a" * 64, "b" * 64],
        "datasets": [["people", "c" * 64]],
    }
    cli._show("s3://b/people", small[0].model_copy(update={"options": options}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "manifest" in line]
    assert len(lines) == 1
    assert lines[0].endswith("validation 0.25, validation seed 0, images added 2 times")
