"""Which images a model takes, and what it says of the others."""

from __future__ import annotations

import numpy as np
import pytest

from data_shards.errors import DataError
from reid_train.model.embedder import require_images

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
