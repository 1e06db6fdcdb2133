"""What a sweep was given and what became of each trial, as JSON beside the runs.

    <output>/<sweep>/sweep.json            the settings, taken once
    <output>/<sweep>/trials/trial-007.json one trial, written anew at each evaluation
    <output>/<sweep>/trial-007/            the trial's run: checkpoints, snapshot, report

Only the driver writes here. A sweep whose driver was killed continues from these files: ended
trials stay as they are, the others resume from their own checkpoints, and the searcher and the
scheduler learn from all of them again.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from pydantic import ValidationError

from data_shards.errors import ConfigError
from data_shards.storage import Storage, open_storage
from reid_train.config import TrainConfig, explain
from tune.config import EXTENDABLE, NEUTRAL, Sweep
from tune.space import Value, apply

State = Literal["queued", "running", "waiting", "finished", "stopped", "failed"]
"""`waiting`: between two parts of a population's training; `stopped`: by the scheduler."""
ENDED = ("finished", "stopped", "failed")
HELD = "λ held"  # label of a repeat in which no λ is learnt: each stays where it starts


@dataclass
class Trial:
    """One configuration's training."""

    number: int
    values: dict[str, Value]  # what differs from the base; a population changes them between parts
    label: str = ""  # of a first point; other trials have none
    seed: int = 0
    repeats: int | None = None  # number of the trial that this one repeats with another seed
    state: State = "queued"
    reason: str = ""
    # Metrics by name, with epoch, step, run, checkpoint and Unix time, ascending by epoch.
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    mlflow_run_id: str | None = None
    part: int = 0  # trainings before this one, in a population; each has its own run folder
    start: str | None = None  # run and checkpoint folder that this part started from
    until: int | None = None  # epoch at which this part ends, if before the last
    # Epoch, values and donor at the start of each part, in a population.
    changes: list[dict[str, Any]] = field(default_factory=list)
    losses: int = 0  # of its process, since the last evaluation
    images_per_second: float | None = None
    began: float = 0.0
    ended: float = 0.0

    @property
    def name(self) -> str:
        """`trial-007`."""
        return f"trial-{self.number:03d}"

    @property
    def runs(self) -> list[str]:
        """Folders of the runs of all parts so far."""
        return [self.name, *(f"{self.name}-{part}" for part in range(1, self.part + 1))]

    @property
    def run_name(self) -> str:
        """Folder of this part's run."""
        return self.runs[-1]

    @property
    def epoch(self) -> int:
        """The last epoch that was evaluated; 0 before the first evaluation."""
        return int(self.evaluations[-1]["epoch"]) if self.evaluations else 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest mAP, of equal ones the newest: its checkpoint is kept."""
        return max(reversed(self.evaluations), key=lambda e: e["mAP"], default=None)

    @property
    def score(self) -> float:
        """The highest mAP, NaN if none was measured."""
        return self.best["mAP"] if self.best else float("nan")

    def add(self, evaluation: dict[str, Any]) -> bool:
        """Take an evaluation of this part; whether it is new. One of the same epoch is replaced.

        One whose checkpoint is gone may be of an earlier part, and replaces none.
        """
        known = {e["epoch"]: e for e in self.evaluations}
        before = known.get(evaluation["epoch"], {})
        if before and not evaluation["checkpoint"]:
            return False
        came = {"run": self.run_name, "time": before.get("time", time.time())}
        known[evaluation["epoch"]] = evaluation | came
        self.evaluations = [known[epoch] for epoch in sorted(known)]
        return not before

    def config(self, base: TrainConfig) -> TrainConfig:
        """The configuration of this part; `base` is the sweep's, with its folder as output."""
        return apply(self.values, base).replace(name=self.run_name, seed=self.seed)

    def best_config(self, base: TrainConfig) -> TrainConfig:
        """The configuration of the part that the best evaluation belongs to."""
        run = self.best["run"] if self.best else self.run_name
        values = self.changes[self.runs.index(run)]["values"] if self.changes else self.values
        return apply(values, base).replace(name=run, seed=self.seed)


@dataclass(frozen=True)
class Store:
    """The sweep's folder on storage."""

    storage: Storage

    @classmethod
    def open(
        cls, settings: Sweep, config: TrainConfig, manifest_digest: str, *, create: bool = True
    ) -> Self:
        """Create a sweep's folder, or continue the same sweep; only check it without `create`."""
        store = cls(open_storage(config.output).child(config.name or ""))
        where = f"{config.output}/{config.name}"
        if store.storage.exists("run.json"):
            raise ConfigError(f"{where} is a training run: give the sweep another --name")
        if store.storage.exists("sweep.json"):
            _same_sweep(where, store.noted("sweep"), settings, config, manifest_digest)
        elif create:
            saved = {
                "sweep": settings.model_dump(mode="json"),
                "config": config.model_dump(mode="json"),
                "manifest_digest": manifest_digest,
            }
            store.storage.write("sweep.json", _json(saved), create_once=True)
        return store

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Write a small fact of the sweep, such as its MLflow run."""
        self.storage.write(f"{name}.json", _json(values))

    def noted(self, name: str) -> dict[str, Any]:
        """What `note` wrote; {} if nothing."""
        key = f"{name}.json"
        return json.loads(self.storage.read(key)) if self.storage.exists(key) else {}

    def save(self, trial: Trial) -> None:
        """Write one trial."""
        self.storage.write(f"trials/{trial.name}.json", _json(asdict(trial)))

    def trials(self) -> list[Trial]:
        """All trials, by number; a `ConfigError` if one cannot be read, or is missing."""
        found = []
        for key, _ in self.storage.list("trials/"):
            try:
                trial = Trial(**json.loads(self.storage.read(key)))
                if key != f"trials/{trial.name}.json":
                    raise ValueError(f"it is of {trial.name}")
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{self.storage.url}/{key} is damaged: {error}. Restore it, or start a new "
                    "sweep under another --name"
                ) from error
            found.append(trial)
        found.sort(key=lambda trial: trial.number)
        for number, trial in enumerate(found):
            if trial.number != number:
                raise ConfigError(
                    f"{self.storage.url}/trials/trial-{number:03d}.json is missing, and later "
                    "trials are there: restore it, or start a new sweep under another --name"
                )
        return found


def _same_sweep(
    where: str, before: dict, settings: Sweep, config: TrainConfig, manifest_digest: str
) -> None:
    """Refuse other settings than a sweep had; one that an older version lacked had its default."""
    try:
        old = Sweep.model_validate(before["sweep"])
        old_config = TrainConfig.model_validate(before["config"])
    except ValidationError as error:
        raise ConfigError(
            f"the sweep {where} has settings that this version refuses ({explain(error)}): give "
            "another --name"
        ) from error
    # A new member of a population would miss the first rounds.
    if old.scheduler == settings.scheduler == "population" and old.trials != settings.trials:
        raise ConfigError(
            f"the sweep {where} is a population of fixed size, --trials {old.trials}: give that to "
            f"continue it, or start a new sweep with --trials {settings.trials} under another "
            "--name"
        )
    was = old.model_dump() | old_config.flat() | {"data (its content)": before["manifest_digest"]}
    now = settings.model_dump() | config.flat() | {"data (its content)": manifest_digest}
    free = EXTENDABLE | NEUTRAL
    changed = [n for n in now if was.get(n) != now[n] and n.split(".")[0] not in free]
    if changed:
        raise ConfigError(
            f"the sweep {where} had other settings of {', '.join(changed)}: leave them as they "
            "were to continue it, or give another --name"
        )


def _json(values: Any) -> bytes:
    return json.dumps(values, indent=2).encode()
