"""The whole system on one machine in a few minutes: `make demo`.

It draws people, writes them as shards to the local stack's S3 server, and trains on them with two
Ray Train workers. Metrics go to MLflow and the model into its registry. Everything stays in one
folder.
"""

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
    console.print(f"report   {page}")
    again = f"python -m cluster local up --folder {folder}"
    console.print(f"servers  {again}  (MLflow, S3 and Ray, as they were)")
    model = f"{str(summary.model).rpartition('/')[0]}@champion"
    search = f"python -m cluster serve --folder {folder} --model {model} --gallery {data}"
    console.print(f"search   {search}  (a page to search these people)")
