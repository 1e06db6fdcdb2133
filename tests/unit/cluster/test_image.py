"""The image's recipe: what it copies is there, what it installs is pinned, and it is not root."""

from __future__ import annotations

import fnmatch
import re
import sys

import pytest

from tests.unit.manifests import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PACKAGES = ("data_shards", "reid_train", "tune", "cluster")


def instructions(text: str) -> list[tuple[str, str]]:
    """The (instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in found]


STEPS = instructions(DOCKERFILE.read_text())


def of(name: str) -> list[str]:
    return [rest for word, rest in STEPS if word == name]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a path through; the last pattern that matches decides."""
    parents = [path.rsplit("/", cut)[0] for cut in range(path.count("/") + 1)]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().lstrip("!").removeprefix("**/")
        if not pattern or line.startswith("#"):
            continue
        anywhere = "**/" in line
        names = [part for p in parents for part in ((p, p.rsplit("/")[-1]) if anywhere else (p,))]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            kept = line.startswith("!")
    return kept


def test_everything_that_is_copied_exists_and_is_in_the_context():
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    assert {*PACKAGES, "pyproject.toml", "constraints.txt"} == set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert in_context(source)


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("reid_train/training/loop.py", True),
        ("cluster/local/s3_server.py", True),
        ("cluster/kuberay/rayjob.yaml", False),
        ("cluster/README.md", False),
        ("reid_train/__pycache__/loop.pyc", False),
        (".git/config", False),
        (".venv/bin/python", False),
        (".demo/mlflow.db", False),
        ("tests/unit/test_image.py", False),
    ],
)
def test_context_has_only_the_code(path, kept):
    assert in_context(path) is kept


def test_dependencies_are_installed_at_their_pinned_versions():
    installs = [rest for rest in of("RUN") if re.search(r"\bpip install\b", rest)]
    assert installs
    for rest in installs:
        assert "-c constraints.txt" in rest
        assert "--no-cache-dir" in rest


def test_every_dependency_is_pinned():
    import tomllib

    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for group in project["optional-dependencies"].values() for item in group]
    names = {re.split(r"[\[<>=]", item)[0].lower() for item in (*project["dependencies"], *extras)}
    assert names - pinned == {"adaptive-reid"}


def test_it_runs_as_the_user_that_the_manifests_ask_for():
    assert of("USER") == ["1000"]
    assert "--uid 1000" in " ".join(of("RUN"))


def test_its_python_is_the_one_that_the_tests_run_on():
    (base,) = of("FROM")
    assert base.startswith(f"python:3.{sys.version_info.minor}-slim")


def test_commands_are_found_in_a_login_shell():
    """KubeRay and `ray up` start one: /etc/profile sets PATH anew, and only /usr/local stays."""
    settings = " ".join(of("ENV"))
    assert "PATH=" not in settings.replace("PYTHONPATH=", "")
    assert not any("venv" in rest for rest in of("RUN"))
    assert "PYTHONPATH=/opt/reid" in settings
