from __future__ import annotations

import errno
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from data_shards.building import build as building
from data_shards.building import reading
from data_shards.building.build import build
from data_shards.cli import main
from data_shards.dataset import Dataset, why_not_measurable
from data_shards.errors import ConfigError, DataError, StorageError
from data_shards.records import ImageRecord
from data_shards.sources.layout import Source
from data_shards.storage import LocalStorage, open_storage
from data_shards.verify import verify


def picture(path: Path, seed: int, kind: str = "JPEG") -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)


def write_csv(root: Path, rows: list[tuple[str, int, int, str]]) -> Path:
    lines = ["path,pid,camid,split", *(",".join(map(str, row)) for row in rows)]
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


def people(root: Path, train: int = 6, test: int = 3) -> Path:
    """Four images of each person; a CSV lists them."""
    rows = []
    for pid in range(train + test):
        for n in range(4):
            split = "train" if pid < train else "query" if n == 0 else "gallery"
            rows.append((f"p{pid}/{n}.jpg", pid, n % 2, split))
            picture(root / rows[-1][0], 10 * pid + n)
    return write_csv(root, rows)


@pytest.fixture
def root(tmp_path) -> Path:
    return people(tmp_path / "images")


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


SMALL = {"shard_bytes": 12_000, "jobs": 1}


def test_built_dataset_gives_each_image_back(root, tmp_path):
    manifest = build("csv", root, str(tmp_path / "out"), **SMALL).manifest
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.manifest == manifest
    assert manifest.complete
    assert {s: i.images for s, i in manifest.splits.items()} == {
        "train": 24,
        "query": 3,
        "gallery": 9,
    }
    assert len(manifest.shards) > 4
    for split in manifest.splits:
        index = dataset.index(split)
        for n in range(len(index)):
            shard = manifest.shards[index.shard[n]].name
            data = dataset.storage.read_range(shard, int(index.offset[n]), int(index.size[n]))
            assert data == (root.parent / index.path[n]).read_bytes()


def test_two_builds_are_byte_identical_whatever_the_processes(root, tmp_path):
    for name, jobs in (("one", 1), ("two", 2)):
        build("csv", root, str(tmp_path / name), shard_bytes=12_000, jobs=jobs)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_nothing_but_the_dataset_is_left_behind(root, tmp_path):
    build("csv", root, str(tmp_path / "out"), work=tmp_path / "work", **SMALL)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "index.parquet",
        "shards",
    }
    assert not (tmp_path / "work").exists()


def test_same_build_again_changes_nothing(root, tmp_path):
    out = tmp_path / "out"
    build("csv", root, str(out), **SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build("csv", root, str(out), **SMALL).already_built
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("change", ["image", "label", "option"])
def test_another_dataset_at_the_same_place_is_refused(root, tmp_path, change):
    out = tmp_path / "out"
    build("csv", root, str(out), **SMALL)
    before = tree(out)
    settings = dict(SMALL)
    if change == "image":
        picture(root.parent / "p0/0.jpg", 999)
    elif change == "label":
        root.write_text(root.read_text().replace("p0/0.jpg,0,0", "p0/0.jpg,0,1"))
    else:
        settings["shard_bytes"] = 20_000
    with pytest.raises(DataError, match="holds another dataset"):
        build("csv", root, str(out), **settings)
    assert tree(out) == before


def stop_after(monkeypatch, count: int) -> list[str]:
    """Let `count` shards be written, then fail as a full disk would; list those written."""
    written, write = [], building.write_shard

    def write_some(plan, dataset, path):
        if len(written) == count:
            raise StorageError("disk full")
        written.append(plan.name)
        return write(plan, dataset, path)

    monkeypatch.setattr(building, "write_shard", write_some)
    return written


def test_interrupted_build_continues(root, tmp_path, monkeypatch):
    build("csv", root, str(tmp_path / "whole"), **SMALL)
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        first = stop_after(context, 2)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    assert not (out / "manifest.json").exists()
    with monkeypatch.context() as context:
        second = stop_after(context, 1000)
        build("csv", root, str(out), **SMALL)
    assert len(first) == 2
    assert not set(first) & set(second), "a finished shard was written again"
    assert tree(out) == tree(tmp_path / "whole")


def test_finished_shard_that_vanished_is_written_again(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        stop_after(context, 2)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    (out / "shards/train-000000.tar").unlink()
    build("csv", root, str(out), **SMALL)
    assert verify(str(out), jobs=1)[1] == []


def test_build_cut_off_before_its_manifest_ends_well(root, tmp_path, monkeypatch):
    build("csv", root, str(tmp_path / "whole"), **SMALL)
    out, write = tmp_path / "out", LocalStorage.write

    def cut(self, key, data, **options):
        if key == "manifest.json":
            raise StorageError("gone")
        write(self, key, data, **options)

    with monkeypatch.context() as context:
        context.setattr(LocalStorage, "write", cut)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    build("csv", root, str(out), **SMALL)
    assert tree(out) == tree(tmp_path / "whole")


def test_unfinished_build_of_another_dataset_is_kept(root, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        stop_after(context, 1)
        with pytest.raises(StorageError):
            build("csv", root, str(out), **SMALL)
    before = tree(out)
    picture(root.parent / "p0/0.jpg", 999)
    with pytest.raises(DataError, match="unfinished build of another dataset"):
        build("csv", root, str(out), **SMALL)
    assert tree(out) == before


def test_shards_of_unknown_origin_are_kept(root, tmp_path):
    shard = tmp_path / "out/shards/train-000000.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"someone's")
    with pytest.raises(DataError, match="shards is not empty"):
        build("csv", root, str(tmp_path / "out"), **SMALL)
    assert shard.read_bytes() == b"someone's"


# Bad input


def spoil(root: Path) -> list[str]:
    """Make four images unreadable, each in its way."""
    jpeg = root.parent / "p0/0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (root.parent / "p1/1.jpg").write_bytes(b"")
    picture(root.parent / "p2/2.jpg", 5, "PNG")
    png = root.parent / "p2/2.jpg"
    png.write_bytes(png.read_bytes()[:-300])
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (root.parent / "p3/3.jpg").write_bytes(bomb.getvalue())
    return ["p0/0.jpg", "p1/1.jpg", "p2/2.jpg", "p3/3.jpg"]


def test_all_unreadable_images_are_listed_before_anything_is_written(root, tmp_path):
    spoiled = spoil(root)
    with pytest.raises(DataError, match="--skip-unreadable") as caught:
        build("csv", root, str(tmp_path / "out"), **SMALL)
    assert [name for name in spoiled if f"\n  {name}: " not in str(caught.value)] == []
    assert not (tmp_path / "out").exists()


def test_unreadable_images_can_be_left_out_and_are_recorded(root, tmp_path):
    spoiled = spoil(root)
    manifest = build("csv", root, str(tmp_path / "out"), skip_unreadable=True, **SMALL).manifest
    assert [item.path for item in manifest.left_out] == spoiled
    assert manifest.splits["train"].images == 20


def test_labels_stay_gapless_when_an_identity_is_left_out(root, tmp_path):
    for n in range(4):
        (root.parent / f"p2/{n}.jpg").write_bytes(b"")
    build("csv", root, str(tmp_path / "out"), skip_unreadable=True, **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    assert np.unique(dataset.index("train").label).tolist() == [0, 1, 2, 3, 4]
    assert dataset.identities.tolist() == [0, 1, 3, 4, 5]


def test_full_disk_leaves_no_half_tar(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("webdataset.TarWriter.write", full)
    with pytest.raises(StorageError, match="disk full"):
        build("csv", root, str(tmp_path / "out"), work=tmp_path / "work", **SMALL)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("work", [None, "work"])
def test_second_build_at_once_is_refused_and_the_first_continues(root, tmp_path, monkeypatch, work):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out, write, refused = tmp_path / "out", building.write_shard, []
    settings = SMALL | {"work": work and tmp_path / work}

    def write_while_another_comes(plan, dataset, path):
        with pytest.raises(ConfigError, match=f"another build.* is running in {path.parent}"):
            build("csv", root, str(out), **settings)
        refused.append(path)
        return write(plan, dataset, path)

    monkeypatch.setattr(building, "write_shard", write_while_another_comes)
    assert not build("csv", root, str(out), **settings).already_built
    assert refused
    assert verify(str(out), jobs=1)[1] == []
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}


def test_leftover_tar_that_another_still_reads_is_not_written_into(root, tmp_path):
    leftover = tmp_path / "work/train-000000.tar"
    leftover.parent.mkdir()
    leftover.write_bytes(b"as it was")
    with leftover.open("rb") as file:
        build("csv", root, str(tmp_path / "out"), work=leftover.parent, **SMALL)
        assert file.read() == b"as it was"
    assert verify(str(tmp_path / "out"), jobs=1)[1] == []


def test_single_identity_is_refused(tmp_path):
    with pytest.raises(DataError, match="one identity"):
        build("csv", people(tmp_path, train=1), str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize(("train", "test"), [(3, 0), (0, 3)])
def test_train_or_test_is_enough(tmp_path, train, test):
    manifest = build("csv", people(tmp_path, train, test), str(tmp_path / "out"), **SMALL).manifest
    assert ("train" in manifest.splits, "query" in manifest.splits) == (train > 0, test > 0)


def test_nothing_at_all_will_not_do(tmp_path):
    with pytest.raises(DataError, match="no images"):
        build("csv", write_csv(tmp_path, []), str(tmp_path / "out"), **SMALL)


def test_number_too_large_for_the_index_is_refused(tmp_path):
    picture(tmp_path / "a.jpg", 1)
    root = write_csv(tmp_path, [("a.jpg", 1 << 63, 1, "query")])
    with pytest.raises(DataError, match="is not from 0 to"):
        build("csv", root, str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize("name", ["a\x07b.jpg", "a\nb.jpg", "a\u2028b.jpg", "a\udcffb.jpg"])
def test_name_that_no_tool_can_take_is_refused_before_the_scan(tmp_path, name, monkeypatch):
    monkeypatch.setattr(reading, "scan", None)
    records = [ImageRecord(tmp_path / name, name, 1, 1, "query")]
    monkeypatch.setitem(reading.SOURCES, "csv", Source("CSV", lambda root, *, images=None: records))
    with pytest.raises(DataError, match=r"a.*b\.jpg' under .*: rename this file"):
        build("csv", tmp_path / "x.csv", str(tmp_path / "out"), **SMALL)


@pytest.mark.parametrize(
    "name",
    [
        "a\u00a0b",
        "at 9.41\u202fPM",
        "人\u3000a",
        "👩\u200d🔬",
        "e\u0301",
        "a,b;c",
        "x'y%",
        "\u202eb",
    ],
)
def test_every_other_name_is_built_and_given_back(tmp_path, name):
    rows = [(f"{name}/{n}.jpg", n // 2, n % 2, "query" if n < 2 else "gallery") for n in range(4)]
    for n, (relative, *_) in enumerate(rows):
        picture(tmp_path / relative, n)
    quoted = [(f'"{relative}"', *rest) for relative, *rest in rows]
    build("csv", write_csv(tmp_path, quoted), str(tmp_path / "out"), **SMALL)
    dataset = Dataset.open(str(tmp_path / "out"))
    found = [*dataset.index("query").path, *dataset.index("gallery").path]
    assert found == [relative for relative, *_ in rows]
    assert verify(str(tmp_path / "out"), decode_images=True, jobs=1)[1] == []


def test_same_image_listed_twice_is_named(tmp_path):
    root = tmp_path / "msmt17"
    for place in ("train/0/0_0_01_a.jpg", "test/0/0_0_01_a.jpg"):
        picture(root / place, 1)
    for split in ("train", "query", "gallery"):
        (root / f"list_{split}.txt").write_text("0/0_0_01_a.jpg 0\n")
    (root / "list_val.txt").write_text("./0/0_0_01_a.jpg 0\n")
    with pytest.raises(DataError, match=r"train/0/0_0_01_a\.jpg is listed twice"):
        build("msmt17", root, str(tmp_path / "out"), allow_incomplete=True, **SMALL)


# Names of datasets


def test_dataset_is_named_after_its_csv_file(tmp_path):
    root = people(tmp_path / "images").rename(tmp_path / "images/my people_v1.0.csv")
    manifest = build("csv", root, str(tmp_path / "out"), **SMALL).manifest
    assert manifest.name == "my-people_v1-0"
    named = build("csv", root, str(tmp_path / "named"), name="läuft_2", **SMALL).manifest
    assert named.name == "läuft_2"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("my/data", "my-data"), ("people_v1.0", "people_v1-0"), ("a:b", "a-b"), ("50%", "50"),
        ("it's", "it-s"), ('"x"', "x"), ("a b", "a-b"), ("", "people"), ("../..", "people"),
        ("a\nb", "a-b"),
    ],
)  # fmt: skip
def test_name_that_mlflow_cannot_take_is_refused_at_once(root, tmp_path, name, suggested):
    with pytest.raises(ConfigError, match=f"--name {suggested}$"):
        build("csv", root, "s3://never/asked", name=name, **SMALL)


def test_names_that_are_accepted_are_accepted_by_mlflow():
    validation = pytest.importorskip("mlflow.utils.validation")
    from mlflow.exceptions import MlflowException

    refused = []
    for name in ("people", "läuft_2", "人", "A-b_c", "-x", "people(1)"):
        reading.check_name(name)
        try:
            validation._validate_model_name(f"reid-{name}")
            validation._validate_logged_model_name(f"reid-{name}")
        except MlflowException:
            refused.append(name)
    assert refused == []


# Datasets that cannot be measured


@pytest.mark.parametrize(
    ("query", "gallery", "reason"),
    [
        ([(1, 0)], [(1, 1)], None),
        ([(1, 0), (2, 0)], [(2, 0), (2, 5)], None),
        ([], [(1, 1)], "there are no query images"),
        ([(1, 1)], [], "there are no gallery images"),
        ([(1, 0), (2, 1)], [(3, 1), (4, 0)], "query and gallery share no identity"),
        (
            [(1, 7), (2, 7)],
            [(1, 7), (2, 7)],
            r"all query and gallery images are from one camera \(7",
        ),
        ([(1, 0), (2, 1)], [(1, 0), (2, 1), (3, 0)], "no query has a gallery image of the same"),
    ],
)
def test_reason_why_images_cannot_be_measured(query, gallery, reason):
    found = why_not_measurable(query, gallery)
    assert found is None if reason is None else re.match(reason, found)


def test_build_warns_of_a_dataset_that_cannot_be_measured(tmp_path, caplog):
    root = people(tmp_path)
    root.write_text(re.sub(r",\d,(\w+)$", r",0,\1", root.read_text(), flags=re.MULTILINE))
    build("csv", root, str(tmp_path / "out"), **SMALL)
    assert "models cannot be measured on this dataset: all query and gallery" in caplog.text
    assert "one camera (0)" in str(Dataset.open(str(tmp_path / "out")).why_not_measurable())


def test_a_dataset_that_can_be_measured_gives_no_warning(root, tmp_path, caplog):
    build("csv", root, str(tmp_path / "out"), **SMALL)
    assert caplog.text == ""
    assert Dataset.open(str(tmp_path / "out")).why_not_measurable() is None


def market(root: Path) -> Path:
    for n, folder in enumerate(("bounding_box_train", "query", "bounding_box_test")):
        picture(root / folder / f"000{n}_c1s1_000001_00.jpg", n)
        picture(root / folder / f"000{n + 3}_c1s1_000001_00.jpg", n)
    return root


def test_incomplete_copy_is_refused_unless_allowed(tmp_path):
    root, out = market(tmp_path / "market"), str(tmp_path / "out")
    with pytest.raises(DataError, match=r"expected 12,936 train images.*--allow-incomplete"):
        build("market1501", root, out, **SMALL)
    assert not build("market1501", root, out, allow_incomplete=True, **SMALL).manifest.complete


def test_wrong_source_and_options_are_named(root, tmp_path):
    with pytest.raises(ConfigError, match="no source 'imagenet'"):
        build("imagenet", root, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="no option 'val': its options are images"):
        build("csv", root, str(tmp_path / "out"), options={"val": "merge"})
    with pytest.raises(ConfigError, match="shard-bytes must be positive, not 0"):
        build("csv", root, str(tmp_path / "out"), shard_bytes=0)


# Verification and the command line


@pytest.fixture
def built(root, tmp_path) -> Path:
    build("csv", root, str(tmp_path / "out"), **SMALL)
    return tmp_path / "out"


def test_whole_dataset_passes(built):
    assert verify(str(built), decode_images=True, jobs=1)[1] == []


def test_all_bad_shards_are_found_at_once(built, capsys):
    shards = built / "shards"
    os.truncate(shards / "train-000000.tar", 5000)
    flipped = bytearray((shards / "train-000001.tar").read_bytes())
    flipped[700] ^= 1
    (shards / "train-000001.tar").write_bytes(flipped)
    (shards / "query-000000.tar").unlink()
    assert main(["verify", str(built), "--jobs", "1"]) == 3
    complaint = capsys.readouterr().err
    for part in (
        "train-000000.tar is truncated",
        "train-000001.tar is damaged",
        "query-000000.tar is missing",
    ):
        assert part in complaint
    assert "3 problems" in complaint


def test_shard_that_disagrees_with_the_index_is_found(built):
    """Even where bytes and digest fit: the JSON member says another camera."""
    manifest = json.loads((built / "manifest.json").read_bytes())
    shard = built / manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes().replace(b'"camid": 0', b'"camid": 7', 1))
    manifest["shards"][0]["sha256"] = building.sha256(shard.read_bytes())
    (built / "manifest.json").write_text(json.dumps(manifest))
    problems = verify(str(built), jobs=1)[1]
    assert len(problems) == 1
    assert "train-00000000.json does not agree with the index" in problems[0]


def test_commands_from_images_to_a_table(root, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["build", "--source", "csv", "--root", str(root), "--out", out, "--jobs", "1"]
    assert main(command) == 0
    assert main(command) == 0
    assert "already built" in capsys.readouterr().out
    assert main(["verify", out, "--decode", "--jobs", "1"]) == 0
    assert main(["info", out]) == 0
    assert "gallery" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["build", "--source", "csv", "--out", "{}/o"], 2),
        (["build", "--source", "csv", "--root", "{}/none.csv", "--out", "{}/o"], 3),
        (["build", "--source", "msmt17", "--root", "{}", "--out", "{}/o"], 3),
        (["build", "--source", "msmt17", "--root", "{}", "--out", "gs://x/o"], 2),
        (["info", "{}"], 3),
        (["verify", "{}/nowhere"], 3),
    ],
)
def test_exit_codes(arguments, code, tmp_path, capsys):
    assert main([argument.replace("{}", str(tmp_path)) for argument in arguments]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_unknown_flag_exits_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["build", "--source", "imagenet"])
    assert caught.value.code == 2


# On S3


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3_out(moto_port, monkeypatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.session.Session().client("s3").create_bucket(Bucket="datasets")
    return "s3://datasets/people"


def test_s3_and_a_folder_hold_the_same(root, tmp_path, s3_out):
    build("csv", root, s3_out, **SMALL)
    build("csv", root, str(tmp_path / "out"), **SMALL)
    storage = open_storage(s3_out)
    assert {key: storage.read(key) for key, _ in storage.list()} == tree(tmp_path / "out")


def test_missing_bucket_is_found_before_images_are_decoded(root, s3_out, monkeypatch):
    monkeypatch.setattr(reading, "scan", None)
    with pytest.raises(StorageError, match="no bucket 'nowhere'"):
        build("csv", root, "s3://nowhere/people", **SMALL)
