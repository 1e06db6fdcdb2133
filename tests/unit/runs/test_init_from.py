"""Runs that start from the weights of another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_dataset, config, make_worker
from tiny import run as train_here

from data_shards.dataset import Dataset
from data_shards.errors import ConfigError, DataError, ReidError
from reid_train.config import TrainConfig
from reid_train.model.pretrained import build_model
from reid_train.runs.init_from import FILE, fetch_initial, keep, read_kept
from reid_train.training.checkpoint import MODEL, TRAINING, Checkpoint
from reid_train.training.initial import is_classifier
from reid_train.training.loop import train
from reid_train.training.optimizer import build_regularizer

pytestmark = pytest.mark.usefixtures("small_and_quick")
SETTINGS = config(optimizer__frozen_epochs=0, tracking__uri="off", model__weights="none")


@pytest.fixture(scope="module")
def source(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a training on 6 identities."""
    with pytest.MonkeyPatch.context() as patch:
        from tiny import narrow_resnet18
        from torchvision.models import resnet

        patch.setattr(resnet, "resnet18", narrow_resnet18)
        recorded = train_here(tiny_dataset, SETTINGS, tmp_path_factory.mktemp("source"))
    return str(recorded.checkpoints[-1])


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Other images than the source's: a dataset of another digest."""
    folder = tmp_path_factory.mktemp("others")
    return Dataset.open(build_dataset(folder, ("gallery", "query", "train")))


def started(settings: TrainConfig, identities: int = 4):
    """Network and regularizer as a run of these settings starts."""
    initial = fetch_initial(settings)
    assert initial is not None
    model = build_model(settings, identities)
    regularizer = build_regularizer(settings, model)
    initial.load(model, regularizer)
    return model, regularizer


def test_weights_are_the_sources_but_for_the_classifiers(source):
    model, regularizer = started(SETTINGS.replace(init_from=source))
    fresh, theirs = build_model(SETTINGS, 4).state_dict(), load_file(Path(source, MODEL))
    for name, value in model.state_dict().items():
        expected = fresh[name] if is_classifier(name) else theirs[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)
    assert set(regularizer.theta_by_name().values()) == {0.0}


def test_theta_is_kept_where_it_is_wanted(source):
    theirs = {
        name.removeprefix("theta/"): float(value)
        for name, value in load_file(Path(source, TRAINING)).items()
        if name.startswith("theta/")
    }
    _, regularizer = started(SETTINGS.replace(init_from=source, init_theta="keep"))
    for name, value in regularizer.theta_by_name().items():
        assert value == (0.0 if is_classifier(name) else theirs[name])
    assert any(value < 0 for value in theirs.values())


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_file_of_a_state_dict_is_a_source(source, tmp_path, name):
    state = load_file(Path(source, MODEL))
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "state.pt")
    model, _ = started(SETTINGS.replace(init_from=str(tmp_path / name)))
    torch.testing.assert_close(
        model.state_dict()["trunk.conv1.weight"], state["trunk.conv1.weight"]
    )


def test_copy_of_a_run_is_what_it_started_from(source, tmp_path):
    settings = SETTINGS.replace(init_from=source, init_theta="keep")
    initial = fetch_initial(settings)
    assert initial is not None
    keep(initial, str(tmp_path))
    kept = read_kept(str(tmp_path), initial.digest)
    assert (kept.digest, kept.theta) == (initial.digest, initial.theta)
    (tmp_path / FILE).write_bytes(b"something else")
    with pytest.raises(ReidError, match=FILE):
        read_kept(str(tmp_path), initial.digest)


def test_training_on_other_people_starts_from_the_weights_and_a_checkpoint_replaces_them(
    source, others, tmp_path
):
    rates = {"optimizer__learning_rate": 1e-30, "optimizer__minimum_learning_rate": 0.0}
    settings = SETTINGS.replace(init_from=source, **rates)
    worker, recorded = make_worker(others, tmp_path)
    train(settings, others, worker, initial=fetch_initial(settings))
    ours, theirs = (load_file(Path(p, MODEL)) for p in (recorded.checkpoints[-1], source))
    weights = [name for name in ours if "running" not in name and "batches" not in name]
    assert all(torch.equal(ours[n], theirs[n]) for n in weights if not is_classifier(n))
    resumed = train_here(others, settings, tmp_path, recorded.checkpoints[-1])  # needs no source
    assert not resumed.checkpoints


def test_another_network_is_refused_with_the_names_of_both(source):
    for changes in ({"model__backbone": "resnet34"}, {"model__stripes": 0}):
        settings = SETTINGS.replace(init_from=source, **changes)
        with pytest.raises(DataError) as error:
            started(settings)
        text = str(error.value)
        assert f"--init-from {source}, a resnet18 with 2 stripes, does not fit this run's" in text
        model = settings.model
        assert f"{model.backbone} with {model.stripes} stripes" in text
        assert "\n" not in text


def test_source_that_changed_is_refused(source):
    settings = SETTINGS.replace(init_from=source)
    initial = fetch_initial(settings)
    assert initial is not None
    assert fetch_initial(settings.replace(init_digest=initial.digest)) is not None
    with pytest.raises(DataError, match=f"has the digest {initial.digest[:12]}, not 0000"):
        fetch_initial(settings.replace(init_digest="0" * 64))


@pytest.fixture
def wrong(tiny_dataset: Dataset, source: str, tmp_path: Path) -> dict[str, str]:
    """Places that hold no model of this program, by what they are."""
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "backbone.safetensors")
    (tmp_path / "text.txt").write_text("weights")
    running = tmp_path / "running"
    shutil.copytree(source, running / "checkpoint_1")
    (running / "run.json").write_text(json.dumps({}))
    return {
        "backbone": str(tmp_path / "backbone.safetensors"),
        "text": str(tmp_path / "text.txt"),
        "running": str(running),
        "dataset": tiny_dataset.url,
        "missing": str(tmp_path / "missing"),
        "missing file": str(tmp_path / "missing.safetensors"),
        "uri": "models:/a/b/c",
    }


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("backbone", "no global_head. Give the weights of a backbone with --model.weights"),
        ("text", "is a file that ends in none of .safetensors, .pt, .pth"),
        ("running", "has not finished.* give one of its checkpoints"),
        ("dataset", "is not a model"),
        ("missing", "is not a model"),
        ("missing file", "is not there"),
        ("uri", "not models:/name@alias or models:/name/version"),
    ],
)
def test_wrong_sources_are_one_clear_line(wrong, what, words):
    with pytest.raises(ReidError, match=words) as error:
        fetch_initial(SETTINGS.replace(init_from=wrong[what], tracking__uri="http://mlflow:1"))
    assert wrong[what] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_theta": "keep"}, "--init-theta keep needs --init-from"),
        ({"init_digest": "0"}, "--init-digest needs --init-from"),
        (
            {"init_from": "x", "init_theta": "keep", "regularization__mode": "none"},
            "needs --regularization.mode adaptive",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        fetch_initial(SETTINGS.replace(**changes))


def test_source_without_theta_cannot_give_it(source, tmp_path):
    shutil.copy(Path(source, MODEL), tmp_path / "model.safetensors")
    settings = SETTINGS.replace(init_theta="keep", init_from=str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match="has no θ to keep: give a run or checkpoint"):
        fetch_initial(settings)


def test_a_checkpoint_says_what_its_run_started_from(source, others, tmp_path):
    settings = SETTINGS.replace(init_from=source, init_digest="0" * 64)
    worker, recorded = make_worker(others, tmp_path)
    train(settings, others, worker, initial=fetch_initial(settings.replace(init_digest=None)))
    found = Checkpoint.open(recorded.checkpoints[-1]).config
    assert (found.init_from, found.init_digest) == (source, "0" * 64)
