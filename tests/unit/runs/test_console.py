"""What a person sees of a run, and the thread between its board and the console."""

from __future__ import annotations

import io
import re
import signal
import threading

import pytest
import ray
from ray.exceptions import GetTimeoutError
from rich.console import Console

from data_shards import progress
from data_shards.progress import Display, display
from reid_train.recipes import recipe
from reid_train.runs import console
from reid_train.runs.job import UNITS
from reid_train.runs.process import Stop


class Board:
    """A board in this process; its answers are what the test says."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.told = list(answers), threading.Event()

    @property
    def read(self) -> Board:
        return self

    def remote(self, seen: int, stop: bool) -> object:
        if self.answers:
            return self.answers.pop(0)
        if stop:
            self.told.set()
        return {}, {}, []


def get(answer: object, timeout: float) -> object:
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.timeout(60)
def test_a_stop_is_passed_on_although_ray_answered_late_before(monkeypatch):
    monkeypatch.setattr(ray, "get", get)
    board, stop = Board(GetTimeoutError(), GetTimeoutError()), Stop()
    with (
        display(Console(file=io.StringIO())) as shown,
        console.watch(board, shown, recipe("demo"), stop),
    ):
        stop.ask(signal.SIGTERM, None)
        assert board.told.wait(30)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def log() -> tuple[Console, Display]:
    made = Console(file=io.StringIO(), width=80)
    return made, Display(made, UNITS, "images")


def lines(shown: Console) -> list[str]:
    return shown.file.getvalue().splitlines()  # type: ignore[attr-defined]


def state(epoch: int, step: int) -> dict:
    where = {"epoch": epoch, "step": step, "epochs": 4, "steps": 50}
    return where | {"loss": 7.0 - epoch, "images_per_second": 64.0}


def evaluation(epoch: int, mean_average_precision: float) -> dict:
    metrics = {"mAP": mean_average_precision, "rank-1": 0.5, "mINP": 0.25}
    return {"epoch": epoch, "metrics": metrics, "seconds": 21.0}


def test_each_line_is_new_and_the_time_left_does_not_jump(clock):
    made, shown = log()
    follower = console.Follower(shown, every=2)
    stages: dict[str, tuple[int, int]] = {}
    evaluations: list[dict] = []

    def look(now: dict) -> None:
        for _ in range(4):  # the driver looks more often than there is news
            follower.look(now, dict(stages), evaluations[follower.evaluated :])
            clock[0] += 0.25

    def evaluate(now: dict, epoch: int) -> None:
        for done in range(0, 21):
            stages["embedding gallery"] = (done * 10, 200)
            look(now)
        evaluations.append(evaluation(epoch, 0.1 + epoch / 10))
        look(now)

    evaluate({}, 0)
    for epoch in range(4):
        for step in range(1, 51):
            look(state(epoch, step))
        if epoch % 2 == 1:
            evaluate(state(epoch, 50), epoch + 1)
    said = lines(made)
    assert said[:4] == [
        "starting the workers",
        "embedding gallery: 200 images in 0:00:20, 10/s",
        "before training: mAP 10.00 %, rank-1 50.00 %, mINP 25.00 %",
        "training: 31 of 200 steps, 1/s, 0:03:31 left (0:00:42 to evaluate), "
        "epoch 1 of 4, loss 7.000, 64 images/s",
    ]
    assert said[-3:] == [
        "training: 199 of 200 steps in 0:03:41, 0.9/s",
        "embedding gallery: 200 images in 0:00:20, 10/s",
        "after 4 epochs: mAP 50.00 %, rank-1 50.00 %, mINP 25.00 %",
    ]
    assert len(set(said)) == len(said) - 2  # only the lines of three equal evaluations
    left = [int(m) * 60 + int(s) for m, s in re.findall(r"0:(\d\d):(\d\d) left", "\n".join(said))]
    truth = [31, 61, 91, 101, 131, 161, 191]
    truth = [200 - step + 21 * (1 + (step <= 100)) for step in truth]
    assert left == pytest.approx(truth, abs=6)


def terminal() -> tuple[Console, Display]:
    made = Console(file=io.StringIO(), force_terminal=True, width=80)
    return made, Display(made, UNITS, "images")


def shown_stages(display: Display) -> set[str]:
    return {task.description for task in display._bars.tasks}


def test_a_stage_that_never_reports_its_total_goes_with_its_evaluation(clock):
    _, shown = terminal()
    follower = console.Follower(shown, every=2)
    follower.look(state(1, 50), {"embedding gallery": (0, 21)}, [])
    assert shown_stages(shown) == {"training", "embedding gallery"}
    follower.look(state(1, 50), {"embedding gallery": (20, 21)}, [evaluation(2, 0.5)])
    assert shown_stages(shown) == {"training"}


def test_a_stage_of_the_last_evaluation_goes_when_training_ended(clock):
    _, shown = terminal()
    follower = console.Follower(shown, every=2)
    follower.look(state(3, 50), {"embedding gallery": (0, 21)}, [])
    follower.look(state(3, 50), {"embedding gallery": (20, 21)}, [evaluation(4, 0.5)])
    assert shown_stages(shown) == set()


def test_a_stage_goes_when_training_resumes_from_a_checkpoint(clock):
    _, shown = terminal()
    follower = console.Follower(shown, every=2)
    follower.look(state(1, 50), {"embedding gallery": (20, 200)}, [])
    follower.look(state(0, 10), {"embedding gallery": (20, 200)}, [])
    assert shown_stages(shown) == {"training"}


def test_a_late_look_at_an_evaluation_does_not_lengthen_the_time_left(clock):
    made, shown = log()
    follower = console.Follower(shown, every=1)
    follower.look({}, {"ranking": (0, 1)}, [])
    follower.look(state(0, 0), {"ranking": (1, 1)}, [evaluation(0, 0.1)])
    for step in range(1, 51):
        clock[0] += 1.0
        follower.look(state(0, step), {"ranking": (1, 1)}, [])
    follower.look(state(0, 50), {"ranking": (1, 1)}, [evaluation(1, 0.2)])
    clock[0] += 1.0
    follower.look(state(1, 1), {"ranking": (1, 1)}, [])
    clock[0] += 30.0
    follower.look(state(1, 31), {"ranking": (1, 1)}, [])
    assert "81 of 200 steps, 1/s, 0:03:02 left (0:01:03 to evaluate)" in lines(made)[-1]


def test_the_loss_stays_when_a_state_has_none(clock):
    made, shown = log()
    follower = console.Follower(shown, every=1)
    follower.look(state(0, 1), {}, [])
    clock[0] += 40
    follower.look({"epoch": 0, "epochs": 4, "step": 2, "steps": 50}, {}, [])
    assert lines(made)[-1].endswith("epoch 1 of 4, loss 7.000, 64 images/s")


def test_an_evaluation_on_validation_is_called_so(clock):
    made, shown = log()
    follower = console.Follower(shown, every=1)
    follower.look(state(0, 1), {}, [evaluation(0, 0.2) | {"split": "validation"}])
    assert "before training, on validation: mAP 20.00 %, rank-1 50.00 %, mINP 25.00 %" in lines(
        made
    )


def test_an_evaluation_comes_after_its_epochs_last_step_and_before_the_next(clock):
    made, shown = log()
    follower = console.Follower(shown, every=1)
    follower.look(state(0, 1), {}, [])
    clock[0] += 40.0
    follower.look(state(1, 3), {}, [evaluation(1, 0.2)])
    assert [line.partition(":")[0] for line in lines(made)[1:]] == ["after 1 epoch", "training"]


def test_a_worker_reports_at_most_twice_a_second_but_the_ends_always(clock):
    sent = []

    class Remote:
        class progress:
            remote = staticmethod(lambda *report: sent.append(report))

    report = console.reporter(Remote)
    for done in range(0, 1001):
        report("embedding", done, 1000)
        clock[0] += 0.01
    assert sent[0] == ("embedding", 0, 1000)
    assert sent[-1] == ("embedding", 1000, 1000)
    assert 18 <= len(sent) <= 23
