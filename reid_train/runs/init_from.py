"""`--init-from`: fetch the weights that a run starts from, and keep a copy with the run."""

import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_shards.errors import ConfigError, DataError, ObjectMissing
from data_shards.storage import open_file, open_storage
from reid_train.config import TrainConfig
from reid_train.model.pretrained import ENDINGS, read_state
from reid_train.registry.load import best_checkpoint, load
from reid_train.training.checkpoint import TRAINING
from reid_train.training.initial import Initial

FILE = "init.safetensors"  # in the folder of a run or a sweep


def fetch_initial(config: TrainConfig) -> Initial | None:
    """Return the weights of `config.init_from`, None if there is none.

    Raises:
        ReidError: the source is no model of this program, it has no θ to keep, or it is not what
            `config.init_digest` says.
    """
    source, keep_theta = config.init_from, config.init_theta == "keep"
    if source is None:
        if keep_theta or config.init_digest:
            flag = "--init-theta keep" if keep_theta else "--init-digest"
            raise ConfigError(f"{flag} needs --init-from")
        return None
    if keep_theta and config.regularization.mode != "adaptive":
        raise ConfigError("--init-theta keep needs --regularization.mode adaptive")
    if source.endswith(ENDINGS):
        weights, known = _from_file(source), source
    elif Path(source).is_file():
        raise ConfigError(
            f"--init-from {source} is a file that ends in none of {', '.join(ENDINGS)}: give a "
            "state dict, or the folder of a run or checkpoint"
        )
    else:
        uri = None if config.tracking.uri == "off" else config.tracking.uri
        embedder = load(source, tracking_uri=uri, device="cpu")
        weights, model = embedder.network.state_dict(), embedder.config.model
        known = f"{source}, a {model.backbone} with {model.stripes} stripes,"
    initial = Initial(known, weights, _theta(source) if keep_theta else None)
    if config.init_digest not in (None, initial.digest):
        raise DataError(
            f"--init-from {source} has the digest {initial.digest[:12]}, not "
            f"{config.init_digest[:12]}: it is not what it was"
        )
    return initial


def keep(initial: Initial, run: str) -> None:
    """Write the copy of a run, or of a sweep for its trials."""
    open_storage(run).write(FILE, initial.content)


def read_kept(run: str, digest: str | None) -> Initial:
    """Read the copy that `keep` wrote."""
    return Initial.from_bytes(open_storage(run).read(FILE, sha256=digest), f"{run}/{FILE}")


def _from_file(source: str) -> dict:
    """Read a state dict that this program saved, such as a checkpoint's `model.safetensors`."""
    storage, name = open_file(source)
    if not storage.exists(name):
        raise ConfigError(f"--init-from {source} is not there")
    state = read_state(source)
    if not any(name.startswith("global_head.") for name in state):
        raise DataError(
            f"--init-from {source} is no network of this program: it has no global_head. Give the "
            "weights of a backbone with --model.weights"
        )
    return state


def _theta(source: str) -> dict[str, float]:
    """Read θ by name from a checkpoint, or from the best one of a run."""
    theta: dict[str, float] = {}
    if not source.startswith("models:/") and not source.endswith(ENDINGS):
        storage = open_storage(best_checkpoint(source))
        with tempfile.TemporaryDirectory(prefix="reid-init-") as folder:
            path = Path(folder, TRAINING)
            try:
                storage.download(TRAINING, path)
                with safe_open(path, framework="pt") as file:
                    names = [name for name in file.keys() if name.startswith("theta/")]  # noqa: SIM118
                    theta = {n.removeprefix("theta/"): float(file.get_tensor(n)) for n in names}
            except ObjectMissing:
                pass
            except SafetensorError as error:
                raise DataError(f"--init-from {source}: {TRAINING} is damaged: {error}") from error
    if not theta:
        raise ConfigError(
            f"--init-from {source} has no θ to keep: give a run or checkpoint that was trained "
            "with adaptive regularization, or --init-theta new"
        )
    return theta
