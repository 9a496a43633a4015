"""SIGTERM and SIGINT: a run saves its step before it ends."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Records whether the run was asked to stop: SIGTERM (pre-emption) or SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal's number
        self.deferred = False
        self._calls, self._due = 0, False

    def defer(self) -> None:
        """Leaves signals to `due` from now on. The loop calls this once it can save.

        Before that, a signal acts at once.
        """
        self.deferred = True

    def due(self) -> bool:
        """Returns whether to stop now: True on every process at the same call, and afterwards.

        Every process has to call it equally often, for example once per step.
        """
        if self._due:
            return True
        self._calls += 1
        if jax.process_count() > 1:  # JAX's distributed runtime takes SIGTERM and agrees on a call
            self._due = multihost_utils.reached_preemption_sync_point(self._calls)
        else:
            self._due = self.received is not None
        return self._due


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catches SIGTERM and SIGINT inside the block and records them in a `StopSignal`.

    While there is nothing to save yet, a signal ends the process at once, and so does a second
    SIGINT at any time.
    """
    stop = StopSignal()
    several = jax.process_count() > 1

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT and (stop.received == number or not stop.deferred):
            raise KeyboardInterrupt
        if not stop.deferred:
            # nothing is saved, so the exit code must not say success
            raise SystemExit(128 + number)
        stop.received = number
        if several:  # JAX's distributed runtime tells the other processes of a SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
