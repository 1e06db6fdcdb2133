"""The model registry and run tracking against a real MLflow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from rich.console import Console
from safetensors.torch import save_file

from data_shards.errors import ConfigError, DataError, ObjectMissing, StorageError
from reid_train.commands.export import Export, export
from reid_train.commands.runtime import open_runtime
from reid_train.config import ImageConfig, ModelConfig, TrainConfig
from reid_train.evaluation.thresholds import Threshold, Thresholds
from reid_train.model.embedder import Embedder, resize
from reid_train.model.network import ReidNet
from reid_train.registry.attached import attach, find_thresholds
from reid_train.registry.load import load
from reid_train.registry.registry import (
    default_name,
    list_models,
    register,
    registered_version,
)
from reid_train.tracking.server import connect, require_names
from reid_train.tracking.tracker import Tracker
from reid_train.tracking.uris import local_tracking

SMALL = TrainConfig(
    recipe="test",
    image=ImageConfig(height=32, width=16),
    model=ModelConfig(backbone="timm:test_resnet", weights="none", stripes=1),
)
DIMENSIONS = 96 + 96


@dataclass(frozen=True)
class Registry:
    """An MLflow with one run, and two trained networks."""

    uri: str
    run_id: str
    folders: tuple[Path, Path]

    def register(self, name: str, mean_average_precision: float, which: int = 0, **changes):
        options = {"manifest_digest": "m" * 64, "evaluation_digest": "e" * 64}
        options |= {"dataset": "people", "run": "first"} | changes
        metrics = {"mAP": mean_average_precision, "rank-1": 0.75}
        run_id = options.pop("run_id", self.run_id)
        folder = self.folders[which]
        return register(folder, name, metrics, run_id=run_id, tracking_uri=self.uri, **options)


def write_model(folder: Path, config: TrainConfig) -> Path:
    folder.mkdir()
    network = ReidNet.from_config(config, identities=5)
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(config.to_json())
    return folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    uri = local_tracking(folder / "tracking")
    run = Tracker.start(uri, "reid", run_name="one")
    run.close()
    assert run.run_id is not None
    models = write_model(folder / "a", SMALL), write_model(folder / "b", SMALL.replace(seed=1))
    return Registry(uri, run.run_id, models)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 40, 24, 3), np.uint8)


def run_elsewhere(code: str, folder: Path, *arguments: str, **environment: str) -> dict:
    """Run code in a process that stands elsewhere and for which this project is not installed."""
    # -S leaves out the paths that site would add, an editable install of the project among them.
    packages = [p for p in sys.path if p.endswith("-packages")]
    code = f"import sys, json; sys.path += {packages!r}\n{code}"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, *arguments],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SERVE = """
import numpy as np
try:
    import reid_train
except ImportError:
    pass
else:
    raise SystemExit("the project is installed here: the test shows nothing")
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
images = np.load(sys.argv[3])
embeddings = model.predict(images)
heavy = [m for m in ("ray", "webdataset", "simplejpeg", "tyro", "numba") if m in sys.modules]
np.save("embeddings.npy", embeddings)
print(json.dumps({
    "code": sys.modules["reid_train"].__file__,
    "heavy": heavy,
    "shape": embeddings.shape,
    "dtype": str(embeddings.dtype),
}))
"""


def test_registered_model_serves_where_neither_the_project_nor_ray_is(registry, images, tmp_path):
    version = registry.register("standalone", 0.5)
    np.save(tmp_path / "images.npy", images)
    told = run_elsewhere(SERVE, tmp_path, registry.uri, version.uri, "images.npy")
    assert told["heavy"] == []
    assert told["shape"] == [3, DIMENSIONS]
    assert told["dtype"] == "float32"
    assert not told["code"].startswith(str(Path(__file__).parents[2]))
    served = np.load(tmp_path / "embeddings.npy")
    expected = Embedder.from_folder(registry.folders[0], "cpu")(images)
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-6)


REFUSE = """
import numpy as np
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
images = np.load(sys.argv[3])
def told(given):
    try:
        return "took it: " + str(model.predict(given).shape)
    except mlflow.exceptions.MlflowException as error:
        return str(error)
print(json.dumps({
    "float": told(images / 255),
    "one": told(images[0]),
    "nchw": told(images.transpose(0, 3, 1, 2)),
    "rgba": told(np.concatenate([images, images[..., :1]], axis=-1)),
    "list": told([images[0], images[1, 1:]]),
    "json": told(images.tolist()),
    "empty": told(images[:0]),
    "served": mlflow.models.validate_serving_input(
        sys.argv[2], json.dumps({"inputs": images.tolist()})
    ).shape,
}))
"""


def test_served_model_says_how_to_convert_images_that_it_does_not_take(registry, images, tmp_path):
    version = registry.register("strict", 0.5)
    np.save(tmp_path / "images.npy", images)
    told = run_elsewhere(REFUSE, tmp_path, registry.uri, version.uri, "images.npy")
    advice = {
        "float": "(3, 40, 24, 3) float64: scale the values with (255 * images)",
        "one": "(40, 24, 3) uint8: make one image a batch with images[None]",
        "nchw": "(3, 3, 40, 24) uint8: move the channels last with images.transpose(0, 2, 3, 1)",
        "rgba": "(3, 40, 24, 4) uint8: drop the alpha channel with images[..., :3]",
        "list": "a list of images of several sizes: resize them to one size",
        "json": f"took it: (3, {DIMENSIONS})",
        "empty": f"took it: (0, {DIMENSIONS})",
    }
    for name, text in advice.items():
        assert text in told[name]
        assert told[name].startswith(("images must be (N, H, W, 3) uint8, RGB", "took it"))
    assert told["served"] == [3, DIMENSIONS]


def test_registered_model_says_what_it_takes_and_needs(registry):
    version = registry.register("described", 0.5)
    source = connect(registry.uri).get_model_version_download_uri(version.name, version.version)
    folder = Path(download_artifacts(source))
    info = Model.load(folder)
    assert info.run_id == registry.run_id
    (taken,), (given,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (taken.type, taken.shape) == (np.dtype("uint8"), (-1, -1, -1, 3))
    assert (given.type, given.shape) == (np.dtype("float32"), (-1, DIMENSIONS))
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "pyfunc_model.py", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pyc"))]
    needed = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert all("==" in line for line in needed)


def test_model_with_a_backbone_of_timm_needs_timm_and_is_served(registry, images, tmp_path):
    settings = SMALL.replace(model__backbone="timm:test_vit", model__pooling="gem")
    written = write_model(tmp_path / "vit", settings)
    version = replace(registry, folders=(written, written)).register("vit", 0.5)
    source = connect(registry.uri).get_model_version_download_uri(version.name, version.version)
    needed = Path(download_artifacts(source), "requirements.txt").read_text().split()
    assert f"timm=={timm.__version__}" in needed
    np.save(tmp_path / "images.npy", images)
    run_elsewhere(SERVE, tmp_path, registry.uri, version.uri, "images.npy")
    expected = Embedder.from_folder(written, "cpu")(images)
    served = np.load(tmp_path / "embeddings.npy")
    np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-6)


def test_champion_moves_only_to_a_better_model(registry):
    decisions = [registry.register("rivals", value).champion for value in (0.5, 0.5, 0.4, 0.6)]
    assert decisions == [True, False, False, True]
    champion = MlflowClient(registry.uri).get_model_version_by_alias("rivals", "champion")
    assert int(champion.version) == 4


def test_champion_stays_when_measured_on_another_gallery(registry):
    registry.register("elsewhere", 0.5)
    other = registry.register("elsewhere", 0.9, evaluation_digest="f" * 64)
    assert not other.champion
    assert "another query and gallery" in other.reason


def test_champion_loads_by_alias_and_embeds_as_its_checkpoint(registry, images):
    registry.register("aliased", 0.5, which=0)
    registry.register("aliased", 0.6, which=1)
    loaded = load("models:/aliased@champion", tracking_uri=registry.uri, device="cpu")
    first, second = (Embedder.from_folder(folder, "cpu")(images) for folder in registry.folders)
    np.testing.assert_allclose(loaded(images), second, rtol=1e-5, atol=1e-6)
    assert np.abs(first - second).max() > 1e-3


def test_models_are_listed_with_what_they_measured(registry):
    registry.register("listed", 0.5)
    registry.register("listed", 0.61234)
    newest, oldest = (m for m in list_models(registry.uri) if m.name == "listed")
    assert (newest.version, newest.aliases, oldest.version) == (2, ("champion",), 1)
    assert newest.mean_average_precision == 0.61234
    assert newest.rank1 == 0.75
    assert newest.manifest_digest == "m" * 64
    assert newest.evaluation_digest == "e" * 64
    assert newest.run_id == registry.run_id
    day = f"{newest.created:%Y-%m-%d}"
    shown = ("listed", "2", "champion", "61.2", "75.0", "people", day, "first")
    assert newest.row() == shown


def test_registering_leaves_the_run_open_and_the_working_folder_empty(
    registry, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    registry.register("open", 0.5)
    load("models:/open/1", tracking_uri=registry.uri, device="cpu")
    assert MlflowClient(registry.uri).get_run(registry.run_id).info.status == "RUNNING"
    assert list(tmp_path.iterdir()) == []


def test_model_on_s3_is_registered_loaded_and_served(registry, s3, images, tmp_path):
    client = connect(registry.uri)
    experiment = client.create_experiment(s3.name, artifact_location=f"{s3.url}/mlflow")
    run_id = client.create_run(experiment).info.run_id
    version = registry.register(s3.name, 0.5, run_id=run_id)
    stored = s3.server.client().list_objects_v2(Bucket=s3.name)["Contents"]
    assert any(item["Key"].endswith("/model.safetensors") for item in stored)
    expected = Embedder.from_folder(registry.folders[0], "cpu")(images)
    loaded = load(f"models:/{s3.name}@champion", tracking_uri=registry.uri, device="cpu")
    np.testing.assert_allclose(loaded(images), expected, rtol=1e-5, atol=1e-6)
    np.save(tmp_path / "images.npy", images)
    told = run_elsewhere(SERVE, tmp_path, registry.uri, version.uri, "images.npy")
    assert told["shape"] == [3, DIMENSIONS]


def test_checkpoint_is_loaded_from_s3(registry, s3, images):
    for name in ("model.safetensors", "config.json"):
        s3.server.client().upload_file(str(registry.folders[0] / name), s3.name, f"best/{name}")
    expected = Embedder.from_folder(registry.folders[0], "cpu")(images)
    np.testing.assert_array_equal(load(f"{s3.url}/best", device="cpu")(images), expected)


def test_an_unknown_model_is_an_error_that_lists_the_registered_ones(registry):
    registry.register("somebody", 0.5)
    with pytest.raises(ObjectMissing, match=r"models:/nobody@champion is not.* are: .*somebody"):
        load("models:/nobody@champion", tracking_uri=registry.uri)


@pytest.mark.parametrize("address", ["models:/known@best", "models:/known/7", "models:/known/1"])
def test_an_unknown_alias_or_version_is_an_error_that_lists_what_there_is(registry, address):
    client = connect(registry.uri)
    if not [m for m in client.search_registered_models() if m.name == "known"]:
        registry.register("known", 0.5)
        registry.register("known", 0.6)
        client.delete_model_version("known", "1")
    with pytest.raises(ObjectMissing) as raised:
        load(address, tracking_uri=registry.uri)
    assert f"{address} is not registered at sqlite:///" in str(raised.value)
    assert str(raised.value).endswith("known has the versions 2 and the aliases champion (2)")


def test_a_model_of_another_project_is_named_as_such(registry, tmp_path):
    client = connect(registry.uri)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "model.pkl").write_bytes(b"")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", tmp_path.as_uri())
    with pytest.raises(DataError, match=r"models:/foreign/1 .* has no model\.safetensors"):
        load("models:/foreign/1", tracking_uri=registry.uri)


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_damaged_registered_model_is_named_by_its_address(registry, damage):
    version = registry.register(f"damaged-{damage}", 0.5)
    source = connect(registry.uri).get_model_version(version.name, str(version.version)).source
    stored = Path(source.removeprefix("file://")) / "artifacts" / "model.safetensors"
    if damage == "deleted":
        stored.unlink()
    else:
        stored.write_bytes(stored.read_bytes()[:1000])
    with pytest.raises(DataError) as raised:
        load(version.uri, tracking_uri=registry.uri)
    assert str(raised.value).startswith(version.uri)
    assert "reid-model-" not in str(raised.value)


def test_datasets_of_one_name_share_a_model_name_only_if_they_share_the_evaluation(
    registry, caplog
):
    assert default_name("people_v1.0", "e" * 64, registry.uri) == "reid-people_v1-0"
    registry.register("reid-people_v1-0", 0.9)
    assert default_name("people_v1.0", "e" * 64, registry.uri) == "reid-people_v1-0"
    assert caplog.messages == []
    other = default_name("people_v1.0", "f" * 64, registry.uri)
    assert other == "reid-people_v1-0-ffffffff"
    assert f"it is called {other}" in caplog.messages[0]
    assert registry.register(other, 0.1, evaluation_digest="f" * 64).champion
    chosen = default_name("people_v1.0", "e" * 64, registry.uri, validation_digest="d" * 64)
    assert chosen == "reid-people_v1-0-dddddddd"


def test_version_says_which_split_chose_it_and_is_found_again(registry):
    validation = {"mAP": 0.7, "rank-1": 0.8}
    options = {"validation": validation, "validation_digest": "d" * 64}
    version = registry.register("chosen", 0.5, **options)
    found = connect(registry.uri).get_model_version(version.name, str(version.version))
    assert found.tags["selected_on"] == "validation"
    assert (found.tags["mAP"], found.tags["validation/mAP"]) == ("0.5", "0.7")
    test = {name: float(found.tags[name]) for name in ("mAP", "rank-1") if name in found.tags}
    again = registered_version("chosen", registry.run_id, test, registry.uri, validation=validation)
    assert again is not None
    assert again.version == version.version
    assert not registered_version(
        "chosen", registry.run_id, test, registry.uri, validation={"mAP": 0.6}
    )


def test_model_address_without_a_version_is_a_clear_error(registry):
    with pytest.raises(ConfigError, match="models:/name@alias"):
        load("models:/known", tracking_uri=registry.uri)


def test_registering_under_an_unknown_run_is_a_clear_error(registry):
    with pytest.raises(StorageError, match="registering lost"):
        registry.register("lost", 0.5, run_id="0" * 32)


def test_without_any_tracking_uri_there_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="--tracking-uri"):
        list_models()


@pytest.mark.parametrize("name", ["two words", "läuft", "人", "😀", "a#b", "[b]=,;*", "x" * 250])
def test_names_that_are_checked_as_good_are_taken_by_mlflow(registry, name):
    require_names(model=name, experiment=name, run=name)
    tracker = Tracker.start(registry.uri, name, run_name=name)
    tracker.close()
    registry.register(name, 0.5, run_id=tracker.run_id)
    assert load(f"models:/{name}@champion", tracking_uri=registry.uri, device="cpu")


def test_version_whose_alias_was_refused_becomes_the_champion_later(registry, monkeypatch):
    def refuse(*_: object) -> None:
        raise MlflowException("not allowed", PERMISSION_DENIED)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(StorageError, match=r"refuses access \(403\)"):
            registry.register("reid-alias", 0.5)
    metrics = {"mAP": 0.5, "rank-1": 0.75}
    found = registered_version("reid-alias", registry.run_id, metrics, registry.uri)
    assert found is not None
    assert (found.version, found.champion) == (1, True)
    assert found.reason == "registered before, promoted: the first champion, mAP 0.5000"
    again = registered_version("reid-alias", registry.run_id, metrics, registry.uri)
    assert again is not None
    assert again.reason == "registered before"


def test_thresholds_are_kept_beside_their_version(registry, tmp_path):
    made, path = registry.register("deciding", 0.5), tmp_path / "thresholds.json"
    assert find_thresholds(made.uri, tmp_path, registry.uri) is None
    at = (Threshold(1e-3, 0.7, 0.6, 0.8, 0.9, 0.8, 1.0),)
    path.write_text(json.dumps(Thresholds(50_000, 99, 5, at, (1e-4,)).to_json()))
    attach(made.uri, path, "thresholds", {"split": "test"}, registry.uri)
    found = find_thresholds("models:/deciding@champion", tmp_path / "there", registry.uri)
    assert found is not None
    assert (found.at, found.too_few) == (at, (1e-4,))


def test_an_exported_file_is_kept_beside_its_version(registry, images, tmp_path):
    made, out = registry.register("exported", 0.5), tmp_path / "reid.onnx"
    with pytest.raises(DataError, match=f"{made.uri} was not exported to ONNX"):
        open_runtime(made.uri, "cpu", registry.uri, "onnx")
    export(Export(made.uri, str(out), tracking_uri=registry.uri), Console(file=io.StringIO()))
    version = connect(registry.uri).get_model_version("exported", str(made.version))
    facts = json.loads(version.tags["export.onnx.fp32"])
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert facts["opset"] == 18
    assert facts["error"] < 1e-5
    sized = resize(images, 32, 16)
    found = open_runtime(made.uri, "cpu", registry.uri, "onnx")(sized)
    np.testing.assert_allclose(found, load(made.uri, tracking_uri=registry.uri)(sized), atol=1e-5)
