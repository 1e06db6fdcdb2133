"""Datasets that are not what they say: hostile images, tars and indexes, and very large ones."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import data_shards.cli
from data_shards.building.build import build
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import DataError
from data_shards.loading.loader import split_batches
from data_shards.manifest import Manifest, sha256
from data_shards.sources.synthetic import render as synthetic

OPTIONS = {"identities": 8, "cameras": 2, "images_per_camera": 2}
SIDE = 60_000


def jpeg_bomb() -> bytes:
    """A small JPEG whose header says 60,000 × 60,000 pixels."""
    data = bytearray(cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", SIDE, SIDE)
    return bytes(data)


def png_bomb() -> bytes:
    """A PNG whose header says 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(SIDE // 8 + 1)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


BOMBS = {"jpg": jpeg_bomb, "png": png_bomb}
DECODE = """
import resource, sys
from pathlib import Path
import data_shards.loading.decode as d
from data_shards.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    d.decode(Path(sys.argv[1]).read_bytes())
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_bomb_is_refused_before_its_pixels_take_memory(tmp_path, kind):
    path = tmp_path / f"bomb.{kind}"
    path.write_bytes(BOMBS[kind]())
    assert path.stat().st_size < 1 << 20
    done = subprocess.run(
        [sys.executable, "-c", DECODE, path], capture_output=True, text=True, check=True
    )
    said, megabytes = done.stdout.splitlines()
    assert "60000 × 60000 pixels is more than" in said or "(3600000000 pixels)" in said
    assert int(megabytes) < 50


def copy_dataset(source: Path, target: Path, change: Callable[[bytes], bytes]) -> None:
    """Copy a dataset with its first shard changed and all digests made right: a forger's work."""
    manifest = json.loads((source / "manifest.json").read_bytes())
    for shard in manifest["shards"]:
        data = (source / shard["name"]).read_bytes()
        if shard is manifest["shards"][0]:
            data = change(data)
            shard |= {"bytes": len(data), "sha256": sha256(data)}
        (target / shard["name"]).parent.mkdir(parents=True, exist_ok=True)
        (target / shard["name"]).write_bytes(data)
    (target / "index.parquet").write_bytes((source / "index.parquet").read_bytes())
    (target / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, out = tmp_path_factory.mktemp("people"), tmp_path_factory.mktemp("shards")
    synthetic.read(root, **OPTIONS)
    build("synthetic", root, str(out), options=OPTIONS, shard_bytes=60_000, jobs=1)
    return out


def images(url: Path, cache: Path) -> int:
    """Read all train images as a training does; returns how many."""
    dataset = Dataset.open(str(url))
    shards = ShardCache(dataset.storage, cache, 10**9)
    options = {"batch": 4, "height": 32, "width": 16, "workers": 0}
    return sum(len(b.image) for b in split_batches(dataset, shards, "train", **options))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def with_members(change: Callable[[tarfile.TarInfo], None]) -> Callable[[bytes], bytes]:
    """Change the headers of a tar's members, each image staying where it is."""

    def rewrite(data: bytes) -> bytes:
        sink = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(data)) as old,
            tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as new,
        ):
            for member in old.getmembers():
                content = old.extractfile(member)
                assert content is not None
                body = content.read()
                change(member)
                new.addfile(member, io.BytesIO(body) if member.isreg() else None)
        return sink.getvalue()

    return rewrite


def climb(member: tarfile.TarInfo) -> None:
    member.name = f"../../{member.name}"


def absolute(member: tarfile.TarInfo) -> None:
    member.name = f"/tmp/{member.name}"


def link(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        if member.name.endswith(".json"):
            member.type, member.size, member.linkname = kind, 0, "/etc/passwd"

    return change


@pytest.mark.parametrize(
    "change",
    [climb, absolute, link(tarfile.SYMTYPE), link(tarfile.LNKTYPE)],
    ids=["../", "absolute", "symbolic link", "hard link"],
)
def test_tar_that_leads_out_is_never_followed(people, tmp_path, capsys, change):
    target = tmp_path / "inside" / "forged"
    copy_dataset(people, target, with_members(change))
    before = files(tmp_path)
    code = data_shards.cli.main(["verify", str(target), "--jobs", "1"])
    said = capsys.readouterr()
    assert "root:" not in said.out + said.err
    if change not in (climb, absolute):  # images stay readable whatever their members are called
        assert code == 3
        assert "train-000000.tar" in said.err
        with pytest.raises(DataError):
            images(target, tmp_path / "cache")
    else:
        assert images(target, tmp_path / "cache") > 0
    assert files(tmp_path) == before


def test_index_that_disagrees_with_its_tar_is_found(people, tmp_path, capsys):
    copy_dataset(people, tmp_path / "moved", lambda data: data[512:] + data[:512])
    with pytest.raises(DataError, match=r"\(byte \d+ of shards/train-000000\.tar in .*verify"):
        images(tmp_path / "moved", tmp_path / "cache")
    assert data_shards.cli.main(["verify", str(tmp_path / "moved"), "--jobs", "1"]) == 3
    assert "train-000000.tar" in capsys.readouterr().err


def test_corrupt_image_within_a_shard_is_named(people, tmp_path, capsys):
    index = Dataset.open(str(people)).index("train")
    row = 2
    start, size = int(index.offset[row]), int(index.size[row])

    def corrupt(data: bytes) -> bytes:
        return data[: start + 20] + bytes(size - 20) + data[start + size :]

    copy_dataset(people, tmp_path / "data", corrupt)
    with pytest.raises(
        DataError, match=rf"^{index.path[row]} \(byte {start} of shards/train-000000"
    ):
        images(tmp_path / "data", tmp_path / "cache")
    assert data_shards.cli.main(["verify", str(tmp_path / "data"), "--decode", "--jobs", "1"]) == 3
    assert "train-00000002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "value"),
    [("bytes", -1), ("images", -1), ("bytes", 1 << 70), ("images", 2.5), ("sha256", "a" * 63)],
)
def test_manifest_with_impossible_numbers_is_refused(people, where, value):
    manifest = json.loads((people / "manifest.json").read_bytes())
    manifest["shards"][0][where] = value
    with pytest.raises(DataError, match=r"manifest\.json is not valid"):
        Manifest.from_json(json.dumps(manifest).encode())


def test_bomb_in_a_shard_is_an_error_with_its_name(people, tmp_path):
    index = Dataset.open(str(people)).index("train")
    start, bomb = int(index.offset[1]), jpeg_bomb()
    assert len(bomb) <= index.size[1]
    copy_dataset(people, tmp_path, lambda d: d[:start] + bomb + d[start + len(bomb) :])
    with pytest.raises(DataError, match=rf"^{index.path[1]} .*60000 × 60000 pixels"):
        images(tmp_path, tmp_path / "cache")


IDENTITIES = 1_000_000
MILLION = """
import resource, time
import numpy as np
from data_shards.index import Index
from data_shards.manifest import FileInfo, Manifest, ShardInfo, SplitInfo, sha256
from data_shards.sampler import plan

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20

images = 2 * {identities}
shards, each = 1000, images // 1000
row = np.arange(images)
index = Index(
    shard=(row // each).astype(np.int32), offset=512 + 8192 * (row % each),
    size=np.full(images, 7000), pid=row // 2, label=row // 2, camid=(row % 2).astype(np.int32),
    width=np.full(images, 128, np.int32), height=np.full(images, 256, np.int32),
    path=np.array([f"{{i // 2:07d}}/{{i % 2}}.jpg" for i in row], object),
)
data = index.to_parquet()
manifest = Manifest(
    name="million", source="csv", options={{}}, complete=True, content="c" * 64,
    splits={{"train": SplitInfo(images=images, identities={identities}, cameras=2)}},
    shards=tuple(
        ShardInfo(name=f"shards/train-{{i:06d}}.tar", split="train", images=each,
                  bytes=each * 8192 + 1024, sha256="a" * 64) for i in range(shards)
    ),
    index=FileInfo(name="index.parquet", bytes=len(data), sha256=sha256(data)),
)
del index
began, before = used()
index = Index.from_parquet(data, Manifest.from_json(manifest.to_json()))
read, _ = used()
rows = plan(index, seed=0, epoch=0, identities=16, images=4, window=8)
planned, after = used()
print(len(index), rows.shape[1], len(data), read - began, planned - read, after)
"""


def test_index_of_a_million_identities_is_read_and_planned_in_bounds():
    done = subprocess.run(
        [sys.executable, "-c", MILLION.format(identities=IDENTITIES)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    images, batch, _, read, planned, peak = map(float, done.stdout.split())
    assert (images, batch) == (2 * IDENTITIES, 64)
    assert read < 60
    assert planned < 60
    assert peak < 4
