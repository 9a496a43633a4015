"""Watching a run: whether it still moves and who is late, traces of chosen steps."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from lmjax.monitoring.goodput import KINDS
from lmjax.runtime import distributed

T = TypeVar("T")
POLL_SECONDS = 15.0  # between looks, at most
GRACE_SECONDS = 20.0  # for the others to find the same and to write their stacks, too
PATIENCE = {  # seconds, at least, for what may take long with nothing to show for it, by what a run is at
    "setting up": 1800.0,
    "preparing data": 24 * 3600.0,
    **dict.fromkeys((KINDS["restore"], KINDS["compile"], KINDS["checkpoint"]), 1800.0),
}


class Watchdog:
    """Ends the process when it has not moved for `seconds` (0: never), or for longer where PATIENCE says so: stacks of
    all threads to stderr and to `stall-<process>.txt` in `folder`, exit code 1, and a line that names the process which
    is behind the others.

    A process that cannot run Python any more, in a call that never returns, is ended by a thread that needs none.
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
        """The main thread begins `doing` at `step`: the same sequence of calls on every process."""
        before = self._limit
        self._place, self._moved = distributed.Place(self._place.moves + 1, step, doing), time.monotonic()
        if self._seconds and self._limit != before:  # not at the next look: there is none if this holds the interpreter
            self._arm()

    def each(self, items: Iterable[T], step: int, doing: str) -> Iterator[T]:
        """The items, each a move."""
        for item in items:
            self.at(step, doing)
            yield item

    @property
    def _limit(self) -> float:
        return max(self._seconds, PATIENCE.get(self._place.doing, 0.0))

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(self._limit + 2 * GRACE_SECONDS, exit=True, file=sys.__stderr__)

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
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"stall-{distributed.process()}.txt"  # JAX's own index may be what it hangs at
        with open(file, "w") as stacks:
            faulthandler.dump_traceback(stacks)
        faulthandler.dump_traceback(sys.__stderr__)
        everyone = distributed.places(self._place)
        if len(everyone) > 1:
            time.sleep(min(GRACE_SECONDS, self._seconds / 2))
        what = self._place.doing if self._place.doing in PATIENCE else "a step"
        distributed.fail(1, f"expected {what} to end within {limit:g} s, got no end in {still:.0f} s: "
                            f"{late(everyone)}; see the stacks in {file}, or raise watch.stall_seconds")


def late(everyone: dict[int, tuple[distributed.Place, str]]) -> str:
    """Who is behind: the processes that have moved least, by number, host and what they are at."""
    least, most = (f(place.moves for place, _ in everyone.values()) for f in (min, max))
    behind = [f"process {number} ({host}) is {place.doing} at step {place.step}"
              for number, (place, host) in sorted(everyone.items()) if place.moves == least]
    few = "; ".join(behind[:4]) + (f"; and {len(behind) - 4} more" if len(behind) > 4 else "")
    if least == most:
        return few
    ahead = max(place.step for place, _ in everyone.values())
    return f"{few}, and late: {len(everyone) - len(behind)} of {len(everyone)} processes are further, at step {ahead}"


class Trace:
    """A trace of steps first..last by `jax.profiler`, in `folder`/profile; `steps`: "first:last", or empty for none."""

    def __init__(self, steps: str, folder: Path):
        self._first, self._last = map(int, steps.split(":")) if steps else (1, 0)
        self._folder, self._on = folder / "profile", False

    def missed(self, start: int) -> str:
        """Says which of its steps a run that goes on from step `start` has behind it; "" if none."""
        if not self._first <= min(start, self._last):
            return ""
        rest = f"steps {start + 1}:{self._last}" if start < self._last else "nothing"
        return (f"watch.profile: expected steps {self._first}:{self._last} to come, got a run that goes on from step "
                f"{start}; tracing {rest}")

    def before(self, step: int) -> None:
        """Called before a step is dispatched."""
        if not self._on and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> bool:
        """Called after a step was dispatched; whether the trace ended with it, for which its result is waited for."""
        if not (self._on and step >= self._last):
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends the trace early, if there is one."""
        if self._on:
            self._on = False
            with contextlib.suppress(RuntimeError):  # another one has ended it
                jax.profiler.stop_trace()


def write_hlo(folder: str, traced: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """The step before and after the compiler: `step.stablehlo.mlir` and `step.hlo.txt` in `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "step.stablehlo.mlir").write_text(traced.as_text())
    (Path(folder) / "step.hlo.txt").write_text(compiled.as_text())
