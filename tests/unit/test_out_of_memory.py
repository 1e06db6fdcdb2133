"""What is said of a machine that ran out of memory. The text is as Ray 2.60's monitor wrote it."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from reid_train.out_of_memory import out_of_memory
from reid_train.recipes import recipe
from reid_train.runs.ray_internals import FailurePolicy, GroupSize, ScalingPolicy
from reid_train.runs.ray_trainer import explained

TEXT = """\
2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, \
ID: b40ce24f2b0d895c8c1ea7dc7bb7df104a8be0c65b91a6768187155c) was 12.82GB used / 23.54GB limit \
(0.544417)
OOM kill reason: Memory usage 13719805952B exceeded threshold of 13295210496B (52.6% of 25276063744B limit)
Object store memory usage: [- objects spillable: 1
- bytes spillable: 3371]
Ray killed 2 worker(s) based on the killing policy
To see more information about memory usage on this node, use `ray logs raylet.out -ip 192.0.2.2`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
24699\t4.04\tpython tests/benchmarks/reranking.py --child ours msmt17
31235\t0.62\tpython -m tune --recipe csv_small --data people --output runs
4043\t0.54\tray::RayTrainWorker
3315\t0.39\tray::ImplicitFunc.train
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/.
"""  # noqa: E501


def test_message_names_the_place_where_memory_ran_out_and_its_users():
    said = out_of_memory(TEXT)
    assert said is not None
    assert said.startswith("memory ran out on 192.0.2.2 (12.82GB of 23.54GB in use)")
    assert "reranking.py --child ours msmt17 4.04 GB" in said
    assert "ray::RayTrainWorker 0.54 GB" in said
    assert "ImplicitFunc" not in said, "three are enough"


def test_a_run_that_ends_so_says_what_to_do_in_one_line():
    config = recipe("demo").replace(name="r", output="/runs")
    said = str(explained(OutOfMemoryError(TEXT), config))
    assert said.startswith("memory ran out on 192.0.2.2")
    assert "\n" not in said
    assert said.endswith("continue with --resume --name r --output /runs")


def test_message_of_a_failed_trial_has_no_advice_to_resume():
    config = recipe("demo").replace(name="r", output="/runs")
    said = str(explained(OutOfMemoryError(TEXT), config, advise=False))
    assert said == out_of_memory(TEXT)


GPU_TEXT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total "
    "capacity of 79.19 GiB of which 1.32 GiB is free. Including non-PyTorch memory, …"
)


def test_message_on_a_gpu_that_is_too_small_has_advice():
    config = recipe("demo").replace(name="r", output="/runs")
    said = str(explained(WorkerGroupError(GPU_TEXT, {3: RuntimeError(GPU_TEXT)}), config))
    assert said.startswith("a GPU's memory ran out: 2.50 GiB more were asked for, of 79.19 GiB in")
    assert "more --workers" in said
    assert said.endswith("with --resume --name r --output /runs")


def test_a_gpu_that_is_too_small_is_not_tried_again():
    policy = FailurePolicy(FailureConfig(max_failures=-1))
    error = WorkerGroupError(GPU_TEXT, {3: RuntimeError(GPU_TEXT)})
    assert policy.make_decision(error) == FailureDecision.RAISE
    other = WorkerGroupError("a cosmic ray", {3: RuntimeError("a cosmic ray")})
    assert policy.make_decision(other) == FailureDecision.RETRY


def test_an_elastic_run_waits_for_workers_with_smaller_shares(monkeypatch):
    monkeypatch.setattr(GroupSize, "started", 0)
    monkeypatch.setattr(GroupSize, "least", 1)
    scaling = ScalingPolicy(ScalingConfig(num_workers=(1, 4), use_gpu=True), batch_size=16)
    one, four = ({"node": {"GPU": float(n), "CPU": 8.0}} for n in (1, 4))
    assert scaling._count_possible_workers(one) == 1
    scaling._get_resize_decision(1)
    policy = FailurePolicy(FailureConfig(max_failures=0), most=4)
    error = WorkerGroupError(GPU_TEXT, {0: RuntimeError(GPU_TEXT)})
    assert policy.make_decision(error) == FailureDecision.RETRY
    assert scaling._count_possible_workers(one) == 0, "it waits"
    assert scaling._count_possible_workers(four) == 4
    scaling._get_resize_decision(4)
    assert policy.make_decision(error) == FailureDecision.RAISE, "there can be no more"


@pytest.mark.parametrize("text", ["", "worker died"])
def test_other_errors_are_not_taken_for_it(text):
    assert out_of_memory(text) is None
