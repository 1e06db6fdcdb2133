"""Names that MLflow does not accept are found before a run starts, with one that it accepts."""

from __future__ import annotations

import pytest

from data_shards.errors import ConfigError
from reid_train.tracking.server import LONGEST, accepted, require_names


@pytest.mark.parametrize(
    "name",
    ["plain", "reid-market1501", "two words", "läuft", "人", "😀", "a#b", "[b]", "a=b;c*d,e"],
)
def test_names_that_mlflow_accepts_are_accepted(name):
    require_names(model=name, experiment=name, run=name)
    assert accepted(name) == name


@pytest.mark.parametrize(
    "name", ["my/data", "people_v1.0", "a:b", "50%", "it's", 'a"b', "a?", "a@b"]
)
def test_a_model_name_that_mlflow_refuses_is_refused_with_a_name_that_it_takes(name):
    with pytest.raises(ConfigError, match=r"--tracking\.model-name") as raised:
        require_names(model=name)
    assert repr(accepted(name)) in str(raised.value)
    require_names(model=accepted(name), experiment=name, run=name)


@pytest.mark.parametrize("name", ["", "  ", " lead", "trail ", "x" * (LONGEST + 1)])
def test_empty_and_very_long_names_are_refused(name):
    for what in ("model", "experiment", "run"):
        with pytest.raises(ConfigError, match=r"MLflow needs 1 to 250") as raised:
            require_names(**{what: name})
        assert len(str(raised.value)) < 160


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\0b"])
def test_control_characters_are_refused(name):
    with pytest.raises(ConfigError, match="'a-b' is one that it accepts"):
        require_names(experiment=name)


def test_a_name_with_nothing_to_keep_becomes_one():
    assert accepted("///") == "model"


def test_names_that_are_not_given_are_not_checked():
    require_names(model=None, experiment=None, run=None)
