"""Measures several things in turn, round after round.

The figures of one round are comparable: a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Report = dict[str, Any]


class Turn(NamedTuple):
    """One of the things to measure."""

    name: str
    run: Callable[[], object]
    amount: int = 1  # units of work per run, such as steps
    unit: str = "run"  # what a unit of work is called


def in_turn(turns: Sequence[Turn], seconds: float,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, list[float]]:
    """Runs all turns, round after round: for `seconds`, but at least three rounds.

    Args:
      turns: what to run.
      seconds: how long, by the clock on the wall.
      clock: what times a turn, such as `time.process_time`.

    Returns:
      by name the seconds per unit of work in each round. Turns of one name are averaged.
    """
    times: dict[str, list[float]] = {turn.name: [] for turn in turns}
    began, rounds = time.monotonic(), 0
    while time.monotonic() - began < seconds or rounds < 3:
        rounds += 1
        found: dict[str, list[float]] = {}
        for name, run, amount, unit in turns:
            at = clock()
            run()
            found.setdefault(name, []).append((clock() - at) / amount)
            print(f"\rround {rounds}: {name}: {found[name][-1]:.3f} s/{unit}        ", end="",
                  file=sys.stderr, flush=True)
        for name, values in found.items():
            times[name].append(statistics.mean(values))
    print(file=sys.stderr)
    return times


def write_report(report: Report, out: str) -> None:
    """Writes the figures of a benchmark to the file `out` as JSON, unless it is ""."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
