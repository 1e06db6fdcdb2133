"""The commands that the demo ends with."""

import shlex
import sys
from pathlib import Path

import pytest

from cluster.demo import _look_around


@pytest.mark.parametrize("active", [True, False])
def test_commands_can_be_pasted_whether_or_not_the_environment_is_active(
    monkeypatch, tmp_path, active
):
    environment = tmp_path / "my env"
    (environment / "bin").mkdir(parents=True)
    for name in ("python", "activate"):
        (environment / "bin" / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(environment / "bin" / "python"))
    monkeypatch.setenv("PATH", str(environment / "bin") if active else "/usr/bin")
    text = _look_around(Path("a folder"), "models:/reid-people@champion", "s3://reid/people")
    # A shell takes a line that ends in a backslash together with the next one.
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    if not active:
        assert commands.pop(0) == ["source", "my env/bin/activate"]
    command, place = ["python", "-m", "cluster"], ["--folder", "a folder"]
    found = ["--model", "models:/reid-people@champion", "--gallery", "s3://reid/people"]
    assert commands == [[*command, "local", "up", *place], [*command, "serve", *place, *found]]
