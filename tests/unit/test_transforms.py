"""Augmentation: against a naive reference an image at a time, and the distributions drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reid_train import transforms
from reid_train.transforms import AugmentParams

FILL = np.trunc(np.array([0.4914, 0.4822, 0.4465]) * 255)


def _images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _naive(images: np.ndarray, params: AugmentParams, pad: int) -> np.ndarray:
    """The same an image at a time, as the steps read; (B, H, W, 3) uint8."""
    results = []
    for i, image in enumerate(images):
        height, width, _ = image.shape
        if params.flip[i]:
            image = image[:, ::-1]
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = params.top[i] + pad, params.left[i] + pad
        image = padded[top : top + height, left : left + width].copy()
        rows = slice(params.erase_top[i], params.erase_bottom[i])
        columns = slice(params.erase_left[i], params.erase_right[i])
        image[rows, columns] = FILL
        results.append(image)
    return np.stack(results)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    batch=st.integers(1, 9),
    height=st.integers(3, 40),
    width=st.integers(3, 24),
    pad=st.integers(0, 12),
)
def test_a_batch_equals_its_images_one_at_a_time(seed, batch, height, width, pad):
    images = _images(batch, height, width)
    params = transforms.draw(seed=seed, step=3, batch=batch, height=height, width=width, pad=pad)
    before = images.clone()
    result = transforms.apply(images, params, pad=pad)
    expected = _naive(images.numpy(), params, pad)
    assert torch.equal(result, transforms.normalize(torch.from_numpy(expected)))
    assert torch.equal(images, before), "the loader's images are left alone"


def test_pixels_are_scaled_as_the_imagenet_weights_expect():
    images = _images(3, 7, 5)
    scaled = (images.numpy() / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = transforms.normalize(images).permute(0, 2, 3, 1)
    np.testing.assert_allclose(result.numpy(), scaled, rtol=1e-5, atol=1e-6)


def test_ranks_slices_make_the_global_batch():
    images = _images(8, 48, 32)
    params = transforms.draw(seed=1, step=5, batch=8, height=48, width=32)
    whole = transforms.apply(images, params)
    parts = [
        transforms.apply(images[i : i + 2], params.rows(slice(i, i + 2))) for i in range(0, 8, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)


def _columns(params: AugmentParams) -> np.ndarray:
    return np.stack(params)


def test_draws_depend_only_on_seed_and_step():
    def columns(seed: int, step: int) -> np.ndarray:
        return _columns(transforms.draw(seed=seed, step=step, batch=64, height=384, width=128))

    np.random.seed(0)  # noqa: NPY002
    first = columns(7, 11)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(columns(7, 11), first)
    assert not np.array_equal(columns(7, 12), first)
    assert not np.array_equal(columns(8, 11), first)


def test_these_draws_never_change():
    # A resumed run must see the augmentation that the stopped one would have seen, also after an
    # upgrade: a change here breaks every checkpoint's promise.
    params = transforms.draw(seed=1, step=2, batch=4, height=384, width=128)
    expected = [
        [1, 1, 1, 0],
        [-1, -10, 2, -2],
        [-5, -3, 3, 5],
        [351, 175, 119, 375],
        [351, 175, 119, 375],
        [37, 103, 13, 74],
        [37, 103, 13, 74],
    ]
    assert _columns(params).astype(int).tolist() == expected


@pytest.fixture(scope="module")
def many() -> AugmentParams:
    return transforms.draw(seed=0, step=0, batch=20_000, height=384, width=128)


def test_half_of_the_images_are_flipped(many):
    assert many.flip.mean() == pytest.approx(0.5, abs=0.015)


def test_crops_are_uniform_over_the_padding(many):
    for column in (many.top, many.left):
        counts = np.bincount(column + 10, minlength=21)
        assert len(counts) == 21
        assert counts.min() > 0.8 * len(column) / 21


def test_half_of_the_images_are_erased_within_the_published_ranges(many):
    height = many.erase_bottom - many.erase_top
    width = many.erase_right - many.erase_left
    erased = height > 0
    assert erased.mean() == pytest.approx(0.5, abs=0.015)
    assert not width[~erased].any()
    area = height[erased] * width[erased] / (384 * 128)
    assert 0.019 < area.min() < 0.03
    assert 0.36 < area.max() < 0.405
    aspect = height[erased] / width[erased]
    assert 0.28 < aspect.min() < 0.35
    assert 3.0 < aspect.max() < 3.5
    assert many.erase_top.min() >= 0
    assert many.erase_left.min() >= 0
    assert many.erase_bottom.max() <= 384
    assert many.erase_right.max() <= 128
    assert height.max() < 384
    assert width.max() < 128


def test_nothing_is_erased_where_no_box_fits():
    params = transforms.draw(seed=0, step=0, batch=50, height=1, width=1, erase=1.0)
    assert not (params.erase_bottom - params.erase_top).any()


def test_all_off_is_plain_normalisation():
    images = _images(4, 20, 10)
    params = transforms.draw(seed=0, step=0, batch=4, height=20, width=10, flip=0, pad=0, erase=0)
    result = transforms.apply(images, params, pad=0)
    assert torch.equal(result, transforms.normalize(images))


def test_everything_on_touches_every_image():
    params = transforms.draw(seed=0, step=0, batch=50, height=384, width=128, flip=1.0, erase=1.0)
    assert params.flip.all()
    assert (params.erase_bottom > params.erase_top).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_channels_last_of_the_given_dtype(dtype):
    images = _images(2, 20, 10)
    result = transforms.normalize(images, dtype)
    assert (result.shape, result.dtype) == ((2, 3, 20, 10), dtype)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_a_view_are_normalised_alike():
    images = _images(2, 20, 10)
    assert torch.equal(transforms.normalize(images.flip(2)), transforms.normalize(images).flip(3))


class _Shapes(TorchDispatchMode):
    """Notes the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [result.shape] if isinstance(result, torch.Tensor) else []
        return result


def test_no_shape_depends_on_what_was_drawn():
    seen = []
    for seed in range(3):
        params = transforms.draw(seed=seed, step=0, batch=4, height=20, width=10)
        with _Shapes() as shapes:
            transforms.apply(_images(4, 20, 10), params)
        seen.append(shapes.seen)
    assert seen[0] == seen[1] == seen[2]


def test_nothing_waits_for_the_device():
    # A meta tensor has no values: reading one to the host, as a wait would, raises.
    params = transforms.draw(seed=0, step=0, batch=4, height=20, width=10)
    result = transforms.apply(_images(4, 20, 10).to("meta"), params)
    assert (result.shape, result.device.type) == ((4, 3, 20, 10), "meta")
