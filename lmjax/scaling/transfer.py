"""`lmjax scale transfer`: does the best learning rate depend on width or depth?

Each size is trained at rates of a grid until the best of them has two worse neighbours. The runs
are those of a sweep (see `scaling.sweep`): the search goes on when its command is repeated, and
rates and sizes can be added later.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lmjax.config import load
from lmjax.errors import UserError
from lmjax.reporting.run_files import read_run
from lmjax.scaling.processes import finished
from lmjax.scaling.sizes import Size, based_on, check_sizes, resized
from lmjax.scaling.sweep import Run, train_runs
from lmjax.training.recipe import build_recipe

STEP = math.log(2) / 2  # of the grid of rates, in the logarithm
UNKNOWN = -1  # the best rate is still searched for


@dataclasses.dataclass(frozen=True)
class Point:
    """A size, a rate and a seed under one parametrization, and its run."""

    parametrization: str
    size: Size
    rate: float
    seed: int
    run: Run


@dataclasses.dataclass(frozen=True)
class Valley:
    """The losses of one size by rate."""

    size: Size
    rates: tuple[float, ...]
    losses: tuple[float, ...]  # means over the seeds; inf: it diverged; nan: it was not needed

    @property
    def best(self) -> float:
        """The rate of the lowest loss: the lowest point of a parabola through the best three.

        The parabola is drawn in the logarithm of the rate. If the next rate diverged, it is the
        tried rate itself. nan if the best rate is the first or the last that was tried, since a
        better one may lie beyond.
        """
        i, losses = self._least, np.array(self.losses)
        if self.next_diverged and i and np.isfinite(losses[i - 1]):
            return self.rates[i]
        if i in (0, len(losses) - 1) or not np.isfinite(losses[i - 1 : i + 2]).all():
            return math.nan
        x = np.log(self.rates[i - 1 : i + 2])
        a, b, _ = np.polyfit(x - x[1], losses[i - 1 : i + 2], 2)
        return float(np.exp(x[1] - b / (2 * a)))

    @property
    def next_diverged(self) -> bool:
        """Whether the rate above the tried one with the lowest loss diverged."""
        return self.losses[self._least + 1 : self._least + 2] == (math.inf,)

    @property
    def _least(self) -> int:
        return int(np.argmin(np.where(np.isfinite(self.losses), self.losses, np.inf)))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The valleys of all sizes along width or depth."""

    parametrization: str
    along: str
    valleys: tuple[Valley, ...]

    @property
    def shift(self) -> float:
        """By how many steps of the grid, sqrt(2), the best rate moves from end to end."""
        return math.log(self.valleys[-1].best / self.valleys[0].best) / STEP


def parse_rates(text: str) -> tuple[float, ...]:
    """LOW:HIGH as all rates LOW * sqrt(2)^k, or rates with commas between."""
    try:
        if ":" in text:
            low, high = map(float, text.split(":"))
            count = round(math.log(high / low) / STEP)
            rates = tuple(float(f"{low * math.exp(STEP * k):.4g}") for k in range(count + 1))
        else:
            rates = tuple(sorted(float(rate) for rate in text.split(",")))
    except (ValueError, ZeroDivisionError, OverflowError):
        rates = ()
    if len(set(rates)) < 3 or not all(0 < rate < math.inf for rate in rates):
        raise UserError("LOW:HIGH, or at least three rates with commas between", repr(text),
                        "correct it", where="--rates")
    return rates


def points_of(spec: str, overrides: Sequence[str], *, parametrizations: Sequence[str],
              widths: Sequence[int], depths: Sequence[int], rates: Sequence[float],
              seeds: int) -> list[Point]:
    """All runs. At the base, where the parametrizations are one program, they share theirs.

    Args:
      widths, depths: while one of them varies, the other has its smallest value; a list without
        values leaves the config's. The smallest are the base, unless the config names one.

    Raises:
      UserError: a size does not fit the heads, or there is nothing to compare.
    """
    for values, where in ((widths, "--widths"), (depths, "--depths")):
        if values:
            check_sizes(values, where)
    if seeds < 1 or not (widths or depths):
        raise UserError("at least 1 seed, and --widths or --depths", f"{seeds} seeds",
                        "correct it", where="lmjax scale transfer")
    model = build_recipe(load(spec, overrides)).model
    base = Size(min(widths, default=model.embed_dim), min(depths, default=model.num_layers))
    sizes = dict.fromkeys([base, *(Size(width, base.num_layers) for width in sorted(widths)),
                           *(Size(base.embed_dim, depth) for depth in sorted(depths))])
    own_base = model.base_embed_dim or model.base_num_layers
    found = []
    for parametrization in parametrizations:
        for size in sizes:
            shared = size == base and not own_base
            name = f"{'base' if shared else parametrization}-{size.name}"
            settings = [*resized(model, size),
                        *based_on(model, "standard" if shared else parametrization, base)]
            found += [Point(parametrization, size, rate, seed, Run(
                f"{name}-{rate:g}-seed{seed}", (*settings, f"optimizer.peak_lr={rate:g}",
                                                f"train.seed={seed}", f"data.seed={seed}")))
                      for seed in range(seeds) for rate in rates]
    return found


def search(spec: str, overrides: Sequence[str], workdir: Path, points: Sequence[Point], *,
           at_once: int = 1) -> list[str]:
    """Trains runs of `points` until the best rate of each size is found.

    Args:
      spec, overrides, workdir, at_once: as for `sweep.train_runs`.
      points: of `points_of`.

    Returns:
      the names of the runs that failed.

    Raises:
      UserError: an error of `train_runs`.
    """
    failed: list[str] = []
    while not failed and (runs := wanted(points, _losses(points, workdir))):
        failed = train_runs(spec, overrides, workdir, runs, at_once=at_once)
    return failed


def wanted(points: Sequence[Point], losses: Mapping[str, float]) -> list[Run]:
    """The runs that the search needs next.

    A size starts at the best rate of the first one, which starts in the middle of the grid.

    Args:
      points: of all sizes.
      losses: of the finished runs by name; nan: it diverged.
    """
    found: dict[str, Run] = {}
    starts: dict[str, int] = {}  # by parametrization, where sizes after the first one start
    for name, size in dict.fromkeys((point.parametrization, point.size) for point in points):
        runs = _by_rate([point for point in points
                         if (point.parametrization, point.size) == (name, size)])
        known = {i: _mean([losses[run.name] for run in its]) for i, its in enumerate(runs)
                 if all(run.name in losses for run in its)}
        if not known and starts.get(name) == UNKNOWN:
            continue  # the first size comes first
        best = (min(known, key=lambda i: known[i]) if known else starts.get(name, len(runs) // 2))
        needs = {best, best - 1, best + 1} if known else {best}
        needs = {i for i in needs - set(known) if 0 <= i < len(runs)}
        starts.setdefault(name, UNKNOWN if needs else best)
        found |= {run.name: run for i in sorted(needs) for run in runs[i]}
    return list(found.values())


def _by_rate(points: Sequence[Point]) -> list[list[Run]]:
    """The runs of one size, those of the lowest rate first."""
    return [[point.run for point in points if point.rate == rate]
            for rate in sorted({point.rate for point in points})]


def _mean(losses: Sequence[float]) -> float:
    """The mean; infinite if one of them is not finite."""
    return float(np.nan_to_num(np.mean(losses), nan=np.inf))


def _losses(points: Sequence[Point], workdir: Path) -> dict[str, float]:
    """The last held-out losses of the finished runs, by name."""
    done = finished(workdir) if workdir.exists() else set()
    return {name: float(read_run(workdir / name).heldout["loss"][-1])
            for name in {point.run.name for point in points} & done}


def read_transfers(points: Sequence[Point], workdir: Path) -> list[Transfer]:
    """What the runs of `points` reached: their last held-out loss."""
    losses, found = _losses(points, workdir), []
    for parametrization in dict.fromkeys(point.parametrization for point in points):
        own = [point for point in points if point.parametrization == parametrization]
        valleys = []
        for size in dict.fromkeys(point.size for point in own):
            rates = sorted({point.rate for point in own})
            valleys.append(Valley(size, tuple(rates), tuple(
                _mean([losses[run.name] for run in runs])
                if all(run.name in losses for run in runs) else math.nan
                for runs in _by_rate([point for point in own if point.size == size]))))
        base = valleys[0].size
        for along, same in (("width", "num_layers"), ("depth", "embed_dim")):
            line = [valley for valley in valleys
                    if getattr(valley.size, same) == getattr(base, same)]
            if len(line) > 1:
                found.append(Transfer(parametrization, along, tuple(line)))
    return found


def table(transfers: Sequence[Transfer]) -> list[str]:
    """The best rates as lines of Markdown."""
    rows = ["| parametrization | along | size | best rate | least loss | shift, steps of sqrt(2) |",
            "| --- | --- | ---: | ---: | ---: | ---: |"]
    for transfer in transfers:
        for valley in transfer.valleys:
            value = valley.size.embed_dim if transfer.along == "width" else valley.size.num_layers
            best = f"{valley.best:.2e}" if math.isfinite(valley.best) else "at an end of the grid"
            if math.isfinite(valley.best) and valley.next_diverged:
                best += " (the next rate diverged)"
            shift = math.log(valley.best / transfer.valleys[0].best) / STEP
            rows.append(f"| {transfer.parametrization} | {transfer.along} | {value} | {best} | "
                        f"{min(loss for loss in (*valley.losses, math.inf) if loss == loss):.4f} | "
                        f"{f'{shift:+.1f}' if math.isfinite(shift) else ''} |")
    verdicts = [f"{transfer.parametrization}: the best rate moves by {abs(transfer.shift):.1f} "
                f"steps of sqrt(2) along {transfer.along}, "
                f"{'less' if abs(transfer.shift) < 1 else 'not less'} than one"
                for transfer in transfers if math.isfinite(transfer.shift)]
    return [*rows, "", *verdicts]
