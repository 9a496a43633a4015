"""The records of a run while it trains.

| file | holds | when a run resumes at step k |
| --- | --- | --- |
| metrics.jsonl | figures that config and data alone determine | lines after k are removed |
| samples.jsonl | generated text | lines after k are removed |
| statistics/ | figures by module and layer | records after k are removed |
| timing.jsonl | figures of this machine: rates, waits, events | kept; repeated steps appear twice |

The same scalars and texts go to TensorBoard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.monitoring.jsonl import Appender, read_jsonl
from lmjax.monitoring.statistics import StatisticsWriter
from lmjax.monitoring.tensorboard import EventFile


class MetricsWriter:
    """Writes metrics.jsonl, timing.jsonl, samples.jsonl, statistics and a TensorBoard event file.

    Write everything of step k, and call `flush`, before the checkpoint of step k is committed. Then
    a killed run ends with the same metrics and samples as a run without a break.

    Args:
      workdir: the run's directory, made if missing; None on processes that write nothing.
      resume_step: the step of the restored checkpoint; 0 or -1 on a fresh start. Later metrics and
        samples are removed.
      tensorboard: whether to write TensorBoard events.

    Attributes:
      seconds_before: wall seconds of all earlier starts, from the last timing line.

    Raises:
      UserError: one of the files holds something other than JSON lines with a step.
    """

    def __init__(self, workdir: str | os.PathLike | None, resume_step: int,
                 tensorboard: bool = True):
        folder = None if workdir is None else Path(workdir)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        last_steps = {"metrics": resume_step, "samples": resume_step, "timing": math.inf}
        self._metrics, self._samples, self._timing = (
            Appender(folder and folder / f"{name}.jsonl", step)
            for name, step in last_steps.items())
        self.statistics = StatisticsWriter(folder, resume_step)
        timed = read_jsonl(folder / "timing.jsonl") if folder else iter(())
        earlier = [line["seconds"] for line in timed if "event" not in line and "seconds" in line]
        self.seconds_before = float(earlier[-1]) if earlier else 0.0
        self._events = EventFile(folder, resume_step + 1) if tensorboard and folder else None
        self._files = [file for file in (self._metrics, self._samples, self._timing,
                                         self.statistics, self._events) if file]
        self._sample_step, self._sample_index = -1, 0

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the deterministic figures of a training step.

        TensorBoard shows them as `train/<name>`.
        """
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "train")

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes figures on held-out data; a name without a group, `loss`, becomes `eval/loss`."""
        metrics = {name if "/" in name else f"eval/{name}": value
                   for name, value in metrics.items()}
        self._metrics.append({"step": step, **metrics})
        self._scalars(step, metrics, "eval")

    def timing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes figures that depend on the machine: rates (1/s) and durations (s)."""
        self._timing.append({"step": step, **metrics})
        self._scalars(step, metrics, "timing")

    def event(self, step: int, name: str, seconds: float, **more: Any) -> None:
        """Writes an event to timing.jsonl.

        Args:
          step: when it happened.
          name: start, resume, compile, checkpoint, eval, slow_step or the like.
          seconds: how long it took.
          more: JSON values to write beside these.
        """
        self._timing.append({"step": step, "event": name, "seconds": seconds, **more})

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Writes a generated text. `text` may begin with its prompt or follow it."""
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
            values = map(float, metrics.values())
            self._events.scalars(step, dict(zip(tags, values, strict=True)))

    def flush(self) -> None:
        """Returns when everything written so far is on the disk, safe from a power cut."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            file.close()
