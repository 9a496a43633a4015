"""SIGTERM and SIGINT: a run saves its step before it ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

GRACE_SECONDS = 3.0  # for the main thread to end by itself


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

    While there is nothing to save yet, a signal ends the process at once, and so does a second one
    at any time: within GRACE_SECONDS, even if the main thread is in a call that runs no Python.
    """
    stop, done = StopSignal(), threading.Event()
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
    read, write = os.pipe()
    os.set_blocking(write, False)
    woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # told before any Python runs
    threading.Thread(target=_watch, args=(read, stop, done), name="lmjax-signals",
                     daemon=True).start()
    try:
        yield stop
    finally:
        done.set()
        signal.set_wakeup_fd(woken)
        os.close(write)  # which ends the thread
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(read: int, stop: StopSignal, done: threading.Event) -> None:
    """Ends the process after a signal that acts at once, unless its main thread does so itself."""
    received = 0
    with os.fdopen(read, "rb", buffering=0) as signals:
        while told := signals.read(1):
            if told[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            received += 1
            if (received > 1 or not stop.deferred) and not done.wait(GRACE_SECONDS):
                os._exit(128 + told[0])
