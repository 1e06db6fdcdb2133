"""What Ray Train shall do about failures and comings and goings that it has no settings for.

The only file that derives from Ray's own classes; it holds for the Ray of `constraints.txt`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from data_shards.errors import ReidError
from reid_train.out_of_memory import gpu_out_of_memory

logger = logging.getLogger(__name__)


class ResilientTrainer(TorchTrainer):
    """TorchTrainer that retries no error raised on purpose, and whose world size divides the batch.

    Its driver handles signals itself, see `signals.py`.
    """

    def _initialize_and_run_controller(self, **arguments):
        arguments["failure_policy"] = _PermanentErrors(
            self.run_config.failure_config or FailureConfig()
        )
        if self.scaling_config.elasticity_enabled:
            batch = (self.train_loop_config or {})["batch_size"]
            arguments["scaling_policy"] = _Divisors(self.scaling_config, batch)
        run = str(self.run_config.storage_path), str(self.run_config.name)
        arguments["callbacks"] = [*arguments["callbacks"], _Named(_prefix(*run))]
        release(*run)
        try:
            with _named_cluster():
                return super()._initialize_and_run_controller(**arguments)
        finally:
            release(*run)

    def _register_sigint_handler(self, controller) -> None:
        pass


@contextlib.contextmanager
def _named_cluster() -> Iterator[None]:
    """Let Ray Train's actors know which cluster they are in.

    What frees the workers of a run that is gone asks for its controller at the address in the
    environment, or else at any cluster that it finds on the machine, where it may wait in vain.
    """
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def _prefix(storage_path: str, name: str) -> str:
    return f"{storage_path}/{name}#"


def release(storage_path: str, name: str) -> None:
    """Give back the CPUs and GPUs that a run without a controller still reserves.

    Ray leaves that to an actor, which may be killed as well where memory runs out or a node is
    lost: then nobody else gets them as long as the driver lives, and a sweep waits for ever.

    Args:
        storage_path, name: of the run, as Ray Train's `RunConfig` has them.
    """
    for number, group in placement_group_table().items():
        if group["name"].startswith(_prefix(storage_path, name)) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


class _Named(ControllerCallback):
    """Gives what a run reserves names by which `release` finds it."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def after_controller_start(self, train_run_context) -> None:
        module = worker_group.__dict__  # of the controller's own process
        reserve = module["placement_group"]

        def named(*arguments: Any, **options: Any) -> PlacementGroup:
            return reserve(*arguments, name=f"{self._prefix}{uuid.uuid4().hex}", **options)

        module["placement_group"] = named


class _PermanentErrors(DefaultFailurePolicy):
    """Retries what a machine may have caused; an error raised on purpose would only recur."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if on_purpose(training_failed_error) or gpu_out_of_memory(str(training_failed_error)):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if isinstance(training_failed_error, WorkerGroupError):
            for rank, failure in sorted(training_failed_error.worker_failures.items()):
                lines = str(failure).strip().splitlines() or [type(failure).__name__]
                logger.warning("rank %d failed: %s (%s)", rank, lines[0], decision.value.lower())
        return decision


class _Divisors(ElasticScalingPolicy):
    """As many workers as there is room for and as share the global batch equally."""

    def __init__(self, scaling_config: ScalingConfig, batch: int) -> None:
        super().__init__(scaling_config)
        self._batch = batch

    def _count_possible_workers(self, reserved_resources) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return next((n for n in range(room, 0, -1) if self._batch % n == 0), 0)


def on_purpose(error: Exception) -> ReidError | None:
    """The controller's or the first worker's `ReidError`, if there is one."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, ReidError):
        return error.controller_failure
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, ReidError):
                return cause
    return None
