"""Market-1501: adaptive, constant and no L2, two seeds each, then one long training of the best.

    python tests/benchmarks/market1501.py FOLDER WEIGHTS WORK [--only adaptive-0 …] [--minutes 60]

FOLDER is `Market-1501-v15.09.15`, WEIGHTS the ImageNet weights of EfficientNet-Lite0 (a file that
`efficientnet_lite0_weights.py` writes), WORK a folder for everything else. The data set is sharded
to a real S3 server with a validation split. Every training is the main command, as a user gives it:
its best checkpoint is chosen on the validation split and measured once on the test split, with and
without re-ranking. No pictures of the data set are kept.

The script can be stopped or killed at any time: the same command continues a training that was
begun, and skips those that ended. `WORK/results.json` and `WORK/results.md` have what is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.local.s3_server import S3Server
from data_shards.storage import open_storage
from reid_train.runs.checkpoint_store import newest_whole
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking

BUCKET = "market1501"
DATA, OUTPUT = f"s3://{BUCKET}/shards", f"s3://{BUCKET}/runs"
SEEDS = (0, 1)
CONSTANTS = ("0.0005", "0.0025")  # λ; the second is where the published adaptive λ starts
MEASURES = ("mAP", "rank-1", "mINP")
TRIES, WAIT_SECONDS = 5, 30.0  # of a command that fails
# Ray starts its workers at niceness 15: beside other work they would hardly run.
BUSY = {"RAY_worker_niceness": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}

COMMON = ["--recipe", "market1501_resnet50", "--image.height", "128", "--image.width", "64"]
COMMON += ["--augment.pad", "5", "--batch.steps-per-epoch", "None"]
COMMON += ["--optimizer.schedule", "cosine", "--optimizer.frozen-epochs", "1"]
COMMON += ["--optimizer.learning-rate", "5e-4", "--optimizer.minimum-learning-rate", "5e-6"]
COMMON += ["--evaluation.every", "4", "--evaluation.no-initial", "--evaluation.no-rank-list"]
COMMON += ["--checkpoint.every-steps", "60", "--tracking.model-name", "off"]
# The global branch only: the two stripes take as long as all the rest.
BACKBONE = ["--model.backbone", "timm:tf_efficientnet_lite0", "--model.stripes", "0"]
# Drawn people, to try the script itself.
SMALL = ["--model.backbone", "resnet18", "--image.height", "32", "--image.width", "16"]
SMALL += ["--batch.identities", "4", "--batch.steps-per-epoch", "3", "--optimizer.epochs", "1"]
SMALL += ["--evaluation.every", "1"]


@dataclass(frozen=True)
class Job:
    """A training: its name, and what it has beside the common settings."""

    setting: str
    seed: int
    flags: list[str] = field(default_factory=list)
    epochs: int | None = None

    @property
    def name(self) -> str:
        return f"{self.setting}-{self.seed}"


class Benchmark:
    """The trainings on one S3 server, and their results."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.work = given, given.work
        self.stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._file = self.work / "results.json"
        self.results: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.results = json.loads(self._file.read_text())

    def jobs(self) -> Iterator[list[Job]]:
        """Yield trainings that can run at the same time; later ones depend on earlier results."""
        epochs, first, last = self.given.epochs, *SEEDS
        modes = {"adaptive": ["adaptive"], "none": ["none"]}
        modes |= {f"constant-{c}": ["constant", "--regularization.factor", c] for c in CONSTANTS}
        flags = {name: ["--regularization.mode", *mode] for name, mode in modes.items()}
        yield [Job(name, first, more, epochs) for name, more in flags.items()]
        constant = self.best([f"constant-{c}" for c in CONSTANTS])
        chosen = ["adaptive", "none", *([constant] if constant else [])]
        yield [Job(name, last, flags[name], epochs) for name in chosen]
        yield [
            Job("held", seed, held, epochs)
            for seed in SEEDS
            if (held := self.held(f"adaptive-{seed}"))
        ]
        best = self.best([*chosen, "held"])
        if best:
            more = flags[best] if best in flags else self.held(f"adaptive-{first}")
            yield [Job("long", first, more, self.given.long_epochs)]

    def best(self, settings: list[str]) -> str | None:
        """Return the setting with the highest mean mAP on the validation split, once all have run.

        Of settings that ran with different numbers of seeds, only the first seed counts.
        """
        scores: dict[str, list[float]] = {
            setting: [r["validation"] for r in self.results.values() if r["setting"] == setting]
            for setting in settings
        }
        if not all(scores.values()):
            return None
        fewest = min(map(len, scores.values()))
        return max(scores, key=lambda setting: statistics.mean(scores[setting][:fewest]))

    def held(self, adaptive: str) -> list[str]:
        """Return settings that hold λ, by kind of tensor, at the mean that a run ended with.

        A θ that does not move keeps λ at half its amplitude.
        """
        if adaptive not in self.results:
            return []
        flags = ["--regularization.mode", "adaptive", "--regularization.theta-lr-multiplier", "0"]
        for kind, found in self.results[adaptive]["factors"].items():
            flags += [f"--regularization.amplitudes.{kind}", repr(2 * found["mean"])]
        return flags

    def run(self, job: Job) -> None:
        """Train unless it is done, measure on the test split, and write the results."""
        if self.stopped.is_set() or job.name in self.results:
            return
        run = f"{OUTPUT}/{job.name}"
        common = [*COMMON, *(SMALL if self.given.smoke else BACKBONE), "--data", DATA]
        common += ["--model.weights", self.given.weights, "--output", OUTPUT, "--name", job.name]
        common += ["--loader.cache", str(self.work / "cache"), "--seed", str(job.seed)]
        if job.epochs:
            common += ["--optimizer.epochs", str(job.epochs)]
        cores = max(1, (os.cpu_count() or 1) // self.given.at_a_time)
        share = ["--cpus-per-worker", str(cores)]
        self._command("reid_train", "train", *common, *share, *job.flags, "--resume-or-start")
        found = self.work / "measured" / f"{job.name}.json"
        measure = ["--model", run, "--data", DATA, "--rerank", "--output", str(found)]
        self._command("reid_train", "evaluate", *measure, *share)
        result = self._result(job, run, json.loads(found.read_text()))
        with self._lock:
            self.results[job.name] = result
            self._file.write_text(json.dumps(self.results, indent=2, ensure_ascii=False))
            (self.work / "results.md").write_text(report(self.results))
        print(f"{job.name}: mAP {result['test']['mAP']:.4f}", flush=True)

    def build(self) -> None:
        """Write the shards; what was built is not built again."""
        source = ["--source", "market1501", "--root", str(self.given.folder), "--validation", "0.1"]
        if self.given.smoke:
            source = ["--source", "synthetic", "--root", str(self.work / "drawn")]
            source += ["--identities", "24", "--validation", "0.25"]
        source += ["--name", BUCKET, "--shard-bytes", str(8 << 20)]
        self._command("data_shards", "build", *source, "--out", DATA)

    def stop(self, *_: object) -> None:
        """Ask the trainings to write a checkpoint and end."""
        self.stopped.set()
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)

    def _command(self, module: str, *words: str) -> None:
        """Run a program of this project; it ends with this script, even if that is killed.

        Each of these commands continues where it was, so one that fails is tried again: on a busy
        machine a server may answer too late.
        """
        command = [sys.executable, "-m", module, *words]
        for _ in range(TRIES):
            if self.stopped.is_set():
                raise Stopped
            process = subprocess.Popen(command, preexec_fn=_end_with_parent)
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
            if code == 0:
                return
            self.stopped.wait(WAIT_SECONDS)
        raise SystemExit(f"{' '.join(command)} failed {TRIES} times")

    def _result(self, job: Job, run: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Return what is reported of a run."""
        storage = open_storage(run)
        summary = json.loads(storage.read("report/summary.json"))
        with newest_whole(run) as newest:
            assert newest is not None
            history = newest.history()
        speed = np.array(history.steps["images_per_second"])
        images = newest.config.batch_size * newest.config.batch.accumulate
        _, values = history.factors()
        kinds = np.array(history.tensor_kinds)
        return {
            "setting": job.setting,
            "seed": job.seed,
            "epochs": newest.config.total_epochs,
            "validation": summary["metrics"]["mAP"],
            "checkpoint": summary["checkpoint"],
            "test": measured["metrics_before_reranking"],
            "reranked": measured["metrics"],
            "minutes": float((images / speed).sum() / 60),
            "images_per_second": float(np.median(speed)),
            "cores": newest.config.cpus_per_worker,
            "factors": {
                kind: {
                    "start": np.quantile(values[0, kinds == kind], (0, 0.5, 1)).tolist(),
                    "end": np.quantile(values[-1, kinds == kind], (0, 0.5, 1)).tolist(),
                    "mean": float(values[-1, kinds == kind].mean()),
                }
                for kind in dict.fromkeys(history.tensor_kinds)
                if len(values)
            },
        }


class Stopped(Exception):
    """The script was asked to stop."""


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a training writes a checkpoint


def report(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as tables in Markdown: by setting, by training, and λ."""
    heads = "mAP | rank-1 | mINP | re-ranked: mAP | rank-1 | mINP"
    lines = [f"| setting | seeds | validation mAP | {heads} |", "| --- " * 9 + "|"]
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        by_setting.setdefault(result["setting"], []).append(result)
    for setting, each in by_setting.items():
        columns = [[r["validation"] for r in each]]
        columns += [[r[way][m] for r in each] for way in ("test", "reranked") for m in MEASURES]
        cells = " | ".join(map(spread, columns))
        lines.append(f"| {setting} | {len(each)} | {cells} |")
    lines += ["", "| training | epochs | minutes | images/s | mAP | rank-1 |", "| --- " * 6 + "|"]
    for name, r in results.items():
        scores = f"{100 * r['test']['mAP']:.1f} | {100 * r['test']['rank-1']:.1f}"
        cells = f"{r['epochs']} | {r['minutes']:.0f} | {r['images_per_second']:.0f} | {scores}"
        lines.append(f"| {name} | {cells} |")
    lines += ["", "| training | kind | λ at the start | λ at the end |", "| --- " * 4 + "|"]
    for name, r in results.items():
        for kind, found in r["factors"].items():
            cells = (" / ".join(f"{v:.5f}" for v in found[when]) for when in ("start", "end"))
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nλ: least / median / largest of the kind's tensors.\n"


def spread(values: list[float]) -> str:
    """Return the mean in per cent, and the sample standard deviation if there are several."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    """Run what has not been run yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="Market-1501-v15.09.15; not read with --smoke")
    parser.add_argument("weights", help="state dict of EfficientNet-Lite0, or none")
    parser.add_argument("work", type=Path, help="everything that is kept")
    parser.add_argument("--only", nargs="+", help="names of trainings, such as adaptive-0")
    parser.add_argument("--minutes", type=float, help="stop after so long; run again to continue")
    parser.add_argument("--epochs", type=int, default=12, help="of the comparison, after 1 frozen")
    parser.add_argument("--long-epochs", type=int, default=40, help="of the long training")
    parser.add_argument("--at-a-time", type=int, default=1, help="trainings that share the cores")
    parser.add_argument("--smoke", action="store_true", help="drawn people, one epoch, ResNet-18")
    given = parser.parse_args()
    given.work = given.work.absolute()
    if given.smoke:
        given.epochs = given.long_epochs = None
    given.work.mkdir(parents=True, exist_ok=True)
    for name, value in BUSY.items():
        os.environ.setdefault(name, value)
    with S3Server(given.work / "s3") as server:
        os.environ.update(server.environment())
        os.environ["MLFLOW_TRACKING_URI"] = local_tracking(given.work)
        # Made here, because a training waits for it for 25 seconds only.
        connect(os.environ["MLFLOW_TRACKING_URI"]).get_experiment_by_name("reid")
        server.create_bucket(BUCKET)
        benchmark = Benchmark(given)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, benchmark.stop)
        if given.minutes:
            timer = threading.Timer(60 * given.minutes, benchmark.stop)
            timer.daemon = True
            timer.start()
        try:
            benchmark.build()
            for jobs in benchmark.jobs():
                wanted = [job for job in jobs if not given.only or job.name in given.only]
                with ThreadPoolExecutor(given.at_a_time) as pool:
                    list(pool.map(benchmark.run, wanted))
        except Stopped:
            print("stopped; the same command continues", flush=True)
    print(report(benchmark.results))


if __name__ == "__main__":
    main()
