"""A model of a folder: which images it takes, what it says of others, and how it embeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data_shards.errors import DataError
from data_shards.loading.decode import decode_into
from reid_train.config import ImageConfig, ModelConfig, TrainConfig
from reid_train.model.embedder import CONFIG, WEIGHTS, Embedder, require_images, resize
from reid_train.model.network import ReidNet

IMAGES = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


@pytest.mark.parametrize("given", [IMAGES, list(IMAGES), IMAGES.tolist(), tuple(IMAGES)])
def test_images_and_lists_of_images_are_taken_as_they_are(given):
    taken = require_images(given)
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, IMAGES)


def test_an_empty_batch_is_taken():
    assert require_images(IMAGES[:0]).shape == (0, 4, 5, 3)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (IMAGES / 255, "(255 * images).round().astype(numpy.uint8)"),
        (IMAGES.astype(np.float32), "images.round().astype(numpy.uint8)"),
        (IMAGES.astype(np.int64), "images.round().astype(numpy.uint8)"),
        (IMAGES / 60 - 1, "without normalization (these are from -1 to 0.9833)"),
        (IMAGES / np.nan, "without normalization (these are from nan to nan)"),
        (IMAGES[0], "images[None]"),
        (IMAGES[0].transpose(2, 0, 1), "images.transpose(1, 2, 0)[None]"),
        (IMAGES.transpose(0, 3, 1, 2), "images.transpose(0, 2, 3, 1)"),
        (IMAGES[..., [0, 1, 2, 0]], "images[..., :3]"),
        (IMAGES[..., :1], "images.repeat(3, axis=3)"),
        (IMAGES[:, :0], "these images have no pixels"),
        ([IMAGES[0], IMAGES[0, 1:]], "a list of images of several sizes"),
        ([], "numpy.empty((0, H, W, 3), numpy.uint8)"),
        (["a.jpg"], "an array of numbers"),
        (np.array([IMAGES[0], None], object), "an array of numbers"),
        ("a.jpg", "not str: convert them to a NumPy array"),
        (None, "not NoneType: convert them to a NumPy array"),
    ],
)
def test_other_images_are_refused_with_how_to_convert_them(given, advice):
    with pytest.raises(DataError) as raised:
        require_images(given)
    assert str(raised.value).startswith("images must be (N, H, W, 3) uint8, RGB")
    assert advice in str(raised.value)


def test_advice_on_shape_and_on_values_comes_together():
    with pytest.raises(DataError, match=r"transpose.* and scale the values"):
        require_images(IMAGES.transpose(0, 3, 1, 2) / 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for images of 32 × 16 pixels, as a checkpoint has it."""
    folder = tmp_path_factory.mktemp("model")
    model = ModelConfig(backbone="timm:test_resnet", weights="none", stripes=1)
    config = TrainConfig(recipe="test", image=ImageConfig(height=32, width=16), model=model)
    save_file(ReidNet.from_config(config, identities=5).state_dict(), folder / WEIGHTS)
    (folder / CONFIG).write_text(config.to_json())
    return folder


def test_embeddings_are_of_the_image_and_its_mirror(folder):
    embedder = Embedder.from_folder(folder, "cpu")
    images = np.random.default_rng(1).integers(0, 256, (3, 40, 24, 3), np.uint8)
    np.testing.assert_allclose(embedder(images), embedder(images[:, :, ::-1].copy()), atol=1e-5)
    assert embedder(images[:0]).shape == (0, 96 + 96)


@pytest.mark.parametrize("size", [(40, 24), (90, 50), (31, 100), (32, 16)])
def test_images_are_resized_as_the_loader_does(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    file = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
    loaded = np.empty((32, 16, 3), np.uint8)
    decode_into(file, loaded)
    np.testing.assert_array_equal(resize(image[None], 32, 16)[0], loaded)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 3, 32, 16), np.uint8), np.zeros((2, 32, 16, 3), np.float32)]
)
def test_images_of_another_shape_or_type_are_refused(folder, wrong):
    with pytest.raises(DataError, match=r"must be \(N, H, W, 3\) uint8"):
        Embedder.from_folder(folder, "cpu")(wrong)


def damage_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def damage_truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def damage_other_network(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop("reductions.0.weight")
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_other_network])
def test_damaged_model_is_refused(folder, tmp_path, damage):
    folder = Path(shutil.copytree(folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(DataError, match=str(folder)):
        Embedder.from_folder(folder)
