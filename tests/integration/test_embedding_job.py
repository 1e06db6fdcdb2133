"""Embedding a dataset on real Ray actors, into parts on disk."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
from rich.console import Console
from safetensors.torch import save_file

from data_shards.building.build import build as build_shards
from data_shards.building.merge import merge
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ReidError
from data_shards.progress import silent
from reid_train.commands import embedding_job as job
from reid_train.commands.embed import Embed
from reid_train.commands.evaluate import Evaluate, evaluate
from reid_train.config import LoaderConfig
from reid_train.evaluation.embedding_store import EmbeddingFiles
from reid_train.evaluation.measures import Measures
from reid_train.evaluation.metrics import MEAN
from reid_train.model.embedder import CONFIG, WEIGHTS
from reid_train.model.pretrained import build_model
from reid_train.recipes import recipe
from reid_train.tracking.server import connect
from reid_train.tracking.uris import local_tracking


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Parts of 5 images, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "PART", 5)
        ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """8 query and 24 gallery images of 2 cameras."""
    folder = tmp_path_factory.mktemp("people")
    options = {"identities": 8, "cameras": 2, "images_per_camera": 4}
    build_shards("synthetic", folder / "raw", str(folder / "shards"), options=options, jobs=1)
    return str(folder / "shards")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Two untrained networks, as checkpoints have them."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        config = recipe("demo").replace(
            image__height=32, image__width=16, model__backbone="timm:test_resnet", seed=seed
        )
        (folder / f"{seed}").mkdir()
        save_file(build_model(config, 4).state_dict(), folder / f"{seed}" / WEIGHTS)
        (folder / f"{seed}" / CONFIG).write_text(config.to_json())
    return str(folder / "0"), str(folder / "1")


@pytest.fixture(scope="module")
def model(models) -> str:
    return models[0]


def embed(model: str, data: str, out: Path, **arguments) -> int:
    loader = LoaderConfig(workers=0, cache=out.parent / "cache")
    progress = arguments.pop("progress", silent)
    arguments = {"workers": 1, "loader": loader} | arguments
    return job.embed_dataset(Embed(model, data, str(out), **arguments), progress)


def test_every_image_is_embedded_once_and_a_second_try_does_what_is_missing(data, model, tmp_path):
    out = tmp_path / "embeddings"
    dataset = Dataset.open(data)
    total = len(dataset.index("query")) + len(dataset.index("gallery"))
    assert embed(model, data, out, workers=2) == total
    files = EmbeddingFiles.open(str(out))
    for split in ("query", "gallery"):
        index = dataset.index(split)
        np.testing.assert_array_equal(files.pid[files.split == split], index.pid)
        np.testing.assert_array_equal(files.camid[files.split == split], index.camid)
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    assert len(before) == 7
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-000003.parquet").unlink()
    with pytest.raises(DataError, match="6 of 7 parts"):
        EmbeddingFiles.open(str(out))

    seen = []
    embed(model, data, out, progress=lambda *report: seen.append(report))
    done = [report[1:] for report in seen if report[0] == "embedding"]
    assert done == [(total - 5, total), (total, total)]
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before
    kept = {name for name, time in times.items() if (out / name).stat().st_mtime_ns == time}
    assert kept == before.keys() - {"part-000003.parquet"}


def test_a_folder_of_images_is_embedded_as_a_gallery(data, model, tmp_path, caplog):
    folder, out = tmp_path / "people", tmp_path / "out"
    dataset = Dataset.open(data)
    index = dataset.index("gallery")
    for row in range(12):
        file = folder / f"{row % 2}" / f"{row:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dataset.read(index, row))
    (folder / "0" / "04.jpg").write_bytes(b"no image")
    assert embed(model, str(folder), out) == 11
    assert "1 unreadable image left out: 0/04.jpg (not a readable image" in caplog.text
    files, sharded = EmbeddingFiles.open(str(out)), tmp_path / "sharded"
    assert files.paths().tolist() == [f"{i % 2}/{i:02}.jpg" for i in (0, 2, 6, 8, 10)] + [
        f"1/{i:02}.jpg" for i in range(1, 12, 2)
    ]
    embed(model, data, sharded, splits=("gallery",))
    whole = EmbeddingFiles.open(str(sharded)).read("gallery")
    rows = [0, 2, 6, 8, 10, *range(1, 12, 2)]
    np.testing.assert_allclose(files.read("gallery"), whole[rows], rtol=1e-4, atol=1e-4)
    (folder / "1" / "01.jpg").unlink()
    with pytest.raises(DataError, match="another model, dataset or choice of splits"):
        embed(model, str(folder), out)


def test_embeddings_of_another_model_are_not_mixed_in(data, models, tmp_path):
    out = tmp_path / "embeddings"
    embed(models[0], data, out, splits=("query",))
    with pytest.raises(DataError, match="another model, dataset or choice of splits"):
        embed(models[1], data, out, splits=("query",))


def test_parts_of_another_device_are_not_mixed_in(data, model, tmp_path):
    out = tmp_path / "embeddings"
    total = embed(model, data, out)
    job = json.loads((out / "job.json").read_text())
    assert job["device"] == "cpu"
    (out / "job.json").write_text(json.dumps(job | {"device": "cuda"}))
    assert embed(model, data, out, device="cpu") == total  # nothing is left to be embedded
    (out / "part-000003.parquet").unlink()
    for device in ("cpu", "auto"):
        with pytest.raises(DataError, match="started with --device cuda"):
            embed(model, data, out, device=device)


def test_parts_of_another_precision_are_not_mixed_in(data, model, tmp_path):
    out, parts = tmp_path / "embeddings", {}
    out.mkdir()
    for precision in ("bf16", "float32"):
        (out / job.PRECISION).write_text(precision)  # as the first worker found it
        embed(model, data, out, splits=("query",), device="cpu")
        parts[precision] = (out / "part-000001.parquet").read_bytes()
        (out / "part-000001.parquet").unlink()
    assert parts["bf16"] != parts["float32"]


def test_evaluate_embeds_batches_of_the_given_size(data, model, monkeypatch):
    told = []

    def embedded(settings, progress):
        told.append(settings.batch)
        raise DataError("not now")

    monkeypatch.setattr(job, "embed_dataset", embedded)
    settings = Evaluate(model=(model,), data=(data,), batch=3)
    with pytest.raises(DataError, match="not now"):
        evaluate(settings, Console(quiet=True))
    assert told == [3]


def test_parts_of_unknown_origin_are_not_mixed_in(data, model, tmp_path):
    out = tmp_path / "embeddings"
    out.mkdir()
    (out / "part-000000.parquet").touch()
    with pytest.raises(DataError, match=r"no job\.json that describes them"):
        embed(model, data, out)


def test_workers_for_which_there_is_no_room_are_not_waited_for(data, model, tmp_path):
    out = tmp_path / "embeddings"
    assert embed(model, data, out, splits=("gallery",), workers=3) == 24  # on two cores


def test_a_split_that_the_dataset_has_not_is_an_error(data, model, tmp_path):
    with pytest.raises(DataError, match="has no images in val"):
        embed(model, data, tmp_path / "embeddings", splits=("val",))


def test_a_model_measures_the_same_on_one_worker_and_on_two(data, model, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    console = Console(quiet=True)
    loader = LoaderConfig(workers=0, cache=tmp_path / "cache")
    embeddings, output = str(tmp_path / "embeddings"), str(tmp_path / "measured.json")
    both = Evaluate(
        model=(model,),
        data=(data,),
        embeddings=embeddings,
        output=output,
        workers=2,
        loader=loader,
    )
    (spread,) = evaluate(both, console)
    (local,) = evaluate(Evaluate(embeddings=embeddings), console)
    assert spread.result.summary() == local.result.summary()
    assert json.loads(Path(output).read_text())["metrics"] == local.result.summary()


def test_measures_of_a_model_are_tracked_under_names_that_mlflow_takes(data, model, tmp_path):
    uri = local_tracking(tmp_path)
    settings = Evaluate(
        model=(model,),
        data=(data,),
        tracking_uri=uri,
        measures=Measures(false_accept_rates=(0.1,)),
        loader=LoaderConfig(workers=0, cache=tmp_path / "cache"),
    )
    console = Console(file=io.StringIO(), width=40)
    found = evaluate(settings, console)[0].result.summary()
    client = connect(uri)
    experiment = client.get_experiment_by_name(settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["mAP"] == found["mAP"]
    assert run.data.metrics["TAR at FAR 0.1"] == found["TAR@FAR=0.1"]
    page = f"#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    assert page in console.file.getvalue()


def test_models_are_measured_on_several_datasets_as_on_each(data, models, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = {"identities": 4, "cameras": 2, "images_per_camera": 2, "seed": 1}
    raw, other = tmp_path / "raw", str(tmp_path / "other")
    build_shards("synthetic", raw, str(tmp_path / "part"), name="part", options=options, jobs=1)
    merge([data, str(tmp_path / "part")], other, name="other")
    loader, output = LoaderConfig(workers=0, cache=tmp_path / "cache"), tmp_path / "all.json"
    screen = io.StringIO()
    one_model = Evaluate(model=models[:1], data=(data, other), output=str(output), loader=loader)
    found = evaluate(one_model, Console(file=screen, width=100))
    written = json.loads(output.read_text())
    assert [one["embeddings"] for one in written] == [f"{models[0]} on {d}" for d in (data, other)]
    assert [set(one.get("datasets", ())) for one in written] == [
        set(),
        {"part", "synthetic", MEAN},
    ]
    first, second, mean = (line for line in screen.getvalue().splitlines() if "%" in line)
    assert ("synthetic" in first, "other" in second, "mean" in mean) == (True, True, True)

    screen = io.StringIO()
    both_models = Evaluate(model=models, data=(other,), loader=loader)
    again = evaluate(both_models, Console(file=screen, width=200))
    rows = [line for line in screen.getvalue().splitlines() if "%" in line]
    for model, row, one in zip(models, rows, again, strict=True):
        summary = one.result.summary()
        assert row.split()[0] == model.rpartition("/")[2]
        assert f"{100 * summary['mAP']:.2f} %" in row
    assert again[0].result.summary() == found[1].result.summary()


def test_worker_that_is_lost_for_good_ends_the_job_in_one_line(data):
    class Doomed:
        def load(self, files) -> None:
            pass

        def embed(self, files, task) -> int:
            os._exit(1)

    tasks = job.tasks_of(Dataset.open(data), ("query",))
    actor = ray.remote(Doomed).options(max_restarts=0).remote()
    with pytest.raises(ReidError, match=r"worker was lost: .*same command to continue"):
        list(job._results([actor], [], tasks))


def test_a_wait_for_a_free_core_is_explained(data, monkeypatch, caplog):
    class Quick:
        def load(self, files) -> None:
            pass

        def embed(self, files, task) -> tuple[int, list]:
            return len(task.rows), []

    @ray.remote(num_cpus=2)
    class Greedy:
        def ready(self) -> None:
            pass

    greedy = Greedy.remote()
    ray.get(greedy.ready.remote())
    monkeypatch.setattr(job, "WAIT_SECONDS", 0.1)
    released = threading.Timer(2, ray.kill, (greedy,))
    released.start()
    actor = ray.remote(Quick).options(num_cpus=1).remote()
    tasks = job.tasks_of(Dataset.open(data), ("query",))
    assert list(job._results([actor], [], tasks)) == [(5, []), (3, [])]
    assert caplog.messages == ["no worker is ready yet: all cores of the Ray cluster are in use"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Evaluate(), "give --embeddings FILE, or --model and --data"),
        (Evaluate(model=("somewhere",)), "--model needs --data"),
        (Evaluate(embeddings="a", data=("b",)), "--data and --tracking-uri go with --model"),
        (Evaluate(embeddings="a.npz", model=("b",), data=("c",)), "is a folder here"),
        (Evaluate(embeddings="a", measures=Measures(rerank=True, k1=0)), "k1 ≥ 1"),
        (Evaluate(embeddings="a", measures=Measures(expand=-1)), "--expand takes"),
        (Evaluate(embeddings="a", measures=Measures(expand=1, alpha=-1)), "α ≥ 0"),
        (
            Evaluate(embeddings="a.npz", measures=Measures(rerank=True, camera_pairs=True)),
            "without re-ranking",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(settings, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(settings, Console(quiet=True))


def test_a_folder_of_photos_is_measured_as_it_is(data, model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local_tracking(tmp_path))
    dataset = Dataset.open(data)
    gallery = dataset.index("gallery")
    for row, pid in enumerate(gallery.pid):
        file = tmp_path / "photos" / f"person {pid}" / f"{row}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(dataset.read(gallery, row))
    console = Console(file=io.StringIO(), width=200)
    settings = Evaluate(
        model=(model,),
        data=(str(tmp_path / "photos"),),
        loader=LoaderConfig(workers=0, cache=tmp_path / "cache"),
    )
    (found,) = evaluate(settings, console)
    assert found.queries == found.gallery == len(gallery)
    assert found.result.valid == len(gallery)
    assert 0 < found.result.mAP < 1
