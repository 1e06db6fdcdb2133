"""`counting.count_block` for scores on an accelerator, to the same counts."""

from __future__ import annotations

import numpy as np
import torch

from reid_train.evaluation.kernels import rank_counts as counting


def count_block_on_device(
    scores: torch.Tensor, first: int, start: np.ndarray, key: np.ndarray, index: np.ndarray,
    low: np.ndarray, high: np.ndarray, metric: int, query: np.ndarray, block: np.ndarray,
    query_scale: np.ndarray, block_scale: np.ndarray, before: np.ndarray,
) -> None:  # fmt: skip
    """Arguments as `counting.count_block` has them, `scores` on the device.

    The sure comparisons are made there. The pairs too close to call come back, and are scored by
    the very loop that the CPU uses.
    """
    count, device = np.diff(start), scores.device
    width = int(count.max(initial=0))
    if width == 0:
        return
    filled = np.arange(width) < count[:, None]
    limits = np.full((2, len(count), width), np.inf, np.float32)
    limits[0][filled], limits[1][filled] = low[start[0] : start[-1]], high[start[0] : start[-1]]
    lows, highs = torch.from_numpy(limits).to(device)
    certain = torch.searchsorted(lows, scores, right=True, out_int32=True)
    possible = torch.searchsorted(highs, scores, out_int32=True)
    offset = torch.arange(len(count), device=device, dtype=torch.int32)[:, None] * (width + 1)
    arrivals = torch.bincount((certain + offset).flatten(), minlength=len(count) * (width + 1))
    sure = arrivals.view(len(count), width + 1).cumsum(1)[:, :width].cpu().numpy()
    before[start[0] : start[-1]] += sure[filled]

    close = torch.nonzero((possible < certain) & (scores < torch.inf))
    if len(close) == 0:
        return
    bounds = torch.stack([possible[close[:, 0], close[:, 1]], certain[close[:, 0], close[:, 1]]])
    rows, columns = close.cpu().numpy().T.copy()
    exact = np.empty(len(rows))
    counting.score_pairs(
        metric, query, block, query_scale, block_scale, rows, columns, exact
    )  # fmt: skip
    counting.settle_pairs(
        start[rows], bounds.cpu().numpy().astype(np.int64), first + columns, exact,
        key, index, before,
    )  # fmt: skip
