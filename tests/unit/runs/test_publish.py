"""What is left when a run has ended, and what a person is told of it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from data_shards.errors import StorageError
from reid_train.recipes import recipe
from reid_train.registry.registry import Registered
from reid_train.runs import publish
from reid_train.runs.publish import show
from reid_train.runs.run_dir import Summary
from reid_train.tracking.tracker import Tracker

RUN = recipe("demo").replace(name="r", output="s3://b/runs", tracking__uri="off")


def told(model: str | None, **more: Any) -> str:
    summary = Summary(
        name="r",
        metrics={},
        before={},
        images_per_second=1.0,
        report="s3://b/runs/r/report/report.html",
        checkpoint="checkpoint_2",
        model=model,
        champion=model is not None,
        **more,
    )
    screen = io.StringIO()
    show(summary, RUN, Tracker(None, None), Console(file=screen, width=60))
    return screen.getvalue()


def test_summary_names_the_place_of_the_model():
    assert "model      models:/reid-people/3 (now the champion)" in told("models:/reid-people/3")
    assert "model      s3://b/runs/r/checkpoint_2\n" in told(None)


def test_an_address_too_long_for_a_terminal_has_a_line_of_its_own(monkeypatch):
    page = "http://127.0.0.1:5000/#/experiments/1/runs/" + "0" * 32
    monkeypatch.setattr(publish, "run_page", lambda *_: page)
    tracker: Any = SimpleNamespace(uri="http://127.0.0.1:5000", run_id="0" * 32)
    summary = Summary("r", {}, {}, 1.0, "report.html", "checkpoint_2", None, False)
    for terminal, lines in ((True, ["MLflow", page]), (False, [f"MLflow     {page}"])):
        screen = io.StringIO()
        show(summary, RUN, tracker, Console(file=screen, width=80, force_terminal=terminal))
        assert screen.getvalue().splitlines()[-len(lines) :] == lines


def test_the_mean_of_datasets_comes_after_them():
    names = ["mAP/fold", "mAP/mean of datasets", "mAP/people"]
    shown = publish._shown(dict.fromkeys([*names, "mAP", "rank-1"], 0.5))
    assert shown[-3:] == ["mAP/fold", "mAP/people", "mAP/mean of datasets"]


def test_summary_has_the_command_that_opens_a_report_on_s3():
    assert "python -m reid_train report s3://b/runs/r\n" in told(None)


def test_summary_says_that_validation_chose():
    assert "validation" not in told(None)
    shown = told(None, selected_on="validation", test={"mAP": 0.5})
    assert "best epoch chosen by mAP on validation, then measured once on test\n" in shown


def test_without_tracking_nothing_is_registered():
    nothing: Any = None
    assert publish._register(RUN, nothing, nothing, {}, {}, Tracker(None, None)) is None


def test_what_was_not_registered_says_how_a_run_and_a_sweep_register_it(monkeypatch, caplog):
    def away(*_: object, **__: object) -> None:
        raise StorageError("MLflow does not answer")

    monkeypatch.setattr(publish, "registered_version", away)
    monkeypatch.setattr(publish, "attach", away)
    dataset: Any = SimpleNamespace(
        choose_split=lambda split: "test", url="s3://b/data", manifest=SimpleNamespace(name="d")
    )
    best: Any = SimpleNamespace(origin=SimpleNamespace(evaluation_digest="0"))
    tracker: Any = SimpleNamespace(uri="sqlite:///x.db", run_id="1")
    config = RUN.replace(tracking__uri="sqlite:///x.db", tracking__model_name="m")
    assert publish._register(config, dataset, best, {}, {}, tracker) is None
    assert "To register it, continue: a run with --resume, a sweep with the same" in caplog.text
    publish._attach(Registered("m", 3, True, ""), Path("x"), dataset, "validation", tracker)
    command = "evaluate --model models:/m/3 --data s3://b/data --split validation"
    assert f"Register them with python -m reid_train {command}" in caplog.text
