"""The model: how long a run takes and what limits it. Pure arithmetic; docs/PLAN.md derives it.

A step is as slow as the slowest of what happens side by side: the workers computing and telling
each other, the loaders decoding. An epoch is as slow as its steps or its downloads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.plan.network import PHASES, Network, Phase, PhaseName
from cluster.plan.throughput import Speed
from cluster.plan.workload import Pass, Workload

NAMES = {
    "compute": "computing",
    "talk": "all-reduce and global batch norm",
    "decode": "decoding cores",
    "network": "the nodes' network",
    "s3": "S3",
}
"""What can be the limit."""

OVERLAP = 2 / 3
"""Part of a GPU's step, the backward pass, behind which gradients are averaged."""


@dataclass(frozen=True)
class Machine:
    """A node, and what connects it; see the flags of `python -m cluster plan`.

    Attributes:
        cores: of a node.
        on_cpu: whether the workers compute on these cores, one each, or on GPUs.
        network: bytes a second, of each node, to others and to S3.
        s3: bytes a second that S3 gives all nodes together.
        interconnect: bytes a second between the workers of a node.
        latency: seconds of a small exchange between two workers.
    """

    cores: int
    on_cpu: bool
    network: float
    s3: float
    interconnect: float
    latency: float


@dataclass(frozen=True)
class Host:
    """What a core and a disk do; measured where docs/PLAN.md says.

    Attributes:
        decode: core-seconds of an image, from bytes to the network's input size.
        multiply: floating point operations a core-second of ranking, all of ranking's work in it.
        crowding: how much longer CPU workers compute for each doubling of those on a node, beyond
            what its cores account for.
        write: bytes a second of writing and sealing a checkpoint.
        start: seconds from the command to the first pass: Ray, workers, the network.
        finish: seconds after the last pass: report, pictures, registry.
    """

    decode: float
    multiply: float = 147e9
    crowding: float = 0.35
    write: float = 400e6
    start: float = 30.0
    finish: float = 20.0


@dataclass(frozen=True)
class Step:
    """An optimizer step's parts in seconds; those in `beside` run at the same time.

    Attributes:
        compute: forward, backward and update, other workers of the node competing for its cores.
        talk: exchanges between workers that nothing hides.
        decode: what the loaders need for the step's images.
    """

    compute: float
    talk: float
    decode: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return max(self.compute + self.talk, self.decode)

    @property
    def limit(self) -> str:
        """The longest part, as in `NAMES`."""
        parts = {"decode": self.decode, "compute": self.compute, "talk": self.talk}
        if self.decode > self.compute + self.talk:
            return "decode"
        return max(("compute", "talk"), key=parts.__getitem__)


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        workload: what was estimated.
        steps: one step of each phase.
        start, train, evaluate, checkpoint, wait, finish: seconds; `wait` is for shards alone.
        limit: what the run waits for most, as in `NAMES`.
    """

    workload: Workload
    steps: dict[PhaseName, Step]
    start: float
    train: float
    evaluate: float
    checkpoint: float
    wait: float
    finish: float
    limit: str

    @property
    def seconds(self) -> float:
        """From the command to its end."""
        parts = (self.start, self.train, self.evaluate, self.checkpoint, self.wait, self.finish)
        return sum(parts)

    def images_per_second(self, phase: PhaseName = "all") -> float:
        """Images trained a second by all workers together, evaluations left out."""
        return self.workload.images / self.steps[phase].seconds


@dataclass(frozen=True)
class Prices:
    """The user's: for an hour of a GPU, a GET, and a gigabyte that leaves S3."""

    gpu_hour: float = 0.0
    get: float = 0.0
    gigabyte: float = 0.0

    def cost(self, estimate: Estimate) -> float:
        """Of a run, in the prices' currency; GPUs are paid for from start to end."""
        work = estimate.workload
        hours = work.layout.workers * estimate.seconds / 3600
        return hours * self.gpu_hour + work.gets * self.get + work.bytes / 1e9 * self.gigabyte


def estimate(
    work: Workload,
    network: Network,
    machine: Machine,
    host: Host,
    speeds: dict[PhaseName, Speed],
    *,
    loaders: int,
    accumulate: int = 1,
    mirror: bool = True,
) -> Estimate:
    """Estimate a run.

    Args:
        work: what it does.
        network: what it trains.
        machine: what it runs on.
        host: what its cores and disks do.
        speeds: of a worker by phase, at its share of the batch.
        loaders: loader processes of each worker; 0 decodes in the worker itself.
        accumulate: global batches to an optimizer step.
        mirror: whether evaluation embeds mirror images, too.
    """
    steps: dict[PhaseName, Step] = {
        phase: step(work, network.phases[phase], machine, host, speed, loaders, accumulate)
        for phase, speed in speeds.items()
    }
    evaluation = evaluate(work, network, machine, host, speeds["all"], loaders, mirror)
    train = measured = wait = 0.0
    bound = dict.fromkeys(NAMES, 0.0)
    for part in work.passes:
        if part.phase is None:
            seconds, limit = evaluation, "compute"
            measured += seconds
        else:
            seconds, limit = part.steps * steps[part.phase].seconds, steps[part.phase].limit
            train += seconds
        link, load = downloading(part, machine)
        wait += max(0.0, load - seconds)
        bound[link if load > seconds else limit] += max(load, seconds)
    written = sum(work.checkpoints[phase] * network.checkpoint(phase) for phase in PHASES)
    return Estimate(
        workload=work,
        steps=steps,
        start=host.start,
        train=train,
        evaluate=measured,
        checkpoint=written / host.write,
        wait=wait,
        finish=host.finish,
        limit=max(bound, key=bound.__getitem__),
    )


def step(
    work: Workload,
    phase: Phase,
    machine: Machine,
    host: Host,
    speed: Speed,
    loaders: int,
    accumulate: int,
) -> Step:
    """One optimizer step: `accumulate` batches, one exchange of gradients."""
    mates = work.layout.busiest
    share = work.images // accumulate // work.layout.workers
    decode = 0.0 if speed.decoding and loaders == 0 else share * host.decode
    alone = speed.seconds + (decode if loaders == 0 else 0.0)
    if machine.on_cpu:
        beside = decode if loaders else 0.0
        compute = max(alone, mates * (alone + beside) / machine.cores)
        if not speed.talk:  # measured alone
            compute *= 1 + host.crowding * math.log2(mates)
        free = machine.cores
    else:
        compute, free = alone, max(machine.cores - mates, 1)
    waiting = 0.0
    if loaders:
        waiting = mates * decode / min(mates * loaders, free)
    talk = 0.0 if speed.talk else talking(work, phase, machine, compute, share, accumulate)
    return Step(accumulate * compute, talk, accumulate * waiting)


def talking(
    work: Workload, phase: Phase, machine: Machine, compute: float, share: int, accumulate: int
) -> float:
    """Seconds of a step in which workers wait for each other's numbers.

    Gradients go round a ring: each worker sends and receives 2(n − 1)/n of them. On GPUs that
    hides behind the backward pass; on the CPU it takes the same cores.
    """
    workers = work.layout.workers
    if workers == 1:
        return 0.0
    link = bandwidth(work, machine)
    ring = 2 * (workers - 1) / workers * phase.gradients / link
    hidden = 0.0 if machine.on_cpu else OVERLAP * compute
    small = phase.collectives * machine.latency * math.log2(workers)
    return max(0.0, ring - hidden) + accumulate * small


def bandwidth(work: Workload, machine: Machine) -> float:
    """Bytes a second that a worker's ring neighbour gets: its slowest link's."""
    if work.layout.nodes == 1:
        return machine.interconnect
    return min(machine.interconnect, machine.network)


def evaluate(
    work: Workload,
    network: Network,
    machine: Machine,
    host: Host,
    speed: Speed,
    loaders: int,
    mirror: bool,
) -> float:
    """Seconds of one evaluation: embedding on all workers, ranking on the first."""
    images = work.queries + work.gallery
    if images == 0:
        return 0.0
    layout = work.layout
    share = math.ceil(images / layout.workers)
    batch = work.images / layout.workers
    forward = speed.seconds / batch * network.flops / network.phases["all"].flops
    alone = share * (1 + mirror) * forward
    decode = share * host.decode
    if machine.on_cpu:
        embed = max(
            alone + (decode if loaders == 0 else 0.0),
            decode / max(loaders, 1),  # a loader's process has one core, however many there are
            layout.busiest * (alone + decode) / machine.cores,
        )
    else:
        free = min(layout.busiest * max(loaders, 1), max(machine.cores - layout.busiest, 1))
        embed = max(alone, layout.busiest * decode / free)
    gathered = 4 * network.embedding * images / bandwidth(work, machine)
    products = 2.0 * work.queries * work.gallery * network.embedding
    cores = 1 if machine.on_cpu else machine.cores
    return embed + gathered * (layout.workers > 1) + products / host.multiply / cores


def downloading(part: Pass, machine: Machine) -> tuple[str, float]:
    """The slower of a node's network and S3, and the seconds that a pass's shards take on it."""
    network, s3 = part.busiest_bytes / machine.network, part.bytes / machine.s3
    return ("network", network) if network >= s3 else ("s3", s3)
