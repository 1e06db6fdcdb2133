"""The benchmark on Market-1501, tried on drawn people: it measures, and continues where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "market1501.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trainings_are_measured_once_and_reported(tmp_path):
    command = [sys.executable, str(SCRIPT), "none", "none", str(tmp_path), "--smoke", "--only"]
    wanted = ["adaptive-0", "held-0"]
    for count, name in enumerate(wanted, 1):
        subprocess.run([*command, *wanted[:count]], check=True, timeout=800)
        results = json.loads((tmp_path / "results.json").read_text())
        assert list(results) == wanted[:count]
        assert 0 < results[name]["test"]["mAP"] <= 1
        assert results[name]["reranked"].keys() == results[name]["test"].keys()
        assert f"| {name} | kernel |" in (tmp_path / "results.md").read_text()
    adaptive, held = (results[name]["factors"]["kernel"] for name in wanted)
    assert adaptive["start"][1] == pytest.approx(0.0025, rel=1e-2)
    assert adaptive["end"][1] < adaptive["start"][1]
    assert held["start"] == held["end"] == pytest.approx([adaptive["mean"]] * 3)
    assert not [path for path in tmp_path.rglob("*.png") if "rank_list" in path.name]
