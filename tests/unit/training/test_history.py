import numpy as np

from reid_train.training.history import History


def test_history_is_the_same_after_saving(tmp_path):
    history = History(tensor_names=["a.weight", "a.bias"], tensor_kinds=["kernel", "bias"])
    history.add_step(1, {"loss": 2.0})
    history.add_step(2, {"loss": 1.0})
    history.add_evaluation(0, {"mAP": 0.1}, 0)
    history.add_factors(2, np.array([0.1, 0.2]))
    history.save(tmp_path / "history.safetensors")
    read = History.load(tmp_path / "history.safetensors")
    assert read.steps == history.steps == {"step": [1.0, 2.0], "loss": [2.0, 1.0]}
    assert read.evaluations == {"epoch": [0.0], "mAP": [0.1]}
    assert read.tensor_names == ["a.weight", "a.bias"]
    assert read.tensor_kinds == ["kernel", "bias"]
    np.testing.assert_array_equal(read.factors()[0], [2])
    np.testing.assert_array_equal(read.factors()[1], np.array([[0.1, 0.2]], np.float32))


def test_an_empty_history_can_be_saved(tmp_path):
    History().save(tmp_path / "history.safetensors")
    steps, values = History.load(tmp_path / "history.safetensors").factors()
    assert len(steps) == len(values) == 0


def test_columns_stay_equally_long_when_one_starts_late():
    history = History()
    history.add_step(1, {"loss": 2.0})
    history.add_step(2, {"loss": 1.0, "penalty": 0.5})
    history.add_step(3, {"loss": 1.0})
    assert history.steps["loss"] == [2.0, 1.0, 1.0]
    np.testing.assert_array_equal(history.steps["penalty"], [np.nan, 0.5, np.nan])


def test_replay_logs_each_value_at_its_step_in_order():
    history = History()
    history.add_step(1, {"loss": 2.0})
    history.add_step(2, {"loss": 1.0})
    history.add_evaluation(0, {"mAP": 0.1}, 0)
    history.add_evaluation(1, {"mAP": 0.2}, 2)
    history.add_factors(2, np.array([0.25, 0.5, 0.75]))
    logged = []
    history.replay(lambda values, step: logged.append((step, values)))
    assert logged == [
        (1, {"loss": 2.0}),
        (2, {"loss": 1.0}),
        (0, {"mAP": 0.1}),
        (2, {"mAP": 0.2}),
        (2, {"factor/min": 0.25, "factor/median": 0.5, "factor/max": 0.75}),
    ]


def test_metrics_of_a_validation_split_have_names_of_their_own(tmp_path):
    history = History(split="validation")
    history.add_evaluation(1, {"mAP": 0.2}, 2)
    history.save(tmp_path / "history.safetensors")
    logged = []
    read = History.load(tmp_path / "history.safetensors")
    read.replay(lambda values, step: logged.append((step, values)))
    assert logged == [(2, {"validation/mAP": 0.2})]
    assert read.evaluations["mAP"] == [0.2]
