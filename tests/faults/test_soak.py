"""A short soak: five minutes of training, a fault every 20 seconds, the same bits at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import DEMO, soak
from soak_report import Event, Outcome, draw, text
from soak_run import place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SMALL = [*DEMO, "--image.height", "32", "--image.width", "16"]
SMALL += ["--batch.identities", "4", "--batch.images", "2"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder: Path = tmp_path_factory.mktemp("soak")
    with place(folder, SMALL, identities=32, cameras=3, images_per_camera=4) as here:
        outcome = soak(here, minutes=5, every=20, seed=0)
    assert outcome is not None
    draw(outcome, folder / "soak.png")
    print(text(outcome, str(folder / "soak.png")))
    return outcome


def test_faults_were_caused(outcome):
    assert sum(event.kind != Event.BY_ITSELF for event in outcome.events) >= 4


def test_results_are_the_quiet_runs_and_nothing_grew(outcome):
    assert not outcome.problems
