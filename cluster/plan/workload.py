"""What a run will do, counted: its passes over the data, and which shards each node downloads.

The real sampler plans every epoch and the loader's own look-ahead says which shards it asks for,
so nothing here can drift from what training does. Where a node's cache holds all that its workers
read, the counts are exact. Where it does not, one reader for each node stands for its workers,
whose order among each other nobody knows beforehand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cluster.plan.network import PhaseName
from data_shards.cache import ShardCache
from data_shards.dataset import Dataset
from data_shards.errors import ConfigError
from data_shards.loader import Lookahead
from data_shards.manifest import MANIFEST_NAME, Index, ShardInfo
from reid_train.config import TrainConfig
from reid_train.evaluation.ground_truth import Labels, find_matches
from reid_train.training.loop import epoch_plan, train_index
from reid_train.training.validation import MATCHES, QUERIES


@dataclass(frozen=True)
class Layout:
    """How many workers there are, and how many of them share a node; ranks fill node by node."""

    workers: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes that the workers fill, the last one perhaps in part."""
        return -(-self.workers // self.per_node)

    @property
    def busiest(self) -> int:
        """Workers on the fullest node."""
        return min(self.workers, self.per_node)

    def ranks(self) -> list[range]:
        """Each node's ranks."""
        starts = range(0, self.workers, self.per_node)
        return [range(a, min(a + self.per_node, self.workers)) for a in starts]


@dataclass(frozen=True)
class Pass:
    """One epoch or one evaluation.

    Attributes:
        phase: of the training; None for an evaluation.
        steps: optimizer steps; 0 in an evaluation.
        downloads: shards that all nodes together download in it.
        bytes: of those.
        busiest_bytes: of the node that downloads most.
    """

    phase: PhaseName | None
    steps: int
    downloads: int = 0
    bytes: int = 0
    busiest_bytes: int = 0


@dataclass(frozen=True)
class Workload:
    """All that a run does.

    Attributes:
        layout: of its workers.
        passes: in their order.
        images: of an optimizer step.
        queries: embedded at each evaluation.
        gallery: embedded at each evaluation.
        checkpoints: written, by phase.
        openings: GETs of manifest and index, by workers and driver.
        opening_bytes: of those.
        pictures: ranged GETs for the report's rank lists.
        picture_bytes: of those, about.
        exact: whether a node's cache holds all that its workers read.
    """

    layout: Layout
    passes: tuple[Pass, ...]
    images: int
    queries: int
    gallery: int
    checkpoints: dict[PhaseName, int]
    openings: int
    opening_bytes: int
    pictures: int
    picture_bytes: int
    exact: bool

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(p.steps for p in self.passes)

    @property
    def evaluations(self) -> int:
        """How often query and gallery are embedded and ranked."""
        return sum(p.phase is None for p in self.passes)

    @property
    def embedded(self) -> int:
        """Images embedded in all evaluations."""
        return self.evaluations * (self.queries + self.gallery)

    @property
    def shards(self) -> int:
        """Shards downloaded by all nodes together."""
        return sum(p.downloads for p in self.passes)

    @property
    def gets(self) -> int:
        """GET requests for the data."""
        return self.shards + self.openings + self.pictures

    @property
    def bytes(self) -> int:
        """Bytes of the data that leave S3."""
        return sum(p.bytes for p in self.passes) + self.opening_bytes + self.picture_bytes


def workloads(config: TrainConfig, dataset: Dataset, layouts: Sequence[Layout]) -> list[Workload]:
    """Count what a run does with its workers laid out in each of several ways.

    Args:
        config: of the run; its `workers` does not matter.
        dataset: opened.
        layouts: to count for; each number of workers must divide the batch.

    Raises:
        DataError: no train split, or a query that nothing can match.
        ConfigError: the batch cannot be made, or the cache is too small for a window.
    """
    index, shards = train_index(dataset), dataset.manifest.shards
    cache = ShardCache(dataset.storage, config.loader.cache, config.loader.cache_bytes)
    cache.require([s for s in shards if s.split == "train"], config.batch.window)
    remote = not cache.in_place
    measured = len(dataset.index("query")) > 0 and len(dataset.index("gallery")) > 0
    clusters = [_Cluster(config, dataset, layout, remote) for layout in layouts]
    checkpoints = _run(config, index, clusters, measured)
    pictures, picture_bytes = _pictures(dataset) if measured and remote else (0, 0)
    small = (len(dataset.storage.read(MANIFEST_NAME)), dataset.manifest.index.bytes)
    return [
        Workload(
            layout=cluster.layout,
            passes=tuple(cluster.passes),
            images=config.batch_size * config.batch.accumulate,
            queries=len(dataset.index("query")) if measured else 0,
            gallery=len(dataset.index("gallery")) if measured else 0,
            checkpoints=checkpoints,
            openings=remote * len(small) * (cluster.layout.workers + 1),
            opening_bytes=remote * sum(small) * (cluster.layout.workers + 1),
            pictures=pictures,
            picture_bytes=picture_bytes,
            exact=cluster.fits,
        )
        for cluster in clusters
    ]


def _run(
    config: TrainConfig, index: Index, clusters: list[_Cluster], measured: bool
) -> dict[PhaseName, int]:
    """Take all clusters through the run; return how many checkpoints it writes, by phase."""
    checkpoints: dict[PhaseName, int] = {"heads": 0, "all": 0}
    between, done = config.checkpoint.every_steps, 0
    for cluster in clusters if measured and config.evaluation.initial else ():
        cluster.evaluate()
    for epoch in range(config.total_epochs):
        phase: PhaseName = "heads" if epoch < config.optimizer.frozen_epochs else "all"
        steps, rows = config.batch.steps_per_epoch, None
        # The first epoch is planned in any case: it shows whether a batch can be made.
        if steps is None or epoch == 0 or not all(cluster.complete for cluster in clusters):
            rows = epoch_plan(config, index, epoch)
            steps = len(rows) // config.batch.accumulate
        if steps == 0:
            raise ConfigError(
                f"epoch {epoch} has fewer global batches than one optimizer step averages:"
                " lower --batch.accumulate, or set --batch.steps-per-epoch"
            )
        for cluster in clusters:
            cluster.train(phase, steps, index, rows)
        evaluated = epoch + 1 == config.total_epochs or (epoch + 1) % config.evaluation.every == 0
        if between is not None:  # one after an evaluation is no other
            checkpoints[phase] += (done + steps - evaluated) // between - done // between
        done += steps
        if evaluated:
            checkpoints[phase] += 1
            for cluster in clusters if measured else ():
                cluster.evaluate()
    return checkpoints


class _Cluster:
    """The nodes of a layout, and what passed so far.

    Where shards do not fit into a cache, the first node stands for all: they differ in nothing but
    which images of a batch are theirs.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, layout: Layout, remote: bool) -> None:
        self.config, self.dataset, self.layout, self.remote = config, dataset, layout, remote
        self.passes: list[Pass] = []
        shards, room = dataset.manifest.shards, config.loader.cache_bytes
        self.fits = not remote or sum(s.bytes for s in shards if s.split != "val") <= room
        self.ranks = layout.ranks() if self.fits else layout.ranks()[:1]
        self.nodes = [_Node(shards, room) for _ in self.ranks if remote]

    @property
    def complete(self) -> bool:
        """Whether no epoch can make a node download anything more."""
        return self.fits and all(node.has_train for node in self.nodes)

    def train(self, phase: PhaseName, steps: int, index: Index, rows: np.ndarray | None) -> None:
        """An epoch; `rows` of its plan may be left out once the cluster is complete."""
        found = []
        if not self.complete:
            assert rows is not None
            share = rows.shape[1] // self.layout.workers
            for node, ranks in zip(self.nodes, self.ranks, strict=True):
                mine = rows[:, ranks.start * share : ranks.stop * share]
                found.append(self._read(node, index, list(mine)))
        self._passed(phase, steps, found)

    def evaluate(self) -> None:
        """An evaluation: each rank embeds its stretch of query and gallery."""
        found = []
        for node, ranks in zip(self.nodes, self.ranks, strict=False):
            read = []
            for split in ("query", "gallery"):
                index = self.dataset.index(split)
                read.append(self._read(node, index, list(self._stretches(len(index), ranks))))
            found.append((sum(count for count, _ in read), sum(size for _, size in read)))
        self._passed(None, 0, found)

    def _stretches(self, total: int, ranks: range) -> Iterator[np.ndarray]:
        """Rows that a node's ranks read at the same time, batch after batch."""
        world, batch = self.layout.workers, self.config.evaluation.batch
        edges = list(pairwise(total * r // world for r in (*ranks, ranks.stop)))
        for first in range(0, max(b - a for a, b in edges), batch):
            parts = [np.arange(min(a + first, b), min(a + first + batch, b)) for a, b in edges]
            yield np.concatenate(parts)

    def _read(self, node: _Node, index: Index, steps: list[np.ndarray]) -> tuple[int, int]:
        if not self.fits:
            return node.follow(index, steps)
        rows = np.concatenate(steps) if steps else np.zeros(0, np.int64)
        return node.fetch(np.unique(index.shard[rows]).tolist())

    def _passed(self, phase: PhaseName | None, steps: int, found: list[tuple[int, int]]) -> None:
        nodes = 1 if self.fits else self.layout.nodes
        count, size = (nodes * sum(part[i] for part in found) for i in (0, 1))
        busiest = max((part[1] for part in found), default=0)
        self.passes.append(Pass(phase, steps, count, size, busiest))


class _Node:
    """A node's cache, empty at first, with shards' positions in place of their files."""

    def __init__(self, shards: Sequence[ShardInfo], room: int) -> None:
        self.shards, self.room, self.held = shards, room, 0
        self.position = {shard.name: i for i, shard in enumerate(shards)}
        self.train = {i for i, shard in enumerate(shards) if shard.split == "train"}
        self.files: OrderedDict[int, None] = OrderedDict()  # the least recently used first

    @property
    def has_train(self) -> bool:
        """Whether it holds all that epochs read."""
        return self.train <= self.files.keys()

    def fetch(self, wanted: Sequence[int]) -> tuple[int, int]:
        """Have these shards, as `ShardCache` does; return downloads and their bytes."""
        for shard in wanted:
            if shard in self.files:
                self.files.move_to_end(shard)
        missing = [shard for shard in wanted if shard not in self.files]
        for shard in missing:
            self.held += self.shards[shard].bytes
            while self.held > self.room:
                self.held -= self.shards[self.files.popitem(last=False)[0]].bytes
            self.files[shard] = None
        return len(missing), sum(self.shards[shard].bytes for shard in missing)

    def follow(self, index: Index, steps: list[np.ndarray]) -> tuple[int, int]:
        """Read step after step, the loader's look-ahead before it."""
        ahead = Lookahead(index, self.shards, steps, self.room)
        count = size = 0
        for step, needed in enumerate(ahead.needs):
            wanted = [self.position[shard.name] for shard in ahead.advance(step) or ()]
            for part in (wanted, needed):
                more, bytes_ = self.fetch(part)
                count, size = count + more, size + bytes_
        return count, size


def _pictures(dataset: Dataset) -> tuple[int, int]:
    """Images that the report's rank lists read one by one, and about how many bytes."""
    query, gallery = dataset.index("query"), dataset.index("gallery")
    matches = find_matches(Labels(query.pid, query.camid, gallery.pid, gallery.camid))
    rows = min(QUERIES, int(np.count_nonzero(np.diff(matches.positives()))))
    columns = min(MATCHES, len(gallery))
    size = rows * float(query.size.mean()) + rows * columns * float(gallery.size.mean())
    return rows * (1 + columns), round(size)
