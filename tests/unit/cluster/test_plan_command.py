"""`python -m cluster plan` and `measure`: what they print, refuse and write."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cluster.cli import main
from cluster.measure import PACKAGED, Measurement, add_to_table, read_table, steps_needed
from cluster.plan.command import Plan
from cluster.plan.estimate import Network, Speed, describe, speed_of
from data_shards.errors import DataError
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
        "device": "X1", "backbone": "resnet18", "stripes": 2, "height": 80, "width": 40,
        "phase": "all", "precision": "auto", "compile": True, "workers": 1, "batch": 32,
        "images_per_second": 100.0, "gigaflops": 4.0, "decoding": "beside", "date": "2026-01-01",
        "source": "run",
    }  # fmt: skip
    return Measurement.model_validate(values | changes)


NETWORK = Network(0, 0, 0, 0, 0, 0, forward=1.0, flops=4e9)


def speed(table, workers=1, **changes) -> Speed | None:
    config = recipe("demo").replace(workers=workers, **changes)
    return speed_of(table, config, "X1", NETWORK)


@pytest.fixture
def plan(tiny_dataset, tmp_path):
    def run(*more: str, gpus: str = "2", gpu_type: str = "X1") -> int:
        asked = ["plan", *SIZE, "--data", tiny_dataset.url, "--gpus", gpus, "--gpu-type", gpu_type]
        return main([*asked, "--table", str(tmp_path / "own.json"), *more])

    return run


def test_plan_says_time_limit_cost_and_where_the_speed_is_from(plan, tmp_path, capsys):
    path = tmp_path / "plan.json"
    prices = ["--price-per-gpu-hour", "7200", "--images-per-second", "500"]
    assert plan(*prices, "--json", str(path)) == 0
    shown, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "The limit is" in shown
    assert "--images-per-second" in shown
    chosen = found["plan"]
    assert (chosen["workers"], chosen["steps"], chosen["images"]) == (2, 160, 160 * 16)
    assert chosen["cost"] == pytest.approx(2 * chosen["seconds"] / 3600 * 7200)
    assert [row["workers"] for row in found["scaling"]] == [1, 2, 4, 8, 16]


def test_without_prices_there_is_no_cost(plan, capsys):
    assert plan("--images-per-second", "500") == 0
    assert "cost" not in capsys.readouterr().out


def test_where_more_gpus_are_slower_fewer_are_advised(plan, capsys):
    slow = ("--images-per-second", "500", "--collective-microseconds", "100000")
    assert plan(*slow) == 0
    assert "2 GPUs are slower than 1: use 1 GPU." in capsys.readouterr().out
    assert plan(*slow, gpus="1") == 0
    assert "slower" not in capsys.readouterr().out


def test_unmeasured_gpu_is_no_guess_but_says_what_is_known_and_how_to_measure(plan, capsys):
    assert plan(gpu_type="my gpu") == 2
    error = capsys.readouterr().err
    assert "no speed of my gpu with precision auto is known, only of H100" in error
    assert "--batch.steps-per-epoch 30" in error
    assert "python -m cluster measure OUTPUT/probe --gpu-type 'my gpu'" in error
    assert "--images-per-second" in error


def test_help_says_of_which_gpus_a_speed_is_packaged():
    for entry in read_table(PACKAGED):
        assert entry.device in (Plan.__doc__ or "")


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
    *phases, error = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert set(phases) <= {"loading PyTorch", "opening the dataset"}


def test_measured_speed_is_taken_as_it_is():
    assert speed([entry()]) == (0.32, "run", False)


def test_another_batch_is_in_proportion_to_the_nearest_and_says_so():
    table = [entry(batch=64), entry(batch=8, images_per_second=50.0, source="small")]
    found = speed(table, workers=2)
    assert found == (pytest.approx(0.32), "small, × 16/8 for the images", False)


def test_another_backbone_is_scaled_by_operations_and_says_so():
    found = speed([entry(backbone="resnet50", gigaflops=16.0)])
    assert found == (0.08, "run, × 0.25 for the operations of an image", False)


def test_same_number_of_workers_measured_includes_their_exchange():
    table = [entry(), entry(workers=4, batch=8, images_per_second=200.0, source="four")]
    assert speed(table, workers=4) == (0.16, "four", True)
    assert speed(table, workers=2) == (pytest.approx(0.16), "run, × 16/32 for the images", False)


@pytest.mark.parametrize(
    "changes", [{"precision": "float32"}, {"phase": "heads"}, {"device": "X2"}]
)
def test_nothing_is_concluded_from_another_kind_of_run(changes):
    assert speed([entry(**changes)]) is None


def test_compiled_run_is_planned_from_an_eager_one_only_if_there_is_no_other():
    eager = entry(compile=False, images_per_second=50.0, source="eager")
    found = speed([eager])
    assert found == (0.64, "eager, not compiled: compiling makes it faster", False)
    assert speed([eager, entry()]) == (0.32, "run", False)
    assert speed([eager, entry()], compile="off") == (0.64, "eager", False)
    assert speed([entry()], compile="off") is None


def test_own_table_comes_first_and_a_run_replaces_itself(tmp_path):
    path = tmp_path / "folder" / "own.json"
    another = entry(device="X2")  # a run of the same name on another device
    for one in (entry(), entry(source="other"), another, entry(images_per_second=400.0)):
        add_to_table(path, one)
    table = read_table(path)
    assert [(e.source, e.images_per_second) for e in table] == [
        ("other", 100.0), ("run", 100.0), ("run", 400.0),
    ]  # fmt: skip
    assert table[1] == another
    assert read_table(tmp_path / "none.json") == []


@pytest.mark.parametrize("text", ["{", "[]", '{"measurements": [{"device": "X1"}]}'])
def test_damaged_table_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"own\.json is not a throughput table"):
        read_table(path)


def finished(folder, data: str, looks: int, every: int = 1) -> str:
    """A run's folder as far as `measure` reads it: 20 frozen steps, then more, twice as slow."""
    config = recipe("demo").replace(
        name="done", data=data, output=str(folder), batch__steps_per_epoch=20,
        optimizer__frozen_epochs=1, image__height=32, image__width=32, loader__workers=2,
        batch__identities=4,
    )  # fmt: skip
    history = History()
    for step in range(1, looks + 1):
        window = (step - 1) // every
        rate = 10.0 if step == 1 else (200.0 if step <= 20 else 100.0) + window % 3
        history.add_step(step, {"images_per_second": rate})
    (folder / "done" / "checkpoint_1").mkdir(parents=True)
    history.save(folder / "done" / "checkpoint_1" / "history.safetensors")
    (folder / "done" / "run.json").write_bytes(Run(config, "digest", None).to_json())
    return str(folder / "done")


def test_measure_adds_the_speed_of_a_run_and_plan_uses_it(tiny_dataset, tmp_path, capsys, plan):
    run = finished(tmp_path / "runs", tiny_dataset.url, looks=40)
    own = tmp_path / "own.json"
    assert main(["measure", run, "--gpu-type", "X1", "--table", str(own)]) == 0
    (found,) = read_table(own)
    assert (found.phase, found.images_per_second) == ("all", pytest.approx(101, abs=1))
    assert (found.batch, found.decoding, found.source) == (16, "beside", "done")
    config = recipe("demo").replace(image__height=32, image__width=32)
    assert np.isclose(found.gigaflops, describe(config, 6).flops / 1e9)
    assert plan(gpus="1") == 0
    assert "from done" in capsys.readouterr().out


def test_measure_takes_a_run_of_the_steps_that_plan_advises(tiny_dataset, tmp_path, capsys):
    config = recipe("demo")
    steps = steps_needed(config)

    def measure(steps: int) -> int:
        folder = tmp_path / str(steps)
        run = finished(folder, tiny_dataset.url, looks=20 + steps, every=10)
        return main(["measure", run, "--gpu-type", "X1", "--table", str(tmp_path / "own.json")])

    assert measure(steps) == 0
    assert measure(20) == 3
    assert f"it has 20 steps with everything trained and needs {steps}" in capsys.readouterr().err


def test_measure_refuses_what_is_no_run(tmp_path, capsys):
    own = tmp_path / "own.json"
    assert (
        main(["measure", str(tmp_path / "nothing"), "--gpu-type", "X1", "--table", str(own)]) == 2
    )
    assert "nothing/run.json is missing" in capsys.readouterr().err
    assert not own.exists()
