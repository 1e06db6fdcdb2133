"""A pickle handed in as anything that is read is refused before it runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.errors import DataError
from data_shards.manifest import sha256
from reid_train.evaluation.embedding_store import read_embeddings
from reid_train.model.pretrained import read_state
from reid_train.recipes import recipe
from reid_train.registry.load import load
from reid_train.training.checkpoint import (
    CONFIG,
    FILES,
    MODEL,
    PROGRESS,
    SEAL,
    Checkpoint,
    Position,
)


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that a pickle leaves if it runs."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload works"
    path.unlink()
    return path


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
@pytest.mark.parametrize("save", ["torch", "plain"])
def test_as_weights(tmp_path, ran, name, save):
    if save == "torch":
        torch.save({"weight": Payload(ran)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(DataError):
        read_state(str(tmp_path / name))
    assert not ran.exists()


def test_as_a_checkpoint_with_a_seal_that_fits(tmp_path, ran):
    origin = {"manifest_digest": "m", "evaluation_digest": "e", "identities": 2}
    contents = {name: pickle.dumps(Payload(ran)) for name in FILES}
    contents[CONFIG] = recipe("demo").to_json().encode()
    contents[PROGRESS] = json.dumps({"progress": vars(Position()), "origin": origin}).encode()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seal = {name: sha256(content) for name, content in contents.items()}
    (tmp_path / SEAL).write_text(json.dumps(seal))
    opened = Checkpoint.open(tmp_path)
    network = torch.nn.Linear(2, 2)
    for read in (
        opened.history,
        lambda: opened.load_model(network),
        lambda: opened.load_optimizer(torch.optim.Adam(network.parameters())),
        lambda: load(tmp_path),
    ):
        with pytest.raises(DataError):
            read()
    assert (tmp_path / MODEL).read_bytes() == contents[MODEL]
    assert not ran.exists()


def test_as_embeddings(tmp_path, ran):
    hidden = np.array([Payload(ran)], object)
    np.savez(tmp_path / "x.npz", query_embedding=hidden)
    with pytest.raises(DataError, match="cannot be read as npz"):
        read_embeddings(str(tmp_path / "x.npz"))
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(DataError, match="cannot be read as npz"):
        read_embeddings(str(tmp_path / "y.npz"))
    assert not ran.exists()
