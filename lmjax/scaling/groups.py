"""Runs of one config with several seeds as one: means, intervals, what tells configs apart."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import UserError
from lmjax.reporting.run_files import RunRecord, read_run
from lmjax.reporting.task_report import is_task, measures
from lmjax.training.best import HIGHER_IS_BETTER

# Runs that differ in these keys only share a group: seeds, and what changes nothing that is learnt.
IGNORED = ("train.seed", "data.seed", "data.directory", "train.log_every", "eval.every",
           "checkpoint.", "sample.", "watch.")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Group:
    """Runs of one config, whose seeds may differ."""

    name: str
    runs: tuple[RunRecord, ...]
    settings: Mapping[str, Any]  # by dotted key, without those of IGNORED
    # Of the metric at each run's last evaluation; nan: it has none, or the run has diverged.
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the runs; nan if one of them has no value."""
        return float(np.mean(self.values))

    @property
    def half_width(self) -> float:
        """Half of the confidence interval of the mean, by Student's t; nan for a single run."""
        from scipy import stats  # it takes half a second

        if (count := len(self.values)) < 2:
            return math.nan
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
        return float(quantile * np.std(self.values, ddof=1) / math.sqrt(count))


def read_runs(places: Sequence[str | Path]) -> list[RunRecord]:
    """The records of runs.

    Args:
      places: directories of runs, or directories whose subdirectories are runs.

    Raises:
      UserError: a place is neither, or there is no run.
    """
    found: dict[Path, RunRecord] = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise UserError("the directory of a run, or one that holds such directories",
                            f"{place}, which is none", "give the --workdir of lmjax train",
                            where=str(place))
        here = [place] if (place / "metrics.jsonl").exists() else sorted(
            path.parent for path in place.glob("*/metrics.jsonl"))
        if not here:
            raise UserError("metrics.jsonl in it, or in its subdirectories", "none",
                            "train into it first, or wait for the first step", where=str(place))
        for path in here:
            found.setdefault(path.resolve(), read_run(path))
    return list(found.values())


def choose_metric(runs: Sequence[RunRecord], asked: str = "") -> str:
    """The metric by which the runs are compared.

    Args:
      runs: what is compared.
      asked: for by the user; "": what the runs keep their best step by, if they agree; else the
        first metric of their task, bits per byte, or the loss: the first that all of them have.

    Raises:
      UserError: no evaluation has the metric that was asked for, or the runs share none.
    """
    seen = [[name for name in run.heldout if name in HIGHER_IS_BETTER] for run in runs
            if run.heldout]
    if asked and not any(asked in names for names in seen):
        raise UserError(f"one of {', '.join(sorted({n for names in seen for n in names}))}",
                        repr(asked), "correct it", where="--metric")
    if asked:
        return asked
    wanted = {str(run.config.get("eval", {}).get("metric") or "") for run in runs}
    of_task = measures(runs[0])[:1] if is_task(runs[0]) else []
    for name in (*sorted(wanted - {""})[: len(wanted) == 1], *of_task, "bits_per_byte", "loss"):
        if seen and all(name in names for names in seen):
            return name
    raise UserError("runs that were evaluated on held-out examples by the same metric",
                    "none or different ones", "train them with config.eval.every above 0",
                    where="lmjax compare")


def group_runs(runs: Sequence[RunRecord], metric: str) -> list[Group]:
    """The runs by config, the best group first; those without a value come last."""
    by_settings: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    flat = [_settings(its[0]) for its in by_settings.values()]
    keys = differing(flat)
    groups = [Group(_name(settings, keys, its), tuple(its), settings,
                    tuple(float(run.heldout.get(metric, (math.nan,))[-1]) for run in its))
              for settings, its in zip(flat, by_settings.values(), strict=True)]
    sign = -1 if HIGHER_IS_BETTER[metric] else 1
    return sorted(groups, key=lambda group: (math.isnan(group.mean), sign * group.mean))


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys whose values are not the same in all of these settings."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys
            if len({json.dumps(each.get(key), sort_keys=True) for each in settings}) > 1]


def short(keys: Sequence[str]) -> dict[str, str]:
    """The keys by their last parts, or by more parts where two would be the same."""
    found = {}
    for key in keys:
        parts = key.split(".")
        found[key] = next(name for n in range(1, len(parts) + 1)
                          for name in [".".join(parts[-n:])]
                          if n == len(parts) or sum(
                              f".{other}".endswith(f".{name}") for other in keys) == 1)
    return found


def _settings(run: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in _leaves(run.config) if not key.startswith(IGNORED)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config by its dotted key; a list without groups in it is a leaf."""
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) and any(
                 isinstance(item, dict) for item in value) else None)
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _name(settings: Mapping[str, Any], keys: Sequence[str], its: Sequence[RunRecord]) -> str:
    """What tells a group apart if that is short, and else the directory of its first run."""
    told = ", ".join(f"{name}={settings.get(key)}" for key, name in short(keys).items())
    return told if told and len(keys) <= 2 and len(told) <= 40 else its[0].workdir.resolve().name
