"""The watchdog: ends a run that no longer moves, and names the process that the others wait for."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from lmjax.monitoring.goodput import ACTIVITIES
from lmjax.runtime import distributed

T = TypeVar("T")
POLL_SECONDS = 15.0  # between two looks, at most
GRACE_SECONDS = 20.0  # for the other processes to notice the stall and write their stacks, too
# These activities take long and show no progress. They are allowed this many seconds, or the run's
# `stall_seconds` if that is more.
PATIENCE = {
    "setting up": 1800.0,
    "preparing data": 24 * 3600.0,
    ACTIVITIES["restore"]: 1800.0,
    ACTIVITIES["compile"]: 1800.0,
    ACTIVITIES["checkpoint"]: 1800.0,
}


class Watchdog:
    """Ends the run when it has not moved for too long.

    It writes the stacks of all threads to stderr and to `stall-<process>.txt`, prints a line that
    names the slowest process, and exits with code 1. If a call never returns and keeps Python's
    lock, a thread of C (`faulthandler`) writes the stacks to stderr and ends the process.

    Args:
      seconds: how long the run may stand still; 0 switches the watchdog off. The activities in
        PATIENCE may take longer.
      folder: where the stacks go.
    """

    def __init__(self, seconds: float, folder: Path):
        self._seconds, self._folder = seconds, folder
        self._place = distributed.Place(0, 0, "setting up")
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lmjax-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def at(self, step: int, doing: str) -> None:
        """The main thread says that it begins `doing` at `step`.

        Every process makes the same sequence of calls.
        """
        before = self._limit
        self._place = distributed.Place(self._place.moves + 1, step, doing)
        self._moved = time.monotonic()
        # The watching thread may get no turn if what begins now keeps Python's lock.
        if self._seconds and self._limit != before:
            self._arm()

    def each(self, items: Iterable[T], step: int, doing: str) -> Iterator[T]:
        """Yields the items and calls `at` before each one."""
        for item in items:
            self.at(step, doing)
            yield item

    @property
    def _limit(self) -> float:
        return max(self._seconds, PATIENCE.get(self._place.doing, 0.0))

    def _arm(self) -> None:
        """Sets the timer of the thread that needs no Python to end the process."""
        faulthandler.dump_traceback_later(self._limit + 2 * GRACE_SECONDS, exit=True,
                                          file=sys.__stderr__ or sys.stderr)

    def _watch(self) -> None:
        told = None
        while not self._done.wait(min(POLL_SECONDS, self._seconds / 8)):
            self._arm()
            place, limit = self._place, self._limit
            if place != told:
                told = place
                distributed.tell(told)
            still = time.monotonic() - self._moved
            if still >= limit and place is self._place:
                self._end(still, limit)

    def _end(self, still: float, limit: float) -> None:
        """Writes the stacks and ends all processes; `still` is how long this one did not move."""
        # `jax.process_index` would hang if the run waits for its devices.
        path = self._folder / f"stall-{distributed.process()}.txt"
        with contextlib.suppress(OSError):  # a full disk or a lost directory: the run ends anyway
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as stacks:
                faulthandler.dump_traceback(stacks)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        everyone = distributed.places(self._place)
        if len(everyone) > 1:
            time.sleep(min(GRACE_SECONDS, self._seconds / 2))
        what = self._place.doing if self._place.doing in PATIENCE else "a step"
        distributed.fail(1, f"expected {what} to end within {limit:g} s, got no end in "
                            f"{still:.0f} s: {slowest(everyone)}; see the stacks in {path}, or "
                            "raise watch.stall_seconds")


def slowest(everyone: dict[int, tuple[distributed.Place, str]]) -> str:
    """Names the processes that have moved least: number, host, activity and step.

    Args:
      everyone: the place and the host of each process, by its number.
    """
    moves = [place.moves for place, _ in everyone.values()]
    behind = [f"process {number} ({host}) is {place.doing} at step {place.step}"
              for number, (place, host) in sorted(everyone.items()) if place.moves == min(moves)]
    more = f"; and {len(behind) - 4} more" if len(behind) > 4 else ""
    named = "; ".join(behind[:4]) + more
    if min(moves) == max(moves):
        return named
    ahead = max(place.step for place, _ in everyone.values())
    return (f"{named}, and late: {len(everyone) - len(behind)} of {len(everyone)} processes are "
            f"further, at step {ahead}")
