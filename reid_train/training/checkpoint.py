"""Checkpoints: what is saved of a run, and how it is verified before it is used.

A checkpoint is a folder:

    model.safetensors     weights and buffers of the network; with config.json enough to infer
    training.safetensors  Adam's moments, θ, and in float16 the scale of the loss
    history.safetensors   curves and λ so far
    rank_list.npz         top matches of a few queries, when it was measured
    config.json           the configuration
    progress.json         position in the run, and the dataset that it was trained on
    checkpoint.json       the seal: SHA-256 of each file above

It holds no generator state: batches and augmentation are pure functions of (seed, epoch, step). It
holds no pickle. The seal is written last; a folder without a seal, or with files that do not match
it, is refused. PyTorch is imported where tensors are read or written, so that a list of checkpoints
needs none.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from data_shards.errors import DataError
from data_shards.storage.atomic import disk_errors, file_sha256
from reid_train.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from reid_train.training.history import History

FILES = MODEL, TRAINING, HISTORY, RANK_LIST, CONFIG, PROGRESS = (
    "model.safetensors",
    "training.safetensors",
    "history.safetensors",
    "rank_list.npz",
    "config.json",
    "progress.json",
)
SEAL = "checkpoint.json"
# The mAP of a checkpoint that was not evaluated: below all measured ones. NaN is not valid JSON.
UNMEASURED = -1.0


@dataclass
class Position:
    """Position in a run: the next step is step `step` of epoch `epoch`, both counted from 0."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    phase: str = ""
    skipped: int = 0  # steps so far whose gradient was not finite


@dataclass(frozen=True)
class Origin:
    """The dataset that a checkpoint was trained on."""

    manifest_digest: str
    evaluation_digest: str
    identities: int


def save(
    folder: Path,
    *,
    config: TrainConfig,
    origin: Origin,
    progress: Position,
    history: History,
    model: nn.Module,
    regularizer: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    rank_list: dict[str, np.ndarray],
    loss_scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write a checkpoint into an empty folder; the seal comes last.

    Raises:
        DataError: a tensor has values that are not finite; nothing is written.
        StorageError: the disk is full, or refuses.
    """
    import torch
    from safetensors.torch import save_file

    from reid_train.regularization import AdaptiveL2

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    training = {
        f"adam/{position}/{key}": tensor.contiguous()
        for position, entry in optimizer.state_dict()["state"].items()
        for key, tensor in entry.items()
    }
    if isinstance(regularizer, AdaptiveL2):
        theta = regularizer.theta_by_name().items()
        training |= {f"theta/{name}": torch.tensor(value) for name, value in theta}
    if loss_scaler is not None:
        scale = loss_scaler.state_dict().items()  # empty where the loss is not scaled
        training |= {f"loss_scaler/{key}": torch.tensor(value) for key, value in scale}
    # safetensors cannot write an empty file, and before the first step there are no moments.
    training["global_step"] = torch.tensor(progress.global_step)
    for name, tensor in (weights | training).items():
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"no checkpoint written: {name} has values that are not finite; the checkpoint "
                "before it is good. Train with a lower --optimizer.learning-rate or with "
                "--optimizer.clip-norm, or check the memory of the machine"
            )
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / MODEL)
        save_file(training, folder / TRAINING)
        history.save(folder / HISTORY)
        np.savez(folder / RANK_LIST, allow_pickle=False, **rank_list)
        (folder / CONFIG).write_text(config.to_json())
        position = {"progress": asdict(progress), "origin": asdict(origin)}
        (folder / PROGRESS).write_text(json.dumps(position, indent=2))
        seal = {name: file_sha256(folder / name) for name in FILES}
        (folder / SEAL).write_text(json.dumps(seal, indent=2))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified and opened."""

    folder: Path
    progress: Position
    origin: Origin
    config: TrainConfig

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """Verify the digest of every file, and read all but the tensors, or raise a `DataError`.

        A copy that was verified while it was made needs no `verify`.
        """
        try:
            seal = json.loads((folder / SEAL).read_text())
            for name in FILES if verify else ():
                if file_sha256(folder / name) != seal[name]:
                    raise DataError(f"checkpoint {folder}: {name} is damaged (its SHA-256 differs)")
            position = json.loads((folder / PROGRESS).read_text())
            progress, origin = Position(**position["progress"]), Origin(**position["origin"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"checkpoint {folder} is incomplete or damaged: {error}") from error
        config = TrainConfig.from_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
        return cls(folder, progress, origin, config)

    def require(self, origin: Origin) -> None:
        """Raise a `DataError` if the dataset is another: a run continues only on its own."""
        if self.origin.manifest_digest != origin.manifest_digest:
            raise DataError(
                f"checkpoint {self.folder} was trained on the dataset with manifest "
                f"{self.origin.manifest_digest[:12]}, not {origin.manifest_digest[:12]}: give the "
                "run that dataset, or start a new run under another --name"
            )

    def history(self) -> History:
        """Read curves and λ up to here."""
        from reid_train.training.history import History

        with _readable(self.folder / HISTORY):
            return History.load(self.folder / HISTORY)

    def load_model(self, model: nn.Module) -> None:
        """Load weights and buffers, in place."""
        from safetensors.torch import load_file

        with _readable(self.folder / MODEL):
            model.load_state_dict(load_file(self.folder / MODEL))

    def load_theta(self, regularizer: nn.Module | None) -> None:
        """Load θ, in place, if the regularizer has any."""
        from reid_train.regularization import AdaptiveL2

        if isinstance(regularizer, AdaptiveL2):
            theta = {name: float(value) for name, value in self._tensors("theta/")}
            regularizer.load_theta(theta)

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load Adam's moments, in place."""
        import torch

        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        with _readable(self.folder / TRAINING):
            for name, tensor in self._tensors("adam/"):
                position, key = name.split("/")
                weight = weights[int(position)]
                if tensor.shape == weight.shape:
                    # Fused Adam walks through memory: a moment needs the layout of its weight.
                    tensor = torch.empty_like(weight).copy_(tensor)
                state.setdefault(int(position), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_loss_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """Load the scale of the loss, if it is scaled."""
        state = {key: value.item() for key, value in self._tensors("loss_scaler/")}
        if state and scaler.is_enabled():
            scaler.load_state_dict(state)

    def _tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `training.safetensors` below a prefix; no others are read."""
        path = self.folder / TRAINING
        with _readable(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn what writing into a folder raises into a `StorageError`."""
    with disk_errors(folder):
        try:
            yield
        except SafetensorError as error:  # it has the number of the system's error in its text
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number)) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a sealed file with unexpected contents raises into a `DataError`."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"checkpoint {path} is not one of this network: {error}") from error
