"""`python -m cluster plan` against real runs of 1 and 2 workers on this machine.

    python tests/benchmarks/plan.py [--steps 8] [--epochs 2] [--workers 1 2]

Real trainings on Ray, data on a real S3 server behind a proxy that counts requests and bytes. Bytes
of shards, manifest and index must be what was planned. The plan knows the speed of one worker, so
seconds are shown as ratios; the machine should be idle.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.console import Console
from rich.table import Table

from cluster.local.s3_server import S3Server
from cluster.measure import add_to_table, measured
from cluster.plan.command import make, parse
from data_shards.building.build import build
from data_shards.storage import open_storage

BUCKET, DATA = "plan", "people"
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
                # The signature covers Host: forward it as the client wrote it.
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
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        server.create_bucket(BUCKET)
        try:
            yield proxy
        finally:
            proxy.stop()


def flags(args: argparse.Namespace, cache: Path) -> list[str]:
    """A training small enough for two cores."""
    common = ["--recipe", "demo", "--data", f"s3://{BUCKET}/{DATA}", "--loader.cache", str(cache)]
    common += ["--batch.steps-per-epoch", str(args.steps), "--optimizer.epochs", str(args.epochs)]
    common += ["--evaluation.every", "2", "--loader.workers", "1", "--batch.window", "4"]
    return [*common, "--tracking.every-steps", "2"]


def train(name: str, workers: int, given: list[str]) -> float:
    """Run the main command; return its seconds."""
    command = [sys.executable, "-m", "reid_train", "train", *given, "--name", name]
    command += ["--output", f"s3://{BUCKET}/runs", "--workers", str(workers)]
    command += ["--tracking.model-name", "off", "--device", "cpu"]
    command += ["--cpus-per-worker", "1"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def checkpoint_bytes(run: str) -> int:
    """Bytes of the newest checkpoint's tensors, their headers included."""
    sizes: dict[str, int] = {}
    for key, size in open_storage(run).list("checkpoint_"):
        if key.endswith(("model.safetensors", "training.safetensors")):
            sizes[key.split("/")[0]] = sizes.get(key.split("/")[0], 0) + size
    return sizes[max(sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, storage(Path(name)) as proxy:
        compare(args, Path(name), proxy)


def compare(args: argparse.Namespace, folder: Path, proxy: CountingProxy) -> None:
    """Build, run, and print what was planned beside what was seen."""
    url = f"s3://{BUCKET}/{DATA}"
    build("synthetic", folder / "raw", url, options=dict(PEOPLE), shard_bytes=200_000, jobs=2)
    console, own = Console(width=120), folder / "throughput.json"
    for workers in args.workers:
        given, run = flags(args, folder / f"cache-{workers}"), f"s3://{BUCKET}/runs/{workers}"
        proxy.seen.clear()
        seconds = train(str(workers), workers, given)
        gets, size = proxy.of_data()
        seen = measured(run, "cpu")
        if workers == 1:
            add_to_table(own, seen)
        asked = ["--gpus", str(workers), "--gpu-type", "cpu", "--table", str(own)]
        planned = make(parse([*given, *asked]))
        row = planned["plan"]
        table = Table("", "planned", "seen", "seen / planned", title=f"{workers} workers")
        for what, planned_value, found in (
            ("GETs of the data, at most", row["gets"], gets),
            ("bytes of the data", row["bytes"], size),
            ("checkpoint, bytes", planned["checkpoint"], checkpoint_bytes(run)),
            ("images/s", row["images_per_second"], seen.images_per_second),
            ("seconds of the command", row["seconds"], seconds),
        ):
            table.add_row(
                what, f"{planned_value:,.1f}", f"{found:,.1f}", f"{found / planned_value:.3f}"
            )
        console.print(table)
        assert row["bytes"] == size, "the plan's bytes are wrong"
        assert row["gets"] >= gets, "the plan's GETs are too few"


if __name__ == "__main__":
    main()
