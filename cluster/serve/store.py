"""What people enrol and remove, in a folder or on S3: written before it is answered.

    enrolled/ID_pPERSON_cCAMERA_tSECONDS.img    an enrolled image, as it was uploaded
    removed/ID                                  an image of the gallery that is no longer found
    vectors/ID/WEIGHTS                          the embedding of an enrolled image
    embeddings/WEIGHTS/GALLERY/part-….parquet   those of the gallery
    embeddings/WEIGHTS/GALLERY/complete         and whether they are all there

Embeddings are kept so that a restart need not compute them again.

An enrolment is one object, and all that is known of it is in its name. Objects appear whole or not
at all, so a kill at any moment leaves an image enrolled or not, never by half.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from data_shards.errors import ConfigError, ObjectExists, ObjectMissing
from data_shards.manifest import Names
from data_shards.storage import open_storage
from reid_train.evaluation.embedding_store import ROWS, EmbeddingFiles, EmbeddingTable, write_part

_NAME = re.compile(r"enrolled/(?P<id>[0-9a-f]{24})_p(\d*)_c(\d*)_t(|-?\d+)\.img")
LARGEST = 2**31  # of identities and cameras


class Image(NamedTuple):
    """An image of the gallery."""

    id: str  # 24 hex digits
    path: str
    pid: int | None = None  # identity
    camera: int | None = None
    time: int | None = None  # seconds since 1970
    enrolled: bool = False  # or of the gallery that the service was started with
    row: int = -1  # in that gallery

    def public(self, names: Names) -> dict[str, object]:
        """As answers show it, with the names of its person and camera."""
        time = None if self.time is None else datetime.fromtimestamp(self.time, UTC).isoformat()
        pid, camera = self.pid, self.camera
        return {
            "id": self.id,
            "path": self.path,
            "pid": pid,
            "person": None if pid is None else names.people.get(pid),
            "camera": camera,
            "camera_name": None if camera is None else names.cameras.get(camera),
            "time": time,
            "enrolled": self.enrolled,
        }


def digest(*parts: str | bytes) -> str:
    """An id: 24 hex digits of the SHA-256 of its parts."""
    encoded = (part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(b"\0".join(encoded)).hexdigest()[:24]


class Store:
    """Enrolled images, removals and known embeddings at a URL."""

    def __init__(self, url: str) -> None:
        self.storage = open_storage(url)

    def enrolled(self) -> dict[str, Image]:
        """All enrolled images by id. Their names say all, so that none is read."""
        found = {}
        for key, _ in self.storage.list("enrolled/"):
            if match := _NAME.fullmatch(key):
                pid, camera, time = (int(text) if text else None for text in match.groups()[1:])
                found[match["id"]] = Image(match["id"], key, pid, camera, time, enrolled=True)
        return found

    def removed(self) -> set[str]:
        """The ids of removed images of the gallery."""
        return {key.removeprefix("removed/") for key, _ in self.storage.list("removed/")}

    def enrol(self, data: bytes, pid: int | None, camera: int | None, time: int | None) -> Image:
        """Write an image. The same image with the same facts gets the same id, and is there once.

        Raises:
            StorageError: it could not be written.
        """
        for name, number in (("pid", pid), ("camera", camera)):
            if number is not None and not 0 <= number < LARGEST:
                raise ConfigError(f"{name} must lie between 0 and {LARGEST - 1}, not {number}")
        facts = "".join(
            f"_{letter}{'' if number is None else number}"
            for letter, number in (("p", pid), ("c", camera), ("t", time))
        )
        name = digest(data, facts)
        key = f"enrolled/{name}{facts}.img"
        with suppress(ObjectExists):  # by an earlier attempt, whose answer was lost
            self.storage.write(key, data, create_once=True)
        return Image(name, key, pid, camera, time, enrolled=True)

    def remove(self, image: Image) -> None:
        """Delete an enrolled image and its embeddings; of another, write that it is removed."""
        if image.enrolled:
            for key, _ in self.storage.list(f"vectors/{image.id}/"):
                self.storage.delete(key)
            self.storage.delete(image.path)
        else:
            self.storage.write(f"removed/{image.id}", b"")

    def read(self, image: Image) -> bytes:
        """The bytes of an enrolled image."""
        return self.storage.read(image.path)

    def vector(self, image: Image, weights: str) -> np.ndarray | None:
        """The kept embedding of an enrolled image, (D,) float32."""
        with suppress(ObjectMissing):
            return np.frombuffer(self.storage.read(f"vectors/{image.id}/{weights[:16]}"), "<f4")
        return None

    def keep_vector(self, image: Image, weights: str, embedding: np.ndarray) -> None:
        """Keep the embedding (D,) of an enrolled image."""
        data = embedding.astype("<f4").tobytes()
        self.storage.write(f"vectors/{image.id}/{weights[:16]}", data)

    def known(self, weights: str, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids (n,) and embeddings (n, D) float32 that were kept, by the model's weights."""
        for key, _ in self.storage.list(f"{_folder(weights, source)}/part-"):
            url = f"{self.storage.url}/{key}"
            files = EmbeddingFiles.open(url)
            ids = files.paths()
            for first, block in files.blocks("gallery", 0, len(ids), ROWS):
                yield ids[first : first + len(block)], block

    def keep(self, weights: str, source: str, ids: np.ndarray, embedding: np.ndarray) -> None:
        """Keep embeddings for the next start."""
        unknown, split = np.full(len(ids), -1), np.full(len(ids), "gallery", object)
        table = EmbeddingTable(embedding, unknown, unknown, split, ids)
        write_part(self.storage, f"{_folder(weights, source)}/part-{digest(*ids)}.parquet", table)

    def complete(self, weights: str, source: str) -> None:
        """Write that all embeddings of a source are kept."""
        self.storage.write(f"{_folder(weights, source)}/complete", b"")

    def is_complete(self, weights: str, source: str) -> bool:
        """Whether `complete` was called."""
        return self.storage.exists(f"{_folder(weights, source)}/complete")


def _folder(weights: str, source: str) -> str:
    return f"embeddings/{weights[:16]}/{source[:16]}"
