"""The whole system on one machine in a few minutes: `make demo`.

Procedural people are rendered, sharded to the local stack's S3 server, learnt by two Ray Train
workers, measured, tracked in MLflow and registered. What it leaves lies in one folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from cluster.local import servers as local
from cluster.local.stack import BUCKET
from data_shards.cli import build_command
from data_shards.storage import open_storage
from reid_train.recipes import recipe


def demo(folder: Path = Path(".demo"), workers: int = 2) -> None:
    """Run the main job from end to end on procedural people.

    Args:
        folder: Where everything is kept: objects, cache, MLflow, reports.
        workers: Ray Train workers.
    """
    folder = folder.absolute()
    console = Console()
    console.rule("S3, MLflow and Ray, on loopback")
    try:
        addresses = local.start(folder, console=console)
        os.environ |= local.environment(folder)
        # Ray reads some of these variables as it is imported.
        from reid_train.runs.job import run
        from reid_train.runs.run_dir import REPORT

        console.print(f"S3 {addresses.s3}, MLflow {addresses.mlflow}, Ray's dashboard", end=" ")
        console.print(addresses.dashboard, highlight=False)
        console.rule("procedural people, sharded to S3")
        data, output = f"s3://{BUCKET}/people", f"s3://{BUCKET}/runs"
        build_command("synthetic", data, root=folder / "people", shard_bytes=1 << 20)
        console.rule(f"training with {workers} Ray workers")
        config = recipe("demo").replace(data=data, output=output, workers=workers)
        summary = run(config.replace(loader__cache=folder / "cache"), console=console)
        # The servers go when this ends: the report stays beside their data.
        report = folder / "reports" / summary.name
        run_folder = open_storage(output).child(summary.name)
        for key, _ in run_folder.list(f"{REPORT}/"):
            run_folder.download(key, report / Path(key).name)
    finally:
        local.stop(folder)
    console.rule("to look at")
    console.print(f"report   {report / 'report.html'}", highlight=False, soft_wrap=True)
    again = f"python -m cluster local up --folder {folder}"
    console.print(f"servers  {again}  (MLflow, S3 and Ray, as they were)", soft_wrap=True)
