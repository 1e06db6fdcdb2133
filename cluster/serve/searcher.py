"""The deployment that searches: the gallery in memory, and the model version that it belongs to."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from cluster.serve.embedder import ModelFacts
from cluster.serve.generation import Generation, decider, gallery_images
from cluster.serve.handles import call, cause
from cluster.serve.index import Index
from cluster.serve.settings import Settings
from cluster.serve.store import Image, Store, digest
from data_shards.errors import DataError, ObjectMissing
from data_shards.images import ImageFolder
from data_shards.loading.decode import decode
from reid_train.commands.gallery import Block, Gallery, blocks, open_gallery
from reid_train.commands.runtime import Runtime
from reid_train.config import LoaderConfig
from reid_train.evaluation.embedding_store import ROWS, EmbeddingFiles
from reid_train.registry.load import pinned

logger = logging.getLogger(__name__)

BACKGROUND = 8  # images embedded at once for the gallery: queries wait for no more than these
PICTURE_HEIGHT = 384  # of gallery images on the page
FETCHED = 16  # enrolled images that are read at once


class Searcher:
    """A replica with the whole gallery. It watches the model's alias, and what others enrol."""

    def __init__(self, settings: Settings, embedder: Any, changes: Any = None) -> None:
        self.settings, self.embedder = settings, embedder
        self.changes = changes  # the deployment `Changes`, if there are several replicas
        self.seen: str | None = None  # what it said when this replica last looked into the store
        self.store = Store(settings.store)
        self.gallery: Gallery | None = None
        self.images: list[Image] = []  # of the gallery
        self.current: Generation | None = None
        self.building: str | None = None  # the version that the gallery is embedded for now
        self.trouble: str | None = None  # the last failure of the background work
        self.progress: tuple[int, int] | None = None
        self.starting = asyncio.Lock()
        self.writing = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the gallery for the first time, and begin to watch. Later calls do nothing."""
        async with self.starting:
            if self.current is None:
                self.gallery = await asyncio.to_thread(
                    open_gallery, self.settings.gallery, self.settings.split, self.settings.images
                )
                self.images = await asyncio.to_thread(gallery_images, self.gallery)
                await self.use(await asyncio.to_thread(self._version))
                self.task = asyncio.create_task(self._watch())

    async def up_to_date(self) -> Generation:
        """The gallery, with all that was enrolled or removed before this call, by any replica."""
        await self.start()
        if self.changes is not None and await call(self.changes.latest) != self.seen:
            async with self.writing:
                latest = await call(self.changes.latest)
                if latest != self.seen:
                    await self._synchronize(self._generation)
                    self.seen = latest
        return self._generation

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            try:
                await self.look()
                self.trouble = None
            except Exception as error:  # the service answers with what it has
                text = str(cause(error))
                if text != self.trouble:
                    logger.warning("keeping %s: %s", self._generation.model, text)
                self.trouble = text
            finally:
                self.building = self.progress = None

    async def look(self) -> None:
        """Take over a new champion if there is one; else what others have enrolled or removed."""
        version = await asyncio.to_thread(self._version)
        if version != self._generation.model:
            await self.use(version)
        else:
            async with self.writing:
                await self._synchronize(self._generation)
            await self._approximate(self._generation)

    def _version(self) -> str:
        return pinned(self.settings.model, self.settings.tracking_uri)

    async def use(self, model: str) -> None:
        """Embed the gallery with a model, then switch to it at once; until then the old serves."""
        self.building = model
        logger.info("embedding the gallery with %s", model)
        facts = ModelFacts(**await call(self.embedder.describe, model))
        assert self.gallery is not None
        index = Index(facts.embedding_size, len(self.images))
        made = Generation(model, facts, index, facts.measured, self.gallery.names)
        await self._add_gallery(made)
        await self._synchronize(made)
        if not len(index):
            raise DataError(f"none of the images at {self.settings.gallery} can be searched")
        await self._approximate(made)
        await asyncio.to_thread(index.nearest, index.vector(0)[None], 1)  # compile before requests
        async with self.writing:  # what was enrolled meanwhile is in both
            await self._synchronize(made)
            self.current = made
        gc.freeze()  # collections would look at each image again, while requests wait
        self.building = self.progress = None
        logger.info("searching %d images with %s", len(index), model)

    async def _add_gallery(self, made: Generation) -> None:
        """Add the gallery that the service was started with: its known embeddings, or new ones."""
        gallery, weights, loop = self.gallery, made.facts.weights, asyncio.get_running_loop()
        assert gallery is not None
        images = self.images
        source = None if isinstance(gallery.source, EmbeddingFiles) else _source(gallery)
        known: dict[str, np.ndarray] = {}
        if source and await asyncio.to_thread(self.store.is_complete, weights, source):
            known = await asyncio.to_thread(self._known, weights, source)

        def embed(pixels: np.ndarray) -> np.ndarray:
            work = self._embed_pixels(made.model, pixels)
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        def progress(_stage: str, done: int, total: int) -> None:
            self.progress = done, total

        def read() -> None:
            facts = made.facts
            batch = BACKGROUND * self.settings.replicas
            size = facts.height, facts.width, batch, facts.embedding_size, facts.weights
            for part in blocks(gallery, Runtime(embed, *size), LoaderConfig(workers=0), progress):
                add(part)
                if source is not None:
                    names = np.array([images[row].id for row in part.rows], object)
                    self.store.keep(weights, source, names, part.embedding)
            if source is not None:
                self.store.complete(weights, source)

        def add(part: Block) -> None:
            made.add([images[row] for row in part.rows], part.embedding)

        def add_known() -> None:
            rows = np.array([image.row for image in images if image.id in known])
            for first in range(0, len(rows), ROWS):
                part = rows[first : first + ROWS]
                add(Block(part, np.stack([known[images[row].id] for row in part])))

        await asyncio.to_thread(add_known if known else read)

    def _known(self, weights: str, source: str) -> dict[str, np.ndarray]:
        parts = self.store.known(weights, source)
        return {name: row for ids, rows in parts for name, row in zip(ids, rows, strict=True)}

    async def _embed_pixels(self, model: str, pixels: np.ndarray) -> np.ndarray:
        """Embed a batch in the background, `BACKGROUND` images on each replica."""
        steps = range(0, len(pixels), BACKGROUND)
        parts = [pixels[i : i + BACKGROUND] for i in steps]
        work = [call(self.embedder.embed_pixels, model, part) for part in parts]
        return np.concatenate(await asyncio.gather(*work))

    async def _synchronize(self, made: Generation) -> None:
        """Bring a generation up to what the store has: enrolled and removed images.

        Nothing may be enrolled in this generation or removed from it meanwhile.
        """
        enrolled = await asyncio.to_thread(self.store.enrolled)
        removed = await asyncio.to_thread(self.store.removed)
        gone = [image.id for image in made.images if image.enrolled and image.id not in enrolled]
        for name in (*gone, *removed):
            made.remove(name)
        at_once = asyncio.Semaphore(FETCHED)

        async def add(image: Image) -> None:
            async with at_once:
                try:
                    row = await self._vector(made, image)
                except ObjectMissing:
                    return  # removed meanwhile, by another replica
                except DataError as error:
                    logger.warning("%s is left out: %s", image.path, cause(error))
                    return
            made.add([image], row[None])

        missing = (image for name, image in enrolled.items() if name not in made.row)
        await asyncio.gather(*map(add, missing))

    async def _vector(self, made: Generation, image: Image) -> np.ndarray:
        """The embedding of an enrolled image: the kept one, or a new one, which is kept."""
        weights = made.facts.weights
        row = await asyncio.to_thread(self.store.vector, image, weights)
        if row is None:
            data = await asyncio.to_thread(self.store.read, image)
            row = await call(self.embedder.embed_photo, made.model, data)
            await asyncio.to_thread(self.store.keep_vector, image, weights, row)
        return row

    async def _approximate(self, made: Generation) -> None:
        """Build the approximate index if the gallery has grown large enough."""
        above = self.settings.approximate_above
        if above is not None and len(made.index) > above and made.index.approximate is None:
            await asyncio.to_thread(made.index.build_graph)

    @property
    def _generation(self) -> Generation:
        assert self.current is not None
        return self.current

    async def search(
        self,
        data: bytes | None,
        name: str | None,
        *,
        top: int,
        rate: float | None = None,
        query_camera: int | str | None = None,
        cameras: Sequence[int | str] = (),
        since: float | None = None,
        until: float | None = None,
    ) -> dict[str, Any]:
        """Rank the gallery by its similarity to a photo, or to an image of the gallery.

        The whole answer is of one generation, also if another takes over meanwhile.
        """
        made = await self.up_to_date()
        query_camera = made.number("camera", query_camera)
        row = None if name is None else made.find(name)
        if row is not None and query_camera is None:
            query_camera = made.images[row].camera
        decide = decider(made.thresholds, rate, query_camera)
        if row is not None:
            query = made.index.vector(row)
        else:
            query = await call(self.embedder.embed_photo, made.model, data)
        wanted = made.wanted(cameras, since, until)
        if wanted is None:
            found = await made.nearest(query, top)
        else:
            found = await asyncio.to_thread(made.index.nearest, query[None], top, wanted)
        return {
            "model": made.model,
            "exact": found.exact,
            "gallery": len(made.index),
            "threshold": None if decide is None else decide(None)._asdict(),
            "matches": made.matches(found, decide),
        }

    async def compare(self, a: bytes, b: bytes, rate: float | None = None) -> dict[str, Any]:
        """The similarity of two photos, and whether they show one person."""
        await self.start()
        made = self._generation
        decide = decider(made.thresholds, rate, None)
        photos = (call(self.embedder.embed_photo, made.model, data) for data in (a, b))
        x, y = (row.astype(np.float64) for row in await asyncio.gather(*photos))
        lengths = np.linalg.norm(x) * np.linalg.norm(y)
        similarity = float(x @ y / lengths) if lengths else 0.0
        at = None if decide is None else decide(None)
        return {
            "model": made.model,
            "similarity": round(similarity, 6),
            "same": None if at is None else similarity > at.similarity,
            "threshold": None if at is None else at._asdict(),
        }

    async def embed(self, data: bytes) -> dict[str, Any]:
        """The embedding of a photo."""
        await self.start()
        model = self._generation.model
        row = await call(self.embedder.embed_photo, model, data)
        return {"model": model, "embedding": row.tolist()}

    async def enrol(
        self, data: bytes, pid: int | str | None, camera: int | str | None, time: int | None
    ) -> dict[str, Any]:
        """Add an image. It is written before this returns."""
        await self.start()
        while True:
            made = self._generation
            facts = made.number("person", pid), made.number("camera", camera), time
            # Before anything is written: this refuses what is no image.
            row = await call(self.embedder.embed_photo, made.model, data)
            async with self.writing:
                if made is not self._generation:
                    continue  # another model took over: embed with that one
                image = await asyncio.to_thread(self.store.enrol, data, *facts)
                made.add([image], row[None])
                await asyncio.to_thread(self.store.keep_vector, image, made.facts.weights, row)
            await self._tell()
            return image.public(made.names)

    async def remove(self, name: str) -> bool:
        """Remove an image, and say whether it was there. It is written before this returns."""
        await self.up_to_date()
        async with self.writing:
            made = self._generation
            if (row := made.row.get(name)) is None:
                return False
            await asyncio.to_thread(self.store.remove, made.images[row])
            made.remove(name)
        await self._tell()
        return True

    async def _tell(self) -> None:
        """Have the other replicas look into the store before they answer the next request."""
        if self.changes is not None:
            await call(self.changes.add)

    async def list(
        self,
        *,
        offset: int,
        limit: int,
        cameras: Sequence[int | str] = (),
        since: float | None = None,
        until: float | None = None,
        pid: int | str | None = None,
    ) -> dict[str, Any]:
        """Some images of the gallery, and its cameras."""
        made = await self.up_to_date()
        person = made.number("person", pid)
        wanted = made.wanted(cameras, since, until)
        count, known = len(made.time), made.names.cameras

        def listed() -> dict[str, Any]:
            there, images = made.index.kept[:count].copy(), made.images
            camera, time = made.camera[:count], made.time[:count]
            rows = np.flatnonzero(there if wanted is None else there & wanted)
            if person is not None:
                rows = [row for row in rows if images[row].pid == person]
            numbers = np.unique(camera[there & (camera >= 0)]).tolist()
            return {
                "total": len(rows),
                "cameras": numbers,
                "camera_names": {n: known[n] for n in numbers if n in known},
                "times": bool(np.isfinite(time[there]).any()),
                "images": [images[row].public(made.names) for row in rows[offset : offset + limit]],
            }

        return await asyncio.to_thread(listed)

    async def picture(self, name: str) -> bytes:
        """A JPEG of an image of the gallery. Raises `ObjectMissing` if there is none."""
        made = await self.up_to_date()
        image = made.images[made.find(name)]
        pixels = await asyncio.to_thread(self._pixels, image)
        if pixels is None:
            raise ObjectMissing("the gallery has embeddings without images: start with --images")
        if pixels.shape[0] > PICTURE_HEIGHT:
            width = max(1, round(pixels.shape[1] * PICTURE_HEIGHT / pixels.shape[0]))
            pixels = cv2.resize(pixels, (width, PICTURE_HEIGHT), interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", pixels[..., ::-1])[1].tobytes()

    def _pixels(self, image: Image) -> np.ndarray | None:
        if image.enrolled:
            return decode(self.store.read(image))
        assert self.gallery is not None
        return self.gallery.picture(image.row)

    async def status(self) -> dict[str, Any]:
        """What is served, for /healthz and /metrics."""
        await self.start()
        made = self._generation
        graph = made.index.approximate
        rates = [at.false_accept_rate for at in made.thresholds.at] if made.thresholds else []
        return {
            "model": made.model,
            "weights": made.facts.weights,
            "runtime": made.facts.runtime,
            "gallery": len(made.index),
            "dimensions": made.facts.embedding_size,
            "exact": graph is None,
            "recall": None if graph is None else {"k": 10, "against_exact": graph.recall},
            "false_accept_rates": rates,
            "building": self.building,
            "progress": self.progress,
            "trouble": self.trouble,
        }


def _source(gallery: Gallery) -> str:
    """What the gallery's embeddings depend on beside the model."""
    source = gallery.source
    assert not isinstance(source, EmbeddingFiles)
    found = source.digest if isinstance(source, ImageFolder) else source.manifest.digest
    return digest(found, gallery.split)
