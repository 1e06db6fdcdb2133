"""The plan of an epoch: which images make up each global batch.

The plan is a pure function of the index, the seed and the epoch. So a run that resumes at any
step, or on another number of workers, sees the same batches. It guarantees by construction:

* A step is P identities × K images, and no identity is in a step twice.
* An image is used at most once in a pass over the data, unless its identity has fewer than K.
* The K images of an identity come from as many cameras as its images allow.
* Steps come window by window, so that training needs only a few shards on disk at a time.

It works like dealing cards. In a window, the images of each identity are dealt into groups of K.
The groups, sorted by identity, are dealt to T steps in turn, so an identity with at most T groups
is never twice in a step. Then the steps are mixed: they are paired at random, and the groups of
each pair are sorted by a random order of identities and dealt to the two steps again. Two groups
of one identity are neighbours in that order, so they go to different steps again.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Literal

import numpy as np

from data_shards.errors import ConfigError
from data_shards.index import Index
from data_shards.records import NO_CAMERA

# After r rounds of mixing, two identities that began in the same step are together more often than
# by chance by about 2^-r. With ten rounds no test can measure it.
_ROUNDS = 10


def plan(
    index: Index,
    *,
    seed: int,
    epoch: int,
    identities: int,
    images: int,
    window: int,
    steps: int | None = None,
    small: Literal["replace", "drop"] = "replace",
) -> np.ndarray:
    """Plan an epoch of P × K batches.

    Args:
        index: the train split, N rows, labels 0..C-1.
        seed: of the run, >= 0.
        epoch: >= 0; another epoch is another order.
        identities: P, identities in a global batch.
        images: K, images of each.
        window: shards that are read at a time. A larger window mixes better and needs more disk.
            A window with fewer than P identities is joined with its neighbour.
        steps: S; None takes the steps of one pass over the data. More steps take more passes, each
            in another order.
        small: an identity with fewer than K images has all of them in one group that is filled by
            sampling with replacement ("replace"), or is left out ("drop", the authors' rule).

    Returns:
        (S, P * K) int64 rows of `index`. Each step is P blocks of K rows of one identity.

    Raises:
        ConfigError: a setting is out of range, or the data has fewer than P usable identities.
    """
    _check(seed=(seed, 0), epoch=(epoch, 0), identities=(identities, 1), images=(images, 1))
    _check(window=(window, 1), steps=(1 if steps is None else steps, 1))
    if small not in ("replace", "drop"):
        raise ConfigError(f"small is {small!r}: choose 'replace' or 'drop'")
    fewest = images if small == "drop" else 1
    usable = _usable(index.label, fewest)
    if usable < identities:
        raise ConfigError(
            f"a batch has {identities} people, but the training split has {usable} with"
            f" {fewest} or more images: give --batch.identities {max(usable, 1)} or fewer"
            + (", or --batch.small-identities replace" if small == "drop" else "")
        )

    planned: list[np.ndarray] = []
    missing = steps
    for number in range(1) if missing is None else count():
        entropy = np.random.SeedSequence((seed, epoch, number))
        rng = np.random.Generator(np.random.Philox(entropy))
        for rows in _windows(index, window, identities, fewest, rng):
            groups, owner = _groups(rows, index, images, fewest, rng)
            batches = groups[_deal(owner, identities, rng)].reshape(-1, identities * images)
            planned.append(batches[:missing])
            if missing is not None:
                missing -= len(planned[-1])
                if missing == 0:
                    return np.concatenate(planned)
    return np.concatenate(planned)


def plan_apart(
    index: Index,
    dataset: np.ndarray,
    *,
    seed: int,
    epoch: int,
    identities: int,
    images: int,
    window: int,
    steps: int | None = None,
    small: Literal["replace", "drop"] = "replace",
) -> np.ndarray:
    """Plan an epoch of a union of datasets, each batch from one of them.

    Each dataset has batches in proportion to those of one pass over it, in a random order of turns.

    Args:
        dataset: (N,) number of the dataset that each row of the index comes from.
        index, seed, epoch, identities, images, window, steps, small: as in `plan`.

    Returns:
        (S, P * K) int64 rows of `index`, as `plan` does.
    """
    make = partial(plan, seed=seed, epoch=epoch, identities=identities, images=images)
    make = partial(make, window=window, small=small)
    rows = [np.flatnonzero(dataset == number) for number in np.unique(dataset)]
    parts = [index.select(_as_slice(own)) for own in rows]
    plans = [make(part) for part in parts]
    if steps is not None:
        ends = np.cumsum([0, *map(len, plans)])
        shares = np.diff(ends * steps // max(ends[-1], 1)).tolist()
        plans = [
            make(part, steps=share) if share else one[:0]
            for part, share, one in zip(parts, shares, plans, strict=True)
        ]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, 0, 1))))
    turn = rng.permutation(np.repeat(np.arange(len(plans)), [len(one) for one in plans]))
    planned = np.empty((len(turn), identities * images), np.int64)
    for number, (own, one) in enumerate(zip(rows, plans, strict=True)):
        planned[turn == number] = own[one]
    return planned


def _as_slice(rows: np.ndarray) -> np.ndarray | slice:
    """Ascending rows as a slice, which takes no memory, if they are contiguous."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else rows


def slice_for_rank(plan: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Take one rank's part of a plan: the same contiguous block of each batch.

    Args:
        plan: (S, P * K) int64, from `plan`.
        rank: 0..world-1.
        world: number of ranks.

    Returns:
        (S, P * K / world) int64. The parts of all ranks side by side are `plan`.

    Raises:
        ConfigError: `world` does not divide the batch.
    """
    batch = plan.shape[1]
    if not 0 <= rank < world:
        raise ConfigError(f"rank must be from 0 to {world - 1}, not {rank}")
    if batch % world:
        raise ConfigError(f"{world} workers do not divide a batch of {batch} images evenly")
    share = batch // world
    return plan[:, rank * share : (rank + 1) * share]


def _check(**settings: tuple[int, int]) -> None:
    for name, (value, least) in settings.items():
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, not {value}")


def _usable(label: np.ndarray, fewest: int) -> int:
    return int(np.count_nonzero(np.bincount(label) >= fewest))


def _windows(
    index: Index, window: int, identities: int, fewest: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the rows of each window's shards, the shards in random order."""
    ends = np.flatnonzero(np.diff(index.shard, append=-1)) + 1  # the index is in shard order
    shards = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
    order = rng.permutation(len(shards))
    windows: list[np.ndarray] = []
    short = False
    for first in range(0, len(order), window):
        rows = np.concatenate([np.arange(*shards[i]) for i in order[first : first + window]])
        if short:
            rows = np.concatenate([windows.pop(), rows])
        windows.append(rows)
        short = _usable(index.label[rows], fewest) < identities
        if len(windows) > 2:  # the last two may yet be joined with others
            yield windows.pop(0)
    if short and len(windows) > 1:
        rows = np.concatenate(windows[-2:])
        windows[-2:] = [rows]
    yield from windows


def _groups(
    rows: np.ndarray, index: Index, images: int, fewest: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Deal the images of each identity into groups of K, cameras spread as evenly as possible.

    Returns (G, K) rows and (G,) identities, numbered from 0 in the window. The
    groups of an identity are contiguous.
    """
    rows = rng.permutation(rows)
    present = np.bincount(index.label[rows]) > 0
    identity = (np.cumsum(present) - 1)[index.label[rows]]
    amount = np.bincount(identity)
    first = np.cumsum(amount) - amount
    # XOR with a random number per identity gives each identity its own order of cameras.
    known = np.where(index.camid[rows] < NO_CAMERA, index.camid[rows], 0)
    camera = known ^ rng.integers(1 << 16, size=len(amount), dtype=np.int32)[identity]
    rows = rows[np.lexsort((camera, identity))]
    identity = np.repeat(np.arange(len(amount)), amount)

    # Leave out the n mod K images that fill no group. They are evenly spaced from a random start,
    # so each image has the same chance and each camera loses in proportion.
    full = amount // images
    extra = np.where(full > 0, amount % images, 0)
    number = np.arange(extra.sum()) - np.repeat(np.cumsum(extra) - extra, extra)
    spacing = np.repeat(amount / np.maximum(extra, 1), extra)
    start = np.repeat(rng.random(len(amount)), extra)
    out = np.floor((start + number) * spacing).astype(np.int64)
    keep = (full > 0)[identity]
    keep[np.repeat(first, extra) + out] = False

    # Image i of an identity goes to group i mod n, so neighbours of the same camera are separated.
    dealt, owner = rows[keep], np.repeat(np.arange(len(amount)), full)
    begin = np.cumsum(full) - full
    place = np.arange(len(dealt)) - np.repeat(begin * images, full * images)
    n = np.repeat(full, full * images)
    groups = np.empty((len(owner), images), np.int64)
    groups[np.repeat(begin, full * images) + place % n, place // n] = dealt

    few = np.flatnonzero((full == 0) & (amount >= fewest))
    slot = np.arange(images)
    drawn = np.floor(rng.random((len(few), images)) * amount[few, None]).astype(np.int64)
    filled = rows[first[few, None] + np.where(slot < amount[few, None], slot, drawn)]
    return np.concatenate([groups, filled]), np.concatenate([owner, few])


def _deal(owner: np.ndarray, identities: int, rng: np.random.Generator) -> np.ndarray:
    """Deal groups to as many steps as possible, with no identity twice in a step.

    `owner` is the (G,) identity of each group; the groups of an identity are contiguous. Returns
    (T, P) int64 positions in `owner`.
    """
    amount = np.bincount(owner)
    steps = len(owner) // identities
    while (most := int(np.minimum(amount, steps).sum()) // identities) < steps:
        steps = most
    # Keep at most `steps` groups of an identity, at random; then drop a random surplus.
    shuffled = rng.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    present = amount[amount > 0]
    turn = np.arange(len(owner)) - np.repeat(np.cumsum(present) - present, present)
    kept = rng.permutation(grouped[turn < steps])[: steps * identities]

    hands = _by_identity(kept[None], owner, rng).reshape(identities, steps).T
    for _ in range(_ROUNDS if steps > 1 else 0):
        hands = hands[rng.permutation(steps)]
        even = steps // 2 * 2
        pairs = _by_identity(hands[:even].reshape(even // 2, -1), owner, rng)
        hands[:even] = pairs.reshape(-1, identities, 2).swapaxes(1, 2).reshape(even, identities)
    return hands[rng.permutation(steps)]


def _by_identity(groups: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sort each row of (L, n) groups by a random order of the identities."""
    rank = rng.permutation(int(owner.max()) + 1)
    return np.sort(rank[owner[groups]] << 32 | groups, axis=1) & 0xFFFFFFFF
