"""A training that goes on for long under random faults, and comes to what a quiet one comes to.

    python tests/faults/soak.py WORK_FOLDER [--minutes 60] [--every 120] [--seed 0]

The people of `make demo` are sharded to a real S3 server behind a proxy that fails as it is told.
The main command trains on them with 2 workers: shortly to learn its speed, then with nothing
happening to it, then under a fault every so often (`soak_faults.py`), from which it has to come
back before the next. Exits with 1 if weights, θ, moments, losses or metrics differ from the quiet
run's in a bit, if a driver ended by itself, or if something grew (`soak_report.py`). Leaves
`soak.png` and `soak.md` in the folder, and what the drivers said. `--until quiet` stops before the
faulty run, which the same command without it then goes on with. Other flags are `train`'s.

The cache holds less than the data, so that shards are fetched as long as the run goes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import psutil
from soak_faults import FAULTS, GONE_SECONDS, Scene, dealt
from soak_report import Event, Outcome, draw, text
from soak_run import PATIENCE, STEPS, Place, Run, place
from soak_watch import alive

DEMO = ["--recipe", "demo", "--batch.window", "4", "--loader.workers", "1"]
CHECKPOINT_SECONDS, LOST_SECONDS = 20.0, 30.0
"""Between two checkpoints; and what a fault costs about, which sets the run's length."""
OVERHEAD = 1.3
"""Seconds of a run by those of its steps: evaluations and checkpoints."""


def quiet(run: Run) -> float:
    """Let a run be; its seconds."""
    with run.watch:
        run.start()
        try:
            code = run.process.wait()
            assert code == 0, f"exit {code}: {run.said()}"
            return run.watch.now()
        finally:
            run.finish()


def faulty(run: Run, every: float, seed: int) -> list[Event]:
    """Cause a fault every so often until the run has ended; what happened."""
    rng, events = random.Random(seed), []
    scene = Scene(rng, run.place.proxy, run.place.cache(run.name), run)
    with run.watch:
        run.start()
        try:
            recovered(run, 0, events)
            for kind in dealt(rng):
                due = run.watch.now() + every
                while run.watch.now() < due and run.process.poll() is None:
                    time.sleep(0.2)
                if run.process.poll() == 0 or not cause(kind, scene, events):
                    return events
        finally:
            run.finish()
    return events


def cause(kind: str, scene: Scene, events: list[Event]) -> bool:
    """Cause one fault and wait until the run makes steps again; False if it has ended."""
    run: Run = scene.run  # type: ignore[assignment]
    scene.waiting.clear()
    event = Event(run.watch.now(), run.step(), kind)
    events.append(event)
    began = time.monotonic()
    try:
        event.detail = FAULTS[kind](scene)
    except psutil.NoSuchProcess:
        if run.process.poll() != 0:
            raise
        events.remove(event)  # the run ended before it
        return False
    say(f"{event.time:.0f} s, step {event.step}: {kind}, {event.detail}")
    goes_on = recovered(run, event.step, events)
    # A request that the fault is for may come later than the next step.
    while goes_on and any(fault.hits < (fault.times or 1) for fault in scene.waiting):
        if time.monotonic() - began > 60 or run.process.poll() is not None:
            break
        time.sleep(0.2)
    event.seconds = time.monotonic() - began
    event.met = all(fault.hits for fault in scene.waiting)
    for fault in scene.waiting:
        fault.times = fault.hits  # no longer due
    deadline = time.monotonic() + GONE_SECONDS
    while (left := run.left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    event.left = [" ".join(process.cmdline())[:60] for process in left if alive(process)]
    return goes_on


def recovered(run: Run, step: int, events: list[Event]) -> bool:
    """Wait for a later step; False if the run ended. A driver that ended by itself is resumed."""
    deadline = time.monotonic() + PATIENCE
    while run.step() <= step:
        code = run.process.poll()
        if code == 0:
            return False
        if code is not None:
            unexpected = [event for event in events if event.kind == Event.BY_ITSELF]
            assert len(unexpected) < 3, f"drivers end by themselves: exit {code}: {run.said()}"
            said = f"exit {code}: {run.said()}"
            events.append(Event(run.watch.now(), step, Event.BY_ITSELF, said))
            say(said)
            run.resume()
        assert time.monotonic() < deadline, f"no step after {step}: {run.said()}"
        time.sleep(0.5)
    return True


def soak(
    here: Place, minutes: float, every: float, seed: int, until: str = "faulty"
) -> Outcome | None:
    """The speed, a quiet run, a faulty run, and what they came to.

    The first two are kept in the folder, and not done again.
    """
    settled, kept = here.folder / "settled.json", here.folder / "quiet.json"
    if not settled.exists():
        first = Run(here, _free(here, "speed"), ["--optimizer.epochs", "1"])
        quiet(first)
        step = statistics.median(point.value for point in first.tracked("step_seconds"))
        useful = 60 * minutes * every / (every + LOST_SECONDS)
        epochs = max(4, round(useful / (OVERHEAD * step * STEPS)))
        between = max(5, round(CHECKPOINT_SECONDS / step))
        settled.write_text(json.dumps({"step": step, "epochs": epochs, "between": between}))
    chosen = json.loads(settled.read_text())
    more = ["--optimizer.epochs", str(chosen["epochs"])]
    more += ["--checkpoint.every-steps", str(chosen["between"])]
    say(f"{chosen['step']:.2f} s a step: {chosen['epochs'] * STEPS} steps, {' '.join(more)}")
    hard = Run(here, _free(here, "faulty"), more)
    if kept.exists():
        calm = Run(here, json.loads(kept.read_text())["name"], more)
        calm.watch.load(kept)
    else:
        calm = Run(here, _free(here, "quiet"), more)
        say(f"{quiet(calm):.0f} s without a fault")
        calm.watch.save(kept, name=calm.name)
    if until == "quiet":
        return None
    events = faulty(hard, every, seed)
    said = "\n".join(hard.log(i).read_text(errors="replace") for i in range(len(hard.pids)))
    results, watches = (calm.result(), hard.result()), (calm.watch, hard.watch)
    return Outcome(results, watches, events, said, here.room, chosen["epochs"] * STEPS)


def _free(here: Place, name: str) -> str:
    """A name that no run has, if an earlier one was broken off."""
    return f"{name}-{len(list(here.folder.glob(f'{name}-*-0.log')))}"


def say(line: str) -> None:
    """Tell whoever waits."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made; keeps logs, plot and result")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the faulty run, about")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--until", choices=("quiet", "faulty"), default="faulty")
    args, flags = parser.parse_known_args()
    with place(args.folder.absolute(), [*DEMO, *flags]) as here:
        outcome = soak(here, args.minutes, args.every, args.seed, args.until)
    if outcome is None:
        return 0
    draw(outcome, args.folder / "soak.png")
    result = text(outcome, "soak.png")
    (args.folder / "soak.md").write_text(result)
    print(result)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
