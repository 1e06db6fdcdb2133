"""SIGTERM and SIGINT: the first asks a run to end in order, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from data_shards.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether this process was asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def ask(self, number: int, _frame: object) -> None:
        """Take a signal.

        Raises:
            Interrupted: it is the second.
        """
        if self.signal is not None:
            raise Interrupted("ended at once, by a second signal", number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Take SIGTERM and SIGINT while the block runs; outside the main thread, nothing is taken."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
