"""The progress line of a run on the terminal."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

from lmjax.monitoring.units import human_count, human_seconds


def to_stderr(line: str) -> None:
    """Prints a line to standard error at once."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows on the terminal how far a run is.

    On a terminal one line is rewritten in place. Elsewhere there are plain lines: at the first
    update, then 1, 2, 4, 8, 15, 15, ... seconds apart, and at the end.

    Args:
      total_steps: the step at which the run ends.
      stream: standard error by default, so that standard output stays clean.
      clock: seconds, monotonic.
      quiet: True on processes that show nothing.
      unit: of `bits_per_byte`, as it is shown.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic, quiet: bool = False,
                 unit: str = "bits/byte"):
        self._total, self._quiet, self._clock, self._unit = total_steps, quiet, clock, unit
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._gap = 0.1 if self._live else 1.0  # seconds to the next line
        self._next_time = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._line = ""
        self._shown = True  # whether `_line` is on the terminal

    def update(self, step: int, loss: float, bits_per_byte: float | None, tokens_per_second: float,
               data_wait_share: float = 0.0, mfu: float | None = None) -> None:
        """Shows the figures of the newest step. It draws at most ten times per second.

        Args:
          step: the newest step.
          loss: nats per token.
          bits_per_byte: bits per byte of text; None for the examples of a task.
          tokens_per_second: tokens per second.
          data_wait_share: the share of the step, 0 to 1, that was spent waiting for data.
          mfu: model FLOP/s as a share of the peak, 0 to 1; None if the peak is not known.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        remaining = math.nan
        if step > first_step:
            remaining = (now - first_time) / (step - first_step) * (self._total - step)
        done = f"{step:,}/{self._total:,} {step / max(self._total, 1):.0%}"
        losses = [f"loss {loss:.3f}"]
        losses += [] if bits_per_byte is None else [f"{bits_per_byte:.3f} {self._unit}"]
        rate = human_count(tokens_per_second)
        left = f"ETA {'-' if math.isnan(remaining) else human_seconds(round(remaining))}"
        used = () if mfu is None else (f"MFU {mfu:.0%}",)
        if self._live:  # short enough for 80 columns
            used = used or (f"wait {data_wait_share:.0%}",)
            parts = (done, *losses, f"{rate} tok/s", *used, left)
        else:
            wait = f"data wait {data_wait_share:.1%}"
            parts = (f"step {done}", *losses, f"{rate} tokens/s", *used, wait, left)
        self._line = ("  " if self._live else " | ").join(parts)
        self._shown = False
        if now >= self._next_time or step >= self._total:
            self._show()
            self._next_time = now + self._gap
            self._gap = self._gap if self._live else min(2 * self._gap, 15.0)

    def log(self, message: str) -> None:
        """Prints a message on lines of its own. The live line stays below it."""
        if not self._live:
            self._emit(message + "\n")
            return
        self._emit("\r\x1b[K" + message + "\n")
        if self._line:
            self._show()

    def close(self) -> None:
        """Shows the last figures if they are not on the terminal yet, and ends the line."""
        if self._live and self._line:
            self._show()
            self._emit("\n")
        elif not self._shown:
            self._show()
        self._line, self._shown = "", True

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        if self._live:
            # One column stays free: some terminals wrap as soon as the last column is written.
            width = shutil.get_terminal_size().columns - 1
            self._emit("\r" + self._line[:width] + "\x1b[K")
        else:
            self._emit(self._line + "\n")
        self._shown = True

    def _emit(self, text: str) -> None:
        if self._quiet:
            return
        self._stream.write(text)
        self._stream.flush()
