"""The whole system on one machine in a few minutes: `make demo`.

It draws people, writes them as shards to the local stack's S3 server, and trains on them with two
Ray Train workers. Metrics go to MLflow and the model into its registry. Everything stays in one
folder.
"""

import shlex
import shutil
import sys
from pathlib import Path

from cluster.local import servers as local
from cluster.local.stack import BUCKET
from data_shards.cli import build_command
from data_shards.progress import make_console
from data_shards.ray_utils import prepare_ray
from reid_train.recipes import recipe


def demo(folder: Path = Path(".demo"), workers: int = 2) -> None:
    """Run the whole system on drawn people, on this machine, in a few minutes.

    Args:
        folder: Where everything is kept: images, objects, cache, MLflow's database, reports.
        workers: Training workers.
    """
    folder = folder.absolute()
    console = make_console()
    console.rule("S3, MLflow and Ray, on loopback")
    with local.used(folder, console) as addresses:
        prepare_ray()
        # Ray reads these variables as it is imported.
        from reid_train.runs.job import run
        from reid_train.runs.run_dir import fetch_report

        console.print(f"S3         {addresses.s3}")
        console.print(f"MLflow     {addresses.mlflow}")
        console.print(f"dashboard  {addresses.dashboard}")
        console.rule("drawn people, as shards on S3")
        data, output = f"s3://{BUCKET}/people", f"s3://{BUCKET}/runs"
        build_command("synthetic", data, root=str(folder / "people"), shard_bytes=1 << 20)
        console.rule(f"training with {workers} Ray workers")
        config = recipe("demo").replace(data=data, output=output, workers=workers)
        config = config.replace(loader__cache=folder / "cache")
        # The servers stop now: their addresses are of no use, and the report is kept beside them.
        summary = run(config, console=console, where=False)
        page = fetch_report(f"{output}/{summary.name}", folder / "reports" / summary.name)
        import ray

        ray.shutdown()  # before its head stops
    console.rule("to look at")
    console.print(f"report   {local.from_here(page)}")
    console.print("servers  MLflow, S3 and Ray, as they were; then a page to search these people:")
    model = f"{str(summary.model).rpartition('/')[0]}@champion"
    console.print(_look_around(local.from_here(folder), model, data))


def _look_around(folder: Path, model: str, data: str) -> str:
    """Commands that start the servers again and search the demo's people, as a shell takes them."""
    where = f"--folder {shlex.quote(str(folder))}"
    commands = [
        f"python -m cluster local up {where}",
        f"python -m cluster serve {where} \\\n        --model {model} --gallery {data}",
    ]
    ours = Path(sys.executable).parent
    if Path(shutil.which("python") or "").parent != ours and (ours / "activate").exists():
        commands.insert(0, f"source {shlex.quote(str(local.from_here(ours / 'activate')))}")
    return "\n".join(f"    {command}" for command in commands)
