"""Omniglot as a re-identification problem: adaptive, constant and no L2, three seeds each.

    python tests/benchmarks/omniglot.py FOLDER_WITH_ZIPS WORK_FOLDER

A character is an identity, a drawer is a camera. Train: images_background_small1 (136 identities);
test: Japanese_(katakana), Sanskrit and Tagalog of images_background_small2 (106 identities), query
drawers 01–05, gallery drawers 06–20. The archives are unpacked, described in a CSV, sharded to a
real S3 server through the CSV source, and every training is the main command with two workers, as a
user gives it. Trainings that finished are not run again.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

from cluster.local.s3_server import S3Server
from data_shards.cli import build_command
from data_shards.errors import ObjectMissing
from data_shards.storage import open_storage
from reid_train.tracking.uris import local_tracking

TEST = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
QUERY_DRAWERS = range(1, 6)
MODES = ("adaptive", "constant", "none")
SEEDS = (0, 1, 2)


def write_csv(zips: Path, out: Path) -> Path:
    """Unpack both archives below `out` and describe them in a CSV."""
    rows, pids = [], {}
    for archive, train in (("small1", True), ("small2", False)):
        with zipfile.ZipFile(zips / f"images_background_{archive}.zip") as opened:
            for member in sorted(opened.namelist()):
                path = Path(member)
                if path.suffix != ".png" or ".." in path.parts or path.is_absolute():
                    continue
                alphabet, character = path.parts[-3:-1]
                if not train and alphabet not in TEST:
                    continue
                drawer = int(path.stem.split("_")[1])
                split = "train" if train else "query" if drawer in QUERY_DRAWERS else "gallery"
                pid = pids.setdefault((alphabet, character), len(pids))
                target = out / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.read(member))
                rows.append((path.as_posix(), pid, drawer, split))
    table = out / "omniglot.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "pid", "camid", "split"))
        writer.writerows(rows)
    return table


def compare(data: str, output: str) -> None:
    """Train each mode with each seed and print a table in Markdown."""
    results: dict[str, list[dict]] = {}
    for mode in MODES:
        for seed in SEEDS:
            name = f"omniglot-{mode}-{seed}"
            summary = finished(output, name)
            if summary is None:
                command = [sys.executable, "-m", "reid_train", "train", "--recipe", "csv_small"]
                command += ["--data", data, "--output", output, "--name", name, "--workers", "2"]
                command += ["--seed", str(seed), "--regularization.mode", mode]
                subprocess.run(command, check=True)
                summary = finished(output, name)
            assert summary is not None
            results.setdefault(mode, []).append(summary)
            print(f"{name}: {summary['metrics']}", flush=True)
    print("| mode | mAP | rank-1 | mINP | images/s |\n| --- | --- | --- | --- | --- |")
    runs = [run for each in results.values() for run in each]
    print(f"| untrained | {cells([run['before'] for run in runs])} | |")
    for mode, each in results.items():
        speed = statistics.median(run["images_per_second"] for run in each)
        print(f"| {mode} | {cells([run['metrics'] for run in each])} | {speed:.0f} |")


def finished(output: str, name: str) -> dict | None:
    """The summary of a run that ended, or None."""
    try:
        return json.loads(open_storage(output).read(f"{name}/report/summary.json"))
    except ObjectMissing:
        return None


def cells(metrics: list[dict]) -> str:
    """Mean ± sample standard deviation of each metric, in percent, as cells of a table."""
    columns = [[100 * entry[name] for entry in metrics] for name in ("mAP", "rank-1", "mINP")]
    return " | ".join(f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns)


def main(zips: Path, work: Path) -> None:
    """Run the whole comparison."""
    table = write_csv(zips, work / "omniglot")
    with S3Server(work / "s3") as server:
        os.environ.update(server.environment())
        os.environ["MLFLOW_TRACKING_URI"] = local_tracking(work)
        server.create_bucket("omniglot")
        build_command("csv", "s3://omniglot/shards", root=str(table), name="omniglot")
        compare("s3://omniglot/shards", "s3://omniglot/runs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
