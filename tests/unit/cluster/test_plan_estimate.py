"""The planner's arithmetic: what holds whatever the figures are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.plan.estimate import Host, Machine, Prices, estimate
from cluster.plan.network import Network, Phase
from cluster.plan.throughput import Speed
from cluster.plan.workload import Layout, Pass, Workload

BATCH = 64
PHASES = {
    "heads": Phase(3e10, 2_000_000, 168_000_000, 336_000_000, 13),
    "all": Phase(7.5e10, 112_000_000, 322_000_000, 644_000_000, 139),
}
NETWORK = Network(322_000_000, 4096, 2.5e10, PHASES)  # type: ignore[arg-type]
FAST = 1e15  # bytes a second: no limit
FREE = Machine(cores=1000, on_cpu=False, network=FAST, s3=FAST, interconnect=FAST, latency=0.0)


def work(workers: int = 1, per_node: int = 8, passes: tuple[Pass, ...] = ()) -> Workload:
    passes = passes or (Pass(None, 0), Pass("heads", 200), Pass("all", 200), Pass(None, 0))
    return Workload(
        Layout(workers, per_node), passes, BATCH, 3000, 20_000, {"heads": 1, "all": 2},
        2 * (workers + 1), 1000, 88, 10_000, True,
    )  # fmt: skip


def run(
    machine: Machine, speed: float, job: Workload, loaders: int = 4, host: Host | None = None,
    talk: bool = False,
):  # fmt: skip
    """Estimate with a worker that makes `speed` images a second, alone or (talk) among all."""
    seconds = BATCH / job.layout.workers / speed
    speeds = {phase: Speed(seconds, "given", "", talk) for phase in PHASES}
    return estimate(job, NETWORK, machine, host or Host(decode=3e-4), speeds, loaders=loaders)  # type: ignore[arg-type]


rates = st.floats(1e6, 1e12)
machines = st.builds(
    Machine, cores=st.integers(1, 256), on_cpu=st.booleans(), network=rates, s3=rates,
    interconnect=rates, latency=st.floats(0, 1e-2),
)  # fmt: skip
workers = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


@settings(deadline=None, max_examples=60)
@given(workers, st.floats(1, 1e4))
def test_free_communication_scales_without_loss(count, speed):
    one, many = run(FREE, speed, work()), run(FREE, speed, work(count))
    assert many.images_per_second() == pytest.approx(count * one.images_per_second())
    assert many.limit == "compute"


@settings(deadline=None, max_examples=60)
@given(machines, workers, st.floats(1, 1e5), st.integers(0, 8))
@example(replace(FREE, cores=3, on_cpu=True), 1, 4308.0, 1)  # decoding, by one loader
def test_no_run_is_faster_than_with_everything_else_free(machine, count, speed, loaders):
    job = work(count)
    assert run(machine, speed, job, loaders).seconds >= run(FREE, speed, job, loaders).seconds * (
        1 - 1e-9
    )


@settings(deadline=None, max_examples=60)
@given(machines, workers, st.floats(1, 1e5), st.floats(1, 10), st.data())
def test_a_better_machine_never_makes_a_run_slower(machine, count, speed, factor, data):
    name = data.draw(st.sampled_from(["cores", "network", "s3", "interconnect"]))
    value = getattr(machine, name) * factor
    better = replace(machine, **{name: int(value) if name == "cores" else value})
    passes = (Pass(None, 0, 5, 10**9, 10**9), Pass("heads", 200, 9, 10**10, 10**9))
    job = work(count, passes=(*passes, Pass("all", 200)))
    now, then = run(machine, speed, job), run(better, speed, job)
    assert then.seconds <= now.seconds * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(machines, workers, st.floats(1, 1e5), st.integers(1, 8))
def test_steps_are_as_slow_as_their_limit_says(machine, count, speed, loaders):
    step = run(machine, speed, work(count), loaders).steps["all"]
    parts = {"compute": step.compute, "talk": step.talk, "decode": step.decode}
    assert step.seconds >= parts[step.limit] == max(parts.values()) or step.limit != "decode"
    assert step.seconds == max(step.compute + step.talk, step.decode)


def test_one_worker_talks_to_nobody():
    slow = replace(FREE, interconnect=1.0, network=1.0, latency=1.0)
    assert run(slow, 100, work()).steps["all"].talk == 0


def test_gradients_go_twice_round_the_ring_on_cpus():
    machine = replace(FREE, on_cpu=True, interconnect=1e9)
    talk = run(machine, 100, work(4)).steps["all"].talk
    assert talk == pytest.approx(2 * 3 / 4 * 322e6 / 1e9)


def test_gradients_hide_behind_the_backward_pass_of_gpus():
    slow, quick = (replace(FREE, interconnect=rate) for rate in (1e8, 1e9))
    compute = BATCH / 4 / 20
    assert run(quick, 20, work(4)).steps["all"].talk == 0
    left = 2 * 3 / 4 * 322e6 / 1e8 - 2 / 3 * compute
    assert run(slow, 20, work(4)).steps["all"].talk == pytest.approx(left)


def test_gradients_between_nodes_pass_the_slower_link():
    machine = replace(FREE, on_cpu=True, interconnect=1e10, network=1e9)
    within, between = (run(machine, 1e4, work(8, per)).steps["all"].talk for per in (8, 4))
    assert between == pytest.approx(10 * within)


def test_four_cpu_workers_on_two_cores_are_as_fast_as_two_but_for_crowding():
    machine = replace(FREE, on_cpu=True, cores=2)
    two, four = (
        run(machine, 10, work(n), 1, Host(decode=0.0, crowding=0.5)).images_per_second()
        for n in (2, 4)
    )
    assert four / two == pytest.approx((1 + 0.5) / (1 + 2 * 0.5))


def test_crowding_is_of_cpu_workers_on_one_node_that_were_measured_alone():
    crowded, free = Host(decode=0.0, crowding=0.5), Host(decode=0.0, crowding=0.0)
    cpu = replace(FREE, on_cpu=True)

    def slower(machine: Machine, job: Workload, talk: bool = False) -> float:
        one, other = (run(machine, 10, job, 1, host, talk).steps["all"] for host in (crowded, free))
        return one.compute / other.compute

    assert slower(cpu, work(2)) == pytest.approx(1.5)
    assert slower(cpu, work(2, per_node=1)) == slower(FREE, work(2)) == 1
    assert slower(cpu, work(2), talk=True) == 1


@pytest.mark.parametrize(
    ("changes", "decode", "limit"),
    [
        ({"cores": 9}, 0.1, "decode"),
        ({"interconnect": 1e6}, 1e-6, "talk"),
        ({"latency": 0.5}, 1e-6, "talk"),
        ({"network": 1e3}, 1e-6, "network"),
        ({"s3": 1e3}, 1e-6, "s3"),
        ({}, 1e-6, "compute"),
    ],
)
def test_limit_is_what_was_made_scarce(changes, decode, limit):
    passes = (Pass("all", 200, 100, 10**9, 10**9),) * 3
    machine, job = replace(FREE, **changes), work(8, passes=passes)
    if limit == "network":
        machine = replace(machine, interconnect=FAST)
    assert run(machine, 500, job, host=Host(decode=decode)).limit == limit


def test_worker_that_decodes_itself_takes_the_time_of_both():
    alone, inside = (run(FREE, 100, work(), n, Host(decode=0.01)).steps["all"] for n in (4, 0))
    assert inside.seconds == pytest.approx(alone.compute + BATCH * 0.01)


def test_frozen_weights_are_not_exchanged():
    steps = run(replace(FREE, on_cpu=True, interconnect=1e9), 100, work(4)).steps
    assert steps["heads"].talk == pytest.approx(steps["all"].talk * 168 / 322)


@settings(deadline=None, max_examples=60)
@given(workers, st.floats(0.01, 100))
def test_cost_is_hours_of_all_gpus_requests_and_bytes(count, price):
    found = run(FREE, 100, work(count))
    cost = Prices(gpu_hour=price, get=0.5, gigabyte=3.0).cost(found)
    job = found.workload
    hours = count * found.seconds / 3600
    assert cost == pytest.approx(hours * price + job.gets * 0.5 + job.bytes / 1e9 * 3.0)
