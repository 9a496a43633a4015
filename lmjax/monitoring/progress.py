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


class Progress:
    """Shows how far a run is: a line rewritten in place on a terminal, plain lines now and then elsewhere.
    Piped lines come at the first update, then 1, 2, 4, 8, 15, 15, ... seconds apart, and always at the end.

    total_steps: the step at which the run ends. stream: standard error unless given, so that standard output
    stays clean. clock: seconds, monotonic. quiet: on processes that show nothing.
    """

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        quiet: bool = False
    ):
        self._quiet = quiet
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._gap = 0.1 if self._live else 1.0
        self._next_time = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._line = ""
        self._shown = True

    def update(self, step: int, loss: float, bits_per_byte: float, tokens_per_second: float,
               data_wait_share: float = 0.0, mfu: float | None = None) -> None:
        """Figures of the newest step: nats per token, bits per byte, 1/s, and shares of 0..1 (None: not known).

        Cheap enough for every step; it draws at most ten times a second.
        """
        now = self._clock()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        remaining = math.nan
        if step > first_step:
            remaining = (now - first_time) / (step - first_step) * (self._total - step)
        done = f"{step:,}/{self._total:,} {step / max(self._total, 1):.0%}"
        losses, rate = (f"loss {loss:.3f}", f"{bits_per_byte:.3f} bits/byte"), human_count(tokens_per_second)
        left = f"ETA {'-' if math.isnan(remaining) else human_seconds(round(remaining))}"
        used = () if mfu is None else (f"MFU {mfu:.0%}",)
        if self._live:  # short enough for 80 columns
            parts = (done, *losses, f"{rate} tok/s", *(used or (f"wait {data_wait_share:.0%}",)), left)
        else:
            parts = (f"step {done}", *losses, f"{rate} tokens/s", *used, f"data wait {data_wait_share:.1%}", left)
        self._line = ("  " if self._live else " | ").join(parts)
        self._shown = False
        if now >= self._next_time or step >= self._total:
            self._show()
            self._next_time = now + self._gap
            self._gap = self._gap if self._live else min(2 * self._gap, 15.0)

    def log(self, message: str) -> None:
        """Prints a message on lines of its own, the live line staying below it."""
        if not self._live:
            self._emit(message + "\n")
            return
        self._emit("\r\x1b[K" + message + "\n")
        if self._line:
            self._show()

    def close(self) -> None:
        """Shows the last figures, if they were not yet, and ends the line."""
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
            # One column stays free: some terminals wrap when the last one is written.
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
