"""The curves of a run: losses by step, metrics by epoch, λ of every tensor over time.

Every checkpoint holds them, so the curves of a resumed run have no gap.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@dataclass
class History:
    """Three tables: a row for each recorded step, each evaluation, and each reading of λ."""

    split: str = "test"  # what the evaluations measured: "test" or "validation"
    steps: dict[str, list[float]] = field(default_factory=dict)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    evaluation_steps: list[int] = field(default_factory=list)
    tensor_names: list[str] = field(default_factory=list)  # of the columns of λ
    tensor_kinds: list[str] = field(default_factory=list)  # of the same columns
    factor_steps: list[int] = field(default_factory=list)
    factor_rows: list[np.ndarray] = field(default_factory=list)

    def add_step(self, step: int, values: dict[str, float]) -> None:
        """Record one step's losses, learning rate and throughput."""
        _append(self.steps, {"step": step, **values})

    def add_evaluation(self, epoch: int, values: dict[str, float], step: int) -> None:
        """Record the metrics after `epoch` epochs, at a global step."""
        self.evaluation_steps.append(step)
        _append(self.evaluations, {"epoch": epoch, **values})

    def add_factors(self, step: int, factors: np.ndarray) -> None:
        """Record λ (n,) of every tensor at a step."""
        self.factor_steps.append(step)
        self.factor_rows.append(factors.astype(np.float32))

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return steps (T,) int64 and λ (T, n) float32."""
        rows = np.stack(self.factor_rows) if self.factor_rows else np.zeros((0, 0), np.float32)
        return np.asarray(self.factor_steps, np.int64), rows

    def replay(self, log: Callable[[dict[str, float], int], None]) -> None:
        """Log everything again as it was logged the first time; `log` ignores what it has."""
        for values in _rows(self.steps):
            log(values, int(values.pop("step")))
        for step, values in zip(self.evaluation_steps, self.evaluation_rows(), strict=False):
            log(tracked(values, self.split), step)
        for step, factors in zip(self.factor_steps, self.factor_rows, strict=True):
            log(factor_metrics(factors), step)

    def evaluation_rows(self) -> list[dict[str, float]]:
        """Return the metrics of each evaluation, without its epoch."""
        return [
            {name: v for name, v in row.items() if name != "epoch" and not math.isnan(v)}
            for row in _rows(self.evaluations)
        ]

    def columns(self) -> dict[str, list[float]]:
        """Return step and evaluation columns together, for the curves."""
        return self.steps | self.evaluations

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        steps, factors = self.factors()
        tensors = {
            f"{group}/{name}": torch.tensor(column, dtype=torch.float64)
            for group, columns in (("steps", self.steps), ("evaluations", self.evaluations))
            for name, column in columns.items()
        }
        tensors["measured/step"] = torch.tensor(self.evaluation_steps, dtype=torch.int64)
        tensors["factors/step"] = torch.from_numpy(steps)
        tensors["factors/value"] = torch.from_numpy(factors)
        names: dict[str, object] = {"names": self.tensor_names, "kinds": self.tensor_kinds}
        if self.split != "test":
            names["split"] = self.split
        save_file(tensors, path, metadata={"tensors": json.dumps(names)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["tensors"])
        history = cls(
            split=described.get("split", "test"),
            tensor_names=described["names"],
            tensor_kinds=described["kinds"],
            evaluation_steps=tensors.pop("measured/step", torch.zeros(0)).tolist(),
            factor_steps=tensors.pop("factors/step").tolist(),
            factor_rows=list(tensors.pop("factors/value").numpy()),
        )
        for name, column in tensors.items():
            group, _, key = name.partition("/")
            (history.steps if group == "steps" else history.evaluations)[key] = column.tolist()
        return history


def tracked(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """Return metrics by the names that MLflow has for them.

    Those of the validation split are `validation/mAP` and so on: `mAP` is always the test's.
    """
    return {f"validation/{n}" if split == "validation" else n: v for n, v in metrics.items()}


def factor_metrics(factors: np.ndarray) -> dict[str, float]:
    """Return what is tracked of λ (n,) of all tensors."""
    low, middle, high = np.quantile(factors, [0, 0.5, 1]).tolist()
    return {"factor/min": low, "factor/median": middle, "factor/max": high}


def _rows(columns: dict[str, list[float]]) -> Iterator[dict[str, float]]:
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _append(columns: dict[str, list[float]], row: dict[str, float]) -> None:
    length = max((len(column) for column in columns.values()), default=0)
    for name, value in row.items():
        # A column that appears late, such as a metric first measured at epoch 10, starts with NaN.
        columns.setdefault(name, [float("nan")] * length).append(float(value))
    for column in columns.values():
        if len(column) == length:
            column.append(float("nan"))
