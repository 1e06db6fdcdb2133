"""Learning rates against the authors' numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reid_train.training.optimizer import cosine_rate, step_rate

GOLDEN = Path(__file__).parents[2] / "golden" / "lr_schedule.npz"


def test_steps_match_the_authors():
    with np.load(GOLDEN, allow_pickle=False) as golden:
        expected = golden["default_lr"]
    rates = [step_rate(epoch) for epoch in range(len(expected))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_cosine_matches_the_authors():
    with np.load(GOLDEN, allow_pickle=False) as golden:
        expected = golden["cosine_lr"]
    rates = [cosine_rate(epoch, len(expected)) for epoch in range(len(expected))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@given(
    epoch=st.integers(0, 500),
    epochs=st.integers(1, 300),
    warmup=st.integers(0, 20),
    every=st.integers(1, 50),
)
def test_rates_stay_between_minimum_and_peak(epoch, epochs, warmup, every):
    bounds = {"peak": 1e-3, "minimum": 1e-5}
    for rate in (
        step_rate(epoch, warmup=warmup, every=every, **bounds),
        cosine_rate(epoch, epochs, **bounds),
    ):
        assert 1e-5 * (1 - 1e-12) <= rate <= 1e-3 * (1 + 1e-12)


def test_one_epoch_of_warmup_starts_at_the_peak():
    assert step_rate(0, peak=1.0, warmup=1) == step_rate(0, peak=1.0, warmup=0) == 1.0
