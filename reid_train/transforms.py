"""Augmentation of whole batches on the device: flip, pad and crop, random erasing, normalise.

The parameters are drawn on the CPU for the whole global batch, by a counter-based generator with
the key (seed, step), and each rank takes its slice. So the augmented images do not depend on the
number of workers, on the device, or on whether the run was resumed.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class Pixels(NamedTuple):
    """What a network's weights expect: (RGB / 255 − mean) / standard deviation, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's weights
# (0.4914, 0.4822, 0.4465) × 255, rounded down, because the authors' images hold bytes.
ERASED = (125, 122, 113)
ERASED_AREA = (0.02, 0.4)  # fraction of the image's area
ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width
TRIES = 100


class AugmentParams(NamedTuple):
    """How to augment each image of a batch: arrays of length B, int32 (flip: bool).

    The image is flipped if `flip`. The output's pixel (y, x) is its pixel (y + top, x + left),
    black outside the image. Then the box [erase_top, erase_bottom) × [erase_left, erase_right) is
    filled. An empty box erases nothing.
    """

    flip: np.ndarray
    top: np.ndarray
    left: np.ndarray
    erase_top: np.ndarray
    erase_bottom: np.ndarray
    erase_left: np.ndarray
    erase_right: np.ndarray

    def rows(self, rows: slice) -> Self:
        """Return the parameters of some of the images, such as one rank's slice."""
        return self._make(values[rows] for values in self)


def draw(
    *,
    seed: int,
    step: int,
    batch: int,
    height: int,
    width: int,
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
) -> AugmentParams:
    """Draw how to augment each image of a global batch: a pure function of its arguments.

    Random erasing (Zhong et al., AAAI 2020) draws up to 100 boxes of random area and aspect ratio
    and takes the first that fits. If none fits, nothing is erased.

    Args:
        seed: seed of the run.
        step: number of the batch within the run.
        batch: B, images of the global batch.
        height: height of the images, pixels.
        width: width of the images, pixels.
        flip: probability of a mirror image.
        pad: pixels added to each side before an image-sized crop at a random place.
        erase: probability of random erasing.
    """
    key = np.array([seed % 2**64, step], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    flipped = generator.random(batch) < flip
    top, left = generator.integers(-pad, pad, (2, batch), dtype=np.int32, endpoint=True)

    area = generator.uniform(*ERASED_AREA, (batch, TRIES)) * (height * width)
    aspect = generator.uniform(*ERASED_ASPECT, (batch, TRIES))
    heights, widths = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    first = np.arange(batch), fits.argmax(axis=1)
    erased = (generator.random(batch) < erase) & fits[first]
    box_height = np.where(erased, heights[first], 0).astype(np.int32)
    box_width = np.where(erased, widths[first], 0).astype(np.int32)
    place = generator.random((2, batch))
    box_top = (place[0] * (height - box_height)).astype(np.int32)
    box_left = (place[1] * (width - box_width)).astype(np.int32)
    return AugmentParams(
        flipped, top, left, box_top, box_top + box_height, box_left, box_left + box_width
    )


def apply(
    image: Tensor,
    params: AugmentParams,
    dtype: torch.dtype = torch.float32,
    pixels: Pixels = IMAGENET,
    *,
    pad: int = 10,
) -> Tensor:
    """Augment and normalize a batch, on its device and without waiting for it.

    No shape depends on what was drawn.

    Args:
        image: (B, H, W, 3) uint8, RGB.
        params: how to augment these B images.
        dtype: type of the result.
        pixels: how the network expects them to be scaled.
        pad: that of `draw`.

    Returns:
        (B, 3, H, W), channels_last.
    """
    packed = torch.from_numpy(np.stack(params).astype(np.int64))
    if image.is_cuda:
        packed = packed.pin_memory()
    flip, top, left, *box = packed.to(image.device, non_blocking=True)
    return normalize(_erased(_moved(image, flip, top, left, pad), box), dtype, pixels)


def normalize(
    image: Tensor, dtype: torch.dtype = torch.float32, pixels: Pixels = IMAGENET
) -> Tensor:
    """Turn images (B, H, W, 3) uint8 into network input (B, 3, H, W), channels_last."""
    count, height, width, _ = image.shape
    # Rows of W · 3 values: an innermost dimension of 3 would defeat vector instructions.
    rows = image.reshape(count, height, 3 * width).float()
    one = tuple(1 / (255 * std) for std in pixels.std)
    zero = tuple(-mean / std for mean, std in zip(*pixels, strict=True))
    scale = _row(one, width, torch.float32, image.device)
    shift = _row(zero, width, torch.float32, image.device)
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.to(dtype).view(count, height, width, 3).permute(0, 3, 1, 2)


def _moved(image: Tensor, flip: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """Return the images flipped, zero-padded and cropped, (B, H, W, 3) uint8."""
    count, height, width, _ = image.shape
    # The originals, then all mirror images, within a black frame.
    padded = image.new_zeros(2 * count, height + 2 * pad, width + 2 * pad, 3)
    inner = padded[:, pad : pad + height, pad : pad + width]
    inner[:count] = image
    inner[count:] = image.flip(2)

    # Each row of a crop is contiguous in `padded`. So view `padded` as overlapping windows of a
    # row's length, one at every pixel, and gather the windows at which rows start.
    windows = padded.view(-1).unfold(0, 3 * width, 3)
    source = torch.arange(count, device=image.device) + count * flip
    first = (source * padded.shape[1] + top + pad) * padded.shape[2] + left + pad
    below = torch.arange(height, device=image.device) * padded.shape[2]
    return windows.index_select(0, (first[:, None] + below).flatten()).view(image.shape)


def _erased(image: Tensor, box: Sequence[Tensor]) -> Tensor:
    """Fill the images' boxes, in place; return the images (B, H, W, 3) uint8."""
    count, height, width, _ = image.shape
    top, bottom, left, right = (bound[:, None] for bound in box)
    y = torch.arange(height, device=image.device)
    x = torch.arange(3 * width, device=image.device) // 3
    # Bytes of all ones or all zeros, so that masking is a bitwise operation.
    chosen_y = ((y >= top) & (y < bottom)).to(torch.uint8).neg_()[:, :, None]  # (B, H, 1)
    chosen_x = ((x >= left) & (x < right)).to(torch.uint8).neg_()[:, None, :]  # (B, 1, 3 W)
    fill = _row(ERASED, width, torch.uint8, image.device)
    rows = image.view(count, height, 3 * width)
    rows.bitwise_and_((chosen_y & chosen_x).bitwise_not_())
    rows.bitwise_or_(chosen_y & (chosen_x & fill))
    return image


@cache
def _row(pixel: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a row of equal pixels, (W · 3,)."""
    return torch.tensor(pixel, dtype=dtype).repeat(width).to(device)
