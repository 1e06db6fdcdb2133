"""What is enrolled and removed: durable, whole or not at all, and there once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.serve.store import Store
from data_shards.errors import ConfigError
from data_shards.manifest import Names


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_an_enrolled_image_is_there_with_all_its_facts(store, tmp_path):
    image = store.enrol(b"pixels", 7, 2, 1_700_000_000)
    again = Store(str(tmp_path))
    assert again.enrolled() == {image.id: image}
    assert again.read(image) == b"pixels"
    before_1970 = store.enrol(b"pixels", 7, 2, -3600)
    assert again.enrolled()[before_1970.id] == before_1970
    unknown = store.enrol(b"pixels", None, None, None)
    assert unknown.id != image.id
    assert again.enrolled()[unknown.id].public(Names())["time"] is None
    assert image.public(Names())["time"] == "2023-11-14T22:13:20+00:00"


def test_the_same_enrolment_twice_is_there_once(store):
    assert store.enrol(b"pixels", 1, 2, 3) == store.enrol(b"pixels", 1, 2, 3)
    assert len(store.enrolled()) == 1


def test_a_removed_image_is_deleted_and_one_of_the_gallery_is_marked(store, tmp_path):
    image = store.enrol(b"pixels", 1, 2, 3)
    store.keep_vector(image, "w" * 64, np.ones(3))
    store.remove(image)
    store.remove(image._replace(enrolled=False))
    again = Store(str(tmp_path))
    assert again.enrolled() == {}
    assert again.removed() == {image.id}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [image.id]


def test_a_kill_in_the_middle_leaves_whole_images_only(tmp_path):
    """Kill a process that enrols without end; what a new one finds are whole images."""
    code = (
        "from cluster.serve.store import Store; import itertools, sys\n"
        f"store = Store({str(tmp_path)!r})\n"
        "for n in itertools.count():\n"
        "    store.enrol(bytes([n % 256]) * 300_000, n, None, None)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answered = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    answered += [int(line) for line in process.communicate()[0].split()]
    store = Store(str(tmp_path))
    found = {image.pid: store.read(image) for image in store.enrolled().values()}
    assert set(answered) <= found.keys()
    assert all(data == bytes([pid % 256]) * 300_000 for pid, data in found.items())


def test_what_is_no_enrolment_is_ignored(store, tmp_path):
    (tmp_path / "enrolled").mkdir()
    for name in (".tmp-abc", "notes.txt", "ffff_p1_c1_t1.img", f"{'0' * 24}_p1_c1_tx.img"):
        (tmp_path / "enrolled" / name).write_bytes(b"")
    assert store.enrolled() == {}


@pytest.mark.parametrize(("pid", "camera"), [(-1, None), (2**31, None), (None, -1)])
def test_numbers_out_of_range_are_refused(store, pid, camera):
    with pytest.raises(ConfigError, match="must lie between 0 and"):
        store.enrol(b"pixels", pid, camera, None)


def test_the_embedding_of_an_enrolled_image_is_found_by_weights(store):
    image, row = store.enrol(b"pixels", 1, 2, 3), np.arange(3, dtype=np.float32)
    store.keep_vector(image, "w" * 64, row)
    np.testing.assert_array_equal(store.vector(image, "w" * 64), row)
    assert store.vector(image, "v" * 64) is None


def test_kept_embeddings_are_found_by_weights_and_source(store):
    ids, rows = np.array(["a", "b"], object), np.ones((2, 3), np.float32)
    store.keep("w" * 64, "people", ids, rows)
    ((found, embedding),) = store.known("w" * 64, "people")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(embedding, rows)
    assert list(store.known("v" * 64, "people")) == []
    assert not store.is_complete("w" * 64, "people")
    store.complete("w" * 64, "people")
    assert store.is_complete("w" * 64, "people")


def test_s3_keeps_the_same(s3):
    store = Store(f"{s3.url}/enrolled here")
    image = store.enrol(b"pixels", 7, None, None)
    store.enrol(b"pixels", 7, None, None)
    assert Store(store.storage.url).enrolled() == {image.id: image}
    store.remove(image)
    assert store.enrolled() == {}
