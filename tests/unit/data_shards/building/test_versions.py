"""New versions of a dataset: what is added, removed and merged, and what readers see meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from version_files import PEOPLE, SMALL, images_of, is_whole, write_csv

from data_shards.building import versions
from data_shards.building.build import build
from data_shards.building.merge import merge
from data_shards.building.versions import add, remove
from data_shards.cli import main
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.index import Index
from data_shards.manifest import Manifest
from data_shards.storage import LocalStorage, open_storage
from data_shards.storage.s3 import S3Storage

BOTH = pytest.mark.parametrize("place", ["folder", "s3"], indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, or an empty bucket on a real S3 server."""
    if getattr(request, "param", "folder") == "folder":
        return str(tmp_path / "datasets")
    return request.getfixturevalue("s3").url


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build("csv", write_csv(folder / "images", PEOPLE), str(folder / "out"), name="people", **SMALL)
    return folder / "out"


@pytest.fixture
def url(built: Path, place: str) -> str:
    return copied(built, f"{place}/people")


def copied(built: Path, out: str) -> str:
    storage = open_storage(out)
    for key, _ in LocalStorage(built).list():
        storage.upload(key, built / key)
    return out


def keys(url: str) -> set[str]:
    return {key for key, _ in open_storage(url).list()}


@BOTH
def test_added_images_make_a_version_that_reuses_the_shards(url, tmp_path, monkeypatch):
    before, old = images_of(Dataset.open(url)), Dataset.open(url).manifest
    more = write_csv(tmp_path / "more", {3: "train", 4: "train", 11: "test"}, first=3)
    changed = killed_at(1000, monkeypatch)
    change = add(url, "csv", more, **SMALL)
    dataset = Dataset.open(url)
    assert dataset.manifest == change.manifest
    assert change.images == 9
    now = images_of(dataset)
    assert before.items() <= now.items()
    assert len(now) == len(before) + 9
    assert dataset.identities.tolist() == [1, 3, 4, 5]
    assert not {shard.name for shard in old.shards} & {call.split()[1] for call in changed}
    assert [shard.sha256 for shard in dataset.manifest.shards[: len(old.shards)]] == [
        shard.sha256 for shard in old.shards
    ]
    assert is_whole(url)
    assert not [key for key in keys(url) if key.startswith("build")]


@BOTH
def test_version_before_is_opened_by_its_digest(url, tmp_path):
    old = Dataset.open(url)
    add(url, "csv", write_csv(tmp_path / "more", {11: "train"}), **SMALL)
    again = Dataset.open(url, old.digest)
    assert again.digest == old.digest != Dataset.open(url).digest
    assert images_of(again) == images_of(old)


def test_same_images_are_added_once(url, tmp_path):
    more = write_csv(tmp_path / "more", {11: "train"})
    first = add(url, "csv", more, **SMALL)
    again = add(url, "csv", more, **SMALL)
    assert again.already_made
    assert again.manifest == first.manifest
    build_again = write_csv(tmp_path / "images", PEOPLE)
    with pytest.raises(DataError, match="holds another dataset"):
        build("csv", build_again, url, **SMALL)


class Killed(Exception):
    pass


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a process end at its write of this number."""
    calls: list[str] = []

    def counted(kind: type, method: str):
        before = getattr(kind, method)

        def call(self, key, *args, **options):
            calls.append(f"{method} {key}")
            if len(calls) > number:
                raise Killed
            return before(self, key, *args, **options)

        monkeypatch.setattr(kind, method, call)

    for kind in (LocalStorage, S3Storage):
        for method in ("write", "upload", "delete", "erase"):
            counted(kind, method)
    return calls


@pytest.mark.parametrize(
    ("place", "change"),
    [("folder", "add"), ("folder", "remove"), ("s3", "remove")],
    indirect=["place"],
)
def test_reader_sees_the_old_or_the_new_version_wherever_a_change_ends(
    url, built, place, tmp_path, change
):
    more = write_csv(tmp_path / "more", {4: "train", 11: "test"})
    whole = copied(built, f"{place}/whole")

    def make(url: str) -> Manifest:
        if change == "add":
            return add(url, "csv", more, **SMALL).manifest
        return remove(url, [3], delete_old=True, jobs=1).manifest

    old, new = Dataset.open(url).digest, make(whole).digest
    number, ended = 0, False
    while not ended:
        with pytest.MonkeyPatch.context() as patch:
            killed_at(number, patch)
            try:
                make(url)
                ended = True
            except Killed:
                number += 1
        dataset = Dataset.open(url)
        assert dataset.digest in (old, new)
        assert is_whole(url)
    assert number >= 5
    assert Dataset.open(url).digest == new
    assert keys(url) == keys(whole)


def test_change_is_refused_while_another_is_unfinished(url, tmp_path, monkeypatch):
    more = write_csv(tmp_path / "more", {11: "train"})
    with pytest.MonkeyPatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            add(url, "csv", more, **SMALL)
    with pytest.raises(DataError, match="is being changed by another add or remove"):
        remove(url, [1], jobs=1)
    add(url, "csv", more, **SMALL)
    remove(url, [1], jobs=1)


def added_before_the_claim(monkeypatch: pytest.MonkeyPatch, url: str, others: Path) -> None:
    """Have another machine add images after the next command has read the manifest."""
    claim = versions.state.claim

    def late(storage, content, **options):
        monkeypatch.setattr(versions.state, "claim", claim)
        add(url, "csv", others, **SMALL)
        claim(storage, content, **options)

    monkeypatch.setattr(versions.state, "claim", late)


def test_change_that_another_machine_made_meanwhile_is_not_lost(url, tmp_path, monkeypatch):
    more, others = (
        write_csv(tmp_path / name, {pid: "train"}) for name, pid in (("more", 11), ("others", 13))
    )
    added_before_the_claim(monkeypatch, url, others)
    with pytest.raises(DataError, match="was changed meanwhile"):
        add(url, "csv", more, **SMALL)
    add(url, "csv", more, **SMALL)
    assert {11, 13} < set(Dataset.open(url).identities.tolist())
    assert is_whole(url)


def test_deletion_sees_the_version_that_another_machine_made_meanwhile(url, tmp_path, monkeypatch):
    remove(url, [3], jobs=1)
    others = write_csv(tmp_path / "others", {13: "train"})
    added_before_the_claim(monkeypatch, url, others)
    with pytest.raises(DataError, match="was changed meanwhile"):
        remove(url, [3], delete_old=True, jobs=1)
    remove(url, [3], delete_old=True, jobs=1)
    assert 13 in Dataset.open(url).identities
    assert is_whole(url)


@pytest.mark.parametrize("what", ["no images", "no readable images"])
def test_addition_of_nothing_is_refused_and_others_can_follow(url, tmp_path, what):
    more = write_csv(tmp_path / "more", {11: "train"} if "readable" in what else {})
    for image in more.parent.glob("*.jpg"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match="no images under"):
        add(url, "csv", more, skip_unreadable=True, **SMALL)
    remove(url, [1], jobs=1)


def test_addition_whose_images_change_can_be_repeated(url, tmp_path, monkeypatch):
    more = write_csv(tmp_path / "more", {11: "train"})
    other = (write_csv(tmp_path / "other", {11: "train"}, seed=1).parent / "11-0.jpg").read_bytes()
    claim = versions.state.claim

    def change(*arguments, **options):
        claim(*arguments, **options)
        (more.parent / "11-0.jpg").write_bytes(other)

    with monkeypatch.context() as patch:
        patch.setattr(versions.state, "claim", change)
        with pytest.raises(DataError, match=r"11-0\.jpg changed during the build: run this again"):
            add(url, "csv", more, **SMALL)
    add(url, "csv", more, **SMALL)
    assert is_whole(url)


def test_build_again_leaves_an_unfinished_change_as_it_is(url, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            remove(url, [3], jobs=1)
    unfinished = {key for key in keys(url) if key.startswith("build/")}
    images = write_csv(tmp_path / "images", PEOPLE)
    assert build("csv", images, url, name="people", **SMALL).already_built
    assert unfinished
    assert unfinished <= keys(url)


def test_removed_person_is_gone_and_all_others_stay(url):
    before = images_of(Dataset.open(url))
    change = remove(url, [3, 7], jobs=1)
    now = images_of(Dataset.open(url))
    assert now == {who: data for who, data in before.items() if who[1] not in (3, 7)}
    assert change.images == len(before) - len(now) == 6
    assert Dataset.open(url).identities.tolist() == [1, 5]
    assert is_whole(url)


@BOTH
def test_deleted_person_is_in_no_object(url, tmp_path):
    add(url, "csv", write_csv(tmp_path / "more", {11: "train"}), **SMALL)
    gone = [data for who, data in images_of(Dataset.open(url)).items() if who[1] == 11]
    first = Dataset.open(url).digest
    remove(url, [5], delete_old=False, jobs=1)
    change = remove(url, [11], delete_old=True, jobs=1)
    assert change.deleted > 0
    storage = open_storage(url)
    objects = {key: storage.read(key) for key in keys(url)}
    assert not any(data in content for data in gone for content in objects.values())
    assert is_whole(url)
    # The version before the person was added has nobody to delete.
    (kept,) = (content for key, content in objects.items() if key.startswith("versions/"))
    assert Dataset.open(url, first).digest != first
    old = Dataset.open(url, Manifest.from_json(kept).digest)
    assert len(images_of(old)) == 15


@BOTH
def test_deleting_can_follow_later_and_finds_nothing_twice(url):
    remove(url, [3], jobs=1)
    first = remove(url, [3], delete_old=True, jobs=1)
    assert first.already_made
    assert first.deleted > 0
    with pytest.raises(DataError, match="has no pid 3"):
        remove(url, [3], delete_old=True, jobs=1)


def test_deletion_leaves_no_part_of_a_killed_copy_and_no_path(url, tmp_path):
    more = write_csv(tmp_path / "more", {11: "train"})
    (more.parent / "11-0.jpg").write_bytes(b"")
    add(url, "csv", more, skip_unreadable=True, **SMALL)
    parts = [Path(url, folder, ".tmp-abc") for folder in (".", "shards", "shards/v1", "versions")]
    for part in parts:
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(b"a part")
    other = Path(url, "other/.tmp-abc")
    other.parent.mkdir()
    other.write_bytes(b"of another program")
    remove(url, [11], delete_old=True, jobs=1)
    assert not [part for part in parts if part.exists()]
    assert other.exists()
    assert Dataset.open(url).manifest.left_out == ()
    assert b"11-0.jpg" not in Path(url, "manifest.json").read_bytes()


def test_object_that_cannot_be_deleted_is_named(url, monkeypatch):
    monkeypatch.setattr(LocalStorage, "erase", lambda self, key: None)
    with pytest.raises(StorageError, match="is still there after it was deleted"):
        remove(url, [3], delete_old=True, jobs=1)


@pytest.mark.parametrize(
    ("pids", "message"),
    [([2], "has no pid 2: nothing was changed"), ([1, 3], "too few people left")],
)
def test_removal_that_cannot_be_is_refused(url, pids, message):
    before = Dataset.open(url).digest
    with pytest.raises(DataError, match=message):
        remove(url, pids, jobs=1)
    assert Dataset.open(url).digest == before
    remove(url, [7], jobs=1)


@BOTH
def test_merged_people_and_cameras_are_kept_apart(url, place, tmp_path):
    other, out = f"{place}/other", f"{place}/both"
    table = write_csv(tmp_path / "b", {1: "train", 2: "train", 7: "test"}, seed=1)
    build("csv", table, other, name="other", **SMALL)
    manifest = merge([url, other], out).manifest
    assert manifest.name == "people-other"
    dataset, parts = Dataset.open(out), [Dataset.open(url), Dataset.open(other)]
    assert sorted(images_of(dataset).values()) == sorted(
        data for part in parts for data in images_of(part).values()
    )
    assert dataset.identities.tolist() == [1, 3, 5, 11, 12]
    train = dataset.index("train")
    assert dataset.origin("train").tolist() == (train.pid < 10).tolist()
    assert set(dataset.index("query").pid.tolist()) == {7, 9, 17}
    assert set(dataset.index("query").camid.tolist()) == {0, 2}
    assert is_whole(out)
    if "://" not in out:
        assert Path(out, manifest.shards[0].name).stat().st_nlink == 2
    assert merge([url, other], out).already_made


def test_merged_dataset_is_merged_again_and_loses_people(url, place, tmp_path):
    other, out = f"{place}/other", f"{place}/both"
    build("csv", write_csv(tmp_path / "b", {1: "train", 2: "train"}), other, name="other", **SMALL)
    merge([url, other], out)
    third, part = f"{place}/three", f"{place}/c3"
    build("csv", write_csv(tmp_path / "c", PEOPLE, seed=2), part, name="c", **SMALL)
    merge([out, part], third)
    assert is_whole(third)
    remove(third, [11], jobs=1)
    assert is_whole(third)


def test_datasets_of_one_name_are_not_merged(url, tmp_path):
    with pytest.raises(ConfigError, match=r"named people: .* another --name"):
        merge([url, url], str(tmp_path / "both"))


def test_commands_say_what_they_did(url, tmp_path, capsys):
    more = write_csv(tmp_path / "more", {11: "train"})
    assert main(["add", url, "--source", "csv", "--root", str(more), "--jobs", "1"]) == 0
    assert "3 images added" in capsys.readouterr().out
    write_csv(tmp_path / "more", {11: "train", 13: "train"})
    assert main(["add", url, "--source", "csv", "--root", str(more), "--jobs", "1"]) == 0
    assert "3 images added\n3 images were there already" in capsys.readouterr().out
    assert main(["remove", url, "--pid", "11", "3", "--delete-old", "--jobs", "1"]) == 0
    assert "6 images removed" in capsys.readouterr().out
    assert main(["remove", url, "--pid", "11"]) == 3
    assert "has no pid 11" in capsys.readouterr().err


def test_old_manifests_keep_their_digest(url):
    shard = Dataset.open(url).manifest.shards[0]
    assert set(shard.model_dump()) == {"name", "bytes", "sha256", "split", "images"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4))
def test_indices_are_joined_in_shard_order(parts):
    first, indices = 0, []
    for shards in parts:
        column = np.sort(np.array(shards, np.int32))
        numbers = {name: np.zeros(len(column), np.int64) for name in ("offset", "size", "label")}
        numbers |= {name: np.zeros(len(column), np.int64) for name in ("width", "height", "camid")}
        index = Index(shard=column, pid=column + 10 * first, path=column.astype(object), **numbers)
        indices.append(versions.shifted(index, first))
        first += 4
    whole = Index.concatenated(indices[::-1])
    assert (np.diff(whole.shard) >= 0).all()
    assert len(whole) == sum(map(len, parts))
