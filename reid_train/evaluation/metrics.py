"""Ranks of the positives to CMC, mAP and mINP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

RANKS = (1, 5, 10, 20)
MEAN = "mean of datasets"  # no dataset has spaces in its name


@dataclass(frozen=True)
class RankingResult:
    """How well a gallery answers its queries. Means are of the queries with a match.

    The inverse negative penalty is the number of matches over the rank of the last one (Ye et al.,
    TPAMI 2021).
    """

    cmc: np.ndarray  # (R,) float64; at r - 1 the share of queries with a match among the first r
    mAP: float
    mINP: float
    average_precision: np.ndarray  # (Q,) float64, NaN for a query without a match
    inverse_negative_penalty: np.ndarray  # (Q,) float64, NaN for a query without a match
    first_match_rank: np.ndarray  # (Q,) int64, from 1; 0 for a query without a match
    valid: int  # how many queries have a match
    tar_at_far: dict[float, float] | None = None  # true by false accept rate, if measured

    def summary(self) -> dict[str, float]:
        """The metrics by name: mAP, mINP, rank-1, rank-5, … up to the length of the CMC."""
        ranks = {f"rank-{r}": float(self.cmc[r - 1]) for r in RANKS if r <= len(self.cmc)}
        accepted = {f"TAR@FAR={far:g}": tar for far, tar in (self.tar_at_far or {}).items()}
        return {"mAP": self.mAP, "mINP": self.mINP} | ranks | accepted

    def summary_of(self, queries: np.ndarray) -> dict[str, float]:
        """The same of some queries, by a mask (Q,), without TAR; empty if none has a match."""
        chosen = queries & (self.first_match_rank > 0)
        if not chosen.any():
            return {}
        means = {
            "mAP": float(self.average_precision[chosen].mean()),
            "mINP": float(self.inverse_negative_penalty[chosen].mean()),
        }
        first = self.first_match_rank[chosen]
        ranks = [r for r in RANKS if r <= len(self.cmc)]
        return means | {f"rank-{r}": float((first <= r).mean()) for r in ranks}


def of_each_dataset(
    result: RankingResult, names: Sequence[str], origin: np.ndarray
) -> dict[str, dict[str, float]]:
    """The metrics of the queries of each dataset in a merged one, and the means of these.

    Each query is ranked in the gallery of all datasets. Empty if there is one dataset.

    Args:
        result: of all queries.
        names: of the datasets.
        origin: (Q,) each query's dataset, a position in `names`.
    """
    found = {name: result.summary_of(origin == n) for n, name in enumerate(names)}
    found = {name: summary for name, summary in found.items() if summary}
    if len(found) < 2:
        return {}
    first = next(iter(found.values()))
    mean = {measure: fmean(summary[measure] for summary in found.values()) for measure in first}
    return found | {MEAN: mean}


def by_name(datasets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """mAP and rank-1 of each dataset, named as in MLflow, such as `mAP/people`."""
    return {
        f"{measure}/{name}": summary[measure]
        for name, summary in datasets.items()
        for measure in ("mAP", "rank-1")
    }


def metrics_of(start: np.ndarray, before: np.ndarray, max_rank: int) -> RankingResult:
    """Metrics of each query's positives, from the closest to the furthest.

    `before` (P,) int64: images of other identities before each, junk not counted. `start` (Q + 1,):
    where each query's positives start in it. The CMC has the length `max_rank`.
    """
    count = np.diff(start)
    valid = np.flatnonzero(count)
    nth = np.arange(1, len(before) + 1) - np.repeat(start[:-1], count)
    rank = before + nth
    precision, penalty = np.full((2, len(count)), np.nan)
    precision[valid] = np.add.reduceat(nth / rank, start[valid]) / count[valid]
    penalty[valid] = count[valid] / rank[start[valid + 1] - 1]
    first = np.zeros(len(count), np.int64)
    first[valid] = rank[start[valid]]
    hits = np.bincount(np.minimum(first[valid], max_rank + 1), minlength=max_rank + 2)
    return RankingResult(
        cmc=np.cumsum(hits)[1:-1] / len(valid),
        mAP=float(precision[valid].mean()),
        mINP=float(penalty[valid].mean()),
        average_precision=precision,
        inverse_negative_penalty=penalty,
        first_match_rank=first,
        valid=len(valid),
    )
