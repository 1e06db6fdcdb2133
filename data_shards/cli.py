"""The command line: `python -m data_shards build | verify | info`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data_shards.building.build import SHARD_BYTES, build
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, run_command
from data_shards.manifest import Manifest
from data_shards.records import SPLITS
from data_shards.verify import verify

SourceName = Literal["msmt17", "market1501", "dukemtmc", "csv", "synthetic"]
Url = Annotated[str, tyro.conf.Positional]


def _optional(metavar: str) -> Any:
    # An option that may be left out, without tyro's "None" all over the help.
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


OptionalInt = Annotated[int | None, _optional("INT")]
OptionalPath = Annotated[Path | None, _optional("PATH")]
OptionalName = Annotated[str | None, _optional("NAME")]
OptionalVal = Annotated[Literal["merge", "separate"] | None, _optional("{merge,separate}")]
RENDERED = Path.home() / ".cache" / "data_shards" / "synthetic"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    commands = {"build": build_command, "verify": verify_command, "info": info_command}
    return run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="python -m data_shards",
            description="Person images to checked, indexed WebDataset shards on S3 or a disk.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    )


def build_command(
    source: SourceName,
    out: str,
    root: OptionalPath = None,
    name: OptionalName = None,
    val: OptionalVal = None,
    images: OptionalPath = None,
    identities: OptionalInt = None,
    cameras: OptionalInt = None,
    images_per_camera: OptionalInt = None,
    seed: OptionalInt = None,
    shard_bytes: int = SHARD_BYTES,
    allow_incomplete: bool = False,
    skip_unreadable: bool = False,
    jobs: OptionalInt = None,
    work: OptionalPath = None,
) -> None:
    """Read a dataset, decode every image once, and write it as shards.

    An interrupted build goes on where it was when the same command is given again. A place that
    holds another dataset is left as it is.

    Args:
        source: Which dataset it is; csv is for your own.
        out: Where to put it: s3://bucket/prefix, or a folder.
        root: The dataset's folder; for csv the CSV file; for synthetic where to render
            them (by default under ~/.cache).
        name: What to call it inside the shards; by default the source's name.
        val: [msmt17] Merge list_val.txt into train (default), or keep it as a split of its own.
        images: [csv] The folder its paths are relative to; by default the CSV's.
        identities: [synthetic] How many people, half of them for training.
        cameras: [synthetic] How many cameras see each of them.
        images_per_camera: [synthetic] How often each camera sees each of them.
        seed: [synthetic] Another seed, other people.
        shard_bytes: Size of a shard, roughly.
        allow_incomplete: Go on although the published counts are not met; the manifest says so.
        skip_unreadable: Leave unreadable images out; the manifest lists them.
        jobs: Processes; by default one for each core.
        work: Folder for shards until they are uploaded; by default the system's temporary one.
    """
    given = {"val": val, "images": images, "identities": identities, "cameras": cameras}
    given |= {"images_per_camera": images_per_camera, "seed": seed}
    options = {key: value for key, value in given.items() if value is not None}
    if root is None:
        if source != "synthetic":
            raise ConfigError(
                f"source {source!r} needs --root: the folder (for csv the file) to read"
            )
        root = RENDERED
    with _progress() as progress:
        result = build(
            source,
            root,
            out,
            name=name,
            options=options,
            shard_bytes=shard_bytes,
            allow_incomplete=allow_incomplete,
            skip_unreadable=skip_unreadable,
            jobs=jobs,
            work=work,
            progress=progress,
        )
    if result.already_built:
        print(f"already built: {out} holds these very images")
    _show(out, result.manifest)


def verify_command(url: Url, decode: bool = False, jobs: OptionalInt = None) -> None:
    """Read a sharded dataset back in full and check it against its manifest and index.

    Lists every shard that is missing, truncated or altered, and then exits with code 3.

    Args:
        url: Where it is: s3://bucket/prefix, or a folder.
        decode: Decode every image too.
        jobs: Processes; by default one for each core.
    """
    with _progress() as progress:
        report = partial(progress, "verifying")
        dataset, problems = verify(url, decode_images=decode, jobs=jobs, progress=report)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise DataError(f"{url}: {len(problems):,} problems; build it again elsewhere:{lines}")
    _show(url, dataset.manifest)
    print("all shards are as the manifest says")


def info_command(url: Url) -> None:
    """Show what a sharded dataset holds.

    Args:
        url: Where it is: s3://bucket/prefix, or a folder.
    """
    _show(url, Dataset.open(url).manifest)


class _Speed(ProgressColumn):
    """Images a second since the step began."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.elapsed:
            return Text("")
        return Text(f"{task.completed / task.elapsed:,.0f} images/s", style="cyan")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each step; the yielded function moves it."""
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), _Speed())
    bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def report(step: str, total: int, done: int) -> None:
        bars.start()  # not before there is something to show: it would leave an empty line
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


def _show(url: str, manifest: Manifest) -> None:
    console = Console()
    table = Table(title=f"{manifest.name} at {url}", title_justify="left")
    table.add_column("split")
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
    console.print(f"manifest {manifest.digest[:16]}  source {manifest.source} {manifest.options}")
    if not manifest.complete:
        console.print("[yellow]incomplete: the published counts are not met")
    if manifest.left_out:
        console.print(f"[yellow]{len(manifest.left_out):,} unreadable images were left out")
