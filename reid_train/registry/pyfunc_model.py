"""The MLflow model, as code: MLflow runs this file to load a registered model.

It travels with the model, beside the weights and a copy of this project's packages; so the model
loads where the project is not installed, and nothing of it is a pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from reid_train.model.embedder import Embedder


class EmbeddingModel(PythonModel):
    """Images (N, H, W, 3) uint8, RGB, of any one size, to embeddings (N, D) float32."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the weights; on a GPU if there is one."""
        self._embedder = Embedder.from_folder(Path(context.artifacts["weights"]).parent)

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Embed a batch; MLflow has checked it against the signature."""
        return self._embedder(model_input)


set_model(EmbeddingModel())
