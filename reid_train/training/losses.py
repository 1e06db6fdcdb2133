"""The losses of an objective head.

To add a loss: write a function that takes a `HeadBatch` and a `LossConfig` and returns the mean
over this rank's anchors, add it to `LOSSES`, and add its weight to `LossConfig` in
`reid_train/config.py` as `<name>_weight: NonNegative | None = None`. Whenever its weight is set, it
is trained, logged as `loss/<name>`, kept in the history and drawn in the report.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reid_train.config import LossConfig


class HeadBatch(NamedTuple):
    """What a loss sees of one head and one global batch, on one rank.

    Anchors are this rank's rows; positives and negatives are looked for in `all_pooled`. So any
    number of ranks gives the same gradient. Anchor i is row `first + i` of `all_pooled`.
    """

    pooled: Tensor  # (B, D) float32, this rank's features before batch norm, in [0, 1]
    logits: Tensor  # (B, C) float32, this rank's
    label: Tensor  # (B,) int64, this rank's, in 0..C-1
    all_pooled: Tensor  # (N, D) float32, of all ranks; gradients flow to the rank they came from
    all_label: Tensor  # (N,) int64, of all ranks
    first: int  # row of all ranks' features that is this rank's first


def label_smoothing_cross_entropy(logits: Tensor, label: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return the mean cross-entropy against (1 − s) · one-hot + s / C, in float32.

    Args:
        logits: (B, C).
        label: (B,) int64, in 0..C-1.
        smoothing: s.

    Returns:
        Scalar, mean over the batch. Szegedy et al., CVPR 2016.
    """
    return F.cross_entropy(logits.float(), label, label_smoothing=smoothing)


def batch_hard_triplet(
    embedding: Tensor,
    pid: Tensor,
    candidates: Tensor | None = None,
    candidate_pid: Tensor | None = None,
) -> Tensor:
    """Return the batch-hard triplet loss with soft margin, in float32 under autocast too.

    softplus(furthest positive − closest negative), mean over anchors, with the Euclidean distance
    sqrt(Σ (a − b)² + 1e-12). The anchor itself counts as a positive (it is never the furthest,
    unless it is the only one). Hermans et al., arXiv 1703.07737.

    Args:
        embedding: (B, D), the anchors.
        pid: (B,) int64, their identities.
        candidates: (N, D), where positives and negatives are looked for; the anchors themselves
            by default. Under data parallelism the gathered embeddings of all ranks.
        candidate_pid: (N,) int64; given exactly when `candidates` is.

    Returns:
        Scalar. An anchor without a negative among the candidates counts 0.
    """
    if candidates is None or candidate_pid is None:
        candidates, candidate_pid = embedding, pid
    anchors, candidates = embedding.float(), candidates.float()
    same = pid[:, None] == candidate_pid[None, :]
    with torch.no_grad():
        # The hardest pairs are chosen outside autograd, so that only B pairs are differentiated and
        # no gradient of a zero distance arises. Exact differences: ‖a‖² + ‖b‖² − 2ab cancels.
        distance = torch.cdist(anchors, candidates, compute_mode="donot_use_mm_for_euclid_dist")
        positive = distance.masked_fill(~same, -torch.inf).argmax(dim=1)
        negative = distance.masked_fill(same, torch.inf).argmin(dim=1)
    furthest = _distance(anchors, candidates[positive])
    closest = _distance(anchors, candidates[negative])
    loss = F.softplus(furthest - closest)
    return torch.where(same.all(dim=1), 0.0, loss).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return sqrt(Σ (a − b)² + 1e-12) of rows, (B,): finite gradient where a equals b."""
    return ((a - b).square().sum(dim=1) + 1e-12).sqrt()


def _cross_entropy(head: HeadBatch, config: LossConfig) -> Tensor:
    return label_smoothing_cross_entropy(head.logits, head.label, config.label_smoothing)


def _triplet(head: HeadBatch, config: LossConfig) -> Tensor:
    return batch_hard_triplet(head.pooled, head.label, head.all_pooled, head.all_label)


# A loss returns a scalar, the mean over this rank's part of the batch.
Loss = Callable[[HeadBatch, LossConfig], Tensor]
LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "triplet": _triplet}


def loss_weights(config: LossConfig) -> dict[str, float]:
    """Return the weight of each loss that is trained. A weight of None leaves a loss out."""
    weights = {name: getattr(config, f"{name}_weight") for name in LOSSES}
    return {name: weight for name, weight in weights.items() if weight is not None}
