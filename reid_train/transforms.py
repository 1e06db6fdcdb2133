"""Augmentation of whole batches on the device: flip, pad and crop, random erasing, normalise.

What is done to an image is drawn on the CPU for the whole global batch from a counter-based
generator keyed by (seed, step), then sliced by rank. So the augmented images depend neither on the
number of workers, nor on the device, nor on whether the run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# torchvision's ImageNet weights want RGB / 255, less the mean, over the standard deviation.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# (0.4914, 0.4822, 0.4465) × 255, cut to the bytes that the authors' images hold.
ERASED = (125, 122, 113)
ERASED_AREA = (0.02, 0.4)  # of the image's
ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width
TRIES = 100


@dataclass(frozen=True, slots=True)
class AugmentParams:
    """What happens to each image of a batch: columns of length B, int32 (flip: bool).

    The output pixel (y, x) is that of the flipped image at (y + top, x + left), black outside it;
    then the box [erase_top, erase_bottom) × [erase_left, erase_right) is filled: empty for none.
    """

    flip: np.ndarray
    top: np.ndarray
    left: np.ndarray
    erase_top: np.ndarray
    erase_bottom: np.ndarray
    erase_left: np.ndarray
    erase_right: np.ndarray

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, rows: slice) -> AugmentParams:
        """Return the columns of some images, as of one rank's slice of the global batch."""
        return AugmentParams(
            self.flip[rows],
            self.top[rows],
            self.left[rows],
            self.erase_top[rows],
            self.erase_bottom[rows],
            self.erase_left[rows],
            self.erase_right[rows],
        )


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
    """Draw what happens to each image of a global batch: a pure function of its arguments.

    Random erasing (Zhong et al., AAAI 2020) tries up to 100 boxes of random area and aspect ratio
    and takes the first that fits; where none does, nothing is erased.

    Args:
        seed: of the run.
        step: number of the batch within the run.
        batch: B, images of the global batch.
        height: of the images, pixels.
        width: of the images, pixels.
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


def apply(image: Tensor, params: AugmentParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Augment and normalise a batch, on its device and without waiting for it.

    Args:
        image: (B, H, W, 3) uint8, RGB.
        params: of these B images.
        dtype: of the result.

    Returns:
        (B, 3, H, W), channels_last, of the ImageNet weights' scale.
    """
    return normalize(_erased(_moved(image, params), params), dtype)


def normalize(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn images (B, H, W, 3) uint8 into network input (B, 3, H, W), channels_last."""
    count, height, width, _ = image.shape
    # Rows of W · 3 values: an innermost dimension of 3 would defeat vector instructions.
    rows = image.reshape(count, height, 3 * width).float()
    scale = _row(tuple(1 / (255 * s) for s in STD), width, torch.float32, image.device)
    shift = _row(
        tuple(-m / s for m, s in zip(MEAN, STD, strict=True)), width, torch.float32, image.device
    )
    torch.addcmul(shift, rows, scale, out=rows)
    return rows.to(dtype).view(count, height, width, 3).permute(0, 3, 1, 2)


def _moved(image: Tensor, params: AugmentParams) -> Tensor:
    """Return the images flipped, zero-padded and cropped, (B, H, W, 3) uint8."""
    count, height, width, _ = image.shape
    pad = int(max(abs(params.top).max(), abs(params.left).max()))
    flipped = np.flatnonzero(params.flip)
    source = np.arange(count)
    source[flipped] = count + np.arange(len(flipped))

    # Mirror images stand behind the originals, all within a black frame.
    padded = image.new_zeros(count + len(flipped), height + 2 * pad, width + 2 * pad, 3)
    inner = padded[:, pad : pad + height, pad : pad + width]
    inner[:count] = image
    inner[count:] = image.index_select(0, _to_device(flipped, image.device)).flip(2)

    # A crop's rows are contiguous bytes of `padded`. So view it as one window of a row's length
    # at every pixel, overlapping, and gather the windows where rows start.
    windows = padded.view(-1).as_strided((padded.numel() // 3 - width + 1, 3 * width), (3, 1))
    first = (source * padded.shape[1] + params.top + pad) * padded.shape[2] + params.left + pad
    below = torch.arange(height, device=image.device) * padded.shape[2]
    start = _to_device(first, image.device)[:, None] + below
    return windows.index_select(0, start.flatten()).view(image.shape)


def _erased(image: Tensor, params: AugmentParams) -> Tensor:
    """Fill the images' boxes, in place; return the images (B, H, W, 3) uint8."""
    count, height, width, _ = image.shape
    bounds = np.stack(
        [params.erase_top, params.erase_bottom, params.erase_left, params.erase_right]
    )
    top, bottom, left, right = _to_device(bounds, image.device)[:, :, None]
    y = torch.arange(height, device=image.device)
    x = torch.arange(3 * width, device=image.device) // 3
    # All bits or none, so that a mask is a bitwise operation on bytes.
    chosen_y = ((y >= top) & (y < bottom)).to(torch.uint8).neg_()[:, :, None]  # (B, H, 1)
    chosen_x = ((x >= left) & (x < right)).to(torch.uint8).neg_()[:, None, :]  # (B, 1, 3 W)
    fill = _row(ERASED, width, torch.uint8, image.device)
    rows = image.view(count, height, 3 * width)
    rows.bitwise_and_((chosen_y & chosen_x).bitwise_not_())
    rows.bitwise_or_(chosen_y & (chosen_x & fill))
    return image


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an int64 tensor on the device, without waiting for the device."""
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)


@cache
def _row(pixel: tuple[float, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a row of equal pixels, (W · 3,)."""
    return torch.tensor(pixel, dtype=dtype).repeat(width).to(device)
