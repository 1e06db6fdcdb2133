"""The registered model as code: MLflow runs this file to load it.

A copy of this file and of the packages that it imports is stored with the weights of each model. So
a model loads where this project is not installed, and no pickle is needed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from data_shards.errors import DataError
from reid_train.model.embedder import Embedder


class EmbeddingModel(PythonModel):
    """Images (N, H, W, 3) uint8, RGB, of any one size, to embeddings (N, D) float32."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights; use a GPU if there is one."""
        self._embedder = Embedder.from_folder(Path(context.artifacts["weights"]).parent)

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Embed images; `context` and `params` are not used.

        Raises:
            MlflowException: the images have another shape or type; the message says how to convert
                them. A model server answers it with status 400.
        """
        try:
            return self._embedder(model_input)
        except DataError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


set_model(EmbeddingModel())
