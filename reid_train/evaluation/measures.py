"""What to measure, and with which settings: no imports that take long."""

from dataclasses import dataclass
from typing import Literal

from data_shards.errors import ConfigError

Metric = Literal["cosine", "euclidean"]
COSINE, EUCLIDEAN = 0, 1  # the kernels' numbers
METRICS = {"cosine": COSINE, "euclidean": EUCLIDEAN}
LONGEST_CMC = 1_000_000


def metric_code(metric: str) -> int:
    """The kernels' number for a metric. Raises `ConfigError`."""
    if metric not in METRICS:
        raise ConfigError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    return METRICS[metric]


@dataclass(frozen=True)
class Measures:
    """What to measure. Settings of re-ranking are by default the authors' values."""

    metric: Metric = "cosine"
    """Distance of the ranking."""
    rerank: bool = False
    """Re-rank by k-reciprocal encoding, and show the plain ranking beside it."""
    k1: int = 20
    """Re-ranking: neighbours that are checked for reciprocity."""
    k2: int = 6
    """Re-ranking: neighbours averaged over; 1 turns averaging off."""
    weight: float = 0.3
    """Re-ranking: λ, the share of the original distance."""
    expand: int = 0
    """Query expansion: gallery images that join each query; 0 is off."""
    augment: int = 0
    """Database augmentation: gallery images averaged over; 0 is off."""
    alpha: float = 3.0
    """Expansion and augmentation weigh by the similarity to this power."""
    max_rank: int = 50
    """Length of the CMC."""
    false_accept_rates: tuple[float, ...] = ()
    """Also measure the true accept rate at these false accept rates."""
    camera_pairs: bool = False
    """Also measure each pair of query camera and gallery camera."""

    @property
    def needed(self) -> int:
        """Neighbours of each image that re-ranking needs, itself included."""
        return max(self.k1 + 1, self.k2)

    @property
    def compares_all(self) -> bool:
        """Whether all images are compared with all, not only the queries with the gallery."""
        return self.rerank or self.expand > 0 or self.augment > 0

    def check(self, queries: int | None = None, gallery: int | None = None) -> None:
        """Raise `ConfigError` for what cannot be measured, or not of so few images."""
        metric_code(self.metric)
        if self.rerank and (self.camera_pairs or self.false_accept_rates):
            raise ConfigError(
                "camera pairs and false accept rates are measured without re-ranking: "
                "leave out one of the two"
            )
        # Settings that are not used now are checked, too: a wrong one is a mistake.
        total = None if queries is None or gallery is None else queries + gallery
        self.check_reranking(total if self.rerank else None)
        for name, k in (("--expand", self.expand), ("--augment", self.augment)):
            if k < 0:
                raise ConfigError(f"{name} takes a number of images, or 0 for none, not {k}")
            if k and (not isinstance(k, int) or (gallery is not None and k > gallery)):
                most = "" if gallery is None else f" ≤ {gallery}"
                raise ConfigError(f"expansion takes 1 ≤ k{most} gallery images, not {k}")
        if not 0 <= self.alpha < float("inf"):
            raise ConfigError(f"expansion takes a finite α ≥ 0, not {self.alpha}")
        if not 1 <= self.max_rank <= LONGEST_CMC:
            raise ConfigError(
                f"--max-rank must lie between 1 and {LONGEST_CMC:,}, not {self.max_rank}"
            )
        if any(not 0 < rate < 1 for rate in self.false_accept_rates):
            raise ConfigError(f"false accept rates lie in (0, 1), not {self.false_accept_rates}")

    def check_reranking(self, images: int | None = None) -> None:
        """Raise `ConfigError` for k1, k2 or λ out of range, or too large for so many images."""
        whole = isinstance(self.k1, int) and isinstance(self.k2, int)
        if not whole or self.k1 < 1 or self.k2 < 1 or not 0 <= self.weight <= 1:
            raise ConfigError(
                "re-ranking needs whole k1 ≥ 1 and k2 ≥ 1, and 0 ≤ λ ≤ 1, not "
                f"k1 = {self.k1}, k2 = {self.k2}, λ = {self.weight}"
            )
        if images is not None and self.needed > images:
            raise ConfigError(
                f"re-ranking with k1 = {self.k1} and k2 = {self.k2} needs at least {self.needed} "
                f"images in query and gallery together, not {images}: choose smaller values"
            )
