"""Checkpoints: nothing but tensors and JSON, and nothing torn or altered is ever continued from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import narrow_resnet18
from tiny_checkpoint import ORIGIN, PROGRESS, SETTINGS, trained
from torchvision.models import resnet

from data_shards.errors import DataError, StorageError
from reid_train.model.pretrained import build_model
from reid_train.training.checkpoint import RANK_LIST, SEAL, Checkpoint, Origin, save
from reid_train.training.history import History
from reid_train.training.optimizer import build_regularizer

FILES = [
    "checkpoint.json",
    "config.json",
    "history.safetensors",
    "model.safetensors",
    "progress.json",
    "rank_list.npz",
    "training.safetensors",
]


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return shutil.copytree(original[0], tmp_path / "copy")


def test_everything_comes_back_bitwise(original, monkeypatch):
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)
    folder, (model, regularizer, optimizer) = original
    other_model, other_regularizer, other_optimizer = trained(1, steps=2)
    saved = Checkpoint.open(folder)
    saved.load_model(other_model)
    saved.load_theta(other_regularizer)
    saved.load_optimizer(other_optimizer)
    assert (saved.progress, saved.origin, saved.config) == (PROGRESS, ORIGIN, SETTINGS)
    assert saved.history().steps == {"step": [1.0], "loss/total": [2.5]}
    assert saved.history().evaluations == {"epoch": [1.0], "mAP": [0.25]}
    for name, value in model.state_dict().items():
        assert torch.equal(other_model.state_dict()[name], value), name
    assert torch.equal(other_regularizer.theta, regularizer.theta)
    moments = other_optimizer.state_dict()["state"]
    for position, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(moments[position][key], value), (position, key)
            # The next step goes through memory, so the moments must lie there in the same order.
            assert moments[position][key].stride() == value.stride(), (position, key)


def test_checkpoint_has_only_tensors_arrays_and_json(original):
    folder, _ = original
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())
        else:
            with np.load(path, allow_pickle=False) as arrays:
                assert arrays["query"].tolist() == [0, 1, 2]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bit_is_refused(copy, name, where, bit):
    path = copy / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[int(where * len(whole))] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        with pytest.raises(DataError, match="checkpoint"):
            Checkpoint.open(copy)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_torn_file_is_refused(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"damaged|SHA-256"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused_by_name(copy, name):
    (copy / name).unlink()
    with pytest.raises(DataError, match=name):
        Checkpoint.open(copy)


def test_seal_that_leaves_a_file_out_is_refused(copy):
    seal = json.loads((copy / SEAL).read_text())
    del seal[RANK_LIST]
    (copy / SEAL).write_text(json.dumps(seal))
    with pytest.raises(DataError, match=RANK_LIST):
        Checkpoint.open(copy)


def test_no_folder_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        Checkpoint.open(tmp_path / "nowhere")


def test_another_dataset_is_refused_and_both_are_named(original):
    saved = Checkpoint.open(original[0])
    saved.require(ORIGIN)
    with pytest.raises(DataError, match=r"mmmmmmmmmmmm, not xxxxxxxxxxxx: .*--name"):
        saved.require(Origin("x" * 64, "e" * 64, identities=5))


def test_theta_of_other_tensors_is_refused(original, monkeypatch):
    monkeypatch.setattr(resnet, "resnet18", narrow_resnet18)
    model = build_model(SETTINGS, ORIGIN.identities)
    fewer = build_regularizer(SETTINGS.replace(regularization__exclude=("*.bias",)), model)
    with pytest.raises(DataError, match="not in this model"):
        Checkpoint.open(original[0]).load_theta(fewer)


@pytest.mark.parametrize("writer", ["numpy", "safetensors"])
def test_full_disk_is_one_line(original, tmp_path, monkeypatch, writer):
    def refuse(*_: object) -> None:  # what it says on a small file system
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    if writer == "safetensors":
        monkeypatch.setattr("safetensors.torch.save_file", refuse)
    (tmp_path / RANK_LIST).symlink_to("/dev/full")
    _, (model, regularizer, optimizer) = original
    with pytest.raises(StorageError, match=f"disk full while writing {tmp_path}: free some space"):
        save(
            tmp_path,
            config=SETTINGS,
            origin=ORIGIN,
            progress=PROGRESS,
            history=History(),
            model=model,
            regularizer=regularizer,
            optimizer=optimizer,
            rank_list={"query": np.arange(3)},
        )
    assert not (tmp_path / SEAL).exists()
