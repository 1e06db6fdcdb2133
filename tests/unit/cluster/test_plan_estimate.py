"""The arithmetic of `plan`: what holds whatever the figures are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan.command import Plan
from cluster.plan.estimate import (
    COMPILE,
    Counts,
    Downloads,
    Network,
    Speed,
    describe,
    estimate,
    exchange,
    least_share,
)
from reid_train.recipes import recipe

CONFIG = recipe("msmt17_resnet50")
BATCH = CONFIG.batch_size
COUNTS = Counts(400, 100, 3, 3000, 20_000, 4)
READ = Downloads(True, 20, 10**9, 10**9, 150)
NETWORK = Network(
    weights=322_000_000, gradients=320_000_000, state=644_000_000, activations=112_000_000,
    exchanges=139, embedding=4096, forward=2.5e10, flops=7.5e10,
)  # fmt: skip
FREE = Plan(
    CONFIG, gpus=1, gpu_type="X1", network_gbit=1e9, interconnect_gbit=1e9,
    collective_microseconds=1e-9,
)  # fmt: skip


def run(options: Plan, rate: float, *, exchanged: bool = False, read: Downloads = READ) -> dict:
    """Estimate with a worker that trains `rate` images a second."""
    speed = Speed(BATCH / options.gpus / rate, "", exchanged)
    return estimate(options, COUNTS, NETWORK, read, speed)


workers = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
options = st.builds(
    Plan, st.just(CONFIG), gpus=workers, gpu_type=st.just("X1"), gpus_per_node=st.integers(1, 8),
    network_gbit=st.floats(0.1, 1000), s3_gbit=st.floats(0.1, 1000),
    interconnect_gbit=st.floats(0.1, 1000), collective_microseconds=st.floats(0.1, 1000),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(workers, st.floats(1, 1e4))
def test_free_communication_scales_without_loss(count, rate):
    found = run(replace(FREE, gpus=count), rate)
    assert found["images_per_second"] == pytest.approx(count * rate, rel=1e-3)
    assert found["limit"] == "computing"


@settings(deadline=None, max_examples=60)
@given(options, st.floats(1, 1e5))
def test_no_run_is_faster_than_with_everything_else_free(asked, rate):
    best = run(replace(FREE, gpus=asked.gpus, gpus_per_node=asked.gpus_per_node), rate)
    assert run(asked, rate)["seconds"] >= best["seconds"] * (1 - 1e-9)


@settings(deadline=None, max_examples=60)
@given(options, st.floats(1, 1e5), st.floats(1, 10), st.data())
def test_a_better_network_never_makes_a_run_slower(asked, rate, factor, data):
    name = data.draw(st.sampled_from(["network_gbit", "s3_gbit", "interconnect_gbit"]))
    better = replace(asked, **{name: getattr(asked, name) * factor})
    assert run(better, rate)["seconds"] <= run(asked, rate)["seconds"] * (1 + 1e-9)


def test_seconds_are_the_sum_of_their_parts():
    found = run(replace(FREE, gpus=4, network_gbit=0.1), 500)
    assert found["seconds"] == sum(found["parts"].values())
    assert found["parts"]["train"] == pytest.approx(400 * BATCH / (4 * 500), rel=1e-3)


def test_one_worker_exchanges_nothing():
    slow = replace(FREE, interconnect_gbit=1e-6, collective_microseconds=1e6)
    assert run(slow, 100)["images_per_second"] == pytest.approx(100)


def test_gradients_are_averaged_during_two_thirds_of_the_computing():
    computing = BATCH / 4 / 20
    slow = run(replace(FREE, gpus=4, interconnect_gbit=0.8), 20)
    ring = 2 * 3 / 4 * 320e6 / 1e8
    assert slow["images_per_second"] == pytest.approx(BATCH / (computing / 3 + ring), rel=1e-3)
    quick = run(replace(FREE, gpus=4, interconnect_gbit=80), 20)
    assert quick["images_per_second"] == pytest.approx(80, rel=1e-3)


def test_gradients_between_nodes_pass_the_nodes_network():
    within = replace(FREE, gpus=8, network_gbit=0.01, gpus_per_node=8)
    assert run(within, 1e4, read=Downloads())["limit"] == "computing"
    between = replace(within, gpus_per_node=4)
    assert run(between, 1e4, read=Downloads())["limit"] == "exchange between workers"


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 8, 64]), st.floats(1, 800), st.floats(1, 200), st.floats(50, 5000))
def test_least_share_is_the_first_with_nine_tenths_of_the_speed(count, gbit, latency, rate):
    asked = replace(
        FREE, network_gbit=gbit, interconnect_gbit=gbit, collective_microseconds=latency
    )
    small, ring = exchange(asked, NETWORK, count)

    def efficiency(images: int) -> float:
        computing = images / rate
        return computing / (computing + small + max(0.0, ring - 2 / 3 * computing))

    least = least_share(small, ring, rate)
    assert efficiency(least) >= 0.9 - 1e-9
    assert least == 1 or efficiency(least - 1) < 0.9 + 1e-9


def test_compiling_takes_time_on_gpus_only():
    assert run(FREE, 100)["parts"]["compile"] == COMPILE
    assert run(replace(FREE, gpu_type="cpu"), 100)["parts"]["compile"] == 0


def test_measured_exchange_is_not_added_again():
    slow = replace(FREE, gpus=4, interconnect_gbit=1e-3)
    assert run(slow, 20, exchanged=True)["images_per_second"] == pytest.approx(80)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"interconnect_gbit": 0.01}, "exchange between workers"),
        ({"collective_microseconds": 5e5}, "exchange between workers"),
        ({"network_gbit": 1e-5}, "download from S3"),
        ({"s3_gbit": 1e-5}, "download from S3"),
        ({}, "computing"),
    ],
)
def test_limit_is_what_was_made_scarce(changes, limit):
    assert run(replace(FREE, gpus=8, **changes), 500)["limit"] == limit


@settings(deadline=None, max_examples=60)
@given(workers, st.floats(0.01, 100))
def test_cost_is_hours_of_all_gpus_requests_and_bytes(count, price):
    prices = {"price_per_gpu_hour": price, "price_per_get": 0.5, "price_per_gb": 3.0}
    found = run(replace(FREE, gpus=count, **prices), 100)
    hours = count * found["seconds"] / 3600
    assert found["cost"] == pytest.approx(hours * price + 150 * 0.5 + 3.0)


def table_of_many_gpus() -> list[str]:
    """The rows of the table in docs/PLAN.md."""
    rows = []
    for norm in ("global", "local"):
        network = describe(CONFIG.replace(model__batch_norm=norm), identities=1041)
        for count, link in ((1, 0), (8, 3600), (64, 400), (64, 200), (64, 100)):
            asked = replace(FREE, collective_microseconds=50, interconnect_gbit=3600)
            asked = replace(asked, network_gbit=link or 1)
            small, ring = exchange(asked, network, count)
            cells = [count, link or "–", norm, network.exchanges if count > 1 else 0]
            cells += [round(2 * (count - 1) / count * network.gradients / 1e6)]
            cells += [f"{1e3 * small:.1f}", f"{1e3 * ring:.1f}"]
            cells += [f"{least_share(small, ring, rate):,}" for rate in (1246, 3000)]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def test_documented_table_of_many_gpus_is_what_the_plan_computes():
    text = (Path(__file__).parents[3] / "docs" / "PLAN.md").read_text()
    for row in table_of_many_gpus():
        assert row in text.splitlines()
