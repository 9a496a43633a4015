"""The best evaluated step of a run, by one metric: early stopping, and the checkpoint to keep."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lmjax.errors import UserError, first_line
from lmjax.runtime.files import write_whole

# The metrics that evaluation writes and `eval.metric` may name: whether higher is better.
HIGHER_IS_BETTER = {
    "loss": False, "perplexity": False, "bits_per_byte": False, "mse": False, "accuracy": True,
    "f1": True, "f1_micro": True, "matthews": True, "exact_match": True, "pearson": True,
    "spearman": True, "precision": True, "recall": True, "bleu": True, "chrf": True,
    "rouge1": True, "margin": True, "mrr": True, "rouge2": True, "rougeL": True,
}
FILE = "best.json"  # beside the checkpoints


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far.

    A checkpoint records it as it was when the step was saved, which is before the step is
    evaluated; best.json records it after the newest evaluation.
    """

    metric: str = ""  # "": none is asked for
    value: float | None = None  # None: no evaluation has given a finite value yet
    step: int = 0  # whose value it is
    waited: int = 0  # evaluations since then
    evaluated: int = 0  # the newest step that counts here

    def after(self, step: int, value: float) -> "Best":
        """Returns what is best after the evaluation of `step` gave `value`."""
        if step <= self.evaluated:  # repeated after a restart
            return self
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        if math.isfinite(value) and (self.value is None or sign * value > sign * self.value):
            return dataclasses.replace(self, value=value, step=step, waited=0, evaluated=step)
        return dataclasses.replace(self, waited=self.waited + 1, evaluated=step)

    def __str__(self) -> str:
        value = "none" if self.value is None else f"{self.value:.4f}"
        return f"{self.metric} {value} of step {self.step:,}"


def restored(metric: str, step: int, *records: Mapping[str, Any]) -> Best:
    """Returns the newest of these records of `metric` that is not of a step after `step`."""
    known = [Best(**record) for record in records if record.get("metric") == metric]
    return max((best for best in known if best.evaluated <= step),
               key=lambda best: best.evaluated, default=Best(metric))


def write_best(directory: str | os.PathLike, best: Best) -> None:
    """Writes best.json in one piece beside the checkpoints, which may be in a bucket."""
    text = json.dumps(dataclasses.asdict(best)) + "\n"
    if "://" in str(directory):
        (epath.Path(directory) / FILE).write_text(text)  # a bucket's objects are whole or not there
    else:
        write_whole(Path(directory) / FILE, text)


def read_best(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the object in best.json beside the checkpoints; {} if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    file = epath.Path(directory) / FILE
    if not file.exists():
        return {}
    try:
        return dataclasses.asdict(Best(**json.loads(file.read_text())))
    except (ValueError, TypeError) as error:
        raise UserError("a JSON object of metric, value and step", first_line(error),
                        "move the file away; the next evaluation writes it again",
                        where=str(file)) from None


def best_step(directory: str | os.PathLike, steps: list[int]) -> int:
    """Returns the best evaluated step of the checkpoints in `directory`.

    Args:
      directory: of the checkpoints.
      steps: of the checkpoints that are there.

    Raises:
      UserError: the run has recorded none, or its checkpoint is not there.
    """
    best = read_best(directory)
    if not best.get("step"):
        raise UserError("a run that records its best step", f"no {FILE} with one",
                        "train with config.eval.metric and config.checkpoint.keep_best=true, or "
                        "name a step", where=str(directory))
    if best["step"] not in steps:
        raise UserError(f"the checkpoint of step {best['step']}, the best", f"those of {steps}",
                        "train with config.checkpoint.keep_best=true, which keeps it (if a kill "
                        "took it, the run's command makes it again), or name a step",
                        where=str(directory))
    return int(best["step"])
