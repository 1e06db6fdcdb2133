"""From which similarity on two images show the same person, at a rate of false accepts.

A threshold is the lowest similarity above which at most the wanted share of impostor pairs (of
different people) lies. Similarities are told apart to 2 / 262,144. Its interval comes from a
bootstrap over identities, because the pairs of one person are not independent: people are drawn
again, with their query and their gallery images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from data_shards.errors import DataError
from data_shards.progress import Progress, silent
from data_shards.records import NO_CAMERA
from reid_train.evaluation.ground_truth import GroundTruth, Labels, find_ground_truth
from reid_train.evaluation.kernels.rank_counts import histogram_by_group
from reid_train.evaluation.measures import COSINE
from reid_train.evaluation.similarity import Features
from reid_train.evaluation.tasks import Separate, ignore, ranges
from reid_train.evaluation.verification import BINS, BLOCK, count_distances, scored_pairs

RATES = (1e-2, 1e-3, 1e-4, 1e-5)
USUAL_RATE = 1e-3  # of false accepts, where none is asked for
ERRORS = 30
"""Fewest false accepts that a rate is measured from: then it is within 30 % of the true one with
90 % confidence if pairs are independent (Doddington et al., Speech Communication 31, 2000)."""
SAMPLES, SEED = 1000, 0  # of the bootstrap
LOW, HIGH = 2.5, 97.5  # percentiles of the samples that end an interval
LOOSEST, STEPS = 0.1, 64  # rate of false accepts up to which samples are counted; steps a decade
POINTS = 200  # of the curve and the histograms


class Threshold(NamedTuple):
    """The threshold at one rate of false accepts; intervals have a confidence of 95 %."""

    false_accept_rate: float
    similarity: float
    low: float
    high: float
    true_accept_rate: float
    true_accept_low: float
    true_accept_high: float


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of a model on a query and gallery, and how its similarities are distributed."""

    impostors: int  # pairs of different people
    genuine: int  # pairs of one person from different cameras
    identities: int
    at: tuple[Threshold, ...]
    too_few: tuple[float, ...]  # rates that fewer than `ERRORS` false accepts would tell
    roc: tuple[tuple[float, float], ...] = ()  # rates of false and of true accepts
    bins: tuple[float, ...] = ()  # edges of the histograms
    genuine_bins: tuple[float, ...] = ()  # share of the pairs in each
    impostor_bins: tuple[float, ...] = ()
    cameras: dict[str, "Thresholds"] = field(default_factory=dict)  # by "query-gallery"

    def find(self, rate: float, cameras: tuple[int, int] | None = None) -> Threshold:
        """The threshold at a rate; that of two cameras if it was measured.

        Raises:
            DataError: it was not measured at this rate.
        """
        own = self.cameras.get("{}-{}".format(*cameras)) if cameras else None
        for found in (*(own.at if own else ()), *self.at):
            if np.isclose(found.false_accept_rate, rate, rtol=1e-6):
                return found
        there = ", ".join(f"{found.false_accept_rate:g}" for found in self.at) or "none"
        text = f"there is no threshold at a false accept rate of {rate:g}, but at: {there}"
        if any(np.isclose(rate, few, rtol=1e-6) for few in self.too_few):
            text += (
                f". That rate needs {needed(rate):,} pairs of different people, and the model was "
                f"measured on {self.impostors:,}"
            )
        raise DataError(text)

    @property
    def usual_rate(self) -> float | None:
        """The measured rate next to `USUAL_RATE`; None if no rate was measured."""
        rates = [at.false_accept_rate for at in self.at]
        return min(rates, key=lambda rate: abs(np.log(rate / USUAL_RATE)), default=None)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        pairs = {name: pair.to_json() for name, pair in self.cameras.items()}
        return asdict(self) | {"at": [found._asdict() for found in self.at], "cameras": pairs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        at = tuple(Threshold(**found) for found in value["at"])
        pairs = {name: cls.from_json(pair) for name, pair in value["cameras"].items()}
        return cls(**value | {"at": at, "cameras": pairs, "too_few": tuple(value["too_few"])})


def needed(rate: float) -> int:
    """How many impostor pairs a rate of false accepts needs."""
    return round(ERRORS / rate)


def measure_thresholds(
    query: np.ndarray,
    gallery: np.ndarray,
    labels: Labels,
    *,
    rates: Sequence[float] = RATES,
    progress: Progress = silent,
) -> Thresholds:
    """Measure thresholds of the cosine similarity, of all pairs and of each pair of cameras.

    Args:
        query, gallery: (Q, D), (G, D) float32 embeddings.
        labels: identities and cameras. Pairs of one identity and one camera are left out.

    Raises:
        DataError: no query has a match.
    """
    features, total = (Features.of(query), Features.of(gallery)), len(gallery)
    whole = _measure(*features, labels, find_ground_truth(labels), rates)
    progress("thresholds", total, 2 * total)
    cameras, done = {}, total
    for theirs in np.unique(labels.gallery_camid[labels.gallery_camid < NO_CAMERA]):
        columns = np.flatnonzero(labels.gallery_camid == theirs)
        known = labels.query_camid < NO_CAMERA
        for ours in np.unique(labels.query_camid[known & (labels.query_camid != theirs)]):
            rows = np.flatnonzero(labels.query_camid == ours)
            part = Labels(
                labels.query_pid[rows],
                labels.query_camid[rows],
                labels.gallery_pid[columns],
                labels.gallery_camid[columns],
            )
            if not np.isin(part.query_pid, part.gallery_pid).any():
                continue
            truth, given = find_ground_truth(part), (features[0][rows], features[1][columns])
            cameras[f"{ours}-{theirs}"] = _measure(*given, part, truth, rates, curves=False)
        done += len(columns)
        progress("thresholds", done, 2 * total)
    progress("thresholds", 2 * total, 2 * total)
    return replace(whole, cameras=cameras)


def _measure(
    query: Features,
    gallery: Features,
    labels: Labels,
    truth: GroundTruth,
    rates: Sequence[float],
    curves: bool = True,
) -> Thresholds:
    """Thresholds of all pairs together."""
    source, blocks = Separate(query, gallery), ranges(len(gallery), BLOCK)
    counts = count_distances(source, truth, COSINE, 1.0, blocks, ignore)
    genuine, accepted = np.cumsum(counts, axis=1)
    impostors, matches = int(accepted[-1]), int(genuine[-1])
    pids = np.unique(np.concatenate([labels.query_pid, labels.gallery_pid]))
    if not impostors:
        return Thresholds(0, matches, len(pids), (), tuple(rates))
    # Up to this bin of distance, no more than the rate's share of impostors is accepted.
    enough = [rate for rate in rates if impostors >= needed(rate)]
    chosen = np.searchsorted(accepted, np.array(enough) * impostors, side="right")
    at: list[Threshold] = []
    if enough:
        decades = np.log10(LOOSEST * impostors)
        steps = np.logspace(0, decades, max(2, int(STEPS * decades)))
        ends = np.unique([*np.searchsorted(accepted, steps, side="right"), *chosen])
        samples = _Samples(source, truth, labels, pids, ends)
        for rate, end in zip(enough, chosen, strict=True):
            interval = samples.thresholds(rate)
            accepts = samples.true_accepts(int(np.searchsorted(ends, end)))
            tar = float(genuine[end - 1]) / matches if end else 0.0
            at.append(Threshold(rate, float(_similarity(end)), *interval, tar, *accepts))
    more = _curves(counts, genuine, accepted) if curves else {}
    few = tuple(rate for rate in rates if rate not in enough)
    return Thresholds(impostors, matches, len(pids), tuple(at), few, **more)


def _similarity(end: Any) -> Any:
    """The similarity that pairs in the bins of distance before `end` exceed."""
    return 1.0 - 2.0 * end / BINS


class _Samples:
    """Accepted pairs of bootstrap samples, at thresholds that end before some bins.

    Weights w of a sample are how often each identity is drawn. A pair of identities i and j would
    weigh w_i w_j; its first-order part w_i + w_j − 1 needs only the counts of each identity.
    """

    def __init__(
        self, source: Separate, truth: GroundTruth, labels: Labels, pids: np.ndarray, ends: Any
    ) -> None:
        self.ends, identities = ends, len(pids)
        classes = np.searchsorted(ends, np.arange(BINS), side="right").astype(np.int32)
        of_query, of_gallery = (
            np.searchsorted(pids, values) for values in (labels.query_pid, labels.gallery_pid)
        )
        rows, columns, genuine = np.zeros((3, identities, len(ends)), np.int64)
        matches = np.zeros(identities, np.int64)
        blocks = ranges(len(labels.gallery_pid), BLOCK)
        for part in scored_pairs(source, truth, COSINE, blocks, ignore):
            row = of_query[part.query : part.query + len(part.impostor)]
            column = of_gallery[part.gallery : part.gallery + part.impostor.shape[1]]
            histogram_by_group(part.impostor, -1.0, 2.0, classes, row, column, rows, columns)
            bins = ((part.genuine.astype(np.float64) + 1) / 2 * BINS).astype(int).clip(0, BINS - 1)
            who, at = of_query[part.genuine_query], classes[bins]
            np.add.at(matches, who, 1)
            near = at < len(ends)
            np.add.at(genuine, (who[near], at[near]), 1)
        # Each query's impostors are the gallery without its own identity, and the reverse.
        queries, others = (np.bincount(x, minlength=identities) for x in (of_query, of_gallery))
        self.impostors = queries * (len(of_gallery) - others) + others * (len(of_query) - queries)
        self.accepted = np.cumsum(rows + columns, axis=1)
        self.genuine, self.matches = np.cumsum(genuine, axis=1), matches
        rng = np.random.default_rng(SEED)
        self.weights = rng.multinomial(identities, np.full(identities, 1 / identities), SAMPLES)

    def thresholds(self, rate: float) -> tuple[float, float]:
        """The interval of the threshold at a rate."""
        # The sums count each pair twice, once for either identity.
        weights = self.weights.astype(np.float64)
        accepted = weights @ self.accepted - self.accepted.sum(axis=0) / 2
        pairs = weights @ self.impostors - self.impostors.sum() / 2
        rates = np.maximum.accumulate(accepted / np.maximum(pairs, 1)[:, None], axis=1)
        last = np.maximum((rates <= rate).sum(axis=1) - 1, 0)
        low, high = np.percentile(_similarity(self.ends[last]), [LOW, HIGH])
        return float(low), float(high)

    def true_accepts(self, at: int) -> tuple[float, float]:
        """The interval of the true accept rate at one of the thresholds."""
        pairs = self.weights @ self.matches
        found = (self.weights @ self.genuine[:, at])[pairs > 0] / pairs[pairs > 0]
        low, high = np.percentile(found, [LOW, HIGH])
        return float(low), float(high)


def _curves(counts: np.ndarray, genuine: np.ndarray, accepted: np.ndarray) -> dict[str, Any]:
    """The rates of true by false accepts, and histograms of both kinds of pairs."""
    steps = np.unique(np.logspace(0, np.log10(accepted[-1]), POINTS).astype(np.int64))
    ends = np.searchsorted(accepted, steps, side="right")
    at = np.concatenate([[0], genuine])[ends] / genuine[-1]
    used = np.flatnonzero(counts.sum(axis=0))
    edges = np.unique(np.linspace(used[0], used[-1] + 1, POINTS + 1).astype(int))
    shares = np.add.reduceat(counts[:, : edges[-1]], edges[:-1], axis=1)[:, ::-1]
    shares = shares / counts.sum(axis=1, keepdims=True)
    return {
        "roc": tuple(zip((steps / accepted[-1]).tolist(), at.tolist(), strict=True)),
        "bins": tuple(_similarity(edges[::-1]).tolist()),
        "genuine_bins": tuple(shares[0].tolist()),
        "impostor_bins": tuple(shares[1].tolist()),
    }
