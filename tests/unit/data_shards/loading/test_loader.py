"""Batches: the same whatever the workers, ranks or the step one starts at."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import multiprocessing
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ObjectMissing, StorageError
from data_shards.index import Index
from data_shards.loading.decode import MAX_PIXELS, decode, decode_into
from data_shards.loading.loader import Batch, Decoders, split_batches, train_batches
from data_shards.sampler import plan, slice_for_rank
from data_shards.storage import LocalStorage

SIZE = {"height": 48, "width": 16}
PLAN = {"seed": 3, "epoch": 1, "identities": 4, "images": 4, "window": 2}


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder that has to be downloaded from; notes each download, for all processes."""

    root: Path

    @property
    def url(self) -> str:
        return f"remote:{self.root}"

    def download(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        with (self.root / "downloads.txt").open("a") as file:
            file.write(f"{key}\n")
        LocalStorage(self.root).download(key, path, sha256=sha256)

    @property
    def downloads(self) -> list[str]:
        return (self.root / "downloads.txt").read_text().split()


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (6, 4, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 train identities in several shards, and a gallery of 37 images."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for number in range(30 * 9 + 37):
        split = "train" if number < 30 * 9 else "gallery"
        name = f"{number:04d}.{'png' if number % 10 == 0 else 'jpg'}"
        Image.fromarray(smooth_image(rng, 60 + number % 7, 24)).save(root / name, quality=90)
        rows.append({"path": name, "pid": number // 9, "camid": number % 5, "split": split})
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "pid", "camid", "split"])
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path_factory.mktemp("shards") / "data"
    build("csv", root / "list.csv", str(out), shard_bytes=100_000, jobs=1)
    return out


@pytest.fixture
def dataset(built: Path) -> Dataset:
    return Dataset.open(str(built))


@pytest.fixture
def cache(dataset: Dataset, tmp_path: Path) -> ShardCache:
    return ShardCache(dataset.storage, tmp_path / "cache", 1 << 30)


@pytest.fixture
def rows(dataset: Dataset) -> np.ndarray:
    return plan(dataset.index("train"), **PLAN)


@pytest.fixture
def remote(built: Path, tmp_path: Path) -> Dataset:
    """The same dataset where it has to be downloaded, in a folder of its own."""
    copy = tmp_path / "copy"
    for key, _ in LocalStorage(built).list():
        LocalStorage(copy).write(key, LocalStorage(built).read(key))
    return dataclasses.replace(Dataset.open(str(copy)), storage=RemoteFolder(copy))  # type: ignore[arg-type]


def remote_cache(remote: Dataset, tmp_path: Path, max_bytes: int = 1 << 30) -> ShardCache:
    return ShardCache(remote.storage, tmp_path / "cache", max_bytes)


def two_windows(remote: Dataset) -> int:
    sizes = sorted(shard.bytes for shard in remote.manifest.shards if shard.split == "train")
    return sum(sizes[-2 * PLAN["window"] :])


def held(folder: Path) -> int:
    """Bytes of the shards in a folder that other processes add to and remove from."""
    total = 0
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(Batch)
    )


def test_a_batch_holds_the_planned_images(dataset, cache, rows):
    index = dataset.index("train")
    batch = next(train_batches(dataset, cache, rows, **SIZE, workers=0))
    assert batch.image.shape == (16, 48, 16, 3)
    assert batch.image.dtype == torch.uint8
    assert batch.row.tolist() == rows[0].tolist()
    assert batch.label.tolist() == index.label[rows[0]].tolist()
    assert {t.dtype for t in (batch.row, batch.label)} == {torch.int64}
    for row, image in zip(rows[0], batch.image, strict=True):
        shard = dataset.manifest.shards[index.shard[row]]
        data = dataset.storage.read_range(shard.name, index.offset[row], index.size[row])
        expected = cv2.resize(decode(data), (16, 48), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(image.numpy(), expected)


def test_any_number_of_workers_gives_the_same_batches(dataset, cache, rows):
    expected = list(train_batches(dataset, cache, rows, **SIZE, workers=0))
    assert len(expected) == len(rows)
    for workers in (1, 2):
        batches = list(train_batches(dataset, cache, rows, **SIZE, workers=workers))
        assert len(batches) == len(rows)
        assert all(map(same, batches, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same_batches(dataset, cache, rows, workers):
    start = len(rows) // 2
    expected = list(train_batches(dataset, cache, rows, **SIZE, workers=workers))[start:]
    resumed = list(train_batches(dataset, cache, rows, start=start, **SIZE, workers=workers))
    assert len(resumed) == len(expected)
    assert all(map(same, resumed, expected))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_side_by_side_see_the_batches_of_one(dataset, cache, rows, world):
    ranks = [
        train_batches(dataset, cache, slice_for_rank(rows, rank, world), **SIZE, workers=0)
        for rank in range(world)
    ]
    for whole in train_batches(dataset, cache, rows, **SIZE, workers=0):
        parts = [next(rank) for rank in ranks]
        for field in dataclasses.fields(Batch):
            together = torch.cat([getattr(part, field.name) for part in parts])
            assert torch.equal(together, getattr(whole, field.name))


def test_skipped_steps_are_not_read(remote, tmp_path, rows):
    cache = remote_cache(remote, tmp_path, two_windows(remote))
    batches = list(train_batches(remote, cache, rows, start=len(rows) - 1, **SIZE, workers=0))
    assert len(batches) == 1
    assert len(remote.storage.downloads) <= PLAN["window"]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_sees_each_image_once(dataset, cache, world, workers):
    seen, sizes = [], []
    for rank in range(world):
        options = {"rank": rank, "world": world, "batch": 8, "workers": workers, **SIZE}
        for batch in split_batches(dataset, cache, "gallery", **options):
            seen += batch.row.tolist()
            sizes.append(len(batch.image))
            assert batch.label.tolist() == [-1] * len(batch.label)
    assert seen == list(range(37))
    assert max(sizes) <= 8


def test_more_ranks_than_images_leave_some_without(dataset, cache):
    batches = [
        list(split_batches(dataset, cache, "gallery", rank=r, world=50, batch=4, **SIZE, workers=0))
        for r in range(50)
    ]
    assert sum(len(b.image) for per_rank in batches for b in per_rank) == 37


@pytest.mark.parametrize("workers", [0, 2])
def test_each_shard_is_downloaded_once_though_only_two_windows_fit(
    remote, tmp_path, rows, cache, dataset, workers
):
    small = remote_cache(remote, tmp_path, two_windows(remote))
    expected = train_batches(dataset, cache, rows, **SIZE, workers=0)
    for batch, other in zip(
        train_batches(remote, small, rows, **SIZE, workers=workers), expected, strict=True
    ):
        assert same(batch, other)
        assert held(small.folder) <= small.max_bytes
    used = {remote.manifest.shards[i].name for i in remote.index("train").shard[rows].flat}
    assert len(used) > 2 * PLAN["window"]
    assert sorted(remote.storage.downloads) == sorted(used)


def test_a_cache_that_cannot_hold_a_step_is_refused(remote, tmp_path, rows):
    cache = remote_cache(remote, tmp_path, 60_000)
    with pytest.raises(ConfigError, match="one step reads shards of"):
        next(train_batches(remote, cache, rows, **SIZE, workers=0))


def damage(path: Path, index: Index, row: int) -> None:
    """Overwrite the second half of an image in a shard."""
    with path.open("r+b") as file:
        file.seek(index.offset[row] + index.size[row] // 2)
        file.write(bytes(int(index.size[row]) // 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_an_error_that_says_which(remote, tmp_path, workers):
    dataset = Dataset.open(str(remote.storage.root))
    cache, index = ShardCache(dataset.storage, tmp_path / "cache", 1), dataset.index("gallery")
    damage(cache.path(dataset.manifest.shards[index.shard[20]]), index, 20)
    with pytest.raises(DataError, match=rf"^{index.path[20]} \(byte {index.offset[20]} of shards/"):
        list(split_batches(dataset, cache, "gallery", batch=8, **SIZE, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cached_shard_damaged_underneath_is_fetched_again_and_nothing_is_lost(
    remote, tmp_path, dataset, cache, caplog, workers
):
    small, index = remote_cache(remote, tmp_path), remote.index("gallery")
    options = {"batch": 8, "workers": workers, **SIZE}
    batches = split_batches(remote, small, "gallery", **options)
    seen = [next(batches)]
    shard = remote.manifest.shards[index.shard[36]]
    damage(small.path(shard), index, 36)
    seen += list(batches)
    damage(small.path(shard), index, 36)  # workers that start later find it damaged
    again = list(split_batches(remote, small, "gallery", **options))
    expected = list(split_batches(dataset, cache, "gallery", **options))
    assert all(map(same, seen, expected))
    assert all(map(same, again, expected))
    assert len(seen) == len(again) == len(expected)
    assert remote.storage.downloads.count(shard.name) >= 2
    assert small.path(shard).read_bytes() == (remote.storage.root / shard.name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_the_same_error_from_a_worker(remote, tmp_path, rows, workers):
    for path in (Path(remote.storage.root) / "shards").glob("train-*"):
        path.unlink()
    cache = remote_cache(remote, tmp_path)
    with pytest.raises(ObjectMissing, match="train-"):
        list(train_batches(remote, cache, rows, **SIZE, workers=workers))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_of_a_batch_that_is_kept_does_not_change(dataset, cache, rows, workers):
    batches = train_batches(dataset, cache, rows, **SIZE, workers=workers)
    kept = next(batches).image[3:5]
    before = kept.clone()
    assert len(list(batches)) == len(rows) - 1
    assert torch.equal(kept, before)


def test_memory_of_batches_that_are_gone_is_used_again(dataset, cache):
    rows = plan(dataset.index("train"), **PLAN, steps=60)
    batches = train_batches(dataset, cache, rows, **SIZE, workers=2)
    assert len({batch.image.data_ptr() for batch in batches}) <= 8


def test_too_little_shared_memory_is_an_error_that_says_what_to_do(
    dataset, cache, rows, monkeypatch
):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(StorageError, match="enlarge /dev/shm"):
        next(train_batches(dataset, cache, rows, **SIZE, workers=2))


def test_leaving_early_ends_the_workers(dataset, cache, rows):
    batches = train_batches(dataset, cache, rows, **SIZE, workers=2)
    list(islice(batches, 2))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_kept_workers_serve_epochs_and_splits_with_the_same_batches(dataset, cache, rows):
    expected = list(train_batches(dataset, cache, rows, **SIZE, workers=0))
    gallery = list(split_batches(dataset, cache, "gallery", batch=8, **SIZE, workers=0))
    decoders = Decoders(cache, dataset.manifest.shards, 16, **SIZE, workers=2)
    kept = {"workers": 2, "decoders": decoders}
    for _ in range(2):
        batches = list(train_batches(dataset, cache, rows, **SIZE, **kept))
        assert all(map(same, batches, expected))
        assert len(batches) == len(expected)
        processes = {process.pid for process in multiprocessing.active_children()}
        batches = list(split_batches(dataset, cache, "gallery", batch=8, **SIZE, **kept))
        assert all(map(same, batches, gallery))
        assert len(batches) == len(gallery)
        assert {process.pid for process in multiprocessing.active_children()} == processes
    assert len(processes) == 2
    decoders.close()
    assert multiprocessing.active_children() == []


def test_kept_workers_serve_after_an_epoch_that_was_left_early(dataset, cache):
    rows = plan(dataset.index("train"), **PLAN, steps=30)
    expected = list(train_batches(dataset, cache, rows, **SIZE, workers=0))
    decoders = Decoders(cache, dataset.manifest.shards, 16, **SIZE, workers=1)
    kept = {"workers": 1, "decoders": decoders}
    for left in range(4):
        batches = train_batches(dataset, cache, rows, **SIZE, **kept)
        seen = list(islice(batches, left))
        batches.close()
        del seen
    addresses = set()
    for batch, whole in zip(
        train_batches(dataset, cache, rows, **SIZE, **kept), expected, strict=True
    ):
        assert same(batch, whole)
        addresses.add(batch.image.data_ptr())
    assert len(addresses) <= 6, "the slots of the epochs left early are used again"
    decoders.close()


def test_loading_does_not_change_the_random_state_of_the_training(dataset, cache, rows):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(train_batches(dataset, cache, rows[:2], **SIZE, workers=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [-1, 10_000])
def test_a_start_outside_the_epoch_is_refused(dataset, cache, rows, start):
    with pytest.raises(ConfigError, match="cannot start at step"):
        train_batches(dataset, cache, rows, start=start, **SIZE, workers=0)


def encoded(image: Image.Image, format: str, tmp_path: Path) -> bytes:
    image.save(tmp_path / "image", format)
    return (tmp_path / "image").read_bytes()


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"),
     ("PNG", "L"), ("PNG", "P"), ("BMP", "RGB"), ("WEBP", "RGB")],
)  # fmt: skip
def test_every_usual_format_becomes_rgb(tmp_path, format, mode):
    image = Image.fromarray(smooth_image(np.random.default_rng(0), 50, 20)).convert(mode)
    data = encoded(image, format, tmp_path)
    expected = np.asarray(image.convert("RGB"), int)
    assert decode(data).shape == (50, 20, 3)
    assert np.abs(decode(data) - expected).mean() < 6


def test_decoding_resizes_into_the_given_buffer(tmp_path):
    picture = smooth_image(np.random.default_rng(0), 50, 20)
    data = encoded(Image.fromarray(picture), "PNG", tmp_path)
    batch = np.zeros((3, 40, 30, 3), np.uint8)
    decode_into(data, batch[1])
    assert np.array_equal(batch[1], cv2.resize(picture, (30, 40)))
    assert not batch[0].any()
    assert not batch[2].any()


def test_a_much_larger_image_is_averaged_over_areas(tmp_path):
    stripes = np.zeros((80, 80, 3), np.uint8)
    stripes[::4] = 255
    out = np.empty((20, 20, 3), np.uint8)
    decode_into(encoded(Image.fromarray(stripes), "PNG", tmp_path), out)
    assert (out == 64).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_a_cut_image_is_refused(tmp_path, format, keep):
    image = Image.fromarray(smooth_image(np.random.default_rng(0), 50, 20))
    data = encoded(image, format, tmp_path)
    with pytest.raises(DataError):
        decode(data[: int(keep * len(data)) if isinstance(keep, float) else keep])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, format, monkeypatch):
    monkeypatch.setattr("data_shards.loading.decode.MAX_PIXELS", 999)
    data = encoded(Image.new("RGB", (20, 50)), format, tmp_path)
    with pytest.raises(DataError, match="20 × 50 pixels is more than the 999 allowed"):
        decode(data)
    assert MAX_PIXELS >= 8000 * 8000
