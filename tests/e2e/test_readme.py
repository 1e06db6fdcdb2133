"""The commands of the tutorial and the README, on 12 drawn people and a stack of this machine."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROJECT = Path(__file__).parents[2]
PAGES = (PROJECT / "docs" / "tutorial.md", PROJECT / "README.md")
"""Their commands are run in this order, in one shell; the README's last one stops the stack."""
MARK = r"<!-- tested: \w+ -->"
"""Before each block of commands that is run here."""
PEOPLE = [
    "anna", "ben", "carl", "dora", "emil", "fay", "gus", "hana", "ivan", "joan", "kim", "leo",
]  # fmt: skip
CAMERAS, IMAGES = ("door", "hall"), 4
SMALLER = {
    "source .venv/bin/activate": "true",  # the test already runs in it
    "--recipe people_small": "--recipe people_small --image.height 32 --image.width 16 "
    "--optimizer.epochs 1 --batch.steps-per-epoch 6 --tracking.every-steps 2",
    "--trials 20": "--trials 6",
    " photo.jpg": " photos/leo/door_1.jpg",
    "'photo.jpg'": "'photos/leo/door_1.jpg'",
}
"""What is replaced in the commands, so that they take minutes on two cores and find a photo."""


def commands(page: str) -> list[str]:
    """The commands of the shell blocks behind the marks, without comments."""
    blocks = re.findall(rf"{MARK}\s*```sh\n(.*?)```", page, re.S)
    lines = re.split(r"(?<!\\)\n", "".join(blocks))
    found = [re.sub(r" +# .*", "", line).strip() for line in lines]
    return [line for line in found if line]


def script() -> str:
    """The commands of all pages. One that an earlier page has, too, is run once."""
    found: list[str] = []
    for page in PAGES:
        own = commands(page.read_text())
        assert own, f"no block of {page.name} is marked by {MARK}"
        found += [command for command in own if command not in found]
    return "\n".join(found)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A copy of the packages and drawn photos; a stack in it is stopped afterwards."""
    for name in ("data_shards", "reid_train", "tune", "cluster"):
        shutil.copytree(
            PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(PROJECT / "docs" / "examples" / "make_csv.py", tmp_path)
    draw(tmp_path / "photos")
    try:
        yield tmp_path
    finally:
        local.stop(tmp_path / local.FOLDER)


def draw(folder: Path) -> None:
    """Draw people of two colours each, as the tutorial names them."""
    rng = np.random.default_rng(0)
    for person in PEOPLE:
        clothes = rng.integers(0, 256, (2, 1, 3))
        (folder / person).mkdir(parents=True)
        for camera in CAMERAS:
            for number in range(1, IMAGES + 1):
                pixels = np.repeat(clothes, 32, axis=0) + rng.integers(-30, 30, (64, 32, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / person / f"{camera}_{number}.jpg")


def test_commands_of_the_tutorial_and_the_readme_work_in_their_order(project):
    lines = script()
    for text, other in SMALLER.items():
        assert text in lines
        lines = lines.replace(text, other)
    environment = {
        k: v
        for k, v in os.environ.items()
        if k == "RAY_worker_niceness" or not k.startswith(("RAY_", "MLFLOW_", "AWS_"))
    }
    done = subprocess.run(
        ["bash", "-exuo", "pipefail", "-c", lines],
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
