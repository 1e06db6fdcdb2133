"""The README's commands, one after the other, on 12 drawn people and a stack of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.local import servers as local

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
MARK = "<!-- tested: home -->"
"""In the README before each block of commands that is run here, in the order of the page."""
PEOPLE, CAMERAS, IMAGES = 12, 2, 4
SMALLER = {
    "--recipe people_small": "--recipe people_small --image.height 32 --image.width 16 "
    "--optimizer.epochs 1 --batch.steps-per-epoch 6 --tracking.every-steps 2",
    "--trials 20": "--trials 6",
    "photo.jpg": "images/0_0_0.jpg",
}
"""What is replaced in the commands, so that they take minutes on two cores and find a photo."""


def blocks(page: str) -> list[str]:
    """The shell blocks behind the marks."""
    return re.findall(rf"{re.escape(MARK)}\s*```sh\n(.*?)```", page, re.S)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A copy of the packages and `people.csv`; a stack in it is stopped afterwards."""
    for name in ("data_shards", "reid_train", "tune", "cluster"):
        shutil.copytree(
            PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    draw(tmp_path)
    try:
        yield tmp_path
    finally:
        local.stop(tmp_path / local.FOLDER)


def draw(folder: Path) -> None:
    """Draw people of two colours each, two thirds of them to train on."""
    rng = np.random.default_rng(0)
    lines = ["path,pid,camid,split"]
    for person in range(PEOPLE):
        clothes = rng.integers(0, 256, (2, 1, 3))
        for camera in range(CAMERAS):
            for number in range(IMAGES):
                pixels = np.repeat(clothes, 32, axis=0) + rng.integers(-30, 30, (64, 32, 3))
                path = f"images/{person}_{camera}_{number}.jpg"
                (folder / "images").mkdir(exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path)
                split = (
                    "train" if person < 8 else "query" if (camera, number) == (0, 0) else "gallery"
                )
                lines.append(f"{path},{person},{camera},{split}")
    (folder / "people.csv").write_text("\n".join(lines) + "\n")


def test_commands_of_the_readme_work_in_their_order(project):
    script = "".join(blocks((PROJECT / "README.md").read_text()))
    assert script, f"no block of the README is marked by {MARK}"
    for text, other in SMALLER.items():
        assert text in script
        script = script.replace(text, other)
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))
    }
    done = subprocess.run(
        ["bash", "-exuo", "pipefail", "-c", script],
        cwd=project,
        env=environment
        | {
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
            "PYTHONPATH": str(project),
            "HOME": str(project),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert '{"predictions": [[' in done.stdout
    assert local.running(project / local.FOLDER) is None, "the last command stops the stack"
