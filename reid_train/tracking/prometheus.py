"""What Prometheus sees of a run: the newest values, through the metrics port of Ray's nodes."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

METRICS = {
    "reid_images_per_second": "Training throughput.",
    "reid_step_seconds": "Seconds of an optimizer step.",
    "reid_data_wait_seconds": "Seconds of an optimizer step spent waiting for its batch.",
    "reid_loss": "Training loss with the L2 penalty.",
    "reid_factor": "Regularization factors (lambda): least, median and greatest of all tensors.",
    "reid_map": "Mean average precision at the last evaluation.",
}
"""Name to description, in ASCII for Ray, which puts `ray_` before the name."""
_SHOWN = {
    "images_per_second": ("reid_images_per_second", ""),
    "step_seconds": ("reid_step_seconds", ""),
    "data_wait_seconds": ("reid_data_wait_seconds", ""),
    "loss/total": ("reid_loss", ""),
    "factor/min": ("reid_factor", "min"),
    "factor/median": ("reid_factor", "median"),
    "factor/max": ("reid_factor", "max"),
    "mAP": ("reid_map", ""),
}
"""Tracked name to metric, and the value of its tag `quantile`."""


class Gauges:
    """Shows tracked values of one run; every gauge carries the run's name.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        tags = ("run", "quantile")
        self._gauges = {name: Gauge(name, text, tag_keys=tags) for name, text in METRICS.items()}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take values under the names that they are tracked by; others are left out."""
        for name in values.keys() & _SHOWN.keys():
            metric, quantile = _SHOWN[name]
            self._gauges[metric].set(values[name], {"run": self._run, "quantile": quantile})
