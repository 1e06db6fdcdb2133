"""Names of people and cameras, through all versions of a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
from version_files import PEOPLE, SMALL, images_of, is_whole, write_csv

from data_shards.building import versions
from data_shards.building.build import build
from data_shards.building.merge import merge
from data_shards.building.versions import add, remove
from data_shards.cli import main
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError


def named(folder: Path, people: str, seed: int, first: int = 0) -> Path:
    """A table of people who have one letter as name, each seen at a door and in a hall."""
    pids = {ord(letter): "test" if letter.isupper() else "train" for letter in people}
    table = write_csv(folder, pids, seed=seed, first=first)
    head, *lines = table.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    rows = [(path, chr(int(pid)), ("door", "hall")[int(c)], split) for path, pid, c, split in cells]
    table.write_text("\n".join([head, *map(",".join, rows)]))
    return table


def shown_names(url: str) -> set[tuple[str, str, str]]:
    """The split of each image, and the names of its person and camera."""
    dataset = Dataset.open(url)
    names = dataset.manifest.names
    assert names is not None
    return {
        (split, names.people[pid], names.cameras[camid])
        for split, pid, camid, _ in images_of(dataset)
    }


def test_names_are_kept_through_all_changes_and_go_with_removed_people(tmp_path):
    first, both = str(tmp_path / "first"), str(tmp_path / "both")
    build("csv", named(tmp_path / "a", "abA", 0), first, **SMALL)
    add(first, "csv", named(tmp_path / "b", "cC", 1), ids="new", **SMALL)
    numbers = str(tmp_path / "numbers")
    build("csv", write_csv(tmp_path / "c", PEOPLE), numbers, name="numbers", **SMALL)
    assert Dataset.open(numbers).manifest.names is None
    merge([numbers, first], both)
    expected = {
        (split, person, camera)
        for person in "abcAC"
        for split in (["query", "gallery"] if person.isupper() else ["train"])
        for camera in (("door",) if split == "query" else ("door", "hall"))
    }
    assert shown_names(first) == expected
    names = Dataset.open(both).manifest.names
    assert sorted(names.people.values()) == sorted("abcAC")
    assert min(names.people) == max(PEOPLE) + 1
    pid = next(pid for pid, name in names.people.items() if name == "C")
    remove(both, [pid])
    assert sorted(Dataset.open(both).manifest.names.people.values()) == sorted("abcA")


@pytest.fixture
def url(tmp_path) -> str:
    """A dataset of a, b and c for training, A and B for testing."""
    build("csv", named(tmp_path / "images", "abcAB", 0), str(tmp_path / "out"), name="p", **SMALL)
    return str(tmp_path / "out")


def test_people_who_are_added_by_name_are_those_of_that_name(url, tmp_path):
    before = Dataset.open(url).manifest.names
    add(url, "csv", named(tmp_path / "more", "bdA", 1, first=3), **SMALL)
    dataset = Dataset.open(url)
    names, index = dataset.manifest.names, dataset.whole
    assert before is not None
    assert names is not None
    assert names.people == before.people | {5: "d"}
    assert names.cameras == before.cameras
    pids = {name: pid for pid, name in names.people.items()}
    of_b, of_d = (sorted(index.path[index.pid == pids[name]]) for name in "bd")
    assert of_b == [f"{ord('b')}-{n}.jpg" for n in range(6)]
    assert of_d == [f"{ord('d')}-{n}.jpg" for n in (3, 4, 5)]
    assert ("train", "d", "hall") in shown_names(url)
    assert is_whole(url)


def test_names_cannot_be_those_of_a_dataset_that_has_numbers(tmp_path):
    url = str(tmp_path / "numbers")
    build("csv", write_csv(tmp_path / "images", PEOPLE), url, **SMALL)
    table = named(tmp_path / "more", "a", 1)
    with pytest.raises(ConfigError, match=r"names of people.*has numbers.*--ids new"):
        add(url, "csv", table, **SMALL)
    add(url, "csv", table, ids="new", **SMALL)
    assert len(Dataset.open(url).identities) == 4


def test_a_name_of_two_people_is_no_answer(url, tmp_path):
    other, both = str(tmp_path / "other"), str(tmp_path / "both")
    build("csv", named(tmp_path / "others", "abcAB", 1), other, name="q", **SMALL)
    merge([url, other], both)
    with pytest.raises(ConfigError, match="several people of the dataset are named b"):
        add(both, "csv", named(tmp_path / "more", "b", 2), **SMALL)
    with pytest.raises(DataError, match=r"a may be pid \d, \d of .*both: give pids"):
        remove(both, ["a"])


def test_name_of_a_removed_person_is_never_that_of_a_later_one(url, tmp_path, monkeypatch):
    remove(url, ["c"], jobs=1)
    # As in an earlier release, d gets the number of c.
    monkeypatch.setattr(versions, "_free_numbers", lambda dataset: (4, 2))
    add(url, "csv", named(tmp_path / "more", "d", 1), **SMALL)
    names = Dataset.open(url).manifest.names
    assert names.people[4] == "d"
    remove(url, ["c"], delete_old=True, jobs=1)
    assert "d" in {person for _, person, _ in shown_names(url)}
    assert is_whole(url)


def test_camera_keeps_its_number_while_it_has_no_images(url, tmp_path):
    table = named(tmp_path / "yard", "d", 1)
    table.write_text(table.read_text().replace("hall", "yard"))
    add(url, "csv", table, **SMALL)
    remove(url, ["d"], jobs=1)
    table = named(tmp_path / "more", "e", 2)
    table.write_text(table.read_text().replace("door", "gate").replace("hall", "yard"))
    add(url, "csv", table, **SMALL)
    cameras = Dataset.open(url).manifest.names.cameras
    assert sorted(cameras.values()) == ["door", "gate", "hall", "yard"]
    assert {name for _, person, name in shown_names(url) if person == "e"} == {"gate", "yard"}


def test_people_are_removed_by_name_from_all_versions(url, capsys):
    assert main(["remove", url, "--pid", "a", "--jobs", "1"]) == 0
    assert {person for _, person, _ in shown_names(url)} == set("bcAB")
    assert main(["remove", url, "--pid", "a", "--delete-old", "--jobs", "1"]) == 0
    assert "none has these people now" in capsys.readouterr().out
    assert main(["remove", url, "--pid", "a", "--jobs", "1"]) == 3
    assert "has nobody named a: nothing was changed" in capsys.readouterr().err
