"""Everything of Ray Train that is not public. Written for Ray 2.60; no other file uses such parts.

`tests/unit/runs/test_ray_internals.py` fails if Ray changes one of them. What is used, and why:

* `TorchTrainer._initialize_and_run_controller` and `_register_sigint_handler` (2.60): Ray has no
  setting for the failure policy, the scaling policy, or who handles SIGINT.
* `DefaultFailurePolicy`, `ElasticScalingPolicy._count_possible_workers` and
  `_get_resize_decision` (2.60): Ray retries errors that were raised on purpose, and starts worker
  groups that cannot share the batch equally.
* `ENV_VARS_TO_PROPAGATE` and the names of two variables (2.60): timeouts are set only through them.
* `worker_group.placement_group` (2.60): reservations get no name otherwise, and without a name they
  cannot be found and given back if the controller is killed before its workers run. Ray has no
  public way to name or find them: `ScalingConfig` has no such field, the table of placement groups
  shows no owner and no label selector, and Ray's own cleaner knows only groups whose workers run.
* the name of the logger of `execution.context` (2.60): `LoggingConfig` does not reach it.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray import train
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution import context as train_context
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    ResizeDecision,
    autoscaling_coordinator_client,
)
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from data_shards.errors import ReidError
from reid_train.out_of_memory import gpu_out_of_memory

logger = logging.getLogger(__name__)

CONTEXT_LOGGER = str(train_context.__file__)  # logs each report; Ray names it after its file


def set_timeouts(hang: int, collective: int) -> None:
    """Set how long Ray Train waits for a silent worker, and in its own collectives, in seconds."""
    os.environ[constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(hang)
    os.environ[constants.COLLECTIVE_TIMEOUT_S_ENV_VAR] = str(collective)


class ResilientTrainer(TorchTrainer):
    """A TorchTrainer that does not retry errors raised on purpose.

    Its numbers of workers always divide the batch, its reservations can be found by `run` and given
    back, and its driver handles signals itself (`process.py`).
    """

    def __init__(self, *arguments: Any, run: str, batch_size: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._run, self._batch_size = run, batch_size

    def _initialize_and_run_controller(self, **arguments):
        elastic = self.scaling_config.elasticity_enabled
        arguments["failure_policy"] = FailurePolicy(
            self.run_config.failure_config or FailureConfig(),
            most=self.scaling_config.max_workers if elastic else 0,
        )
        if elastic:
            arguments["scaling_policy"] = ScalingPolicy(self.scaling_config, self._batch_size)
        arguments["callbacks"] = [*arguments["callbacks"], _NamedReservations(self._run)]
        release(self._run)
        try:
            with _named_cluster():
                return super()._initialize_and_run_controller(**arguments)
        finally:
            release(self._run)

    def _register_sigint_handler(self, controller) -> None:
        pass


@contextlib.contextmanager
def _named_cluster() -> Iterator[None]:
    """Tell Ray Train's actors which cluster they are in.

    The actor that frees the workers of a dead run looks for its controller at the address in the
    environment, or else in any cluster on the machine, where it may wait for ever.
    """
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def release(run: str) -> None:
    """Give back the CPUs and GPUs that a run without a controller still reserves.

    Ray leaves that to an actor that may be killed too, if memory runs out or a node is lost. Then
    the resources stay reserved until the driver ends, and a sweep waits for ever.
    """
    for number, group in placement_group_table().items():
        if group["name"].startswith(f"{run}#") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


class _NamedReservations(ControllerCallback):
    """Names what a run reserves, so that `release` finds it."""

    def __init__(self, run: str) -> None:
        self._run = run

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in the controller's process, before it first asks for resources."""
        self.__dict__ |= state
        # It warns with a traceback of each answer that is late, and asks again. A filter: Ray
        # Train configures its loggers later, which resets the levels of this one.
        late = logging.getLogger(autoscaling_coordinator_client.__name__)
        late.addFilter(lambda record: record.levelno >= logging.ERROR)

    def after_controller_start(self, train_run_context) -> None:
        module = worker_group.__dict__  # of the controller's own process
        reserve = module["placement_group"]

        def named(*arguments: Any, **options: Any) -> PlacementGroup:
            return reserve(*arguments, name=f"{self._run}#{uuid.uuid4().hex}", **options)

        module["placement_group"] = named


class GroupSize:
    """Numbers of workers that the two policies share. A controller's process has one run."""

    started = 0  # workers of the last group
    least = 1  # fewest workers whose share of the batch fits a GPU, as far as is known


class FailurePolicy(DefaultFailurePolicy):
    """Retries what a machine may have caused; an error raised on purpose would only recur.

    If a GPU is too small for its share of the batch, an elastic run waits for more workers: at most
    `most`, which is 0 for a run that is not elastic.
    """

    def __init__(self, failure_config: FailureConfig, most: int = 0) -> None:
        super().__init__(failure_config)
        self._most = most

    def make_decision(self, training_failed_error: train.TrainingFailedError) -> FailureDecision:
        if on_purpose(training_failed_error):
            return FailureDecision.RAISE
        if gpu_out_of_memory(str(training_failed_error)):
            if GroupSize.started >= self._most:
                return FailureDecision.RAISE
            GroupSize.least = GroupSize.started + 1
            logger.warning(
                "a GPU is too small for the share of one of %d workers: waiting for more nodes",
                GroupSize.started,
            )
            return FailureDecision.RETRY
        decision = super().make_decision(training_failed_error)
        if isinstance(training_failed_error, WorkerGroupError):
            for rank, failure in sorted(training_failed_error.worker_failures.items()):
                lines = str(failure).strip().splitlines() or [type(failure).__name__]
                logger.warning("rank %d failed: %s (%s)", rank, lines[0], decision.value.lower())
        return decision


class ScalingPolicy(ElasticScalingPolicy):
    """Starts as many workers as there is room for and as divide the global batch."""

    def __init__(self, scaling_config: ScalingConfig, batch_size: int) -> None:
        super().__init__(scaling_config)
        self._batch_size = batch_size

    def _count_possible_workers(self, reserved_resources) -> int:
        room = super()._count_possible_workers(reserved_resources)
        sizes = range(room, GroupSize.least - 1, -1)
        return next((size for size in sizes if self._batch_size % size == 0), 0)

    def _get_resize_decision(self, num_workers: int) -> ResizeDecision:
        GroupSize.started = num_workers
        return super()._get_resize_decision(num_workers)


def on_purpose(error: Exception) -> ReidError | None:
    """Return the `ReidError` of the controller or of the first worker that raised one."""
    causes: list[Any] = []
    if isinstance(error, train.ControllerError):
        causes = [error.controller_failure]
    elif isinstance(error, WorkerGroupError):
        causes = [getattr(e, "cause", e) for e in error.worker_failures.values()]
    return next((cause for cause in causes if isinstance(cause, ReidError)), None)
