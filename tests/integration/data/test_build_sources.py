"""Building from S3 and from WebDataset tars, and on Ray, gives the bytes of a local build."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.exceptions as boto
import numpy as np
import pytest
import webdataset
from PIL import Image

from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.storage import LocalStorage, open_storage
from data_shards.storage import s3 as s3_module
from data_shards.verify import verify

ODD = ("a b.jpg", "plus+.jpg", "ümlaut ñ.jpg", "%41#?.jpg")


def picture(seed: int) -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (24, 12, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_people(root: Path, names: tuple[str, ...] = ODD) -> list[tuple[str, int, int, str]]:
    """Four people, whose images are in a folder each; two are for the test."""
    rows = []
    for pid in range(4):
        for n, name in enumerate(names):
            path = root / f"p{pid}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(10 * pid + n))
            split = "train" if pid < 2 else "query" if n == 0 else "gallery"
            rows.append((f"p{pid}/{name}", pid, n % 2, split))
    lines = ["path,pid,camid,split", *(f'"{p}",{i},{c},{s}' for p, i, c, s in rows)]
    (root / "people.csv").write_text("\n".join(lines), encoding="utf-8")
    return rows


def upload(folder: Path, url: str) -> None:
    storage = open_storage(url)
    for key, _ in LocalStorage(folder).list():
        storage.write(key, (folder / key).read_bytes())


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.read(key) for key, _ in storage.list()}


SMALL = {"shard_bytes": 6_000, "jobs": 1}


def test_csv_on_s3_gives_the_bytes_of_a_local_one(s3, tmp_path):
    write_people(tmp_path / "people")
    upload(tmp_path / "people", f"{s3.url}/raw")
    build("csv", f"{s3.url}/raw/people.csv", str(tmp_path / "far"), **SMALL)
    build("csv", tmp_path / "people/people.csv", str(tmp_path / "near"), **SMALL)
    assert contents(str(tmp_path / "far")) == contents(str(tmp_path / "near"))


def test_paths_of_a_csv_may_be_urls(s3, tmp_path):
    rows = write_people(tmp_path / "people")
    upload(tmp_path / "people", f"{s3.url}/raw")
    lines = [f'"{s3.url}/raw/{path}",{pid},{camid},{split}' for path, pid, camid, split in rows]
    table = tmp_path / "urls.csv"
    table.write_text("\n".join(["path,pid,camid,split", *lines]), encoding="utf-8")
    build("csv", table, str(tmp_path / "out"), jobs=1)
    assert Dataset.open(str(tmp_path / "out")).index("train").path[0].startswith(f"{s3.url}/raw/p0")
    assert verify(str(tmp_path / "out"), decode_images=True, jobs=1)[1] == []


def test_layouts_below_a_prefix_are_listed_page_by_page(s3, tmp_path, monkeypatch):
    market = tmp_path / "market"
    folders = {"bounding_box_train": (1, 2), "query": (3,), "bounding_box_test": (3, -1)}
    for folder, pids in folders.items():
        (market / folder).mkdir(parents=True)
        for pid in pids:
            for camera in (1, 2):
                who = f"{pid:04d}" if pid >= 0 else "-1"
                name = f"{who}_c{camera}s1_000{camera}51_00.jpg"
                (market / folder / name).write_bytes(picture(camera))
    people = tmp_path / "people"
    write_people(people, ("0.jpg", "1.jpg"))
    upload(market, f"{s3.url}/market")
    upload(people, f"{s3.url}/people")
    open_storage(f"{s3.url}/people").write("p1/", b"")  # a folder, as some programs write it
    client, pages = s3_module._client(), []
    listing = client.list_objects_v2

    def list_three(**request):
        pages.append(request)
        return listing(**request, MaxKeys=3)

    monkeypatch.setattr(client, "list_objects_v2", list_three)
    for source, root in (("market1501", market), ("folders", people)):
        given = {"allow_incomplete": True, "name": "n", **SMALL}
        options = {"options": {"test": 0.5}} if source == "folders" else {}
        for url, out in ((f"{s3.url}/{root.name}", "far"), (root, "near")):
            build(source, url, str(tmp_path / out / source), **given, **options)
        far, near = (contents(str(tmp_path / out / source)) for out in ("far", "near"))
        assert far == near
    assert len(pages) >= 5


def test_missing_and_empty_objects_are_named(s3, tmp_path):
    write_people(tmp_path / "people")
    upload(tmp_path / "people", f"{s3.url}/raw")
    storage = open_storage(f"{s3.url}/raw")
    storage.delete("p0/plus+.jpg")
    storage.write("p1/a b.jpg", b"")
    with pytest.raises(DataError) as caught:
        build("csv", f"{s3.url}/raw/people.csv", str(tmp_path / "out"), **SMALL)
    assert f"p0/plus+.jpg: {s3.url}/raw/p0/plus+.jpg does not exist" in str(caught.value)
    assert re.search(r"p1/a b\.jpg: .*empty", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_object_that_changes_during_the_build_is_named(s3, tmp_path):
    write_people(tmp_path / "people")
    upload(tmp_path / "people", f"{s3.url}/raw")

    def change(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done == 0:
            open_storage(f"{s3.url}/raw").write("p1/a b.jpg", picture(99))

    settings = {"progress": change, **SMALL}
    with pytest.raises(DataError, match=r"raw/p1/a b\.jpg changed during the build"):
        build("csv", f"{s3.url}/raw/people.csv", str(tmp_path / "out"), **settings)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("AccessDenied", r"denies access to .*/raw.* \(listing needs s3:ListBucket\)"),
        ("AuthorizationHeaderMalformed", r"set AWS_DEFAULT_REGION=eu-west-3"),
    ],
)
def test_prefix_that_cannot_be_listed_is_one_line(s3, tmp_path, monkeypatch, code, message):
    def refuse(**_):
        response = {"Error": {"Code": code, "Region": "eu-west-3"}}
        raise boto.ClientError(response, "ListObjectsV2")

    monkeypatch.setattr(s3_module._client(), "list_objects_v2", refuse)
    with pytest.raises(StorageError, match=message) as caught:
        build("folders", f"{s3.url}/raw", str(tmp_path / "out"), jobs=1)
    assert "\n" not in str(caught.value)


# WebDataset


def write_tars(folder: Path, *, named: bool = False) -> list[Path]:
    """Two tars: five people by three cameras, with what must never be decoded beside them."""
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"old-00000{number}.tar")) as tar:
            for n in range(number, 30, 2):
                pid, split = n // 6, "train" if n < 18 else "query" if n % 6 < 2 else "gallery"
                person = f"person {pid}" if named else pid
                values = {"person": person, "cam": n % 3, "at": {"set": split}}
                trap = pickle.dumps(Trap(str(folder / "trapped")))
                sample = {"__key__": f"a/{n:03}", "jpg": picture(n), "json": values, "pth": trap}
                tar.write({key: value for key, value in sample.items()})
    return sorted(folder.glob("*.tar"))


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


FIELDS = ["pid=json.person", "camid=json.cam", "split=json.at.set"]


class Ranges(SimpleHTTPRequestHandler):
    """Python's file server, and ranges."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send_head(self):
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not path.is_file() or wanted is None:
            return super().send_head()
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    handler = functools.partial(Ranges, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tars_give_the_same_bytes_from_a_disk_s3_and_a_web_server(s3, tmp_path):
    tars = write_tars(tmp_path / "old")
    for tar in tars:
        open_storage(f"{s3.url}/raw").upload(tar.name, tar)
    settings = {"options": {"fields": FIELDS}, **SMALL}
    with serving(tmp_path / "old") as server:
        for name, place in (("disk", tmp_path / "old"), ("s3", f"{s3.url}/raw"), ("web", server)):
            pattern = f"{place}/old-{{000000..000001}}.tar"
            manifest = build("webdataset", pattern, str(tmp_path / name), **settings).manifest
    assert manifest.name == "old"
    assert {split: info.images for split, info in manifest.splits.items()} == {
        "train": 18,
        "query": 4,
        "gallery": 8,
    }
    assert contents(str(tmp_path / "disk")) == contents(str(tmp_path / "s3"))
    assert contents(str(tmp_path / "disk")) == contents(str(tmp_path / "web"))
    assert verify(str(tmp_path / "disk"), decode_images=True, jobs=1)[1] == []
    train = Dataset.open(str(tmp_path / "disk")).index("train")
    assert train.path[0] == "old-000000.tar/a/000.jpg"
    assert sorted(set(train.pid.tolist())) == [0, 1, 2]
    assert not (tmp_path / "old/trapped").exists()


def test_samples_without_a_split_are_split_off_by_identity(tmp_path):
    write_tars(tmp_path / "old", named=True)
    options = {"fields": FIELDS[:2], "test": 0.4}
    root = str(tmp_path / "old/old-{000000..000001}.tar")
    manifest = build("webdataset", root, str(tmp_path / "out"), options=options, jobs=1).manifest
    assert manifest.splits["train"].identities == 3
    assert manifest.splits["query"].identities == 2


def test_our_own_shards_are_read_back(tmp_path):
    write_people(tmp_path / "people")
    build("csv", tmp_path / "people/people.csv", str(tmp_path / "out"), jobs=1)
    fields = ["pid=json.pid", "camid=json.camid", "split=json.split"]
    root = str(tmp_path / "out/shards/{train,query,gallery}-000000.tar")
    build("webdataset", root, str(tmp_path / "again"), options={"fields": fields}, jobs=1)
    first, again = (Dataset.open(str(tmp_path / name)).index("train") for name in ("out", "again"))
    for column in ("size", "pid", "label", "camid"):
        assert getattr(first, column).tolist() == getattr(again, column).tolist()


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, **values: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", picture(1)), (f"{key}.json", json.dumps(values).encode())]


def tars_with_faults(tar: Path, fault: str) -> None:
    good = [member for n in range(16) for member in sample(f"k{n}", person=n // 2)]
    faults = {
        "two members of a name": [*good, good[-1]],
        "a key twice": [*good, *sample("other", person=1), *good[:2]],
        "no field": [*good, *sample("k99", who=1)],
        "a fraction": [*good, *sample("k99", person=1.5)],
        "a mix": [*good, *sample("k99", person="anna")],
        "no image": [*good, ("k99.json", b'{"person": 1}')],
        "two images": [*good, *sample("k99", person=1), ("k99.png", b"")],
        "not JSON": [*good, ("k99.jpg", picture(1)), ("k99.json", b"{")],
    }
    tar_of(tar, *faults.get(fault, good))
    data, header = tar.read_bytes(), b"k15.jpg"
    if fault == "cut in an image":
        tar.write_bytes(data[: data.rindex(header) + 600])
    elif fault == "cut between members":
        tar.write_bytes(data[: data.rindex(header)])
    elif fault == "a damaged header":
        tar.write_bytes(data[: data.rindex(header)] + b"x" + data[data.rindex(header) + 1 :])
    elif fault == "an empty file":
        tar.write_bytes(b"")
    elif fault == "compressed":
        with tarfile.open(tar, "w:gz") as file:
            file.addfile(tarfile.TarInfo("a.jpg"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("two members of a name", r"t\.tar: .*k15\.json.*duplicate"),
        ("a key twice", r"t\.tar/k0\.jpg is listed twice"),
        ("no field", r"t\.tar: sample k99 has no json\.person \(--fields pid=json\.person\)"),
        ("a fraction", r"sample k99 has no json\.person"),
        ("a mix", r"sample t\.tar/k99\.jpg: pid 'anna' is not an integer"),
        ("no image", r"sample k99 has no image; its members are json"),
        ("two images", r"sample k99 has the images jpg, png: choose with --fields image="),
        ("not JSON", r"sample k99 has no json\.person"),
        ("cut in an image", r"t\.tar is cut short"),
        ("cut between members", r"t\.tar is cut short or damaged at byte"),
        ("a damaged header", r"t\.tar is cut short or damaged at byte"),
        ("an empty file", r"t\.tar is cut short"),
        ("compressed", r"t\.tar is cut short, compressed, or not a tar"),
    ],
)
def test_fault_of_a_tar_is_named(tmp_path, fault, message):
    tars_with_faults(tmp_path / "t.tar", fault)
    options, out = {"fields": ["pid=json.person"]}, str(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        build("webdataset", str(tmp_path / "t.tar"), out, options=options, jobs=1)
    assert not (tmp_path / "out").exists()


def test_fields_must_say_where_the_identity_is(tmp_path):
    for fields, message in (([], "needs --fields pid="), (["who=json.a"], "--fields who=json.a")):
        with pytest.raises(ConfigError, match=message):
            build("webdataset", "t.tar", str(tmp_path / "out"), options={"fields": fields}, jobs=1)


@pytest.mark.parametrize("url", ["pipe:mkdir {}", "pipe://mkdir {}", "-", "ftp://host/a.tar"])
def test_url_never_runs_a_command(tmp_path, url):
    made, options = tmp_path / "made", {"fields": ["pid=cls"]}
    with pytest.raises((ConfigError, StorageError)):
        build("webdataset", url.format(made), str(tmp_path / "out"), options=options, jobs=1)
    assert not made.exists()
