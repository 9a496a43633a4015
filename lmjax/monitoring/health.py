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
WINDOW = 128  # good steps whose median is the baseline
MIN_STEPS = 32  # no step is a spike before so many
SIGMAS = 10.0  # a spike lies so many deviations above the median
# The least deviation, as a share of the median: the losses of a run at rest hardly differ.
LEAST_DEVIATION = 0.02
PATIENCE = 16  # consecutive spikes after which the new level becomes the baseline
UNLIMITED = (math.inf, math.inf)


class BadStep(NamedTuple):
    """A step at fault."""

    step: int
    what: str  # its loss and gradient norm, and why they are no good
    skipped: bool  # whether it changed no state
    first: int  # of the consecutive skipped steps that end with it; itself if it is not skipped
    is_spike: bool  # whether all of these have finite values


class Rewind(Exception):
    """The run has to go back to its last checkpoint.

    Args:
      step: the newest step.
      why: what happened, in words.
      first: the steps `first` to `step` are at fault, and their rows are to be left out; 0: no row
        is known to be the cause.
      is_spike: whether all of them have finite values, so that the run may as well go on.
      of_device: whether a device is to blame, so that no row is ever left out.
    """

    def __init__(self, step: int, why: str, first: int = 0, is_spike: bool = False,
                 of_device: bool = False) -> None:
        super().__init__(step, why, first, is_spike, of_device)
        self.step, self.why, self.first, self.is_spike = step, why, first, is_spike
        self.of_device = of_device


class Health:
    """Judges every step of a run.

    Args:
      spikes: one of SPIKES.
      rewind_after: so many consecutive skipped steps make the run rewind; 0: it never does.

    Attributes:
      skipped: steps that changed no state so far.
      forgives: whether spikes no longer make the run rewind. Rewinding has not helped, and no
        checkpoint was saved since.
    """

    def __init__(self, spikes: str = "record", rewind_after: int = 0):
        self.spikes, self.rewind_after = spikes, rewind_after
        self.skipped, self.forgives = 0, False
        self._skips = 0  # consecutive skipped steps up to the newest step
        self._spikes = 0  # consecutive spikes up to the newest step, skipped or not
        self._recent: list[tuple[int, float, float]] = []  # (step, loss, gradient norm)
        self._accepted = 0  # the step that made the new level the baseline: no older step counts

    def state(self) -> dict[str, Any]:
        """What a checkpoint records, as plain JSON values."""
        return {"skipped": self.skipped, "consecutive_skips": self._skips,
                "consecutive_spikes": self._spikes, "accepted": self._accepted,
                "recent": [list(entry) for entry in self._recent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a checkpoint; from nothing if it has none."""
        self.skipped, self.forgives = state.get("skipped", 0), False
        self._skips, self._spikes, self._accepted = (
            state.get(key, 0) for key in ("consecutive_skips", "consecutive_spikes", "accepted"))
        self._recent = [(int(step), loss, norm) for step, loss, norm in state.get("recent", ())]

    def forgive(self) -> None:
        """Lets the next steps set a new baseline; until the next save no spike leads to a rewind.

        Without the latter, a spike that comes back in every replay would rewind for ever.
        """
        self._recent, self._skips, self._spikes, self.forgives = [], 0, 0, True

    def limits(self, step: int) -> tuple[float, float]:
        """Above which loss or gradient norm `step` is a spike: float32 values, infinite at first.

        They come from the steps up to `step` - 2: the step before is still running.
        """
        oldest = self._accepted if self._accepted <= step - 2 else 0
        known = [entry for entry in self._recent if oldest < entry[0] <= step - 2][-WINDOW:]
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
            self._skips = self._spikes = 0
            return None
        skipped = not finite or self.spikes == "skip"
        self.skipped += skipped
        self._skips = self._skips + 1 if skipped else 0
        self._spikes = self._spikes + 1 if finite else 0
        bad = BadStep(step, f"loss {loss:.6g} and gradient norm {norm:.6g}, " + (
            f"above {high[0]:.6g} or {high[1]:.6g}" if finite else "not finite"),
            skipped, step - max(self._skips, 1) + 1, is_spike=self._spikes >= max(self._skips, 1))
        if self._spikes >= PATIENCE:  # the next step runs already, with the old limits
            self._accepted, self._skips, self._spikes = step, 0, 0
        return bad

    def rewinds(self, bad: BadStep) -> Rewind | None:
        """Returns how the run has to go back because of `bad`; None if it goes on."""
        skips = bad.step - bad.first + 1 if bad.skipped else 0
        if bad.is_spike and self.forgives:
            return None
        if self.spikes == "rewind" and not bad.skipped or 0 < self.rewind_after <= skips:
            return Rewind(bad.step, bad.what, bad.first, bad.is_spike)
        return None


def _limit(values: list[float]) -> float:
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return float(np.float32(median + SIGMAS * max(deviation, LEAST_DEVIATION * abs(median))))
