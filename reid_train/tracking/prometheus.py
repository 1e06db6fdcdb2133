"""Show the newest values of a run to Prometheus, through the metrics port of Ray's nodes."""

from collections.abc import Callable, Mapping

METRICS = {
    "reid_images_per_second": "Training throughput.",
    "reid_step_seconds": "Seconds of an optimizer step.",
    "reid_data_wait_seconds": "Seconds of an optimizer step spent waiting for its batch.",
    "reid_loss": "Training loss with the L2 penalty.",
    "reid_factor": "Regularization factors (lambda): minimum, median and maximum of all tensors.",
    "reid_map": "Mean average precision at the last evaluation, on validation or test.",
}
"""Metric to description. Ray takes only ASCII, and puts `ray_` before the name."""
_SHOWN = {
    "images_per_second": ("reid_images_per_second", ""),
    "step_seconds": ("reid_step_seconds", ""),
    "data_wait_seconds": ("reid_data_wait_seconds", ""),
    "loss/total": ("reid_loss", ""),
    "factor/min": ("reid_factor", "min"),
    "factor/median": ("reid_factor", "median"),
    "factor/max": ("reid_factor", "max"),
    "mAP": ("reid_map", ""),
    "validation/mAP": ("reid_map", ""),
}
"""Name in MLflow to metric, and the value of the metric's tag `quantile`."""


def gauges(run: str) -> Callable[[Mapping[str, float]], None]:
    """Make the gauges of a run; return a function that sets those in values by MLflow's names."""
    from ray.util.metrics import Gauge

    tags = ("run", "quantile")
    made = {name: Gauge(name, text, tag_keys=tags) for name, text in METRICS.items()}

    def show(values: Mapping[str, float]) -> None:
        for name in values.keys() & _SHOWN.keys():
            metric, quantile = _SHOWN[name]
            made[metric].set(values[name], {"run": run, "quantile": quantile})

    return show
