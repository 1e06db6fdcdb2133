"""`python -m cluster plan` against real runs of 1, 2 and 4 workers on this machine.

    python tests/benchmarks/plan.py [--steps 8] [--epochs 2] [--workers 1 2 4]

Real trainings on Ray, data on a real S3 server behind a proxy that counts requests and bytes.
Steps, images, GETs, bytes and checkpoints must be what was planned, to the last one. Times are
ratios: the plan knows one worker's speed (two short runs with two sizes of batch) and how fast two
processes exchange numbers (measured here, too), and says what 2 and 4 workers will do. The machine
should be idle; what else it does is in the times.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import multiprocessing

from cluster.local.s3_server import S3Server
from cluster.plan.command import Planned, add_to_table, make, measured, parse
from cluster.plan.network import describe
from data_shards.building.build import build
from data_shards.dataset import Dataset
from data_shards.storage import open_storage
from reid_train.recipes import recipe
from reid_train.tracking.uris import local_tracking

BUCKET, DATA = "plan", "people"
TRIES = 6
PEOPLE = {"identities": 64, "cameras": 3, "images_per_camera": 4}


class CountingProxy:
    """Passes HTTP on unchanged; keeps each GET's path, bytes, and whether it asked for a range."""

    def __init__(self, endpoint: str) -> None:
        self.seen: list[tuple[str, int, bool]] = []
        seen, where = self.seen, urlsplit(endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size) if size else None
                # The signature covers Host: it goes on as the client wrote it.
                skip = ("expect", "connection")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in skip}
                with closing(http.client.HTTPConnection(where, timeout=120)) as server:
                    server.request(self.command, self.path, body, headers)
                    answer = server.getresponse()
                    content = answer.read()
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                given = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", given or str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                if self.command == "GET":
                    seen.append((unquote(self.path), len(content), "Range" in self.headers))

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def of_data(self) -> tuple[int, int]:
        """GETs of the dataset's objects, and the bytes of those that were read whole."""
        found = [entry for entry in self.seen if entry[0].startswith(f"/{BUCKET}/{DATA}/")]
        return len(found), sum(size for _, size, part in found if not part)


@contextmanager
def storage(folder: Path) -> Iterator[CountingProxy]:
    """An S3 server behind a counting proxy, and an environment that leads to it."""
    with S3Server(folder / "s3") as server:
        proxy = CountingProxy(server.endpoint)
        os.environ.update(server.environment())
        os.environ["AWS_ENDPOINT_URL"] = os.environ["MLFLOW_S3_ENDPOINT_URL"] = proxy.endpoint
        os.environ["MLFLOW_TRACKING_URI"] = local_tracking(folder)
        server.create_bucket(BUCKET)
        try:
            yield proxy
        finally:
            proxy.stop()


def flags(args: argparse.Namespace, cache: Path, *more: str) -> list[str]:
    """A training small enough for two cores."""
    common = ["--recipe", "demo", "--data", f"s3://{BUCKET}/{DATA}", "--loader.cache", str(cache)]
    common += ["--batch.steps-per-epoch", str(args.steps), "--optimizer.epochs", str(args.epochs)]
    common += ["--optimizer.frozen-epochs", "1", "--evaluation.every", "2", "--loader.workers", "1"]
    common += ["--batch.window", "4", "--tracking.every-steps", "2"]
    return [*common, *more]


def train(name: str, workers: int, given: list[str]) -> float:
    """Run the main command; return its seconds."""
    command = [sys.executable, "-m", "reid_train", "train", *given, "--name", name]
    command += ["--output", f"s3://{BUCKET}/runs", "--workers", str(workers)]
    command += ["--tracking.model-name", "off", "--device", "cpu"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return time.perf_counter() - began
    if "timed out during startup" not in done.stderr:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    raise TimeoutError(f"Ray did not start for {name}: the machine is too busy")


def patiently(name: str, workers: int, given: list[str], proxy: CountingProxy) -> tuple[str, float]:
    """The name and seconds of a run that Ray did start; it gives up on a machine too busy."""
    for attempt in range(TRIES):
        proxy.seen.clear()
        with suppress(TimeoutError):
            return f"{name}-{attempt}", train(f"{name}-{attempt}", workers, given)
    raise SystemExit(f"Ray did not start in {TRIES} tries: the machine is too busy")


def exchange(rank: int, world: int, floats: int, folder: str) -> None:
    """Time what workers tell each other, in one of `world` processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    big, small = torch.zeros(floats), torch.zeros(513)
    parts = [torch.zeros(513) for _ in range(world)]

    def best(call, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            dist.barrier()
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    ring = best(lambda: dist.all_reduce(big), 7)
    gather = best(lambda: dist.all_gather(parts, small), 100)
    reduce = best(lambda: dist.all_reduce(small), 100)
    if rank == 0:
        found = {"ring": ring, "small": (gather + reduce) / 2}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def exchanges(gradients: int) -> tuple[float, float]:
    """Bytes a second of two processes' all-reduce, and seconds of a small exchange."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(exchange, args=(2, gradients // 4, folder), nprocs=2, join=True)
        found = json.loads(Path(folder, "found.json").read_text())
    return gradients / found["ring"], found["small"]


def planned(given: list[str], workers: int, bandwidth: float, latency: float, own: Path) -> Planned:
    """What the plan says."""
    more = ["--gpus", str(workers), "--gpu-type", "cpu", "--table", str(own)]
    more += ["--interconnect-gbit", f"{8 * bandwidth / 1e9:g}"]
    more += ["--collective-microseconds", f"{1e6 * latency:g}"]
    return make(parse([*given, *more]))


def checkpoint_bytes(run: str) -> list[int]:
    """Bytes of tensors in each checkpoint that a run kept, its headers and curves included."""
    sizes: dict[str, int] = {}
    for key, size in open_storage(run).list("checkpoint_"):
        if key.endswith(("model.safetensors", "training.safetensors")):
            sizes[key.split("/")[0]] = sizes.get(key.split("/")[0], 0) + size
    return [size for _, size in sorted(sizes.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, storage(Path(name)) as proxy:
        compare(args, Path(name), proxy)


def compare(args: argparse.Namespace, folder: Path, proxy: CountingProxy) -> None:
    """Build, calibrate, run, and print what was planned beside what was seen."""
    url = f"s3://{BUCKET}/{DATA}"
    build("synthetic", folder / "raw", url, options=dict(PEOPLE), shard_bytes=200_000, jobs=2)
    dataset = Dataset.open(url)
    whole = sum(s.bytes for s in dataset.manifest.shards if s.split != "val")
    config = recipe("demo")
    gradients = describe(config, len(dataset.identities)).phases["all"].gradients
    bandwidth, latency = exchanges(gradients)
    console, own = Console(width=120), folder / "throughput.json"
    console.print(
        f"{len(dataset.manifest.shards)} shards of {whole / 1e6:.1f} MB; gloo between two "
        f"processes: {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} µs a small exchange"
    )
    # One worker's speed with the share that each of four has.
    quarter = flags(args, folder / "cache-share", "--batch.identities", "2")
    name, _ = patiently("share", 1, quarter, proxy)
    add_to_table(own, measured(f"s3://{BUCKET}/runs/{name}", "cpu"))
    runs = [(f"{n} worker{'s' * (n > 1)}", n, 10**9) for n in args.workers]
    runs.append(("1 worker, cache of 45 %", 1, int(0.45 * whole)))
    for title, workers, room in runs:
        name, cache = f"run-{workers}-{room}", folder / f"cache-{workers}-{room}"
        given = flags(args, cache, "--loader.cache-bytes", str(room))
        name, seconds = patiently(name, workers, given, proxy)
        gets, size = proxy.of_data()
        run = f"s3://{BUCKET}/runs/{name}"
        if workers == 1 and room == 10**9:
            add_to_table(own, measured(run, "cpu"))
        plan = planned(given, workers, bandwidth, latency, own)
        work, chosen = plan.chosen.workload, plan.chosen
        seen = measured(run, "cpu")
        # The report's pictures, ranges of shards, are left out of the bytes: whose, nobody knows.
        rest = work.bytes - work.picture_bytes
        rows = [
            ("GETs of the data", work.gets, gets),
            ("bytes of the data", rest, size),
            ("checkpoint, bytes", plan.network.checkpoint("all"), checkpoint_bytes(run)[-1]),
        ]
        for entry in seen:
            rate = chosen.images_per_second(entry.phase)
            rows.append((f"images/s, {entry.phase}", rate, entry.images_per_second))
        rows.append(("seconds of the command", chosen.seconds, seconds))
        table = Table("", "planned", "seen", "seen / planned", title=title)
        for what, said, found in rows:
            exactly = " =" if said == found else ""
            table.add_row(what, f"{said:,.1f}", f"{found:,.1f}", f"{found / said:.3f}{exactly}")
        console.print(table)
        if room == 10**9:
            assert (work.gets, rest) == (gets, size), "the plan is wrong"


if __name__ == "__main__":
    main()
