"""Slow steps: which steps are, and one line per minute that tells of them on the terminal."""

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable

from lmjax.monitoring.goodput import SLOW_FACTOR
from lmjax.monitoring.units import human_seconds

WINDOW = 64  # steps whose median is the usual time of a step
MIN_STEPS = 16  # no step is slow before so many have been timed
SECONDS_PER_LINE = 60.0  # between two lines on the terminal


class Outliers:
    """Finds the steps that took much longer than those before them, waiting for data aside."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    @property
    def usual(self) -> float:
        """The median time of the last steps, in seconds; infinite while there are few of them."""
        return statistics.median(self._seconds) if len(self._seconds) >= MIN_STEPS else math.inf

    def __call__(self, seconds: float, waited: float = 0.0) -> bool:
        """Whether a step is slow: it took over SLOW_FACTOR times the usual time, without its wait.

        The usual time includes waiting; when every step waits, the rest is too small to judge.

        Args:
          seconds: how long the step took.
          waited: the part of `seconds` in which this process waited for its data.
        """
        slow = seconds - waited > SLOW_FACTOR * self.usual
        self._seconds.append(seconds)
        return slow


class SlowStepLog:
    """Sums up slow steps on the terminal: one line per minute at most.

    The minute of a line begins with its first slow step. The loop also writes each slow step as an
    event to timing.jsonl.

    Args:
      log: prints one line.
      clock: seconds, monotonic.
    """

    def __init__(self, log: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._began = math.inf  # when the first slow step that is not yet told ended
        self._ratios: defaultdict[str, list[float]] = defaultdict(list)  # by cause

    def add(self, ratio: float, cause: str) -> None:
        """Notes a slow step that took `ratio` times the median.

        cause: which process was slow and what it was doing, as a clause that the line can end with.
        """
        if not self._ratios:
            self._began = self._clock()
        self._ratios[cause].append(ratio)

    def tick(self) -> None:
        """Prints the line if its minute is over. The loop calls it after every step."""
        if self._clock() - self._began >= SECONDS_PER_LINE:
            self.close()

    def close(self) -> None:
        """Prints the line of the slow steps that were not yet told, if there are any."""
        if not self._ratios:
            return
        every = [ratio for ratios in self._ratios.values() for ratio in ratios]
        low, high = (f"{ratio:.1f}" for ratio in (min(every), max(every)))
        factor = low if low == high else f"{low} to {high}"
        # The cause that cost the most time: one long wait matters more than many short ones.
        cause, ratios = max(self._ratios.items(), key=lambda item: sum(item[1]) - len(item[1]))
        share = f" in {len(ratios)} of them" if len(self._ratios) > 1 else ""
        number, passed = len(every), human_seconds(self._clock() - self._began)
        when = f" in the last {passed}" if number > 1 else ""
        self._log(f"slow steps: {number}{when}, {factor} times the median; {cause}{share}")
        self._began, self._ratios = math.inf, defaultdict(list)
