"""Omniglot as a re-identification problem: a CSV for `--source csv`, and the three modes compared.

    python tests/benchmarks/omniglot.py csv FOLDER_WITH_ZIPS OUT      # writes OUT/omniglot.csv
    python tests/benchmarks/omniglot.py compare DATA OUTPUT           # trains 3 modes × 3 seeds

A character is an identity, a drawer is a camera. Train: images_background_small1 (136 identities);
test: Japanese_(katakana), Sanskrit and Tagalog of images_background_small2 (106 identities), query
drawers 01–05, gallery drawers 06–20. Every training is the main command, as a user gives it.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

from data_shards.storage import open_storage

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


def compare(data: str, output: str, *overrides: str) -> None:
    """Train each mode with each seed and print a table in Markdown."""
    results: dict[str, list[dict]] = {}
    for mode in MODES:
        for seed in SEEDS:
            name = f"omniglot-{mode}-{seed}"
            command = [sys.executable, "-m", "reid_train", "train", "--recipe", "csv_small"]
            command += ["--data", data, "--output", output, "--name", name, "--workers", "2"]
            command += ["--seed", str(seed), "--regularization.mode", mode, *overrides]
            subprocess.run(command, check=True)
            summary = json.loads(open_storage(output).read(f"{name}/report/summary.json"))
            results.setdefault(mode, []).append(summary)
            print(f"{name}: {summary['metrics']}", flush=True)
    print("| mode | mAP | rank-1 | images/s |\n| --- | --- | --- | --- |")
    untrained = [run["before"] for runs in results.values() for run in runs]
    print(f"| untrained | {spread(untrained, 'mAP')} | {spread(untrained, 'rank-1')} | |")
    for mode, runs in results.items():
        metrics = [run["metrics"] for run in runs]
        speed = statistics.median(run["images_per_second"] for run in runs)
        cells = f"{spread(metrics, 'mAP')} | {spread(metrics, 'rank-1')} | {speed:.0f}"
        print(f"| {mode} | {cells} |")


def spread(metrics: list[dict], name: str) -> str:
    """Mean ± sample standard deviation of a metric, in percent."""
    values = [100 * entry[name] for entry in metrics]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    if sys.argv[1] == "csv":
        print(write_csv(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        compare(*sys.argv[2:])
