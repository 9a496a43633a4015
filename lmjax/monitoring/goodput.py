"""The goodput ledger: how a run spent its wall time, summed over all its starts.

`ledger.jsonl` has one row per start, and then one row per minute and per checkpoint:

    {"step": ..., "at": seconds since 1970, ACTIVITY: seconds since the row before, ...}

The row of a start also has "start": the seconds since the process began.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmjax.monitoring.jsonl import Appender
from lmjax.monitoring.units import human_seconds

LEDGER_FILE = "ledger.jsonl"
ROW_SECONDS = 60.0  # seconds between rows; a kill loses at most this much of the account
SLOW_FACTOR = 1.5  # a step is slow if it takes more than this times the median of the steps before
ACTIVITIES = {  # in the order in which reports show them
    "useful": "training steps that count",
    "redone": "steps that a later start did again",
    "data": "waiting for data",
    "compile": "compiling",
    "eval": "evaluating",
    "sample": "sampling",
    "checkpoint": "saving checkpoints",
    "restore": "restoring a checkpoint",
    "setup": "setting up",
    "idle": "the loop, besides",
    "down": "not running, or lost with a kill",
}


class Ledger:
    """Adds up seconds by activity and writes them to `ledger.jsonl`, about once per minute.

    Args:
      workdir: the run's directory; None on processes that write nothing.
    """

    def __init__(self, workdir: Path | None):
        self._file = Appender(workdir / LEDGER_FILE if workdir else None)
        self._step, self._spent, self._next = 0, Counter[str](), 0.0

    def start(self, step: int, seconds: float, **spent: float) -> None:
        """Records that the loop begins.

        Args:
          step: the step that the run starts or resumes from.
          seconds: the seconds since the process began.
          spent: how many of them went to other activities than setting up.
        """
        self._step = step
        self._row({"start": seconds, **spent})

    def spend(self, step: int, **seconds: float) -> None:
        """Records that `seconds` went to these activities, up to `step`."""
        self._step = step
        self._spent.update(seconds)
        if time.time() >= self._next:
            self.row()

    def row(self) -> None:
        """Writes the seconds since the last row, if there are any."""
        if self._spent:
            self._row(self._spent)

    def close(self) -> None:
        """Writes the last row and closes the file."""
        self.row()
        self._file.close()

    def _row(self, values: Mapping[str, float]) -> None:
        now = time.time()
        self._file.append({"step": self._step, "at": now, **values})
        self._spent, self._next = Counter(), now + ROW_SECONDS


def account(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Sums up the seconds of a ledger by activity.

    If a start resumes before the last row, the steps that it repeats were not useful: their
    seconds count as redone.

    Args:
      rows: the rows of `ledger.jsonl`.

    Returns:
      Seconds by activity, in the order of ACTIVITIES, without those of 0 seconds. The sum is the
      wall time of the run.
    """
    spent = dict.fromkeys(ACTIVITIES, 0.0)
    steps: list[tuple[float, float, float]] = []  # per row: first step, last step, useful seconds
    first = last = None
    for row in rows:
        began = row["at"] - row.get("start", 0.0)
        first = began if first is None else first
        before = began if last is None else last
        named = {activity: row[activity] for activity in ACTIVITIES if activity in row}
        for activity, seconds in named.items():
            spent[activity] += seconds
        if "start" in row:
            spent["down"] += max(began - before, 0.0)
            spent["setup"] += row["start"] - sum(named.values())
            spent["redone"] += _undo(steps, row["step"])
        steps.append((steps[-1][1] if steps else 0, row["step"], named.get("useful", 0.0)))
        last = row["at"]
    if first is None or last is None:
        return {}
    spent["useful"] -= spent["redone"]
    spent["idle"] = max(last - first - sum(spent.values()), 0.0)
    return {activity: seconds for activity, seconds in spent.items() if seconds > 0}


def _undo(steps: list[tuple[float, float, float]], step: int) -> float:
    """Removes the steps after `step` from `steps` and returns their useful seconds.

    A row that spans `step` keeps the share of its seconds up to `step`.
    """
    lost = 0.0
    while steps and steps[-1][1] > step:
        first, last, useful = steps.pop()
        keep = max(step - first, 0) / (last - first) if last > first else 0.0
        lost += useful * (1 - keep)
        if keep:
            steps.append((first, step, useful * keep))
    return lost


def goodput_line(spent: Mapping[str, float]) -> str:
    """Words an account: `goodput: 91.2% of 3h12m: useful 2h55m, compile 40s, ...`."""
    total = sum(spent.values())
    parts = ", ".join(f"{activity} {human_seconds(seconds)}"
                      for activity, seconds in spent.items())
    share = spent.get("useful", 0.0) / total
    return f"goodput: {share:.1%} of {human_seconds(total)}: {parts}"
