import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import ConfigError
from reid_train.config import TrainConfig
from reid_train.recipes import RECIPES, recipe
from reid_train.training.losses import loss_weights


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_journey_through_json(name):
    config = recipe(name)
    assert config.recipe == name
    assert TrainConfig.from_json(config.to_json()) == config


def test_the_papers_recipe_has_the_papers_numbers():
    config = recipe("msmt17_resnet50")
    assert (config.batch.identities, config.batch.images, config.batch.steps_per_epoch) == (
        16,
        4,
        200,
    )
    assert config.regularization.amplitude == 0.005
    assert config.regularization.saturation == 2.5
    assert (config.optimizer.frozen_epochs, config.optimizer.epochs) == (20, 200)
    assert config.optimizer.learning_rate == 2e-4
    assert config.optimizer.epsilon == 1e-7
    assert (config.image.height, config.image.width) == (384, 128)
    assert config.loss.label_smoothing == 0.1


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean msmt17_resnet50"):
        recipe("msmt17_resnet5")


def test_an_unknown_setting_in_json_is_refused_by_name():
    with pytest.raises(ConfigError, match="learning_rat"):
        TrainConfig.from_json('{"optimizer": {"learning_rat": 1.0}}')


@given(workers=st.integers(1, 64))
def test_workers_must_share_the_batch_equally(workers):
    config = recipe("msmt17_resnet50")
    if 64 % workers == 0:
        assert config.replace(workers=workers).workers == workers
    else:
        with pytest.raises(ConfigError, match="cannot be shared equally"):
            config.replace(workers=workers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch__identities": 1}, "no anchor has a negative"),
        ({"batch__images": 1}, "greater than or equal to 2"),
        ({"model__batch_norm": "local", "workers": 32}, "needs 2 images or more a worker"),
        ({"name": "../elsewhere"}, "usable as a folder's name"),
        ({"optimizer__learning_rate": 1e-7}, "above the learning rate"),
        ({"regularization__amplitude": -1.0}, "greater than or equal to 0"),
        ({"regularization__amplitude": float("nan")}, "finite"),
    ],
)
def test_a_value_out_of_range_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        recipe("demo").replace(**change)


def test_a_training_without_any_loss_is_refused():
    with pytest.raises(ConfigError, match="no loss has a weight"):
        recipe("demo").replace(loss__cross_entropy_weight=0, loss__triplet_weight=0)


def test_a_weight_of_none_leaves_a_loss_out():
    config = recipe("demo").replace(loss__triplet_weight=None)
    assert loss_weights(config.loss) == {"cross_entropy": 1.0}
