"""One driver a run: who gets it, who waits, who is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import asdict, replace

import psutil
import pytest

from data_shards.errors import ConfigError, Interrupted, ReidError
from data_shards.storage import LocalStorage
from reid_train.runs import run_lock
from reid_train.runs.process import stop_signals
from reid_train.runs.run_lock import Owner, held

ELSEWHERE = Owner("elsewhere", "boot", 1, 0.0)


@pytest.fixture
def run(tmp_path) -> LocalStorage:
    return LocalStorage(tmp_path / "run")


def leave(run: LocalStorage, owner: Owner, number: int = 1) -> None:
    run.write(f"lease/{number:06}.json", json.dumps(asdict(owner)).encode())


def leases(run: LocalStorage) -> list[str]:
    return [key for key, _ in run.list()]


def test_lock_is_given_back(run):
    with held(run, "r"):
        assert leases(run) == ["lease/000001.json"]
    assert leases(run) == []
    with held(run, "r"):
        pass


def test_lock_is_held_for_as_long_as_its_driver_has_the_run(run):
    with held(run, "r") as lock:
        elsewhere = pickle.loads(pickle.dumps(lock))
        elsewhere.require()
        leave(run, ELSEWHERE, 1)  # another got the same number
        assert not elsewhere.is_held()
    with held(run, "r", beat=0.1, silent=0.2) as next_lock:
        assert next_lock.is_held()
        with pytest.raises(ReidError, match=r"lease/000001\.json is gone: another driver took"):
            lock.require()


def test_second_driver_on_the_machine_is_refused_at_once(run):
    started = time.monotonic()
    with (
        held(run, "r"),
        pytest.raises(
            ConfigError,
            match=f"being trained by process {os.getpid()} .* a sweep with the same command",
        ),
        held(run, "r"),
    ):
        pass
    assert time.monotonic() - started < 5


def test_dead_driver_of_this_machine_is_followed_at_once(run):
    process = multiprocessing.get_context("fork").Process(target=lambda: None)
    process.start()
    owner = replace(Owner.here(), pid=process.pid)
    process.join()
    leave(run, owner, 7)
    with held(run, "r", silent=1000):
        assert leases(run) == ["lease/000008.json"]


def test_silent_driver_of_another_machine_is_followed_after_a_while(run):
    leave(run, ELSEWHERE)
    started = time.monotonic()
    with held(run, "r", beat=0.1, silent=0.5):
        assert time.monotonic() - started >= 0.5


def test_living_driver_of_another_machine_is_not_disturbed(run):
    leave(run, ELSEWHERE)
    threading.Timer(0.3, leave, (run, replace(ELSEWHERE, beats=1))).start()
    with (
        pytest.raises(ConfigError, match="process 1 on elsewhere"),
        held(run, "r", beat=0.1, silent=100),
    ):
        pass
    assert leases(run) == ["lease/000001.json"]


def test_of_many_that_want_a_dead_drivers_run_one_gets_it(run):
    leave(run, ELSEWHERE)
    got, refused = [], []
    finish = threading.Event()

    def want() -> None:
        try:
            with held(run, "r", beat=0.1, silent=0.5):
                got.append(1)
                finish.wait(30)
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(got) + len(refused) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    finish.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


def test_lock_that_is_replaced_while_it_is_read_counts_as_held(run, monkeypatch):
    leave(run, ELSEWHERE)
    read = LocalStorage.read

    def read_too_late(self, key, **options):
        if key == "000001.json":
            leave(run, Owner.here(), 2)
            run.delete("lease/000001.json")
        return read(self, key, **options)

    monkeypatch.setattr(LocalStorage, "read", read_too_late)
    with pytest.raises(ConfigError, match="is being trained"), held(run, "r"):
        pass
    assert leases(run) == ["lease/000002.json"]


def test_driver_stops_when_its_run_was_taken_over(run):
    lost = threading.Event()
    with held(run, "r", beat=0.1, lost=lost.set):
        leave(run, ELSEWHERE, 2)
        assert lost.wait(30)


def test_sleeper_does_not_take_back_a_number_that_was_given_again(run):
    """Another took over with 2 and ended; a third has 1, as the sleeper had."""
    lost = threading.Event()
    with held(run, "r", beat=0.1, lost=lost.set):
        leave(run, ELSEWHERE, 1)
        assert lost.wait(30)
    assert json.loads(run.read("lease/000001.json")) == asdict(ELSEWHERE)


def test_sleeper_does_not_continue_a_run_that_another_ended(run):
    lost = threading.Event()
    with held(run, "r", beat=0.1, lost=lost.set):
        run.delete("lease/000001.json")
        assert lost.wait(30)
    assert leases(run) == []


def test_lock_of_another_run_is_kept_at_the_end(run):
    with held(run, "r", beat=1000):
        leave(run, ELSEWHERE, 1)
    assert leases(run) == ["lease/000001.json"]


def test_holder_renews_its_lock(run):
    with held(run, "r", beat=0.05):
        deadline = time.monotonic() + 30
        while json.loads(run.read("lease/000001.json"))["beats"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_damaged_lock_is_waited_for_like_any_other(run):
    run.write("lease/000003.json", b"{")
    with held(run, "r", beat=0.1, silent=0.3):
        assert leases(run) == ["lease/000004.json"]


def test_process_number_of_another_start_of_the_machine_says_nothing():
    assert Owner.here().lives() is True
    assert replace(Owner.here(), boot="another").lives() is None
    assert replace(Owner.here(), started=1.0).lives() is False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere psutil says when a process began")
def test_driver_survives_a_change_of_the_clock(monkeypatch):
    owner, before = Owner.here(), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: before(self) + 3600)
    assert owner.lives() is True


def test_lock_on_s3_is_taken_once(s3):
    run = lease_storage(s3.url)
    with (
        held(run, "r"),
        pytest.raises(ConfigError, match="is being trained"),
        held(run, "r"),
    ):
        pass
    assert list(run.list()) == []


def lease_storage(url: str):
    from data_shards.storage import open_storage

    return open_storage(f"{url}/runs/r")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_and_the_second_ends(number):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal is number
        with pytest.raises(Interrupted) as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.exit_code == 143
    assert signal.getsignal(number) is before


def test_expiry_leaves_room_for_missed_beats():
    assert run_lock.SILENT_SECONDS >= 5 * run_lock.BEAT_SECONDS
