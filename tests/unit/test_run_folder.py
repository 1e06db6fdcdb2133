"""Names and places of runs."""

from __future__ import annotations

from pathlib import Path

from reid_train.recipes import recipe
from reid_train.run_folder import prepare


def test_a_slash_at_the_end_of_a_place_makes_no_other_place():
    asked = recipe("demo").replace(data="s3://b/people/", output="s3://b/runs/", name="r")
    config = prepare(asked)
    assert (config.data, config.output) == ("s3://b/people", "s3://b/runs")
    local = prepare(asked.replace(data="people/", output="runs/"))
    assert (local.data, local.output) == (str(Path.cwd() / "people"), str(Path.cwd() / "runs"))
