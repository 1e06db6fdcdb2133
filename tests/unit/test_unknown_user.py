"""A container under an unknown user id: no home folder, and nothing beside the code is writable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data_shards.errors import ConfigError
from data_shards.ray_utils import prepare_ray
from data_shards.storage import expand_home

ROOT = Path(__file__).parents[2]
NO_HOME = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", refuse)


def test_folder_in_a_home_that_is_not_there_is_one_line(homeless):
    with pytest.raises(ConfigError, match=r"no home folder for ~/.*: set HOME"):
        expand_home(Path("~/.cache/shards"))


def test_ray_gets_a_home(monkeypatch):
    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", refuse)
    for name in ("HOME", "RAY_COLOR_PREFIX", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "before")
    prepare_ray()
    assert os.environ["HOME"] == tempfile.gettempdir()


def test_command_line_needs_no_home():
    code = "from pathlib import Path; del Path.home; import data_shards.cli; print('imported')"
    said = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=120)
    assert said == "imported\n"


def test_kernels_compile_where_no_cache_can_be_kept(tmp_path: Path):
    for package in ("data_shards", "reid_train"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    kernels = tmp_path / "reid_train" / "evaluation" / "kernels"
    (kernels / "__pycache__").touch()  # a file: no folder can be made, whoever tries
    code = "from reid_train.evaluation.kernels import topk; print(topk.__file__)"
    environment = {**os.environ, **NO_HOME, "PYTHONPATH": str(tmp_path)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", code]
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    ended = subprocess.run(command, timeout=120, **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(tmp_path))
    assert not list(tmp_path.glob("reid-numba-*"))
