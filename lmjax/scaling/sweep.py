"""`lmjax sweep`: one recipe with many settings and seeds, each as a run of its own.

    WORKDIR/sweep.json    what every run has in common
    WORKDIR/data/HASH     prepared data, which the runs read that prepare the same
    WORKDIR/finished.jsonl   a line per run that ended well
    WORKDIR/RUN           a run like any other, such as peak_lr=0.01,seed=1
    WORKDIR/RUN/log.txt   what it printed
    WORKDIR/compare.html  the runs beside one another

A sweep that was stopped goes on when its command is repeated; so does each of its runs. A run
depends only on its own settings, so that values, draws and seeds can be added later.
"""

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.config import load, plain
from lmjax.data.preparation.prepare import prepare
from lmjax.errors import UserError
from lmjax.monitoring.progress import to_stderr
from lmjax.runtime.files import write_whole
from lmjax.scaling.compare import write_comparison
from lmjax.scaling.groups import short
from lmjax.scaling.processes import Job, finished, shares, train_all
from lmjax.tasks.task import Task
from lmjax.training.changes import blocking_changes
from lmjax.training.pretrained import make_tokenizer
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.task_config import with_source

MOST_NAME = 100  # characters of the name of a run's directory


@dataclass(frozen=True)
class Run:
    """A run of a sweep."""

    name: str  # of its directory
    overrides: tuple[str, ...]  # KEY=VALUE, beside those that all runs have


@dataclass(frozen=True)
class Space:
    """The settings of a sweep."""

    grid: Mapping[str, Sequence[str]]  # by dotted key: its values
    ranges: Mapping[str, tuple[float, float]]  # by dotted key: the least and greatest value
    draws: int = 0  # points drawn from grid and ranges; 0: every point of the grid
    seeds: int = 1  # runs per point, whose seeds of weights and of the order of data are 0, 1, ...

    def points(self) -> Iterator[dict[str, str]]:
        """By dotted key its value, for one point after the other.

        Draw i depends on i only. A value of a range is drawn evenly in its logarithm, and an
        integer if both ends are.
        """
        if not self.draws:
            for values in itertools.product(*self.grid.values()):
                yield dict(zip(self.grid, values, strict=True))
            return
        for i in range(self.draws):
            random = np.random.default_rng(i)
            point = {key: values[int(random.integers(len(values)))]
                     for key, values in self.grid.items()}
            for key, (low, high) in self.ranges.items():
                value = math.exp(random.uniform(math.log(low), math.log(high)))
                whole = low == int(low) and high == int(high)
                point[key] = str(round(value)) if whole else f"{value:.4g}"
            yield point

    def runs(self) -> list[Run]:
        """All runs, those with the first seed first."""
        points = list({json.dumps(point): point for point in self.points()}.values())
        names = short([*self.grid, *self.ranges])
        return [Run(_name({names[key]: value for key, value in point.items()}, seed),
                    (*(f"{key}={value}" for key, value in point.items()),
                     f"train.seed={seed}", f"data.seed={seed}"))
                for seed in range(self.seeds) for point in points]


def parse_space(grid: Sequence[str], ranges: Sequence[str], draws: int, seeds: int) -> Space:
    """Reads KEY=VALUE,VALUE and KEY=LOW:HIGH.

    A list of values may also be JSON, for values that have commas themselves.

    Raises:
      UserError: one of them is something else, a key comes twice, or nothing is asked for.
    """
    values: dict[str, list[str]] = {}
    for item in grid:
        key, found = _key(item, "--grid", "VALUE,VALUE", values)
        values[key] = _values(found, key)
    limits: dict[str, tuple[float, float]] = {}
    for item in ranges:
        key, text = _key(item, "--range", "LOW:HIGH", {**values, **limits})
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            low = high = math.nan
        if not 0 < low < high < math.inf:
            raise UserError("LOW:HIGH with 0 < LOW < HIGH", repr(text), "correct it",
                            where=f"--range {key}")
        limits[key] = low, high
    if draws < 0 or seeds < 1:
        raise UserError("at least 0 draws and 1 seed", f"{draws} and {seeds}", "correct it",
                        where="--draws, --seeds")
    if bool(limits) and not draws:
        raise UserError("--draws N, the number of points from the ranges", "none", "add it",
                        where="--range")
    if not values and not limits and seeds == 1:
        raise UserError("--grid KEY=VALUE,VALUE, --range KEY=LOW:HIGH or --seeds N", "none",
                        "say what the runs differ in", where="lmjax sweep")
    return Space(values, limits, draws, seeds)


def sweep(spec: str, overrides: Sequence[str], workdir: str | Path, runs: Sequence[Run], *,
          at_once: int = 1) -> list[str]:
    """Trains the runs that are not finished, and compares all of them.

    Arguments, result and errors are those of `train_runs`.
    """
    failed = train_runs(spec, overrides, workdir, runs, at_once=at_once)
    workdir = Path(workdir)
    if made := [workdir / run.name for run in runs
                if (workdir / run.name / "metrics.jsonl").exists()]:
        out = workdir / "compare.html"
        print("\n".join([*write_comparison(made, out), str(out)]))
    return failed


def train_runs(spec: str, overrides: Sequence[str], workdir: str | Path, runs: Sequence[Run], *,
               at_once: int = 1) -> list[str]:
    """Trains the runs that are not finished.

    Args:
      spec: the config, FILE[:VARIANT].
      overrides: KEY=VALUE of all runs.
      workdir: of the sweep.
      runs: what the runs differ in.
      at_once: runs that train at the same time. On a machine with NVIDIA GPUs each gets its share
        of them.

    Returns:
      the names of the runs that failed.

    Raises:
      UserError: the config of a run is wrong, the directory holds another sweep, or there are too
        few GPUs.
    """
    workdir = Path(workdir)
    cards = shares(at_once)
    recipes = {run.name: _recipe(spec, [*overrides, *run.overrides], run.name) for run in runs}
    _keep_plan(workdir, spec, overrides)
    done = finished(workdir)
    for run in runs:
        if run.name in done:
            _check_same(workdir / run.name, recipes[run.name])
    left = [run for run in runs if run.name not in done]
    to_stderr(f"{len(runs)} runs, {len(runs) - len(left)} of them finished")
    jobs = []
    for run in left:
        directory = shared_data(recipes[run.name], workdir)
        shared = [f"data.directory={directory}"] if directory else []
        jobs.append(Job(run.name, recipes[run.name].train.steps, [
            sys.executable, "-m", "lmjax.cli", "train", "--config", spec, "--workdir",
            str(workdir / run.name),
            *(f"--config.{item}" for item in (*overrides, *run.overrides, *shared))]))
    return train_all(jobs, workdir, cards)


def _check_same(workdir: Path, recipe: Recipe) -> None:
    """Refuses a config file that was edited since a run finished."""
    file = workdir / "config.json"
    changes, _ = blocking_changes(json.loads(file.read_text()), plain(recipe))
    if changes:
        raise UserError("the settings of the finished runs", f"{workdir.name} with "
                        f"{'; '.join(changes)}", "undo the change, or give another --workdir",
                        where=str(file))


def _recipe(spec: str, overrides: Sequence[str], name: str) -> Recipe:
    try:
        return build_recipe(with_source(load(spec, overrides)))
    except UserError as error:
        raise UserError(error.expected, error.got, error.fix,
                        where=f"{name}: {error.where}") from None


def _keep_plan(workdir: Path, spec: str, overrides: Sequence[str]) -> None:
    """Writes sweep.json, or compares with the one that is there."""
    file, plan = workdir / "sweep.json", {"config": spec, "overrides": list(overrides)}
    if file.exists():
        found = json.loads(file.read_text())
        if found != plan:
            raise UserError(f"a sweep of {found['config']} with {found['overrides']}",
                            f"{spec} with {list(overrides)}", "repeat these settings, or give "
                            "another --workdir", where=str(file))
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError("an empty directory, or that of a sweep", f"{workdir}, which is neither",
                        "give another --workdir", where="--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(plan, indent=2) + "\n")


def shared_data(recipe: Recipe, workdir: Path) -> str:
    """Prepares the data that a run shares with others; "" if it has to prepare its own."""
    data = recipe.data
    if (data.directory or data.synthetic or recipe.train.init_from or recipe.distill.teacher
            or isinstance(recipe.task, Task)):
        return ""
    decided = json.dumps(data.prepared_by(), sort_keys=True)
    return prepare(data, str(workdir / "data" / hashlib.sha256(decided.encode()).hexdigest()[:8]),
                   make_tokenizer=make_tokenizer)


def _key(item: str, option: str, form: str, taken: Mapping[str, Any]) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key or not value:
        raise UserError(f"KEY={form}", repr(item), "correct it", where=option)
    key = key.removeprefix("config.")
    if key in taken:
        raise UserError(f"one item for {key}", "two", "join them", where=option)
    return key, value


def _values(text: str, key: str) -> list[str]:
    values = [value.strip() for value in text.split(",")]
    if text.startswith("["):
        try:
            values = [value if isinstance(value, str) else json.dumps(value)
                      for value in json.loads(text)]
        except ValueError as error:
            raise UserError("values with commas between, or a JSON list of them", error,
                            "correct it", where=f"--grid {key}") from None
    if not values or "" in values or len(set(values)) < len(values):
        raise UserError("different values with commas between", repr(text), "correct it",
                        where=f"--grid {key}")
    return values


def _name(point: Mapping[str, str], seed: int) -> str:
    """The name of a run's directory: its settings, or a hash of them where they are long."""
    parts = [*(f"{key}={value}" for key, value in point.items()), f"seed={seed}"]
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts))
    if len(name) <= MOST_NAME and name == ",".join(parts):
        return name
    digest = hashlib.sha256(",".join(parts).encode()).hexdigest()[:8]
    return f"{name[: MOST_NAME - 9]}-{digest}"
