from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.building.scan import ScannedImage, scan
from data_shards.building.writer import plan_shards, write_shard
from data_shards.errors import DataError
from data_shards.records import SPLITS, ImageRecord
from data_shards.storage.atomic import file_sha256


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24 + seed, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def images(tmp_path) -> list[ScannedImage]:
    records = []
    for n in range(12):
        relative = f"im.ages/a/{n:02d}.{'PNG' if n == 5 else 'jpg'}"
        path = tmp_path / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n, "PNG" if n == 5 else "JPEG"))
        split = ("train", "query", "gallery")[n // 4]
        records.append(ImageRecord(path, relative, 40 - n // 2, n % 3 + 1, split))
    good, bad = scan(records, 1)
    assert not bad
    return good


def write_all(images, folder: Path, shard_bytes: int = 1 << 20):
    folder.mkdir()
    for plan in plan_shards(images, shard_bytes):
        path = folder / Path(plan.name).name
        yield plan, path, *write_shard(plan, "people", path)


def test_tars_are_those_of_the_standard_library_byte_for_byte(images, tmp_path):
    for _, path, _, offsets in write_all(images, tmp_path / "out"):
        copy = io.BytesIO()
        with tarfile.open(path) as tar, tarfile.open(fileobj=copy, mode="w", format=0) as plain:
            members = tar.getmembers()
            for member in members:
                header = tarfile.TarInfo(member.name)
                header.size, header.mode = member.size, 0o444
                plain.addfile(header, tar.extractfile(member))
        assert copy.getvalue() == path.read_bytes()
        assert offsets == [member.offset_data for member in members[::2]]


def test_program_in_the_documentation_reads_the_shards(images, tmp_path, capsys):
    text = (Path(__file__).parents[4] / "docs/DATA.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    written = [p for _, p, _, _ in write_all(images, tmp_path / "out") if p.name[:5] == "train"]
    shards = next(line for line in program.splitlines() if line.startswith("shards = "))
    exec(program.replace(shards, f"shards = {[str(path) for path in written]}"), {})
    assert capsys.readouterr().out.splitlines()[0] == "0 3 (26, 12, 3)"


def test_stock_webdataset_reads_the_shards(images, tmp_path):
    written = list(write_all(images, tmp_path / "out"))
    train = [str(path) for plan, path, _, _ in written if plan.split == "train"]
    samples = list(webdataset.WebDataset(train, shardshuffle=False).decode("rgb8"))
    assert [s["json"]["pid"] for s in samples] == [39, 39, 40, 40]
    assert [s["json"]["label"] for s in samples] == [0, 0, 1, 1]
    for sample in samples:
        height, width, _ = sample["jpg"].shape
        assert (sample["json"]["width"], sample["json"]["height"]) == (width, height)
        assert sample["json"]["dataset"] == "people"
        assert sample["json"]["split"] == "train"
    query = [str(path) for plan, path, _, _ in written if plan.split == "query"]
    kinds = [set(s) & {"jpg", "png"} for s in webdataset.WebDataset(query, shardshuffle=False)]
    assert sorted(map(sorted, kinds)) == [["jpg"], ["jpg"], ["jpg"], ["png"]]


def test_offsets_lead_to_the_original_bytes(images, tmp_path):
    for plan, path, info, offsets in write_all(images, tmp_path / "out"):
        data = path.read_bytes()
        assert (len(data), file_sha256(path)) == (info.bytes, info.sha256)
        for member, offset in zip(plan.images, offsets, strict=True):
            original = member.image.record.path.read_bytes()
            assert data[offset : offset + len(original)] == original


def test_bytes_depend_only_on_the_images(images, tmp_path):
    first = [info for _, _, info, _ in write_all(images, tmp_path / "first")]
    for image in images:
        os.utime(image.record.path, (1, 1))
    again = [info for _, _, info, _ in write_all(images[::-1], tmp_path / "again")]
    assert again == first


@pytest.mark.parametrize("name", ["no-extension", "x.json", "x.tar.gz?", "x.jpgjpgjpgjpg"])
def test_strange_extension_still_makes_a_sample(images, tmp_path, name):
    record = replace(images[0].record, relative=name)
    odd = replace(images[0], record=record)
    paths = [str(path) for _, path, _, _ in write_all([odd], tmp_path / "out")]
    (sample,) = webdataset.WebDataset(paths, shardshuffle=False)
    assert sample["image"] == images[0].record.path.read_bytes()
    assert json.loads(sample["json"])["path"] == name


def test_test_images_have_no_label(images, tmp_path):
    paths = [str(p) for plan, p, _, _ in write_all(images, tmp_path / "o") if plan.split != "train"]
    labels = [
        json.loads(s["json"])["label"] for s in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    assert labels == [-1] * 8


def test_image_that_changes_during_the_build_stops_it(images, tmp_path):
    images[3].record.path.write_bytes(picture(50))
    with pytest.raises(DataError, match=r"03\.jpg changed during the build"):
        list(write_all(images, tmp_path / "out"))


def scanned(entries: list[tuple[int, int, str]]) -> list[ScannedImage]:
    return [
        ScannedImage(ImageRecord(Path("x"), f"{n}.jpg", pid, 0, split), size, "0" * 64, 8, 8)
        for n, (pid, size, split) in enumerate(entries)
    ]


entries = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 40_000), st.sampled_from(SPLITS)), max_size=60
)


@settings(deadline=None)
@given(entries, st.integers(1, 120_000))
def test_plan_holds_each_image_once_in_shards_of_one_split(entries, shard_bytes):
    images = scanned(entries)
    plans = plan_shards(images, shard_bytes)
    placed = [m.image.record.relative for plan in plans for m in plan.images]
    assert sorted(placed) == sorted(i.record.relative for i in images)
    assert len({plan.name for plan in plans}) == len(plans)
    keys = [m.key for plan in plans for m in plan.images]
    assert len(set(keys)) == len(keys)
    assert all({m.image.record.split for m in p.images} == {p.split} for p in plans)


@settings(deadline=None)
@given(entries, st.integers(1, 120_000))
def test_identity_is_cut_only_when_larger_than_a_shard(entries, shard_bytes):
    plans = plan_shards(scanned(entries), shard_bytes)
    for split in SPLITS:
        shards = [plan for plan in plans if plan.split == split]
        runs = [m.image.record.pid for plan in shards for m in plan.images]
        assert [pid for pid, _ in groupby(runs)] == sorted(set(runs)), "contiguous"
        for pid in set(runs):
            holding = [p for p in shards if any(m.image.record.pid == pid for m in p.images)]
            members = [m for p in holding for m in p.images if m.image.record.pid == pid]
            if len(holding) > 1:
                assert sum(2048 + m.image.size for m in members) > shard_bytes


@settings(deadline=None)
@given(entries)
def test_labels_number_the_train_identities(entries):
    plans = plan_shards(scanned(entries), 50_000)
    found = {(m.image.record.pid, m.label) for p in plans for m in p.images if p.split == "train"}
    pids = sorted({pid for pid, _, split in entries if split == "train"})
    assert found == {(pid, n) for n, pid in enumerate(pids)}
