"""Read a source of images, check what it says, and scan its images."""

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_shards.building.parallel import Cluster
from data_shards.building.scan import ScannedImage, scan
from data_shards.dataset import why_not_measurable
from data_shards.errors import ConfigError, DataError
from data_shards.manifest import LeftOut
from data_shards.progress import Progress, silent
from data_shards.records import EVALUATED, NO_CAMERA, ImageRecord
from data_shards.sources import SOURCES, webdataset
from data_shards.sources.layout import difference
from data_shards.sources.split import split_off
from data_shards.storage.object_path import Place, open_place

log = logging.getLogger(__name__)

# MLflow refuses / and : in registered models' names, and . % " and ' in logged models' names.
_NOT_IN_NAMES = re.compile(r"""[/:.%"'\\\s]""")
# Control characters, line ends, and bytes that are not UTF-8 (which Python reads as surrogates).
_NOT_IN_PATHS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Images:
    """The scanned images of a source."""

    images: list[ScannedImage]
    left_out: list[LeftOut]
    name: str  # of a dataset of these images, unless the user gives another
    complete: bool  # whether all published counts were met
    options: dict[str, Any]  # for the manifest; nothing in them depends on this machine


def read_images(
    source: str,
    root: str | Place,
    *,
    options: Mapping[str, Any] | None = None,
    validation: float | None = None,
    validation_seed: int = 0,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: int = 1,
    cluster: Cluster | None = None,
    progress: Progress = silent,
) -> Images:
    """Read and scan all images of a source; `build` describes the arguments.

    What is wrong with the labels is found before the scan, unless the source is streamed.

    Raises:
        ConfigError: an unknown source or option, or a value out of range.
        DataError: the images are not what they should be.
    """
    given = _all_options(source, options or {})
    take = partial(
        split_off,
        flag="--validation",
        fraction=0.0 if validation is None else validation,
        seed=validation_seed,
        into="validation",
    )

    def check(records: Sequence[ImageRecord]) -> str | None:
        _check_records(records, root)
        if validation is not None:
            if any(record.split in EVALUATED["validation"] for record in records):
                raise ConfigError(
                    f"{root} has a validation split of its own: leave out --validation"
                )
            take(records)
        shortfall = difference(SOURCES[source], records, root)
        if shortfall and not allow_incomplete:
            raise DataError(
                f"{shortfall}: is the archive complete? Pass --allow-incomplete to shard what is"
                " there"
            )
        return shortfall

    if SOURCES[source].streamed:
        name = webdataset.default_name(str(root))
        do = {"jobs": jobs, "cluster": cluster, "progress": progress}
        images, left_out = SOURCES[source].read(str(root), **given, **do)
        shortfall = check([image.record for image in images])
    else:
        root = open_place(root, file=source == "csv", listed=source != "csv", progress=progress)
        own = {"csv": root.stem, "folders": root.absolute().name}
        name = own.get(source, source)
        records = SOURCES[source].read(root, **given)
        shortfall = check(records)
        if cluster is not None and isinstance(root, Path):
            cluster = replace(cluster, shared=(root.absolute(),))
        images, left_out = scan(records, jobs, progress, cluster)
    if left_out and not skip_unreadable:
        raise DataError(
            f"{len(left_out):,} image{'s' * (len(left_out) > 1)} under {root} cannot be read: "
            "repair or remove what follows, or leave it out with --skip-unreadable"
            + "".join(f"\n  {item.path}: {item.reason}" for item in left_out)
        )
    records = _numbered([image.record for image in images], [image.sha256 for image in images])
    if validation is not None:
        records = take(records)
    recorded = {key: value for key, value in given.items() if not isinstance(value, Place | None)}
    if validation is not None:
        recorded |= {"validation": validation, "validation_seed": validation_seed}
    images = [replace(image, record=r) for image, r in zip(images, records, strict=True)]
    return Images(images, left_out, sanitized(name), shortfall is None, recorded)


def _all_options(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if source not in SOURCES:
        raise ConfigError(f"no source {source!r}: choose one of {', '.join(SOURCES)}")
    signature = inspect.signature(SOURCES[source].read)
    given = ("root", "jobs", "cluster", "progress")
    known = [name for name in signature.parameters if name not in given]
    if wrong := [name for name in options if name not in known]:
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"source {source!r} has no option {wrong[0]!r}: {has}")
    defaults = {name: signature.parameters[name].default for name in known}
    return defaults | dict(options)


def check_name(name: str) -> None:
    if not name or not name.isprintable() or _NOT_IN_NAMES.search(name):
        raise ConfigError(
            f"--name {name!r} cannot be the name of a dataset, because MLflow names its models"
            f" after it: use letters, digits, - and _, such as --name {sanitized(name)}"
        )


def sanitized(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name).strip("-") or "people"


def _check_records(records: Sequence[ImageRecord], root: str | Place) -> None:
    """Check what the source says, before the images are read."""
    seen = set[str]()
    for record in records:
        if record.relative in seen:
            raise DataError(f"{record.relative} is listed twice under {root}: remove one entry")
        seen.add(record.relative)
        for name, value, bits in (("pid", record.pid, 63), ("camid", record.camid, 30)):
            unknown = name == "camid" and value == NO_CAMERA
            if not (0 <= value < 1 << bits or unknown):
                raise DataError(f"{record.path}: {name} {value} is not from 0 to 2^{bits} - 1")
        if _NOT_IN_PATHS.search(record.relative):
            raise DataError(
                f"{record.relative!r} under {root}: rename this file; its name has control"
                " characters or is not UTF-8"
            )


def check_identities(records: Sequence[ImageRecord], root: str | Place) -> None:
    """Check whether the readable images can be trained on, and warn if they cannot be measured."""
    if not records:
        raise DataError(f"no images under {root}")
    if len({record.pid for record in records if record.split == "train"}) == 1:
        raise DataError(
            f"{root}: all train images are of one identity; training needs at least two"
        )
    for evaluated, splits in EVALUATED.items():
        query, gallery = ([(r.pid, r.camid) for r in records if r.split == s] for s in splits)
        if evaluated == "validation" and not query + gallery:
            continue  # most datasets have none
        if (reason := why_not_measurable(query, gallery)) is not None:
            on = "its validation split" if evaluated == "validation" else "this dataset"
            log.warning("%s: models cannot be measured on %s: %s", root, on, reason)


def _numbered(records: Sequence[ImageRecord], contents: Sequence[str]) -> list[ImageRecord]:
    """Give each image without a camera the number of its content (`NO_CAMERA`)."""
    unknown = {c for r, c in zip(records, contents, strict=True) if r.camid == NO_CAMERA}
    number = {content: NO_CAMERA + n for n, content in enumerate(sorted(unknown))}
    return [
        replace(record, camid=number[content]) if record.camid == NO_CAMERA else record
        for record, content in zip(records, contents, strict=True)
    ]
