"""Split identities off the training images: people that a model is measured on, not trained on."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from data_shards.errors import ConfigError
from data_shards.records import EVALUATED, NO_CAMERA, ImageRecord

TRAINING = ("train", "val")
LEAST = 2  # identities of a split; with one, every ranking is perfect


def split_off(
    records: Sequence[ImageRecord], flag: str, fraction: float, seed: int, into: str
) -> list[ImageRecord]:
    """Move some training identities with all their images to a query and a gallery.

    An identity can be chosen if two cameras have seen it; without cameras, if it has two different
    images. Of each camera with several images of the identity, one is a query, or one in all if
    there is no such camera; without cameras one in four is. The rest is the gallery, so each query
    has a match from another camera. The choice is made by hashes of the seed, the pid and the path:
    it is the same on every machine, and in any order of the records.

    Args:
        records: of the whole dataset.
        flag: the option that asks for it, for messages.
        fraction: of the training identities, in (0, 1).
        seed: another one chooses other identities.
        into: a key of `EVALUATED`.

    Returns:
        The records in the same order, those that were moved with another split.

    Raises:
        ConfigError: the fraction is out of range, or there are too few identities for it.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"{flag} must lie between 0 and 1, not {fraction:g}")
    images = defaultdict[int, list[ImageRecord]](list)
    for record in records:
        if record.split in TRAINING:
            images[record.pid].append(record)
    fit = [pid for pid, own in images.items() if len({_camera(r) for r in own}) > 1]
    count = round(fraction * len(images))
    _require(flag, fraction, count, len(fit), len(images))

    def order(value: object) -> bytes:
        # A name that is not UTF-8 is refused later, with a message.
        return hashlib.sha256(f"{seed} {value}".encode(errors="surrogatepass")).digest()

    query, gallery = EVALUATED[into]
    chosen = set(sorted(fit, key=order)[:count])
    queries = set[str]()
    for pid in chosen:
        ordered = sorted(images[pid], key=lambda record: order(record.relative))
        queries.update(record.relative for record in _queries(ordered))
    return [
        replace(record, split=query if record.relative in queries else gallery)
        if record.split in TRAINING and record.pid in chosen
        else record
        for record in records
    ]


def _camera(record: ImageRecord) -> object:
    """What tells a record's camera from others; without a camera, each image has its own."""
    return record.relative if record.camid == NO_CAMERA else record.camid


def _queries(images: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The queries among an identity's images, which are in the order of their choice."""
    by_camera = defaultdict[object, list[ImageRecord]](list)
    for record in images:
        by_camera[_camera(record)].append(record)
    cameras = list(by_camera.values())
    if images[0].camid >= NO_CAMERA:
        chosen = cameras[: max(1, len(cameras) // 4)]
    else:
        chosen = [camera for camera in cameras if len(camera) > 1] or cameras[:1]
    return [camera[0] for camera in chosen]


def _require(flag: str, fraction: float, count: int, fit: int, identities: int) -> None:
    """Raise `ConfigError` if a split would be too small, too large, or have no matches."""
    found = f"{flag} {fraction:g} of {identities:,} training identities is {count:,}"
    if identities < 2 * LEAST:
        raise ConfigError(f"{found}: a split needs {LEAST} of them, and training another {LEAST}")
    if count < LEAST:
        least = math.ceil(1000 * LEAST / identities) / 1000
        raise ConfigError(f"{found}, but a split needs at least {LEAST}: give {least:g} or more")
    most = min(fit, identities - LEAST)
    if count > most:
        reason = f"only {fit:,} were seen by two cameras" if fit == most else "training needs 2"
        advice = f"give {math.floor(1000 * most / identities) / 1000:g} or less"
        if most < LEAST:
            advice = "each query needs an image of the same person from another camera"
        raise ConfigError(f"{found}, but {reason}: {advice}")
