"""`reid_train search` and `compare`: photos against a gallery, or against each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import tyro

from data_shards.errors import ConfigError
from data_shards.progress import display, phase, print_table, say
from data_shards.records import NO_CAMERA
from reid_train.commands.embed import require_found
from reid_train.config import LoaderConfig

if TYPE_CHECKING:
    from rich.console import Console

    from data_shards.manifest import Names
    from reid_train.commands.gallery import Gallery
    from reid_train.commands.runtime import Runtime
    from reid_train.evaluation.neighbours import Neighbours
    from reid_train.evaluation.thresholds import Threshold
    from reid_train.report.ranks import Label

    Decider = Callable[[tuple[int, int] | None], Threshold]  # for two cameras, or for any

LONGEST = 200  # of a rank list
DRAWN = 10  # ranks in the picture
SHAPE = (1.2, 5.0)  # height over width of a crop of one person


def require_local(flag: str, place: str | None) -> None:
    """Raise `ConfigError` if pictures would be drawn anywhere but on this machine's disk."""
    if place and "://" in place:
        raise ConfigError(f"{flag} draws on this machine's disk: give a path, not {place}")


@dataclass(frozen=True)
class Search:
    """Rank a gallery by its similarity to each photo of a person.

    python -m reid_train search photo.jpg --model models:/reid-msmt17@champion --gallery photos
    """

    photos: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")]
    """Image files, local or s3://…, each cropped to one person."""
    model: str
    """models:/name@champion, a checkpoint's or run's folder or s3:// URL, or an ONNX file."""
    gallery: str
    """What to search: a folder or s3:// prefix of images, a sharded dataset, or embeddings."""
    top: int = 10
    """How many gallery images to list for each photo."""
    split: str = "gallery"
    """Which split of a sharded dataset or of embeddings to search."""
    images: str | None = None
    """With embeddings as gallery: the folder or dataset of their images, for the picture."""
    false_accept_rate: float | None = None
    """Decide "same person or not" at this rate; by default at 0.001 if the model has thresholds."""
    camera: str | None = None
    """The photos' camera, by name or number: decide by thresholds for it and that of each image."""
    picture: str | None = None
    """Where to draw the rank list, a PNG file; by default one in reports/; "off": none."""
    output: str | None = None
    """Also write the ranks as JSON to this file, a path or s3://…"""
    runtime: Literal["torch", "onnx"] | None = None
    """What runs the model; by default PyTorch, and ONNX Runtime for an ONNX file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def check(self) -> None:
        """Raise `ConfigError` for what is missing or out of range."""
        if not self.photos:
            raise ConfigError("give the photos to search for: search PHOTO… --model … --gallery …")
        if not 1 <= self.top <= LONGEST:
            raise ConfigError(f"--top must lie between 1 and {LONGEST}, not {self.top}")
        if self.picture not in (None, "off") and not str(self.picture).lower().endswith(".png"):
            raise ConfigError(f"--picture takes the name of a PNG file, or off, not {self.picture}")
        require_local("--picture", self.picture)


@dataclass(frozen=True)
class Compare:
    """Say how similar the people on two photos are.

    python -m reid_train compare a.jpg b.jpg --model models:/reid-msmt17@champion
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """An image file, local or s3://…, cropped to one person."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Another."""
    model: str
    """models:/name@champion, a checkpoint's or run's folder or s3:// URL, or an ONNX file."""
    false_accept_rate: float | None = None
    """Decide "same person or not" at this rate; by default at 0.001 if the model has thresholds."""
    runtime: Literal["torch", "onnx"] | None = None
    """What runs the model; by default PyTorch, and ONNX Runtime for an ONNX file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    tracking_uri: str | None = None
    """MLflow, for models:/…; by default MLFLOW_TRACKING_URI."""


class Match(NamedTuple):
    """A gallery image in a rank list."""

    row: int  # in the gallery
    path: str
    camera: int | None
    similarity: float  # cosine, −1 to 1
    same: bool | None = None  # person, at the chosen threshold
    pid: int | None = None
    person: str | None = None  # the names that pid and camera stand for
    camera_name: str | None = None


def search(settings: Search, console: Console) -> list[list[Match]]:
    """Run the command; return the matches of each photo, most similar first."""
    settings.check()
    photos = read_photos(settings.photos, console)
    require_found(console, [settings.model], [settings.gallery], settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch and Numba"):
        from reid_train.commands.gallery import blocks, open_gallery
        from reid_train.commands.runtime import open_runtime
        from reid_train.evaluation.measures import COSINE
        from reid_train.evaluation.neighbours import nearest_in_gallery
    gallery = open_gallery(settings.gallery, settings.split, settings.images)
    camera = None
    if settings.camera is not None:
        camera = gallery.names.number("camera", settings.camera)
    with display(console) as progress:
        with phase(progress, "loading the model"):
            given = settings.device, settings.tracking_uri, settings.runtime
            runtime = open_runtime(settings.model, *given)
            decide, undecided = _decider(runtime, settings)
        query, k = runtime.photos(photos), min(settings.top, len(gallery))
        parts = blocks(gallery, runtime, settings.loader, progress)
        found = nearest_in_gallery(query, parts, k, COSINE)
    matches = _matches(gallery, found, decide, camera)
    for photo, ranked in zip(settings.photos, matches, strict=True):
        _show(photo, ranked, console)
    say(console, undecided if decide is None else _threshold(decide(None)))
    if settings.picture != "off":
        _draw(settings, photos, gallery, matches, console)
    if settings.output is not None:
        _write(settings.output, settings, matches)
        say(console, f"written to {settings.output}")
    return matches


def compare(settings: Compare, console: Console) -> float:
    """Run the command; return the cosine similarity of the two photos."""
    photos = read_photos((settings.a, settings.b), console)
    require_found(console, [settings.model], tracking_uri=settings.tracking_uri)
    with display(console) as progress, phase(progress, "loading PyTorch"):
        from reid_train.commands.runtime import open_runtime
        from reid_train.evaluation.similarity import check_features
    with display(console) as progress, phase(progress, "loading the model"):
        given = settings.device, settings.tracking_uri, settings.runtime
        runtime = open_runtime(settings.model, *given)
        decide, undecided = _decider(runtime, settings)
    both = check_features("photo", runtime.photos(photos))
    a, b = both.embedding.astype(np.float64) * both.scale[:, None]
    similarity = float(a @ b)
    say(console, f"similarity {similarity:.4f}")
    if decide is None:
        say(console, undecided)
    else:
        at = decide(None)
        verdict = "the same person" if similarity > at.similarity else "another person"
        say(console, f"{verdict}: {_threshold(at)}")
    return similarity


def read_photos(urls: Sequence[str], console: Console) -> list[np.ndarray]:
    """Read image files; warn of those that are not shaped like a crop of one person."""
    from data_shards.images import read_photo

    photos = [read_photo(url) for url in urls]
    for url, photo in zip(urls, photos, strict=True):
        if text := shape_warning(url, *photo.shape[:2]):
            say(console, text, style="yellow")
    return photos


def shape_warning(name: str, height: int, width: int) -> str | None:
    """What to say of a photo that is not shaped like a crop of one person."""
    if SHAPE[0] <= height / width <= SHAPE[1]:
        return None
    return (
        f"{name} is {width} × {height} pixels, {height / width:.2g} times as high as wide: "
        f"a person standing is {SHAPE[0]:g} to {SHAPE[1]:g} times. Crop the photo to "
        "one person, or the ranks mean little"
    )


def _decider(runtime: Runtime, settings: Search | Compare) -> tuple[Decider | None, str]:
    """How to decide at the wanted rate, without one at the usual rate; or None, and why."""
    from reid_train.commands.runtime import known_thresholds

    rate = settings.false_accept_rate
    known = known_thresholds(settings.model, settings.tracking_uri, runtime.facts)
    if known is None:
        without = (
            f"{settings.model} has no thresholds. Those of a registered version are measured by "
            "`evaluate --model models:/… --data … --thresholds`, and go with what is exported later"
        )
        if rate is not None:
            raise ConfigError(without)
        return None, f"no decision on same person or not: {without}"
    rate = known.usual_rate if rate is None else rate
    if rate is None:
        return None, (
            f"no decision on same person or not: {settings.model} was measured on too few pairs of "
            "different people, as with a dozen of them. On more: `evaluate --model models:/… "
            "--data … --thresholds`"
        )
    known.find(rate)  # raises if it was not measured
    return partial(known.find, rate), ""


def _threshold(at: Threshold) -> str:
    return (
        f"the threshold is {at.similarity:.4f} ({at.low:.4f} to {at.high:.4f}) at a false accept "
        f"rate of {at.false_accept_rate:g}; {100 * at.true_accept_rate:.1f} % of true pairs are "
        "above it"
    )


def _matches(
    gallery: Gallery, found: Neighbours, decide: Decider | None, asked: int | None
) -> list[list[Match]]:
    names = gallery.names

    def match(row: int, score: float) -> Match:
        pid, number, same = int(gallery.pid[row]), int(gallery.camid[row]), None
        camera = number if 0 <= number < NO_CAMERA else None
        if decide is not None:
            pair = None if asked is None or camera is None else (asked, camera)
            same = -score > decide(pair).similarity
        path = str(gallery.path[row]) or f"row {row}"
        known = names.people.get(pid), names.cameras.get(number)
        return Match(row, path, camera, -score, same, None if pid < 0 else pid, *known)

    return [
        [match(int(row), float(score)) for row, score in zip(*ranks, strict=True) if row >= 0]
        for ranks in zip(found.index, found.score, strict=True)
    ]


def _show(photo: str, ranked: Sequence[Match], console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    say(console, photo, style="bold")
    table = Table(box=SIMPLE_HEAD)
    table.add_column("rank", justify="right")
    table.add_column("image")
    columns = {
        "person": [match.person or match.pid for match in ranked],
        "camera": [match.camera_name or match.camera for match in ranked],
    }
    known = {k: v for k, v in columns.items() if any(value is not None for value in v)}
    for name in known:
        table.add_column(name, justify="right")
    table.add_column("similarity", justify="right")
    if decided := any(match.same is not None for match in ranked):
        table.add_column("same person")
    for rank, match in enumerate(ranked, 1):
        cells = [str(rank), Text(match.path)]
        for values in known.values():
            value = values[rank - 1]
            cells.append("–" if value is None else Text(str(value)))
        cells.append(f"{match.similarity:.4f}")
        if decided:
            cells.append("yes" if match.same else "no")
        table.add_row(*cells)
    print_table(console, table)


def _draw(
    settings: Search,
    photos: Sequence[np.ndarray],
    gallery: Gallery,
    matches: Sequence[Sequence[Match]],
    console: Console,
) -> None:
    """Draw the rank list, or say why there is no picture."""
    from reid_train.report.ranks import PERSON, draw_rank_list

    shown = [ranked[:DRAWN] for ranked in matches]
    images = [[gallery.picture(match.row) for match in ranked] for ranked in shown]
    if any(image is None for row in images for image in row):
        where = f"not at {settings.images}" if settings.images else "not known: give --images"
        say(console, f"no picture of the rank list: where the gallery's images are is {where}")
        return
    path = Path(settings.picture or _picture_name(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = _depth(settings.photos)
    ends = [PurePosixPath(photo).parts[-depth:] for photo in settings.photos]
    by_file = any(match.pid is None for ranked in shown for match in ranked)
    depth = _depth(gallery.path) if by_file else 1
    draw_rank_list(
        path,
        photos,
        [[image for image in row if image is not None] for row in images],
        None if shown[0][0].same is None else [[bool(m.same) for m in row] for row in shown],
        query_labels=[(end[-1], "/".join(end[:-1])) for end in ends],
        gallery_labels=[[_label(match, gallery.names, depth) for match in row] for row in shown],
        similarity=[[match.similarity for match in row] for row in shown],
        meaning=PERSON,
    )
    say(console, f"rank list  {path}")


def _picture_name(settings: Search) -> str:
    """A name of its own for each search: many photos have the same name, in other folders."""
    searched = settings.photos, settings.model, settings.gallery, settings.split
    digest = hashlib.sha256(json.dumps(searched).encode()).hexdigest()
    return f"reports/search-{PurePosixPath(settings.photos[0]).stem}-{digest[:8]}.png"


def _depth(paths: Iterable[str]) -> int:
    """How many of its last parts tell each path apart from the others."""
    parts = {PurePosixPath(path).parts for path in paths}
    deepest = max(map(len, parts))
    return next(
        (n for n in range(1, deepest) if len({p[-n:] for p in parts}) == len(parts)), deepest
    )


def _label(match: Match, names: Names, depth: int) -> Label:
    """Who is on a gallery image, or if that is not known its file; and the camera."""
    file = "/".join(PurePosixPath(match.path).parts[-depth:])
    who = file if match.pid is None else names.person(match.pid)
    return who, "" if match.camera is None else names.camera(match.camera)


def _write(url: str, settings: Search, matches: Sequence[Sequence[Match]]) -> None:
    from data_shards.storage import open_file

    found = {
        "model": settings.model,
        "gallery": settings.gallery,
        "photos": [
            {"photo": photo, "matches": [match._asdict() for match in ranked]}
            for photo, ranked in zip(settings.photos, matches, strict=True)
        ],
    }
    storage, key = open_file(url)
    storage.write(key, json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
