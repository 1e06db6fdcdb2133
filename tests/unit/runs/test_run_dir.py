"""Names and places of runs, what may differ when one is resumed, and what is left of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_shards.errors import ConfigError, DataError
from data_shards.storage import open_storage
from reid_train.recipes import recipe
from reid_train.registry.load import SUMMARY, fetch
from reid_train.runs.run_dir import fetch_report, prepare, same_training

RUN = recipe("demo").replace(name="r")


def test_a_slash_at_the_end_of_a_place_makes_no_other_place():
    config = prepare(RUN.replace(data="s3://b/people/", output="s3://b/runs/"))
    assert (config.data, config.output) == ("s3://b/people", "s3://b/runs")
    local = prepare(RUN.replace(data="people/", output="runs/"))
    assert (local.data, local.output) == (str(Path.cwd() / "people"), str(Path.cwd() / "runs"))


@pytest.mark.parametrize("name", ["imagenet", "none"])
def test_weights_by_name_are_no_folder_of_that_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / "r18.pth").touch()
    config = RUN.replace(data="people", output="runs", model__weights=name)
    assert prepare(config).model.weights == name
    config = config.replace(model__weights="r18.pth")
    assert prepare(config).model.weights == str(tmp_path / "r18.pth")


@pytest.mark.parametrize("schedule", ["step", "constant"])
def test_a_run_is_extended_where_its_rates_do_not_depend_on_its_length(schedule):
    old = RUN.replace(optimizer__schedule=schedule)
    same_training(old, old.replace(optimizer__epochs=20))


def test_a_run_with_cosine_rates_is_not_extended():
    same_training(RUN, RUN.replace(evaluation__every=2))
    with pytest.raises(ConfigError, match=r"epochs 20 instead of 8.*cosine.*another --name"):
        same_training(RUN, RUN.replace(optimizer__epochs=20))


def test_what_else_differs_is_named():
    with pytest.raises(ConfigError, match=r"other settings of seed, optimizer\.beta1"):
        same_training(RUN, RUN.replace(seed=1, optimizer__beta1=0.8, optimizer__epochs=20))


def test_finished_run_means_its_best_checkpoint(tmp_path):
    best = tmp_path / "checkpoint_2"
    best.mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / SUMMARY).write_text(json.dumps({"checkpoint": "../elsewhere/checkpoint_2"}))
    assert fetch(tmp_path, Path("unused")) == best
    assert fetch(best, Path("unused")) == best


def test_a_run_that_was_stopped_names_its_checkpoints(tmp_path):
    for name in ("checkpoint_1", "checkpoint_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "run.json").touch()
    places = f"{tmp_path}/checkpoint_1, {tmp_path}/checkpoint_2"
    with pytest.raises(DataError, match=f"has not finished.* its checkpoints: {places}"):
        fetch(tmp_path, Path("unused"))


def test_summary_without_a_checkpoint_is_an_error(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / SUMMARY).write_text("{}")
    with pytest.raises(DataError, match="names no checkpoint"):
        fetch(tmp_path, Path("unused"))


def test_report_is_copied_from_a_bucket(s3, tmp_path):
    run = f"{s3.url}/runs/first"
    open_storage(run).write("report/report.html", b"<html>")
    open_storage(run).write("report/curves.png", b"png")
    page = fetch_report(run, tmp_path / "reports/first")
    assert page.read_bytes() == b"<html>"
    assert page.with_name("curves.png").read_bytes() == b"png"


def test_run_without_a_report_is_named(tmp_path):
    with pytest.raises(ConfigError, match="has no report"):
        fetch_report(str(tmp_path), tmp_path / "to")
    assert not (tmp_path / "to").exists()
