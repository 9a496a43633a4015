"""The goodput ledger: what the wall time of a run went to, summed over all its starts.

`ledger.jsonl` has a row for each start, and then one a minute and at every checkpoint: {"step", "at" (seconds since
1970), and seconds since the row before by kind}. The row of a start has "start" instead: seconds from its beginning.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmjax.monitoring.jsonl import Appender
from lmjax.monitoring.units import human_seconds

FILE = "ledger.jsonl"
ROW_SECONDS = 60.0  # between rows: what a kill can take out of the account
SLOW = 1.5  # times the median of the steps before, and a step is an outlier
KINDS = {  # in the order in which they are shown
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
    """Adds up seconds by kind and writes a row of them now and then, to `ledger.jsonl` in `workdir`.

    workdir: None on processes that write nothing.
    """

    def __init__(self, workdir: Path | None):
        self._file = Appender(workdir / FILE if workdir else None)
        self._step, self._spent, self._next = 0, Counter[str](), 0.0

    def start(self, step: int, seconds: float, **spent: float) -> None:
        """The loop begins from `step`, `seconds` after this start did; `spent` of these on other kinds than setup."""
        self._step = step
        self._row({"start": seconds, **spent})

    def spend(self, step: int, **seconds: float) -> None:
        """`seconds` went to these kinds, up to `step`."""
        self._step = step
        self._spent.update(seconds)
        if time.time() >= self._next:
            self.row()

    def row(self) -> None:
        """Writes what was spent since the last row, if anything was."""
        if self._spent:
            self._row(self._spent)

    def close(self) -> None:
        """Writes the rest."""
        self.row()
        self._file.close()

    def _row(self, values: Mapping[str, float]) -> None:
        now = time.time()
        self._file.append({"step": self._step, "at": now, **values})
        self._spent, self._next = Counter(), now + ROW_SECONDS


def account(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by kind, in the order of KINDS and without those of none; they sum to the wall time of the run.

    A start that goes on from before the last row takes the steps in between out of what was useful.
    """
    spent: Counter[str] = Counter()
    steps: list[list[float]] = []  # first, last, useful seconds of each row
    first = last = None
    for row in rows:
        began = row["at"] - row.get("start", 0.0)
        first, before = (began if first is None else first), (began if last is None else last)
        named = {kind: row[kind] for kind in KINDS if kind in row}
        spent.update(named)
        if "start" in row:
            spent["down"] += max(began - before, 0.0)
            spent["setup"] += row["start"] - sum(named.values())
            spent["redone"] += _undo(steps, row["step"])
        steps.append([steps[-1][1] if steps else 0, row["step"], named.get("useful", 0.0)])
        last = row["at"]
    if first is None:
        return {}
    spent["useful"] -= spent["redone"]
    spent["idle"] = max(last - first - sum(spent.values()), 0.0)
    return {kind: spent[kind] for kind in KINDS if spent[kind] > 0}


def _undo(steps: list[list[float]], step: int) -> float:
    """Useful seconds of the steps after `step`, taken out of their rows."""
    lost = 0.0
    while steps and steps[-1][1] > step:
        first, last, useful = steps.pop()
        keep = max(step - first, 0) / (last - first) if last > first else 0.0
        lost += useful * (1 - keep)
        if keep:
            steps.append([first, step, useful * keep])
    return lost


def goodput_line(spent: Mapping[str, float]) -> str:
    """`goodput: 91.2% of 3h12m: useful 2h55m, compile 40s, ...`."""
    total = sum(spent.values())
    parts = ", ".join(f"{kind} {human_seconds(seconds)}" for kind, seconds in spent.items())
    return f"goodput: {spent.get('useful', 0.0) / total:.1%} of {human_seconds(total)}: {parts}"
