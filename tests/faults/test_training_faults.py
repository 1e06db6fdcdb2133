"""Whole trainings on real Ray whose S3 server fails on the way."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import small_network
from proxy import S3Proxy
from rich.console import Console
from safetensors.torch import load_file
from torchvision.models import resnet

from cluster.s3 import S3Server
from data_shards.build import build
from data_shards.storage import Storage, open_storage
from reid_train.checkpoint import MODEL, TRAINING
from reid_train.recipes import recipe
from reid_train.run import run
from reid_train.tracking import connect, local_tracking

BUCKET = "faults"
SMALL = recipe("demo").replace(
    workers=1,
    image__height=32,
    image__width=32,
    batch__identities=4,
    batch__images=2,
    batch__steps_per_epoch=3,
    optimizer__epochs=2,
    evaluation__initial=False,
    evaluation__every=1,
    loader__workers=1,
    data=f"s3://{BUCKET}/people",
    output=f"s3://{BUCKET}/runs",
)
CANARIES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-mlflow-4f1c",
    "WANDB_API_KEY": "canary-key-77aa",
    "DATABASE_PASSWORD": "canary-database-0b9e",
}


@dataclass
class Place:
    """A bucket behind a proxy, an MLflow whose artifacts are in it, and Ray."""

    proxy: S3Proxy
    folder: Path
    secret: str

    def train(self, name: str, *, resume: bool = False, **changes: object) -> str:
        """Train, in this process and its Ray; returns what was shown."""
        shown = io.StringIO()
        config = SMALL.replace(
            name=name,
            tracking__uri=local_tracking(self.folder),
            loader__cache=self.folder / "cache" / name,
            **changes,
        )
        run(config, resume=resume, console=Console(file=shown, width=200))
        return shown.getvalue()

    def stored(self, name: str) -> Storage:
        """What is stored of a run."""
        return open_storage(SMALL.output).child(name)

    def checkpoints(self, name: str) -> list[str]:
        """Folders of a run's checkpoints, the oldest first."""
        keys = (key for key, _ in self.stored(name).list("checkpoint_") if "/" in key)
        return sorted({key.partition("/")[0] for key in keys})

    def tensors(self, name: str) -> dict:
        """Weights, θ and moments of a run's last checkpoint."""
        last = self.stored(name).child(self.checkpoints(name)[-1])
        tensors = {}
        for file in (MODEL, TRAINING):
            last.download(file, self.folder / file)
            tensors |= load_file(self.folder / file)
        return tensors

    def ray_logs(self) -> str:
        """All that Ray's processes wrote."""
        session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore
        files = [path for path in (session / "logs").rglob("*") if path.is_file()]
        return "\n".join(path.read_text(errors="replace") for path in files)


@pytest.fixture(scope="module")
def place(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("faults")
    with S3Proxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        environment = s3_server.environment() | CANARIES | {"OMP_NUM_THREADS": "1"}
        for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
            environment[name] = proxy.endpoint
        for name, value in environment.items():
            patch.setenv(name, value)
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(resnet, "resnet18", resnet.resnet18)
        small_network.install()
        s3_server.create_bucket(BUCKET)
        options = {"identities": 8, "cameras": 2, "images_per_camera": 4}
        build("synthetic", folder / "raw", SMALL.data, options=options, shard_bytes=60_000, jobs=1)
        client = connect(local_tracking(folder))
        client.create_experiment("reid", artifact_location=f"s3://{BUCKET}/mlflow")
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": "small_network.install"},
        )
        try:
            yield Place(proxy, folder, s3_server.secret_key)
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def well_behaved(place: Place) -> Iterator[None]:
    place.proxy.clear()
    yield
    place.proxy.clear()


@pytest.fixture(scope="module")
def quiet(place: Place) -> str:
    """A run of two epochs that nothing happens to."""
    began = time.time()
    said = place.train("quiet")
    print("quiet", time.time() - began)
    return said


def test_quiet(place, quiet):
    print(quiet)
    print(place.checkpoints("quiet"), len(place.proxy.seen))
