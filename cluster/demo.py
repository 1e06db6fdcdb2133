"""The whole system on one machine in a few minutes: `make demo`.

Procedural people are rendered, sharded to a real S3 server on loopback, learnt by two Ray Train
workers, measured, tracked in MLflow and registered. What it leaves lies in one folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from cluster.s3 import S3Server
from data_shards.cli import build_command
from data_shards.storage import open_storage
from reid_train.publish import REPORT
from reid_train.recipes import recipe
from reid_train.run import run
from reid_train.tracking import local_tracking

BUCKET = "demo"


def demo(folder: Path = Path(".demo"), workers: int = 2) -> None:
    """Run the main job from end to end on procedural people.

    Args:
        folder: Where everything is kept: objects, cache, MLflow, reports.
        workers: Ray Train workers.
    """
    folder = folder.absolute()
    console = Console()
    console.rule("a real S3 server, on loopback")
    with S3Server(folder / "s3") as server:
        os.environ.update(server.environment())
        server.create_bucket(BUCKET)
        console.print(f"{server.endpoint}, its data in {folder / 's3'}", highlight=False)
        console.rule("procedural people, sharded to S3")
        data, output = f"s3://{BUCKET}/people", f"s3://{BUCKET}/runs"
        build_command("synthetic", data, root=folder / "people", shard_bytes=1 << 20)
        console.rule(f"training with {workers} Ray workers")
        summary = run(
            recipe("demo").replace(
                data=data,
                output=output,
                workers=workers,
                loader__cache=folder / "cache",
                tracking__uri=local_tracking(folder),
            ),
            console=console,
        )
        # The server goes when this ends: the report stays beside it.
        report = folder / "reports" / summary.name
        run_folder = open_storage(output).child(summary.name)
        for key, _ in run_folder.list(f"{REPORT}/"):
            run_folder.download(key, report / Path(key).name)
    console.rule("to look at")
    page, ui = report / "report.html", f"mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db"
    console.print(f"report     {page}", highlight=False, soft_wrap=True)
    console.print(f"MLflow UI  {Path('.venv/bin') / ui}", highlight=False, soft_wrap=True)
