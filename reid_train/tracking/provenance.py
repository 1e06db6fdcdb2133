"""Where a run comes from: the commit, the versions of libraries, the Ray job that started it."""

import functools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path


def code_commit() -> str | None:
    """The git commit of this code, `-dirty` if it was changed; None if it is not known.

    Set `REID_COMMIT` in the environment where the code runs without its repository.
    """
    if commit := os.environ.get("REID_COMMIT"):
        return commit
    here = Path(__file__)
    git = functools.partial(
        subprocess.run, cwd=here.parent, capture_output=True, text=True, timeout=10
    )
    try:
        # Code that is installed inside another repository must not take that one's commit.
        if git(["git", "ls-files", "--error-unmatch", here.name]).returncode:
            return None
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return git(describe).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def submitted_job() -> str | None:
    """Submission id of the Ray job whose driver this process is; None if there is no such job."""
    try:
        described = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        return described.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a step computes."""
    libraries = {name: version(name) for name in ("numpy", "torch", "torchvision", "timm")}
    return {"Python": platform.python_version(), **libraries}


def different_versions(before: Mapping[str, str]) -> str:
    """Say which versions differ from those before, as `torch 2.13.0 became 2.14.1`."""
    now = library_versions()
    return ", ".join(
        f"{name} {old} became {now[name]}"
        for name, old in before.items()
        if name in now and old != now[name]
    )
