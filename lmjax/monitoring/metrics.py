"""What a run writes down while it trains, and what it shows on the terminal.

| file | holds | on resuming at step k |
| --- | --- | --- |
| metrics.jsonl | figures that follow from the config and the data alone | lines after step k are removed |
| samples.jsonl | generated text | lines after step k are removed |
| timing.jsonl | figures of this machine: rates, waits, events | kept; redone steps appear twice |

The same scalars and texts go to TensorBoard. The event file is written here, record by record, because the
usual writers queue events in a thread (a killed run loses them) and import PyTorch wherever it is installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.monitoring.jsonl import Appender, read_jsonl
from lmjax.monitoring.tensorboard import _EventFile

# Numbers for people ---------------------------------------------------------------------------------------


# JSON lines -----------------------------------------------------------------------------------------------


class MetricsWriter:
    """Writes metrics.jsonl, timing.jsonl, samples.jsonl and a TensorBoard event file into `workdir`.

    For a killed run to end with the same metrics and samples as a straight one, write everything of step k
    before the checkpoint of step k is committed (and call `flush` in between).

    Args:
      workdir: the run's directory; made if missing. None on processes that write nothing.
      resume_step: the step of the checkpoint that was restored; 0 or -1 on a fresh start. Metrics and samples
        after it are removed.
      tensorboard: whether to write TensorBoard events.

    Attributes:
      seconds_before: the `seconds` of the last timing line, i.e. wall seconds that earlier starts spent.

    Raises:
      ValueError: one of the files holds something other than JSON lines with a step.
    """

    def __init__(self, workdir: str | os.PathLike | None, resume_step: int, tensorboard: bool = True):
        folder = None if workdir is None else Path(workdir)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        last_steps = {"metrics": resume_step, "samples": resume_step, "timing": math.inf}
        self._metrics, self._samples, self._timing = (
            Appender(folder and folder / f"{name}.jsonl", step) for name, step in last_steps.items())  # may refuse
        timed = (line for line in read_jsonl(folder / "timing.jsonl") if "event" not in line) if folder else ()
        earlier = [line["seconds"] for line in timed if "seconds" in line]
        self.seconds_before = float(earlier[-1]) if earlier else 0.0
        self._events = _EventFile(folder, purge_step=resume_step + 1) if tensorboard and folder else None
        self._files = [f for f in (self._metrics, self._samples, self._timing, self._events) if f]
        self._sample_step, self._sample_index = -1, 0

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Deterministic figures of a train step, to metrics.jsonl as they are named and as `train/<name>`."""
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "train")

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures on held-out data; a name without a group (`loss`) becomes `eval/<name>`."""
        metrics = {name if "/" in name else f"eval/{name}": value for name, value in metrics.items()}
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "eval")

    def timing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures that depend on the machine (rates in 1/s, durations in s), to timing.jsonl."""
        self._timing.append({"step": step, **metrics})
        self._scalars(step, metrics, "timing")

    def event(self, step: int, name: str, seconds: float, **more: Any) -> None:
        """Something that took `seconds`: start, resume, compile, checkpoint, eval, slow_step, and more about it."""
        self._timing.append({"step": step, "event": name, "seconds": seconds, **more})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Generated text (with or without its prompt in front)."""
        self._samples.append({"step": step, "prompt": prompt, "text": text})
        if self._events:
            self._sample_index = self._sample_index + 1 if step == self._sample_step else 0
            self._sample_step = step
            whole = text if text.startswith(prompt) else prompt + text
            markdown = "".join(f"    {line}\n" for line in whole.split("\n"))
            self._events.text(step, f"samples/{self._sample_index}", markdown)

    def _scalars(self, step: int, metrics: Mapping[str, float], group: str) -> None:
        if self._events:
            tags = (name if "/" in name else f"{group}/{name}" for name in metrics)
            self._events.scalars(step, dict(zip(tags, map(float, metrics.values()), strict=True)))

    def flush(self) -> None:
        """Returns once everything written so far is on the disk, safe from a power cut too."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


# TensorBoard: a file of TFRecords, each an `Event` protocol buffer (tensorflow/core/util/event.proto) -----


# The progress line ----------------------------------------------------------------------------------------


