"""The searcher without Ray: enrolment, restart, filters, decisions, and another champion."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.serve import searcher as module
from cluster.serve.app import Changes
from cluster.serve.searcher import Searcher
from cluster.serve.settings import Settings
from data_shards.building.build import build
from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.loading.decode import decode
from reid_train.evaluation.thresholds import Threshold, Thresholds

KNOWN = Thresholds(
    50_000,
    99,
    5,
    (Threshold(1e-2, 0.5, 0.4, 0.6, 0.9, 0.8, 1.0),),
    (1e-3,),
    cameras={"1-2": Thresholds(3000, 9, 5, (Threshold(1e-2, -2, -2, -2, 1, 1, 1),), ())},
)


class Embedder:
    """Stands in for the deployment: an image's embedding is a projection of its pixels."""

    def __init__(self, thresholds: Thresholds | None = KNOWN) -> None:
        self.thresholds, self.embedded = thresholds, 0
        self.gate = asyncio.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    async def _describe(self, model: str) -> dict[str, Any]:
        known = self.thresholds.to_json() if self.thresholds else None
        size = {"height": 8, "width": 4, "batch": 4, "embedding_size": 6}
        return size | {"weights": model * 8, "thresholds": known}

    async def _embed_pixels(self, model: str, images: np.ndarray) -> np.ndarray:
        await self.gate.wait()
        self.embedded += len(images)
        matrix = np.random.default_rng(sum(model.encode())).normal(size=(8 * 4 * 3, 6))
        return (images.reshape(len(images), -1) / 255 @ matrix).astype(np.float32)

    async def _embed_photo(self, model: str, data: bytes) -> np.ndarray:
        return (await self._embed_pixels(model, decode(data)[None]))[0]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def people(tmp_path: Path) -> Path:
    folder = tmp_path / "people"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.png").write_bytes(picture(number))
    return folder


def make(people: Path, embedder: Embedder, model: str = "first", **options: Any) -> Searcher:
    return Searcher(Settings(model, str(people), **options), embedder)


class Handle:
    """Calls an object's methods as a handle of Ray Serve does."""

    def __init__(self, called: Any) -> None:
        self.called = called

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.called, name))


def names(found: dict[str, Any]) -> list[str]:
    return [match["path"] for match in found["matches"]]


def test_a_photo_finds_its_like_and_the_answer_says_how_it_was_made(people):
    async def scenario() -> None:
        searcher = make(people, Embedder())
        found = await searcher.search(picture(3), None, top=5)
        assert names(found)[0] == "03.png"
        assert found["matches"][0]["similarity"] == pytest.approx(1)
        assert (found["model"], found["exact"], found["gallery"]) == ("first", True, 12)
        assert found["threshold"]["false_accept_rate"] == 1e-2
        for match in found["matches"]:
            assert match["same"] == (match["similarity"] > 0.5)
        again = await searcher.search(None, found["matches"][1]["id"], top=1)
        assert names(again) == names(found)[1:2]

    asyncio.run(scenario())


def test_enrolled_images_are_found_filtered_and_decided_by_cameras(people):
    async def scenario() -> None:
        searcher = make(people, Embedder())
        for seed, camera, time in ((50, 1, 100), (51, 2, 200), (52, 2, 300)):
            await searcher.enrol(picture(seed), seed, camera, time)
        found = await searcher.search(picture(50), None, top=20, query_camera=1)
        assert len(found["matches"]) == 15
        pairs = {match["same"] for match in found["matches"] if match["camera"] == 2}
        assert pairs == {True}  # by the threshold of cameras 1 and 2
        only = await searcher.search(picture(50), None, top=20, cameras=[2], since=250)
        assert [match["pid"] for match in only["matches"]] == [52]
        listed = await searcher.list(offset=0, limit=2, until=200)
        assert (listed["total"], listed["cameras"], listed["times"]) == (2, [1, 2], True)

    asyncio.run(scenario())


def test_a_restart_finds_what_was_enrolled_and_removed_without_embedding_it_again(people):
    async def scenario() -> None:
        first = make(people, Embedder())
        kept = await first.enrol(picture(50), 7, None, None)
        gone = await first.enrol(picture(51), 8, None, None)
        base = (await first.list(offset=0, limit=1))["images"][0]
        assert await first.remove(gone["id"])
        assert await first.remove(base["id"])
        assert not await first.remove(base["id"])

        second = make(people, Embedder())
        images = (await second.list(offset=0, limit=50))["images"]
        assert {image["id"] for image in images} >= {kept["id"]}
        assert not {image["id"] for image in images} & {gone["id"], base["id"]}
        assert len(images) == 12
        third = make(people, embedder := Embedder())
        found = await third.search(picture(50), None, top=1)
        assert found["matches"][0]["id"] == kept["id"]
        assert embedder.embedded == 1  # the query

    asyncio.run(scenario())


def test_half_of_a_gallerys_kept_embeddings_are_not_taken_for_all(people, monkeypatch):
    async def scenario() -> None:
        first = make(people, Embedder())
        monkeypatch.setattr(first.store, "complete", lambda *_: None)  # killed before
        await first.start()
        second = make(people, embedder := Embedder())
        await second.start()
        assert embedder.embedded == 12

    asyncio.run(scenario())


def test_what_is_no_image_is_not_enrolled(people):
    async def scenario() -> None:
        searcher = make(people, Embedder())
        with pytest.raises(DataError):
            await searcher.enrol(b"no image", 1, None, None)
        assert searcher.store.enrolled() == {}

    asyncio.run(scenario())


def test_another_champion_takes_over_while_the_old_one_serves(people, monkeypatch):
    champion = "models:/a/1"
    monkeypatch.setattr(module, "pinned", lambda *_: champion)

    async def scenario() -> None:
        nonlocal champion
        embedder = Embedder()
        searcher = make(people, embedder, watch_seconds=0.01)
        before = await searcher.search(None, (await first(searcher))["id"], top=12)
        await searcher.enrol(picture(50), 7, None, None)
        embedder.gate.clear()
        champion = "models:/a/2"
        while searcher.building is None:
            await asyncio.sleep(0.01)
        during = await searcher.search(None, (await first(searcher))["id"], top=12)
        assert during["model"] == before["model"] == "models:/a/1"
        enrolling = asyncio.create_task(searcher.enrol(picture(51), 8, None, None))
        embedder.gate.set()
        late = await enrolling
        while (await searcher.status())["model"] != champion:
            await asyncio.sleep(0.01)
        after = await searcher.search(picture(51), None, top=1)
        assert after["model"] == champion
        assert after["matches"][0]["id"] == late["id"]
        assert after["gallery"] == 14

    asyncio.run(asyncio.wait_for(scenario(), 60))


async def first(searcher: Searcher) -> dict[str, Any]:
    return (await searcher.list(offset=0, limit=1))["images"][0]


def test_a_champion_that_cannot_be_read_leaves_the_old_one_and_is_told(people, monkeypatch):
    def fail(*_: object) -> str:
        raise DataError("MLflow is gone")

    async def scenario() -> None:
        searcher = make(people, Embedder(), watch_seconds=0.01)
        await searcher.start()
        monkeypatch.setattr(module, "pinned", fail)
        while (await searcher.status())["trouble"] is None:
            await asyncio.sleep(0.01)
        assert (await searcher.status())["trouble"] == "MLflow is gone"
        assert (await searcher.search(picture(3), None, top=1))["model"] == "first"

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_others_enrol_and_remove_is_seen(people):
    async def scenario() -> None:
        one, other = (make(people, Embedder(), watch_seconds=0.01) for _ in range(2))
        await asyncio.gather(one.start(), other.start())
        image = await one.enrol(picture(50), 7, None, None)
        while (await other.status())["gallery"] != 13:
            await asyncio.sleep(0.01)
        await other.remove(image["id"])
        while (await one.status())["gallery"] != 12:
            await asyncio.sleep(0.01)
        with pytest.raises(ObjectMissing):
            await one.picture(image["id"])

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_rate_that_was_not_measured_and_an_unknown_image_are_refused(people):
    async def scenario() -> None:
        searcher = make(people, Embedder())
        with pytest.raises(DataError, match="no threshold at a false accept rate"):
            await searcher.search(picture(3), None, top=1, rate=1e-3)
        with pytest.raises(ObjectMissing, match="the gallery has no image x"):
            await searcher.search(None, "x", top=1)
        without = make(people, Embedder(None))
        assert (await without.search(picture(3), None, top=1))["matches"][0]["same"] is None
        with pytest.raises(ConfigError, match="the model has no thresholds"):
            await without.search(picture(3), None, top=1, rate=1e-2)

    asyncio.run(scenario())


def test_above_a_size_the_index_is_approximate_and_says_its_recall(people):
    pytest.importorskip("faiss")

    async def scenario() -> None:
        searcher = make(people, Embedder(), approximate_above=5)
        found = await searcher.search(picture(3), None, top=3)
        assert not found["exact"]
        assert names(found)[0] == "03.png"
        assert 0 <= (await searcher.status())["recall"]["against_exact"] <= 1

    asyncio.run(scenario())


def test_pictures_of_the_gallery_are_jpegs_whatever_they_were(people):
    async def scenario() -> None:
        searcher = make(people, Embedder())
        enrolled = await searcher.enrol(picture(50), None, None, None)
        for name in (enrolled["id"], (await first(searcher))["id"]):
            data = await searcher.picture(name)
            assert Image.open(io.BytesIO(data)).format == "JPEG"

    asyncio.run(scenario())


def test_what_one_replica_has_answered_all_replicas_know(people):
    async def scenario() -> None:
        changes = Handle(Changes())
        settings = Settings("first", str(people), search_replicas=2, watch_seconds=1000)
        first, second = (Searcher(settings, Embedder(), changes) for _ in range(2))
        for searcher in (first, second):
            assert len((await searcher.search(picture(3), None, top=20))["matches"]) == 12
        image = await first.enrol(picture(50), 7, None, None)
        found = await second.search(picture(50), None, top=1)
        assert found["matches"][0]["id"] == image["id"]
        assert await second.picture(image["id"])
        assert await second.remove(image["id"])
        assert (await first.list(offset=0, limit=20))["total"] == 12
        image = await second.enrol(picture(51), 8, None, None)
        changes.called = Changes()  # it was killed
        assert await first.remove(image["id"])
        assert (await second.search(picture(51), None, top=20))["gallery"] == 12

    asyncio.run(scenario())


def test_searches_at_once_share_products_and_find_what_they_find_one_by_one(people, monkeypatch):
    async def scenario() -> None:
        searcher, products = make(people, Embedder()), []
        alone = [await searcher.search(picture(n), None, top=n + 1) for n in range(12)]
        made = await searcher.up_to_date()
        nearest = made.index.nearest

        def counted(*arguments: Any) -> Any:
            products.append(1)
            return nearest(*arguments)

        monkeypatch.setattr(made.index, "nearest", counted)
        searches = [searcher.search(picture(n), None, top=n + 1) for n in range(12)]
        bad = made.nearest(np.full(6, np.nan, np.float32), 3)
        *found, failed = await asyncio.gather(*searches, bad, return_exceptions=True)
        assert found == alone
        assert isinstance(failed, DataError)
        assert len(products) < 12

    asyncio.run(scenario())


def test_answers_have_the_names_of_people_and_cameras(people):
    rows = [f"{n:02}.png,{'ab'[n % 2]},{'xyz'[n % 3]},gallery" for n in range(12)]
    (people / "people.csv").write_text("\n".join(["path,pid,camid,split", *rows]))
    build("csv", people / "people.csv", str(people / "shards"), jobs=1)

    async def scenario() -> None:
        searcher = make(people / "shards", Embedder())
        match = (await searcher.search(picture(4), None, top=1))["matches"][0]
        assert (match["path"], match["person"], match["camera_name"]) == ("04.png", "a", "y")
        listed = await searcher.list(offset=0, limit=1, cameras=[2])
        assert listed["camera_names"] == {0: "x", 1: "y", 2: "z"}
        assert (listed["total"], listed["images"][0]["camera_name"]) == (4, "z")
        assert listed == await searcher.list(offset=0, limit=1, cameras=["z"])
        only = await searcher.search(picture(4), None, top=12, query_camera="x", cameras=["y", "2"])
        assert {match["camera_name"] for match in only["matches"]} == {"y", "z"}
        for pid, camera in ((1, 0), ("b", "x"), ("1", "0")):
            image = await searcher.enrol(picture(50), pid, camera, None)
            assert (image["person"], image["camera_name"]) == ("b", "x")
        assert (await searcher.list(offset=0, limit=9, pid="b"))["total"] == 7
        with pytest.raises(DataError, match="no camera is named 'w': give a number"):
            await searcher.list(offset=0, limit=1, cameras=["w"])
        with pytest.raises(DataError, match="no person is named 'c': give a number; those up to"):
            await searcher.enrol(picture(51), "c", "x", None)

    asyncio.run(scenario())
