"""The command line: `python -m data_shards build | verify | info`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from data_shards.command_line import Command, command, program, run_one_of
from data_shards.errors import ConfigError, DataError
from data_shards.progress import display, make_console
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
    "synthetic",
]
Url = Annotated[str, tyro.conf.Positional]


def _optional(metavar: str) -> Any:
    # Without tyro's "None" all over the help.
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


OptionalInt = Annotated[int | None, _optional("INT")]
OptionalFraction = Annotated[float | None, _optional("FRACTION")]
OptionalPath = Annotated[Path | None, _optional("PATH")]
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
    root: OptionalPath = None,
    name: OptionalName = None,
    validation: OptionalFraction = None,
    validation_seed: int = 0,
    val: OptionalVal = None,
    images: OptionalPath = None,
    identities: OptionalInt = None,
    cameras: OptionalInt = None,
    images_per_camera: OptionalInt = None,
    seed: OptionalInt = None,
    test: OptionalFraction = None,
    shard_bytes: int = SHARD_BYTES,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: OptionalInt = None,
    work: OptionalPath = None,
) -> None:
    """Read a dataset, decode every image once, and write it as shards.

    The same command continues an interrupted build. A place that holds another dataset is not
    changed.

    Args:
        source: Kind of dataset; folders and csv are for your own.
        out: Where to write it: s3://bucket/prefix or a folder.
        root: The dataset's folder. For csv the CSV file. For synthetic where to draw them.
        name: Name of the dataset; its models are called reid-NAME in MLflow (default: the source's
            name; for csv and folders the name of the file or folder).
        validation: Fraction of the training identities to keep for a validation split, on which
            trainings choose their best checkpoint; 0.1 is usual (default: no such split).
        validation_seed: Another seed chooses other identities.
        val: [msmt17] Merge list_val.txt into train, or keep it as a split (default: merge).
        images: [csv] The folder that its paths are relative to (default: the CSV file's).
        identities: [synthetic] How many people, half of them for training (default: 64).
        cameras: [synthetic] How many cameras see each person (default: 4).
        images_per_camera: [synthetic] Images of each person by each camera (default: 6).
        seed: [synthetic, folders] Another seed draws other people, or chooses others for the test
            (default: 0).
        test: [folders] Fraction of the people to test on, in a layout without a folder for each
            split (default: 0.25).
        shard_bytes: Approximate size of a shard.
        allow_incomplete: Build even if the published counts are not met; the manifest records it.
        skip_unreadable: Leave out images that cannot be decoded; the manifest lists them.
        jobs: Processes (default: one per core).
        work: Folder for shards until they are uploaded (default: the system's temporary folder).
    """
    from data_shards.building.build import build

    given = {"val": val, "images": images, "identities": identities, "cameras": cameras}
    given |= {"images_per_camera": images_per_camera, "seed": seed, "test": test}
    options = {key: value for key, value in given.items() if value is not None}
    if root is None:
        if source != "synthetic":
            raise ConfigError(
                f"source {source!r} needs --root: the folder (for csv the file) to read"
            )
        root = expand_home(RENDERED)
    with display() as progress:
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
            work=work,
            progress=progress,
        )
    if result.already_built:
        print(f"already built: {out} holds the same images")
    _show(out, result.manifest)


def verify_command(url: Url, decode: bool = False, jobs: OptionalInt = None) -> None:
    """Read a sharded dataset in full and check it against its manifest and index.

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
    from data_shards.dataset import Dataset

    _show(url, Dataset.open(url).manifest)


def _show(url: str, manifest: Manifest) -> None:
    from rich.table import Table

    console = make_console()
    console.print(f"{manifest.name} at {url}")
    table = Table("split")
    for heading in ("images", "identities", "cameras", "shards", "MB"):
        table.add_column(heading, justify="right")
    for split in SPLITS:
        if split in manifest.splits:
            info = manifest.splits[split]
            shards = [shard for shard in manifest.shards if shard.split == split]
            megabytes = sum(shard.bytes for shard in shards) / 1e6
            counts = (info.images, info.identities, info.cameras, len(shards))
            table.add_row(split, *(f"{n:,}" for n in counts), f"{megabytes:,.1f}")
    console.print(table)
    options = ", ".join(f"{key} {value}" for key, value in manifest.options.items())
    console.print(f"manifest {manifest.digest[:16]}, source {manifest.source}: {options}")
    if not manifest.complete:
        console.print("incomplete: the published counts are not met", style="yellow")
    if manifest.left_out:
        count = len(manifest.left_out)
        console.print(f"{count:,} unreadable images were left out", style="yellow")


COMMANDS: dict[str, Command] = {
    "build": command(build_command, f"{PROGRAM} build"),
    "verify": command(verify_command, f"{PROGRAM} verify"),
    "info": command(info_command, f"{PROGRAM} info"),
}
