"""The parts of Ray that are not public are as `ray_internals.py` needs them."""

from __future__ import annotations

import inspect
import logging
import logging.config
import pickle

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    autoscaling_coordinator_client,
)
from ray.train.v2._internal.execution.worker_group import worker_group

from reid_train.runs import ray_internals


def test_the_trainer_takes_its_policies_and_callbacks_by_these_names():
    source = inspect.getsource(TorchTrainer.fit)
    for name in ("failure_policy=", "scaling_policy=", "callbacks="):
        assert name in source
    assert "_initialize_and_run_controller(" in source
    assert "controller_init_kwargs" in str(
        inspect.signature(TorchTrainer._initialize_and_run_controller)
    )
    source = inspect.getsource(TorchTrainer._initialize_and_run_controller)
    assert "self._register_sigint_handler(controller)" in source
    assert "get_env_vars_to_propagate()" in source


def test_policies_have_the_methods_that_are_replaced():
    assert list(inspect.signature(DefaultFailurePolicy.make_decision).parameters) == [
        "self",
        "training_failed_error",
    ]
    assert list(inspect.signature(ElasticScalingPolicy._count_possible_workers).parameters) == [
        "self",
        "reserved_resources",
    ]
    for decision in (
        ElasticScalingPolicy.make_decision_for_non_running_worker_group,
        ElasticScalingPolicy.make_decision_for_running_worker_group,
    ):
        assert "self._count_possible_workers(" in inspect.getsource(decision)
        assert "self._get_resize_decision(num_workers)" in inspect.getsource(decision)


def test_variables_are_propagated_from_a_set():
    assert isinstance(constants.ENV_VARS_TO_PROPAGATE, set)
    assert constants.COLLECTIVE_TIMEOUT_S_ENV_VAR in constants.ENV_VARS_TO_PROPAGATE
    assert constants.WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR in constants.ENV_VARS_TO_PROPAGATE


def test_worker_groups_reserve_by_the_function_that_is_replaced():
    source = inspect.getsource(worker_group.WorkerGroup._create_placement_group)
    assert "pg = placement_group(" in source
    assert callable(worker_group.placement_group)
    assert "name=" not in source
    assert hasattr(ControllerCallback, "after_controller_start")


def test_reports_are_logged_under_the_name_of_a_file():
    from ray.train.v2._internal.execution import context

    assert context.logger.name == ray_internals.CONTEXT_LOGGER
    assert isinstance(context.logger, logging.Logger)


def test_late_answers_are_not_shown_from_the_controllers_first_request_on():
    log = logging.getLogger(autoscaling_coordinator_client.__name__)
    assert autoscaling_coordinator_client.logger is log
    try:
        pickle.loads(pickle.dumps(ray_internals._NamedReservations("run")))
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "loggers": {"ray.train": {"level": "WARNING"}},
            }
        )
        for level, shown in ((logging.WARNING, False), (logging.ERROR, True)):
            record = logging.LogRecord(log.name, level, "", 0, "late", (), None)
            assert bool(log.filter(record)) is shown
    finally:
        log.filters.clear()


def test_only_the_tested_ray_is_allowed():
    assert ray.__version__.startswith("2.60.")
