"""A look into the step: traces of chosen steps by JAX's profiler, and the step's HLO."""

from pathlib import Path
from typing import Any

import jax

from lmjax.errors import first_line


class Profiler:
    """Traces some steps of a run into `folder`/profile.

    Args:
      steps: "first:last", or "" to trace nothing.
      folder: the run's directory.
    """

    def __init__(self, steps: str, folder: Path):
        self._first, self._last = map(int, steps.split(":")) if steps else (1, 0)
        self._folder, self._on = folder / "profile", False

    def missed(self, start: int) -> str:
        """Says which of the chosen steps a run that resumes at `start` has done already.

        Returns "" if it has done none of them.
        """
        if not self._first <= min(start, self._last):
            return ""
        rest = f"steps {start + 1}:{self._last}" if start < self._last else "nothing"
        return (f"watch.profile: expected steps {self._first}:{self._last} to come, got a run that "
                f"goes on from step {start}; tracing {rest}")

    def before(self, step: int) -> None:
        """Starts the trace if `step`, which is dispatched next, is one of the chosen steps."""
        if not self._on and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> str:
        """Ends the trace if `step`, which was just dispatched, is the last one of it.

        Args:
          step: the step.
          result: the step's output. The trace ends when it is computed.

        Returns:
          A line that says where the trace is, or why there is none; "" if it has not ended.
        """
        if not (self._on and step >= self._last):
            return ""
        jax.block_until_ready(result)
        return self.close()

    def close(self) -> str:
        """Ends a trace that is still going on; returns the line of `after`.

        A trace that cannot be written ends no run.
        """
        if not self._on:
            return ""
        self._on = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # a full disk, or someone has stopped the profiler
            return f"watch.profile: expected a trace in {self._folder}, got {first_line(error)}"
        return f"the trace is in {self._folder}"


def write_hlo(folder: str, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
    """Writes the step before and after the compiler: step.stablehlo.mlir and step.hlo.txt."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "step.stablehlo.mlir").write_text(lowered.as_text())
    (Path(folder) / "step.hlo.txt").write_text(compiled.as_text() or "")
