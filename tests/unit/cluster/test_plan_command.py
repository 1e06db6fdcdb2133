"""`python -m cluster plan` and `measure`: what they say, refuse, and write."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cluster.cli import main
from cluster.plan.network import describe
from cluster.plan.throughput import Measurement, add_to_table, read_table, speed_of
from data_shards.errors import ConfigError, DataError
from reid_train.recipes import recipe
from reid_train.runs.run_dir import Run
from reid_train.training.history import History

SIZE = [
    "--recipe",
    "demo",
    "--image.height",
    "32",
    "--image.width",
    "32",
    "--batch.identities",
    "4",
]


def entry(**changes) -> Measurement:
    values = {
        "device": "X1", "backbone": "resnet18", "stripes": 2, "height": 96, "width": 48,
        "phase": "all", "precision": "auto", "workers": 1, "batch": 32, "images_per_second": 100.0,
        "gigaflops": 4.0, "decoding": "beside", "date": "2026-01-01", "source": "run",
    }  # fmt: skip
    return Measurement.model_validate(values | changes)


def speed(table, workers=1, phase="all", **changes):
    config = recipe("demo").replace(**changes)
    return speed_of(table, "X1", config, phase, workers, {"heads": 2.0, "all": 4.0})


@pytest.fixture
def plan(tiny_dataset, tmp_path):
    def run(*more: str, gpus: str = "2", gpu_type: str = "X1") -> int:
        asked = ["plan", *SIZE, "--data", tiny_dataset.url, "--gpus", gpus, "--gpu-type", gpu_type]
        return main([*asked, "--table", str(tmp_path / "own.json"), *more])

    return run


def test_plan_says_time_limit_cost_and_where_figures_are_from(plan, tmp_path, capsys):
    path = tmp_path / "plan.json"
    prices = ["--price-per-gpu-hour", "7200", "--images-per-second", "500"]
    assert plan(*prices, "--network-gbit", "25", "--json", str(path)) == 0
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "the limit is" in said
    assert "25 Gbit/s" in said
    assert "assumed" in said
    chosen = found["plan"]
    assert (chosen["workers"], chosen["steps"], chosen["images"]) == (2, 160, 160 * 16)
    assert chosen["cost"] == pytest.approx(2 * chosen["seconds"] / 3600 * 7200)
    assert [row["workers"] for row in found["scaling"]] == [1, 2, 4, 8, 16]
    assert found["facts"]["network_gbit"]["origin"] == "given"


def test_without_prices_there_is_no_cost(plan, capsys):
    assert plan("--images-per-second", "500") == 0
    assert "cost" not in capsys.readouterr().out


def test_unmeasured_gpu_is_no_guess_but_says_how_to_measure(plan, capsys):
    assert plan(gpu_type="Z9") == 2
    said = capsys.readouterr().err
    assert "nothing was measured on 'Z9'" in said
    assert "python -m cluster measure RUN --gpu-type Z9" in said
    assert "--images-per-second" in said


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--recipe", "demmo"], 2, "Did you mean demo?"),
        (["--data", "/nowhere/at/all"], 3, "no dataset at /nowhere/at/all"),
        (["--gpus", "3"], 2, "cannot be shared equally by 3 workers"),
        (["--gpus", "64"], 2, "cannot be shared equally by 64 workers"),
        (["--data", ""], 2, "--data is missing"),
        (["--network-gbit", "0"], 2, "--network-gbit is 0.0"),
        (["--batch.identities", "50"], 2, "the training split has 6"),
    ],
)
def test_bad_input_is_one_line_and_a_code(plan, capsys, more, code, message):
    assert plan("--images-per-second", "9", *more) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_measured_speed_is_taken_as_it_is():
    found = speed([entry()])
    assert (found.seconds, found.origin, found.note) == (0.32, "measured", "run")


def test_other_batches_lie_on_the_line_between_measured_ones():
    table = [entry(), entry(batch=8, images_per_second=50.0, source="small")]
    found = speed(table, workers=2)
    assert found.seconds == pytest.approx(0.16 + (0.32 - 0.16) * (16 - 8) / (32 - 8))
    assert found.origin == "estimated"


def test_one_measured_batch_is_scaled_in_proportion():
    found = speed([entry()], workers=4)
    assert found.seconds == pytest.approx(0.08)
    assert found.origin == "estimated"


def test_another_backbone_is_scaled_by_operations_and_says_so():
    found = speed([entry(backbone="resnet50", gigaflops=16.0)])
    assert found.seconds == pytest.approx(0.32 / 4)
    assert (found.origin, "by operations" in found.note) == ("estimated", True)


def test_same_number_of_workers_measured_includes_what_they_tell_each_other():
    table = [entry(), entry(workers=4, batch=8, images_per_second=200.0, source="four")]
    found = speed(table, workers=4)
    assert (found.seconds, found.talk, found.origin) == (0.16, True, "measured")
    assert not speed(table, workers=2).talk


def test_another_precision_is_not_concluded_from():
    with pytest.raises(ConfigError, match="was measured with precision auto only"):
        speed([entry()], precision="float32")


def test_own_table_comes_first_and_a_run_replaces_itself(tmp_path):
    path = tmp_path / "folder" / "own.json"
    add_to_table(path, [entry(), entry(source="other")])
    add_to_table(path, [entry(images_per_second=400.0)])
    table = read_table(path)
    assert [(e.source, e.images_per_second) for e in table] == [("other", 100.0), ("run", 400.0)]
    assert read_table(tmp_path / "none.json") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"measurements": [{"device": "X1"}]}'])
def test_damaged_table_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"own\.json is not a throughput table"):
        read_table(path)


def finished(folder, data: str, looks: int) -> str:
    """A run's folder as far as `measure` reads it: 20 frozen steps, then more, twice as slow."""
    config = recipe("demo").replace(
        name="done", data=data, output=str(folder), batch__steps_per_epoch=20,
        optimizer__frozen_epochs=1, image__height=32, image__width=32, loader__workers=2,
        batch__identities=4,
    )  # fmt: skip
    history = History()
    for step in range(1, looks + 1):
        rate = 10.0 if step == 1 else (200.0 if step <= 20 else 100.0) + step % 3
        history.add_step(step, {"images_per_second": rate})
    (folder / "done" / "checkpoint_1").mkdir(parents=True)
    history.save(folder / "done" / "checkpoint_1" / "history.safetensors")
    (folder / "done" / "run.json").write_bytes(Run(config, "digest", None).to_json())
    return str(folder / "done")


def test_measure_adds_both_phases_of_a_run_and_plan_uses_them(tiny_dataset, tmp_path, capsys, plan):
    run = finished(tmp_path / "runs", tiny_dataset.url, looks=40)
    own = tmp_path / "own.json"
    assert main(["measure", run, "--gpu-type", "X1", "--table", str(own)]) == 0
    heads, everything = read_table(own)
    assert (heads.phase, heads.images_per_second) == ("heads", pytest.approx(201, abs=1))
    assert (everything.phase, everything.images_per_second) == ("all", pytest.approx(101, abs=1))
    assert (everything.batch, everything.decoding, everything.source) == (16, "beside", "done")
    flops = describe(recipe("demo").replace(image__height=32, image__width=32), 6).phases
    assert np.isclose(everything.gigaflops, flops["all"].flops / 1e9)
    assert plan(gpus="1") == 0
    assert "done" in capsys.readouterr().out


def test_measure_refuses_what_is_no_run_or_too_short(tiny_dataset, tmp_path, capsys):
    def measure(run: str) -> int:
        own = str(tmp_path / "own.json")
        return main(["measure", run, "--gpu-type", "X1", "--table", own])

    assert measure(str(tmp_path / "nothing")) == 2
    assert "run.json is not there" in capsys.readouterr().err
    assert measure(finished(tmp_path / "runs", tiny_dataset.url, looks=2)) == 3
    assert "too short to measure" in capsys.readouterr().err
    assert not (tmp_path / "own.json").exists()
