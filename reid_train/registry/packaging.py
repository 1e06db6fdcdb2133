"""Package a trained network as an MLflow model: weights, code and requirements.

The model is code and safetensors, without pickles: MLflow runs `pyfunc_model.py` to load it.
"""

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reid_train.config import TIMM
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

REQUIREMENTS = (
    "mlflow",
    "numpy",
    "opencv-python-headless",
    "pydantic",
    "safetensors",
    "torch",
    "torchvision",
)
"""What `CODE` and `pyfunc_model.py` import, but for timm, which few models need. Without this list
MLflow would run them to find out."""
SOURCE = Path(__file__).parents[2]
CODE = (
    "data_shards/__init__.py",
    "data_shards/errors.py",
    "reid_train/__init__.py",
    "reid_train/transforms.py",
    "reid_train/config.py",
    "reid_train/model/__init__.py",
    "reid_train/model/backbones.py",
    "reid_train/model/batch_norm.py",
    "reid_train/model/collectives.py",
    "reid_train/model/embedder.py",
    "reid_train/model/network.py",
    "reid_train/model/precision.py",
)
"""What `pyfunc_model.py` imports from this project. A copy is stored with each model."""


def log_model(
    client: "MlflowClient", folder: Path, name: str, run_id: str, tags: dict[str, str]
) -> "LoggedModel":
    """Log the model in a folder, such as a checkpoint, to the run that trained it.

    These are the steps of `mlflow.pyfunc.log_model`. That function uses the active run and the
    tracking URI of the whole process, and would end the caller's run.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    embedder = Embedder.from_folder(folder, "cpu")
    size = embedder.config.image
    uses_timm = embedder.config.model.backbone.startswith(TIMM)
    libraries = REQUIREMENTS + (("timm",) if uses_timm else ())
    example = np.random.default_rng(0).integers(0, 256, (1, size.height, size.width, 3), np.uint8)
    images = TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))
    embeddings = TensorSpec(np.dtype(np.float32), (-1, embedder.embedding_size))
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name, run_id, tags, model_type="embedding")
    try:
        with tempfile.TemporaryDirectory(prefix="reid-model-") as temporary:
            path, code = Path(temporary) / "model", Path(temporary) / "code"
            for file in CODE:
                (code / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(SOURCE / file, code / file)
            mlflow.pyfunc.save_model(
                path,
                python_model=str(SOURCE / "reid_train" / "registry" / "pyfunc_model.py"),
                artifacts={"weights": str(folder / WEIGHTS), "config": str(folder / CONFIG)},
                code_paths=[str(package) for package in sorted(code.iterdir())],
                signature=ModelSignature(Schema([images]), Schema([embeddings])),
                input_example=example,
                # A local part such as +cu130 names a build that registries do not have.
                pip_requirements=[
                    f"{name}=={version(name).partition('+')[0]}" for name in libraries
                ],
                mlflow_model=Model(run_id=run_id, model_id=logged.model_id),
            )
            _check_in_model(path / "MLmodel")
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return logged


def _check_in_model(description: Path) -> None:
    """Let `predict` check its input: MLflow's own error does not say how to convert images.

    MLflow (since 2.20) checks no input against a signature that it took from type hints. It has no
    type hints for arrays, so the signature is written out, and this mark is set in the file.
    """
    text = description.read_text()
    unmarked, marked = (f"is_signature_from_type_hint: {value}" for value in ("false", "true"))
    description.write_text(text.replace(unmarked, marked))
