"""From nothing to a registered model as a user goes: a local stack, and jobs submitted to it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.local import servers as local
from cluster.local.stack import BUCKET, MARK
from data_shards.building.build import build

PATIENCE = 800.0
PROJECT = Path(__file__).parents[2]
DATA, OUTPUT = f"s3://{BUCKET}/people", f"s3://{BUCKET}/runs"
TINY = ["--recipe", "demo", "--image.height", "32", "--image.width", "16", "--data", DATA]
TINY += ["--batch.identities", "4", "--batch.images", "2", "--batch.steps-per-epoch", "2"]
TINY += ["--optimizer.epochs", "1", "--evaluation.every", "1", "--output", OUTPUT]
TINY += ["--model.backbone", "timm:test_resnet"]
MODEL = "reid-synthetic"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Give a command from the project's folder."""
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def submit(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Submit `python -m …` as a job and follow it."""
    return run("cluster", "submit", "--", "python", "-m", *words)


def job_client() -> JobSubmissionClient:
    """Ray's own client; it was imported before the stack's variables were set."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    return JobSubmissionClient(os.environ["RAY_API_SERVER_ADDRESS"], headers=headers)


def marked(folder: Path) -> list[psutil.Process]:
    """Every process of a stack."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack's folder; the stack is up, the environment names it, and S3 has a dataset."""
    folder = tmp_path_factory.mktemp("stack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            up = run("cluster", "local", "up", "--folder", folder)
            assert up.returncode == 0, up.stderr
            for name, value in local.environment(folder).items():
                patch.setenv(name, value)
            options = {"identities": 8, "cameras": 2, "images_per_camera": 4}
            build("synthetic", folder / "raw", DATA, options=options, jobs=1)
            yield folder
        finally:
            local.stop(folder)


@pytest.fixture(scope="module")
def trained(folder: Path) -> subprocess.CompletedProcess[str]:
    """A training of two workers, submitted as a job."""
    cache = folder / "cache"
    return submit(
        "reid_train", "train", *TINY, "--name", "one", "--workers", "2", "--loader.cache", cache
    )


def test_up_finds_what_is_up(folder):
    before = local.running(folder)
    again = run("cluster", "local", "up", "--folder", folder)
    assert again.returncode == 0
    assert before is not None
    assert before.mlflow in again.stdout
    assert local.running(folder) == before
    # Where Ray's token is, and not the token itself.
    assert str(folder / "ray-token") in again.stdout.replace("\n", "")
    assert (folder / "ray-token").read_text() not in again.stdout + again.stderr


def test_up_on_other_ports_is_refused(folder):
    other = run("cluster", "local", "up", "--folder", folder, "--port.mlflow", "1")
    assert other.returncode == 2
    assert "down" in other.stderr


def test_status_tells_every_service(folder):
    status = run("cluster", "local", "status", "--folder", folder)
    assert status.returncode == 0
    assert status.stdout.count("healthy") == 4


def test_everything_listens_only_on_loopback(folder):
    addresses = set()
    for process in marked(folder):
        try:
            connections = process.net_connections()
        except psutil.NoSuchProcess:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_only_the_owner_can_read_files_with_secrets(folder):
    for name in ("environment", "ray-token", "s3/credentials.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_folder_with_secrets_is_in_no_jobs_package(folder):
    assert (folder / ".gitignore").read_text().split() == ["*"]


def test_submitted_training_is_followed_to_its_end(trained):
    assert trained.returncode == 0, trained.stdout[-3000:] + trained.stderr[-1000:]
    assert "one: before and after training" in trained.stdout


def test_model_of_a_submitted_training_is_found_in_the_registry(trained):
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias(MODEL, "champion")
    run = client.get_run(version.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.data.tags["ray_job"].startswith("raysubmit_")
    assert run.data.tags["commit"]


def test_evaluation_is_submitted_with_the_registered_model(trained):
    done = submit("reid_train", "evaluate", "--model", f"models:/{MODEL}@champion", "--data", DATA)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "mAP" in done.stdout


def test_sweep_is_submitted(trained, folder):
    space = ["--search", "regularization.theta_lr_multiplier=fixed"]
    # The two baselines that are left, and one point.
    sweep = ["--trials", "3", "--constant-factors", "--workers-per-trial", "1"]
    done = submit("tune", *TINY, *sweep, *space, "--loader.cache", folder / "cache")
    assert done.returncode == 0, done.stdout[-3000:]
    assert ": ranking" in done.stdout


SHOW = """
import time, urllib.request
import ray

@ray.remote(num_cpus=0)
class Worker:
    def log(self, values):
        from reid_train.tracking.prometheus import gauges
        gauges("shown")(values)

ray.init(log_to_driver=False, logging_level="ERROR")
worker = Worker.remote()
ray.get(worker.log.remote({"loss/total": 12.5, "factor/max": 0.002, "other": 1.0}))
url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
shown = []
while len(shown) < 2:
    time.sleep(0.5)
    lines = urllib.request.urlopen(url, timeout=30).read().decode().splitlines()
    shown = [line for line in lines if 'run="shown"' in line]
print(*shown, sep="\\n")
"""


def test_prometheus_is_shown_the_newest_values_of_a_run(folder):
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    shown = done.stdout.splitlines()
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in shown}
    assert values == {"ray_reid_loss": 12.5, "ray_reid_factor": 0.002}, done.stderr
    assert any('quantile="max"' in line for line in shown)


def test_failed_job_gives_its_exit_code_and_its_error(folder):
    done = submit("reid_train", "evaluate", "--model", "nowhere", "--data", f"s3://{BUCKET}/none")
    assert done.returncode == 3
    assert "no dataset at" in done.stdout
    assert "the job failed" in done.stderr


def test_plain_ray_job_submit_works_as_well(folder):
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    command = [*ray, "--", "python", "-m", "reid_train", "models"]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "model" in done.stdout


@pytest.mark.slow
def test_interrupted_submission_asks_and_stops_the_job(folder):
    client = job_client()
    before = {job.submission_id for job in client.list_jobs()}
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "cluster", "submit", "--", "sleep", "600"]
    process = subprocess.Popen(
        command, cwd=PROJECT, stdin=terminal, stderr=subprocess.PIPE, text=True,
        # Which a shell's background jobs have ignored, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    new: list = []
    while not any(job.status == JobStatus.RUNNING for job in new):
        assert time.monotonic() < deadline
        time.sleep(0.3)
        new = [job for job in client.list_jobs() if job.submission_id not in before]
    process.send_signal(signal.SIGINT)
    os.write(keyboard, b"s\n")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert client.get_job_status(new[0].submission_id or "") == JobStatus.STOPPED


@pytest.mark.slow
def test_no_secret_is_in_any_jobs_record_or_log(trained, folder):
    client = job_client()
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]]
    secrets.append((folder / "ray-token").read_text())
    records = [repr(vars(job)) for job in client.list_jobs()]
    records += [client.get_job_logs(job.submission_id or "") for job in client.list_jobs()]
    for log in (folder / "logs" / "ray").rglob("*"):
        if log.is_file():
            records.append(log.read_text(errors="replace"))
    assert len(records) > 10
    assert not [text[:200] for text in records for secret in secrets if secret in text]


def test_stack_that_was_killed_is_started_again_with_its_models(trained, folder):
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    champion = client.get_model_version_by_alias(MODEL, "champion")
    keeper = psutil.Process(int((folder / "lock").read_text()))
    keeper.kill()
    keeper.wait(30)
    addresses = local.start(folder)
    client = mlflow.MlflowClient(addresses.mlflow)
    assert client.get_model_version_by_alias(MODEL, "champion").version == champion.version


def test_down_leaves_nothing_running_and_the_data_where_it_was(trained, folder, monkeypatch):
    stack = psutil.Process(int((folder / "lock").read_text()))
    started_again = local.running(folder)
    assert started_again is not None
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", started_again.dashboard)
    job_client().submit_job(entrypoint="sleep 600")
    processes = stack.children(recursive=True)  # Ray's agents hide the mark
    down = run("cluster", "local", "down", "--folder", folder)
    assert down.returncode == 0, down.stderr
    assert "this job ends, too: sleep 600\n" in down.stdout
    assert marked(folder) == []
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (folder / "environment").exists()
    assert (folder / "logs" / "ray" / "gcs_server.out").exists()
    status = run("cluster", "local", "status", "--folder", folder)
    assert status.returncode == 1
    assert "no stack runs" in status.stderr
