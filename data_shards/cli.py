"""The command line: `python -m data_shards build | add | merge | remove | verify | info`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from data_shards.command_line import Command, command, program, run_one_of
from data_shards.errors import ConfigError, DataError
from data_shards.progress import display, make_console, say
from data_shards.records import SHARD_BYTES, SPLITS
from data_shards.storage import expand_home

if TYPE_CHECKING:
    from data_shards.manifest import Manifest

PROGRAM = program("data_shards", "reid-shards")
SourceName = Literal[
    "msmt17",
    "market1501",
    "dukemtmc",
    "veri776",
    "cuhk03_labeled",
    "cuhk03_detected",
    "folders",
    "csv",
    "webdataset",
    "synthetic",
]
Url = Annotated[str, tyro.conf.Positional]
Urls = Annotated[tuple[str, ...], tyro.conf.Positional]
UNITS = {"scanning tars": "tars", "listing": "keys"}


def _optional(metavar: str) -> Any:
    # Without tyro's "None" all over the help.
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


OptionalInt = Annotated[int | None, _optional("INT")]
OptionalFraction = Annotated[float | None, _optional("FRACTION")]
OptionalAddress = Annotated[str | None, _optional("HOST:PORT")]
Jobs = Annotated[
    int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="", aliases=["--workers"])
]
OptionalPath = Annotated[Path | None, _optional("PATH")]
OptionalPlace = Annotated[str | None, _optional("PATH-OR-URL")]
OptionalName = Annotated[str | None, _optional("NAME")]
OptionalVal = Annotated[Literal["merge", "separate"] | None, _optional("{merge,separate}")]
RENDERED = Path("~/.cache/data_shards/synthetic")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return run_one_of(COMMANDS, PROGRAM, arguments)


def build_command(
    source: SourceName,
    out: str,
    root: OptionalPlace = None,
    name: OptionalName = None,
    validation: OptionalFraction = None,
    validation_seed: int = 0,
    val: OptionalVal = None,
    images: OptionalPlace = None,
    fields: tuple[str, ...] = (),
    identities: OptionalInt = None,
    cameras: OptionalInt = None,
    images_per_camera: OptionalInt = None,
    seed: OptionalInt = None,
    test: OptionalFraction = None,
    shard_bytes: int = SHARD_BYTES,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: Jobs = None,
    address: OptionalAddress = None,
    work: OptionalPath = None,
) -> None:
    """Read a dataset, decode every image once, and write it as shards.

    The same command continues an interrupted build. A place that holds another dataset is not
    changed.

    Args:
        source: Kind of dataset; folders and csv are for your own.
        out: Where to write it: s3://bucket/prefix or a folder.
        root: The dataset's folder, or s3://bucket/prefix. For csv the CSV file. For webdataset the
            tars, such as 's3://bucket/old-{000000..000123}.tar'. For synthetic where to draw them.
        name: Name of the dataset; its models are called reid-NAME in MLflow (default: the source's
            name; for csv and folders the name of the file or folder).
        validation: Fraction of the training identities to keep for a validation split, on which
            trainings choose their best checkpoint; 0.1 is usual (default: no such split).
        validation_seed: Another seed chooses other identities.
        val: [msmt17] Merge list_val.txt into train, or keep it as a split (default: merge).
        fields: [webdataset] Where a sample has its pid and, if known, its camid and split:
            pid=json.person camid=json.cam split=json.set. A member of text is named without a key:
            pid=cls. With several images in a sample, image=jpg chooses one.
        images: [csv] The folder that its paths are relative to (default: the CSV file's).
        identities: [synthetic] How many people, half of them for training (default: 64).
        cameras: [synthetic] How many cameras see each person (default: 4).
        images_per_camera: [synthetic] Images of each person by each camera (default: 6).
        seed: [synthetic, folders, webdataset] Another seed draws other people, or chooses others
            for the test (default: 0).
        test: [folders, webdataset] Fraction of the people to test on, if the source does not say
            which (default: 0.25).
        shard_bytes: Approximate size of a shard.
        allow_incomplete: Build even if the published counts are not met; the manifest records it.
        skip_unreadable: Leave out images that cannot be decoded; the manifest lists them.
        jobs: Processes (default: one per core); with --address, tasks at a time (default: one per
            CPU of the cluster).
        address: A Ray cluster that scans and writes, HOST:PORT of its head; local starts one here.
        work: Folder for shards until they are uploaded (default: the system's temporary folder).
    """
    from data_shards.building.build import build
    from data_shards.storage.object_path import open_place

    folder = None if images is None else open_place(images)
    given = {"val": val, "images": folder, "identities": identities, "cameras": cameras}
    given |= {"images_per_camera": images_per_camera, "seed": seed, "test": test}
    given["fields"] = list(fields) or None
    options = {key: value for key, value in given.items() if value is not None}
    if root is None:
        if source != "synthetic":
            raise ConfigError(
                f"source {source!r} needs --root: the folder (for csv the file) to read"
            )
        root = str(expand_home(RENDERED))
    with display(units=UNITS) as progress:
        result = build(
            source,
            root,
            out,
            name=name,
            options=options,
            validation=validation,
            validation_seed=validation_seed,
            shard_bytes=shard_bytes,
            allow_incomplete=allow_incomplete,
            skip_unreadable=skip_unreadable,
            jobs=jobs,
            address=address,
            work=work,
            progress=progress,
        )
    if result.already_built:
        print(f"already built: {out} holds the same images")
    _show(out, result.manifest)
    if wide := result.wide:
        say(
            make_console(),
            f"images wider than tall: {len(wide):,}, such as {wide[0]} (are they crops of people?)",
            style="yellow",
        )


def add_command(
    url: Url,
    source: SourceName,
    root: str,
    ids: Literal["same", "new"] = "same",
    images: OptionalPlace = None,
    fields: tuple[str, ...] = (),
    seed: OptionalInt = None,
    test: OptionalFraction = None,
    shard_bytes: int = SHARD_BYTES,
    skip_unreadable: bool = False,
    jobs: Jobs = None,
    address: OptionalAddress = None,
    work: OptionalPath = None,
) -> None:
    """Add images to a dataset, as a new version of it.

    The shards that are there stay as they are. Runs that were trained on the dataset before can
    still be resumed. The same command continues an interrupted one.

    Args:
        url: The dataset: s3://bucket/prefix or a folder.
        source: Kind of what is added.
        root: Where it is, as for build.
        ids: Same if the identities and cameras have the numbers or names that they have in the
            dataset; new if all of them are others, which then get the next numbers.
        images: [csv] As for build.
        fields: [webdataset] As for build.
        seed: [folders, webdataset] As for build.
        test: [folders, webdataset] As for build.
        shard_bytes: Approximate size of a shard.
        skip_unreadable: Leave out images that cannot be decoded; the manifest lists them.
        jobs: As for build.
        address: As for build.
        work: As for build.
    """
    from data_shards.building.versions import add
    from data_shards.storage.object_path import open_place

    folder = None if images is None else open_place(images)
    given = {"images": folder, "fields": list(fields) or None, "seed": seed, "test": test}
    with display(units=UNITS) as progress:
        change = add(
            url,
            source,
            root,
            ids=ids,
            options={key: value for key, value in given.items() if value is not None},
            shard_bytes=shard_bytes,
            skip_unreadable=skip_unreadable,
            jobs=jobs,
            address=address,
            work=work,
            progress=progress,
        )
    print(f"{change.images:,} images {'are there already' if change.already_made else 'added'}")
    if change.known:
        print(f"{change.known:,} images were there already")
    _show(url, change.manifest)


def merge_command(urls: Urls, out: str, name: OptionalName = None) -> None:
    """Join datasets, with the identities and cameras of each kept apart.

    Shards are not written again: local ones are linked, and S3 copies its own.

    Args:
        urls: The datasets.
        out: Where to write the new one: s3://bucket/prefix or a folder.
        name: Name of the new dataset (default: their names, joined).
    """
    from data_shards.building.merge import merge

    with display() as progress:
        change = merge(urls, out, name=name, progress=progress)
    if change.already_made:
        print(f"already merged: {out} holds these datasets")
    _show(out, change.manifest)


def remove_command(
    url: Url,
    pid: tuple[str, ...],
    delete_old: bool = False,
    jobs: Jobs = None,
    work: OptionalPath = None,
) -> None:
    """Remove people from a dataset, as a new version of it.

    Shards with images of them are written anew without these. A dataset that was merged from this
    one has its own copies: remove them there, too.

    Args:
        url: The dataset: s3://bucket/prefix or a folder.
        pid: The people, in all splits: their numbers, or their names if the dataset has names.
        delete_old: Delete all earlier versions that have them, and check that they are gone. Runs
            that were trained on those cannot be resumed.
        jobs: Processes (default: one per core).
        work: Folder for shards until they are uploaded (default: the system's temporary folder).
    """
    from data_shards.building.versions import remove

    with display() as progress:
        change = remove(url, pid, delete_old=delete_old, jobs=jobs, work=work, progress=progress)
    _show(url, change.manifest)
    print(f"{change.images:,} images removed")
    if delete_old:
        print(f"{change.deleted:,} objects of earlier versions deleted; none has these people now")
    else:
        print("earlier versions still have them: delete those with --delete-old")


def verify_command(url: Url, decode: bool = False, jobs: OptionalInt = None) -> None:
    """Read a dataset in full and check it against its manifest and index.

    Lists every shard that is missing, truncated or altered, and then exits with code 3.

    Args:
        url: The dataset: s3://bucket/prefix or a folder.
        decode: Decode every image too.
        jobs: Processes (default: one per core).
    """
    from data_shards.verify import verify

    with display() as progress:
        dataset, problems = verify(url, decode_images=decode, jobs=jobs, progress=progress)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"{url}: {len(problems):,} problems; build it again elsewhere:{lines}")
    _show(url, dataset.manifest)
    print("all shards match the manifest")


def info_command(url: Url) -> None:
    """Show what a sharded dataset holds.

    Args:
        url: The dataset: s3://bucket/prefix or a folder.
    """
    from data_shards.dataset import open_manifest

    _show(url, open_manifest(url)[1])


def _show(url: str, manifest: Manifest) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = make_console()
    console.print(f"{manifest.name} at {url}")
    table = Table("split", box=SIMPLE_HEAD)
    for heading in ("images", "identities", "cameras", "shards", "MB"):
        table.add_column(heading, justify="right")
    for split in SPLITS:
        if split in manifest.splits:
            info = manifest.splits[split]
            shards = [shard for shard in manifest.shards if shard.split == split]
            megabytes = sum(shard.bytes for shard in shards) / 1e6
            counts = (info.images, info.identities, info.cameras, len(shards))
            table.add_row(split, *(f"{n:,}" for n in counts), f"{megabytes:,.2f}")
    console.print(table)
    told = [f"manifest {manifest.digest[:16]}", f"source {manifest.source}"]
    for key, value in manifest.options.items():
        if key == "added" and isinstance(value, list):
            told.append(
                f"images added {len(value)} times" if len(value) > 1 else "images added once"
            )
        elif isinstance(value, int | float | str) and key not in BOOKKEEPING:
            told.append(f"{key.replace('_', ' ')} {value}")
    say(console, ", ".join(told))
    if not manifest.complete:
        console.print("incomplete: the published counts are not met", style="yellow")
    if manifest.left_out:
        count = len(manifest.left_out)
        console.print(f"unreadable images left out: {count:,}", style="yellow")


BOOKKEEPING = {"shard_bytes", "least_pid", "least_camid"}  # options that tell a reader nothing

COMMANDS: dict[str, Command] = {
    "build": command(build_command, f"{PROGRAM} build"),
    "add": command(add_command, f"{PROGRAM} add"),
    "merge": command(merge_command, f"{PROGRAM} merge"),
    "remove": command(remove_command, f"{PROGRAM} remove"),
    "verify": command(verify_command, f"{PROGRAM} verify"),
    "info": command(info_command, f"{PROGRAM} info"),
}
