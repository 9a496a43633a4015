"""`lmjax compare RUN RUN ...`: one HTML page that shows what tells runs apart, the best first.

Like a report, it reads only files that the runs wrote.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.monitoring.units import human_count, human_seconds
from lmjax.reporting import page as html
from lmjax.reporting.run_files import RunRecord
from lmjax.reporting.task_report import title
from lmjax.runtime.files import write_whole
from lmjax.scaling.groups import (
    CONFIDENCE,
    Group,
    choose_metric,
    differing,
    group_runs,
    read_runs,
    short,
)

Axis = Callable[[RunRecord, np.ndarray], np.ndarray]  # from steps [N] to x [N]
COLORED = ("train", "heldout", "second", "ema")  # of the best groups; all others are grey
MOST_KEYS = 4  # settings that are columns of the table of runs
MOST_GREY = 40  # curves: more would hide each other
TIMES = (("days", 86_400), ("hours", 3_600), ("minutes", 60), ("seconds", 1))


def write_comparison(places: Sequence[str | Path], out: str | Path,
                     metric: str = "") -> list[str]:
    """Writes a page that compares runs.

    Args:
      places: directories of runs, or directories whose subdirectories are runs.
      out: the page's path.
      metric: by which the runs are ordered; "": see `choose_metric`.

    Returns:
      The page's table as lines of Markdown.

    Raises:
      UserError: see `read_runs` and `choose_metric`.
    """
    runs = read_runs(places)
    metric = choose_metric(runs, metric)
    groups = group_runs(runs, metric)
    keys = differing([group.settings for group in groups])
    shown = keys if len(keys) <= MOST_KEYS else []  # else they get a table of their own
    head, rows = _table(groups, metric, shown)
    body = _header(groups, metric) + _pictures(groups, metric)
    body += html.card("The runs", html.table(head, rows, numbers_from=1 + len(shown)),
                      _note(groups, metric), wide=True)
    if len(keys) > MOST_KEYS:
        body += html.card("What tells them apart", html.table(
            ["setting", *(group.name for group in groups)],
            [[key, *(_setting(group.settings.get(key)) for group in groups)] for key in keys],
            numbers_from=len(groups) + 1), wide=True)
    write_whole(Path(out), html.page("Comparison \u00b7 lmjax", body))
    rule = ["---"] * (1 + len(shown)) + ["---:"] * (len(head) - 1 - len(shown))
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _header(groups: Sequence[Group], metric: str) -> str:
    runs = sum(len(group.runs) for group in groups)
    best = groups[0]
    summary = f"{runs} run{'s' * (runs != 1)} of {len(groups)} config{'s' * (len(groups) != 1)}."
    if math.isfinite(best.mean):
        summary += f" The best {title(metric)} is {_value(best)}, of {best.name}"
        second = next((g for g in groups[1:] if math.isfinite(g.mean)), None)
        summary += f"; next comes {second.name} with {_value(second)}." if second else "."
    return (f'<header><h1>Comparison</h1><p class="summary">{html.escape(summary)}</p>'
            "</header>\n")


def _note(groups: Sequence[Group], metric: str) -> str:
    note = (f"{title(metric).capitalize()} on held-out examples at the last evaluation, the best "
            "first.")
    if any(len(group.runs) > 1 for group in groups):
        note += (f" Runs that differ in their seeds only share a row: their mean, and its "
                 f"{CONFIDENCE:.0%} confidence interval.")
    return note


def _table(groups: Sequence[Group], metric: str,
           keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of runs, with columns for these settings."""
    head = ["runs", *short(keys).values(), title(metric), "seeds", "steps", "tokens", "FLOPs",
            "time", "parameters"]
    rows = []
    for group in groups:
        run = group.runs[0]
        rows.append([group.name, *(_setting(group.settings.get(key)) for key in keys),
                     _value(group), str(len(group.runs)),
                     f"{run.step:,}" + " so far" * run.unfinished,
                     human_count(float(run.tokens(run.step))),
                     human_count(float(_flops(run, run.tokens(run.step)))).replace("nan", ""),
                     human_seconds(run.seconds) if run.seconds > 0 else "",
                     human_count(run.facts.get("parameters", math.nan)).replace("nan", "")])
    return head, rows


def _setting(value: Any) -> str:
    return "" if value is None else str(value)[:60]


def _value(group: Group) -> str:
    if math.isnan(group.mean):
        lost = sum(math.isnan(value) for value in group.values)
        return f"none of {lost} run{'s' * (lost > 1)}"
    width = group.half_width
    return f"{group.mean:.4f}" + f" \u00b1 {width:.4f}" * math.isfinite(width)


def _flops(run: RunRecord, tokens: Any) -> Any:
    return np.asarray(tokens) * run.facts.get("flops_per_token", math.nan)


def _pictures(groups: Sequence[Group], metric: str) -> str:
    """The metric of each group against tokens, FLOPs and time, and the loss of training."""
    longest = max((run.seconds for group in groups for run in group.runs if run.seconds > 0),
                  default=1.0)
    unit, size = next((unit, size) for unit, size in TIMES if longest >= size or size == 1)
    tokens = f"{groups[0].runs[0].unit}s trained on"

    def heldout(group: Group) -> tuple[np.ndarray, np.ndarray]:
        return _mean_curve(group, metric)

    def training(group: Group) -> tuple[np.ndarray, np.ndarray]:
        columns = group.runs[0].train
        return columns.get("step", np.zeros(0)), columns.get("loss", np.zeros(0))

    name = title(metric)
    return (_picture(groups, f"{name} against tokens", name, tokens, _tokens, heldout)
            + _picture(groups, f"{name} against FLOPs", name, "FLOPs of the model",
                       lambda run, steps: _flops(run, run.tokens(steps)), heldout)
            + _picture(groups, f"{name} against time", name, f"{unit} of wall time",
                       lambda run, steps: _seconds(run, steps) / size, heldout)
            + _picture(groups, "loss of training against tokens", "nats, of each first run",
                       tokens, _tokens, training, "trend"))


def _picture(groups: Sequence[Group], name: str, label: str, along: str, x_of: Axis,
             curve_of: Callable[[Group], tuple[np.ndarray, np.ndarray]],
             kind: str = "points") -> str:
    """A card with one curve per group: the best in colour, the others in grey behind them."""
    from lmjax.reporting.plots import Curve, Panel, draw  # matplotlib takes half a second

    colored, grey = [], []
    for i, group in enumerate(groups[: len(COLORED) + MOST_GREY]):
        steps, values = curve_of(group)
        x = x_of(group.runs[0], steps)
        good = np.isfinite(x)
        if good.any() and i < len(COLORED):
            colored.append(Curve(group.name[:24], x[good], values[good], COLORED[i], kind))
        elif good.any():
            grey.append(Curve("", x[good], values[good], "muted", kind))
    if not colored:
        return ""
    panel = Panel(label, [*grey, *colored])
    return html.card(name[:1].upper() + name[1:], draw(name, [panel], along=along))


def _tokens(run: RunRecord, steps: np.ndarray) -> np.ndarray:
    return run.tokens(steps)


def _mean_curve(group: Group, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which all runs of a group were evaluated, and the mean of their values."""
    seen = [dict(zip(run.heldout.get("step", ()), run.heldout.get(metric, ()), strict=True))
            for run in group.runs if metric in run.heldout]
    steps = sorted(set.intersection(*map(set, seen))) if seen else []
    return np.array(steps), np.array([np.mean([one[step] for one in seen]) for step in steps])


def _seconds(run: RunRecord, steps: np.ndarray) -> np.ndarray:
    """The wall time at these steps, over all starts; nan if the run did not record it."""
    known = np.isfinite(run.timing.get("seconds", np.zeros(0)))
    if not known.any():
        return np.full(len(steps), math.nan)
    return np.interp(steps, np.append(0, run.timing["step"][known]),
                     np.append(0, run.timing["seconds"][known]))
