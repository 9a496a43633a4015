"""SIGTERM and SIGINT: a run saves its step before it ends."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Whether this run was asked to stop: SIGTERM (pre-emption) or SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False  # set once there is a step to save: until then a signal ends the process at once
        self._calls, self._due = 0, False

    def due(self) -> bool:
        """True on every process at the same call, and from then on. Call it as often on each of them."""
        if self._due:
            return True
        self._calls += 1
        if jax.process_count() > 1:  # the distributed runtime holds SIGTERM and agrees on a call
            self._due = multihost_utils.reached_preemption_sync_point(self._calls)
        else:
            self._due = self.received is not None
        return self._due


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Collects SIGTERM and SIGINT while inside; before there is anything to save, and on a second SIGINT, they act."""
    stop = StopSignal()

    several = jax.process_count() > 1

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and (stop.received == number or not stop.deferred):
            raise KeyboardInterrupt
        if not stop.deferred:
            raise SystemExit(128 + number)  # nothing is saved: who waits for the run must not think it done
        stop.received = number
        if several:  # the distributed runtime, which holds that signal, tells the others
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
