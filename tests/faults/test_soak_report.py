"""What a soak takes for growth, and what not."""

from __future__ import annotations

import pytest
from soak_report import BOUNDS, GROWN, WARM_UP, growth, most, same, training
from soak_watch import Folders, Sample, Watch

LIFE = 1200


def lives(hourly: float, *, step: float = 0.0) -> list[Sample]:
    """Samples of three processes, one after another, each of which begins a step higher."""
    return [
        Sample(LIFE * life + t, "worker", life, 0, round(100 + step * life + hourly * t), 7)
        for life in range(3)
        for t in range(0, LIFE, 2)
    ]


def test_growth_within_a_process_is_found():
    found = growth(lives(hourly=100 / 3600))
    assert found["worker", "handles"].hourly == pytest.approx(100, rel=0.05)
    assert found["worker", "handles"].beyond("handles")
    assert found["worker", "threads"].hourly == pytest.approx(0, abs=1e-6)
    assert not found["worker", "threads"].beyond("threads")


def test_what_a_new_process_starts_with_is_no_growth():
    assert growth(lives(0.0, step=50))["worker", "handles"].hourly == pytest.approx(0, abs=1e-6)


def test_first_minutes_of_a_process_are_no_growth():
    samples = [
        sample._replace(memory=int(min(sample.time % LIFE, WARM_UP) * 1e7)) for sample in lives(0.0)
    ]
    assert growth(samples)["worker", "memory"].hourly == pytest.approx(0, abs=1e-6)


def test_what_comes_after_the_last_step_is_no_growth():
    watch = Watch(lambda: 0, lambda: (0, 0, 0))
    watch.folders = [Folders(t, min(int(t) // 100, 9), 0, 0, 0) for t in range(0, LIFE, 2)]
    watch.samples = [
        Sample(t, "driver", 1, int(max(0, t - 900) * 1e7), 9, 7) for t in range(0, LIFE, 2)
    ]
    assert growth(watch.samples)["driver", "memory"].beyond("memory")
    assert growth(training(watch))["driver", "memory"].hourly == pytest.approx(0, abs=1e-6)


def test_steep_line_through_little_is_not_beyond_its_bound():
    hourly, longest = BOUNDS["handles"]
    end = WARM_UP + GROWN + 4
    short = [sample for sample in lives(2 * hourly / 3600) if sample.time % LIFE < end]
    found = growth(short)["worker", "handles"]
    assert found.longest < longest
    assert not found.beyond("handles")


def test_life_that_ends_early_has_no_line_but_counts_for_the_most():
    end = WARM_UP + GROWN - 4
    short = [sample for sample in lives(1.0) if sample.time % LIFE < end]
    assert not growth(short)
    assert most(short)["worker", "handles"] == max(sample.handles for sample in short)


def test_same_is_every_bit():
    assert same({"mAP": float("nan")}, {"mAP": float("nan")})
    assert not same(0.1 + 0.2, 0.3)
