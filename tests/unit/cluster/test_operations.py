"""The commands and metric names that the pages for operators show are ones that exist."""

from __future__ import annotations

import re
import shlex

import pytest
import tyro

from reid_train.cli import Train
from reid_train.recipes import recipe
from reid_train.tracking.prometheus import METRICS
from tests.unit.manifests import ROOT

PAGES = [ROOT / "docs" / "OPERATIONS.md", ROOT / "cluster" / "README.md"]


def trainings() -> list[str]:
    blocks = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("reid_train train ")[2] for line in lines if "reid_train train" in line]


@pytest.mark.parametrize("command", trainings())
def test_commands_are_ones_that_the_program_takes(command):
    words = shlex.split(command, comments=True)
    config = tyro.cli(
        Train,
        default=Train(recipe("msmt17_resnet50")),
        args=words,
        config=(tyro.conf.AvoidSubcommands,),
    ).config
    assert config.output == "s3://example-bucket/runs"
    assert "--resume" in words or config.device == "cuda"


def test_there_are_commands_to_check():
    assert len(trainings()) == 3


def test_metrics_are_those_that_training_shows():
    shown = set(re.findall(r"ray_(reid_[a-z_]+)", PAGES[0].read_text()))
    assert shown == set(METRICS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"cluster/(?:kuberay|aws)/[\w.-]+\.yaml", text):
        assert (ROOT / target).is_file(), target
