"""Pictures of a sweep."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from trials import searched_more, swept, trained

from data_shards.errors import ConfigError
from data_shards.storage import open_storage
from reid_train.config import TrainConfig
from reid_train.training.history import History
from tune import plots
from tune.results import ranking
from tune.space import MODE, build, default, draw


@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_sweep_of_any_size_is_drawn(tmp_path: Path, count: int):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    extra = {"batch.images": "choice(2, 4)", "loss.label_smoothing": "uniform(0, 0.3)"}
    space = build(default(base) | extra, base)
    rng = np.random.default_rng(0)
    trials = swept() if count else [trained(0, 0.5, {MODE: "none"})]
    storage = open_storage(str(tmp_path / "sweep"))
    history = History()
    history.tensor_names, history.tensor_kinds = ["a", "b"], ["kernel", "bias"]
    for step in range(5):
        history.add_factors(step, np.array([0.002, 0.001 * (4 - step)], np.float32))
    for number in range(len(trials), len(trials) + count):
        trials.append(trained(number, 0.5 + 0.1 * rng.random(), draw(space, rng)))
        folder = tmp_path / "sweep" / f"trial-{number:03d}" / "c4"
        folder.mkdir(parents=True)
        history.save(folder / "history.safetensors")
    if count > 1:
        trials[-1].state, trials[-1].reason = "stopped", "behind others"
        trials[-2].state, trials[-2].reason = "failed", "the loss is not finite"
        trials[-3].state, trials[-3].reason = "failed", "is not a valid configuration"
        trials[-3].values |= {"optimizer.learning_rate": 1e-9}
        with pytest.raises(ConfigError):
            trials[-3].config(base)
    out = tmp_path / "report"
    missing = plots.draw(out, trials, ranking(trials, base), base, space, storage)
    names = {"landscape", "parallel", "slice", "importance", "timeline", "factors"}
    drawn = {path.stem for path in out.iterdir()}
    assert drawn >= {"landscape", "timeline"}
    assert drawn == names if count else drawn < names
    assert {name for name in names if f"{name}.png" in " ".join(missing)} == names - drawn
    for path in out.iterdir():
        height, width, _ = imread(path).shape
        assert width > 900
        assert height > 200


def test_the_landscape_names_what_the_ranking_names(tmp_path: Path, monkeypatch):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    space, said = build(default(base), base), []

    def note(axes, x, y, text, colour, side):
        said.append(text)

    module = importlib.import_module("tune.plots.landscape")  # `plots` has the function there
    monkeypatch.setattr(module, "_point_out", note)
    few, more = swept({0: [0.82, 0.83], 5: [0.53, 0.54]}), searched_more()
    for trials in (few, more):
        entries = ranking(trials, base)
        module.landscape(tmp_path / "a.png", trials, entries, base, space)
    assert said == ["paper 82.5%", "best 64.0%", "paper 60.0%"]


def test_a_few_points_have_no_parallel_coordinates(tmp_path: Path):
    base = TrainConfig().replace(**{"optimizer__epochs": 4, "optimizer__frozen_epochs": 0})
    trials, space = swept(), build(default(base), base)
    storage = open_storage(str(tmp_path / "sweep"))
    missing = plots.draw(tmp_path / "r", trials, ranking(trials, base), base, space, storage)
    assert "No importance.png and parallel.png: they need 4 finished trials" in missing[0]
    assert (tmp_path / "r" / "slice.png").exists()
    assert not (tmp_path / "r" / "parallel.png").exists()
