"""Which steps of a run are at fault: not finite, or far above the steps before them.

A step at fault changes no state if it is not finite, or if spikes are skipped; the compiled step
decides so by the `limits` that it gets. All else is decided here, from the figures of the steps
alone, so that a run decides the same whenever it repeats them.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

SPIKES = ("off", "record", "skip", "rewind")  # what a spike leads to
WINDOW = 128  # steps without a fault whose median is the usual value
MIN_STEPS = 32  # no step is a spike before so many
SIGMAS = 10.0  # a spike lies so many deviations above the median
# The least deviation, as a share of the median: the losses of a run at rest hardly differ.
LEAST_DEVIATION = 0.02
PATIENCE = 16  # recorded spikes in a row after which their height counts as usual
UNLIMITED = (math.inf, math.inf)


class BadStep(NamedTuple):
    """A step at fault."""

    step: int
    what: str  # its loss and gradient norm, and why they are no good
    skipped: bool  # whether it changed no state
    first: int  # the first step of the row of faults that it is in


class Rewind(Exception):
    """The run has to go back to its last checkpoint.

    Args:
      step: the newest step.
      why: what happened, in words.
      first: the steps `first` to `step` are at fault, and their rows are to be left out; 0: no row
        is known to be the cause.
      is_spike: whether the run may as well go on.
    """

    def __init__(self, step: int, why: str, first: int = 0, is_spike: bool = False) -> None:
        super().__init__(step, why, first, is_spike)
        self.step, self.why, self.first, self.is_spike = step, why, first, is_spike


class Health:
    """Judges every step of a run.

    Args:
      spikes: one of SPIKES.
      rewind_after: so many skipped steps in a row make the run rewind; 0: it never does.
    """

    def __init__(self, spikes: str = "record", rewind_after: int = 0):
        self.spikes, self.rewind_after = spikes, rewind_after
        self.skipped = 0  # steps so far
        self._in_a_row = 0  # of the newest steps: skipped, or recorded as spikes
        self._recent: list[tuple[int, float, float]] = []  # (step, loss, gradient norm)

    def state(self) -> dict[str, Any]:
        """What a checkpoint records, as plain JSON values."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row,
                "recent": [list(entry) for entry in self._recent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a checkpoint; from nothing if it has none."""
        self.skipped, self._in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self._recent = [(int(step), loss, norm) for step, loss, norm in state.get("recent", ())]

    def accept(self) -> None:
        """Takes the height of the newest steps as usual from now on."""
        self._recent, self._in_a_row = [], 0

    def limits(self, step: int) -> tuple[float, float]:
        """Above which loss or gradient norm `step` is a spike: float32 values, infinite at first.

        They come from the steps up to `step` - 2: the step before is still running.
        """
        known = [entry for entry in self._recent if entry[0] <= step - 2][-WINDOW:]
        if self.spikes == "off" or len(known) < MIN_STEPS:
            return UNLIMITED
        loss, norm = (_limit([entry[i] for entry in known]) for i in (1, 2))
        return loss, norm

    def judge(self, step: int, loss: float, norm: float) -> BadStep | None:
        """Notes the loss and the gradient norm of `step`; returns what is wrong with them."""
        high = self.limits(step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and loss <= high[0] and norm <= high[1]:
            self._recent = [*self._recent, (step, loss, norm)][-WINDOW - 2 :]
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        bad = BadStep(step, f"loss {loss:.6g} and gradient norm {norm:.6g}, " + (
            f"above {high[0]:.6g} or {high[1]:.6g}" if finite else "not finite"),
            not finite or self.spikes == "skip", step - self._in_a_row + 1)
        self.skipped += bad.skipped
        if not bad.skipped and self._in_a_row >= PATIENCE:
            self.accept()
        return bad

    def rewinds(self, bad: BadStep) -> Rewind | None:
        """Returns how the run has to go back because of `bad`; None if it goes on."""
        if not bad.skipped and self.spikes == "rewind":
            return Rewind(bad.step, bad.what, bad.step, is_spike=True)
        if bad.skipped and 0 < self.rewind_after <= bad.step - bad.first + 1:
            return Rewind(bad.step, bad.what, bad.first)
        return None


def _limit(values: list[float]) -> float:
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return float(np.float32(median + SIGMAS * max(deviation, LEAST_DEVIATION * abs(median))))
