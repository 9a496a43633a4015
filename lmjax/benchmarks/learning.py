"""`lmjax bench learning`: how many steps an optimizer needs to the loss that AdamW ends at.

Model, data, their order and the batch are those of configs/quickstart.py, or of a smaller model.
Each step is one forward and one backward pass; the optimizer and its numbers are free. With seed 0
each optimizer tries its settings, one choice after the other. With the best, each seed trains for
all steps, and then for fewer and fewer, each time a whole run with its own warm-up and cool-down,
until the run ends above the loss at which AdamW ended with that seed.

    runs/learning/data             the tokens
    runs/learning/results.jsonl    a line per run; what it has is not run again
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from scipy.special import stdtr  # JAX depends on SciPy

from lmjax.benchmarks.rounds import Report, write_report
from lmjax.config import load, plain
from lmjax.errors import UserError
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.training.loop import train
from lmjax.training.recipe import build_recipe

RECIPE = "configs/quickstart.py"
# By size in parameters: the variant of the recipe, and what is set in it.
SIZES: dict[str, tuple[str, tuple[str, ...]]] = {
    "0.7M": ("", ("model.embed_dim=64", "model.num_heads=2", "model.num_kv_heads=1",
                  "model.mlp_dim=176")),
    "1.5M": ("", ("model.embed_dim=112", "model.num_heads=4", "model.num_kv_heads=2",
                "model.head_dim=28", "model.mlp_dim=304")),
    "3.2M": ("", ()),
    "tiny": (":tiny", ()),
}


class Row(NamedTuple):
    """An optimizer."""

    settings: tuple[str, ...]  # KEY=VALUE of the recipe
    # What it tries: of each choice, the setting that ends lowest, beside those already chosen.
    choices: tuple[tuple[str, ...], ...]


REFERENCE = "adamw"
ONE_RATE = "optimizer.groups=[]"  # for all kinds of parameters
ROWS = {
    REFERENCE: Row(("optimizer.name=adamw", ONE_RATE), (
        tuple(f"optimizer.peak_lr={rate}" for rate in (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
        tuple(f"optimizer.b2={b2}" for b2 in (0.95, 0.99)),
        tuple(f"optimizer.b1={b1}" for b1 in (0.9, 0.8)))),
    "muon": Row(("optimizer.name=muon", "optimizer.muon_momentum=0.95", ONE_RATE), (
        tuple(f"optimizer.peak_lr={rate}" for rate in (5e-3, 1e-2, 2e-2)),)),
    "recipe": Row((), ()),  # as configs/quickstart.py has it
}
SHORTER = 5 / 6  # the steps of a run as a share of those of the run before it
WORK = Path("runs/learning")


class Run(NamedTuple):
    """What tells a run from all others."""

    size: str
    row: str
    settings: tuple[str, ...]
    seed: int
    steps: int


class Found(NamedTuple):
    """What a seed of an optimizer came to."""

    size: str
    row: str
    settings: tuple[str, ...]  # the chosen ones
    seed: int
    loss: float  # held-out nats per token after all steps
    bits_per_byte: float
    cpu_seconds: float  # per step, evaluation and start included
    needed: float | None  # steps to the loss of AdamW; None: all of them are too few


def bench_learning(rows: Sequence[str], sizes: Sequence[str], *, seeds: int = 1, steps: int = 600,
                   out: str = "") -> Report:
    """Runs what results.jsonl lacks, and prints the table in Markdown.

    Args:
      rows: keys of ROWS; none: all. AdamW is always among them.
      sizes: keys of SIZES; none: all but tiny.
      seeds: how many seeds train with the best settings, which seed 0 chose.
      steps: of a run.
      out: a file for the figures as JSON; "" writes none.
    Raises:
      UserError: there is no such row or size.
    """
    for value, name in ((seeds, "--seeds"), (steps, "--steps")):
        if value < 1:
            raise UserError("at least 1", value, "raise it", where=name)
    for name, given, known in (("--optimizers", rows, ROWS), ("--sizes", sizes, SIZES)):
        if odd := next((item for item in given if item not in known), None):
            raise UserError(f"some of {', '.join(known)}", repr(odd), "correct it", where=name)
    names = tuple(dict.fromkeys((REFERENCE, *(rows or ROWS))))
    found = [seen for size in sizes or tuple(SIZES)[:-1]
             for seen in _of_size(size, names, seeds, steps)]
    print("\n".join(table(found, steps)))
    report: Report = {"steps": steps, "rows": [seen._asdict() for seen in found]}
    write_report(report, out)
    return report


def _of_size(size: str, names: Sequence[str], seeds: int, steps: int) -> list[Found]:
    chosen = {name: _tuned(size, name, steps) for name in names}
    found = []
    for seed in range(1, seeds + 1):  # the settings were chosen with seed 0
        target = _run(Run(size, REFERENCE, chosen[REFERENCE], seed, steps))["loss"]
        for name in names:
            run = Run(size, name, chosen[name], seed, steps)
            line = _run(run)
            found.append(Found(size, name, chosen[name], seed, line["loss"], line["bits_per_byte"],
                               line["cpu_seconds"] / steps, _needed(run, target)))
    return found


def _tuned(size: str, name: str, steps: int) -> tuple[str, ...]:
    """The settings with which seed 0 ends lowest, chosen one after the other."""
    settings = ROWS[name].settings
    for choice in ROWS[name].choices:
        tried = [(*settings, setting) for setting in choice]
        settings = min(tried, key=lambda its: _run(Run(size, name, its, 0, steps))["loss"])
    return settings


def _needed(run: Run, target: float) -> float | None:
    """The fewest steps of a run that ends at `target`, between two runs of other lengths."""
    below, steps = None, run.steps
    while (loss := _run(run._replace(steps=steps))["loss"]) <= target and steps > 1:
        below = steps, loss
        steps = round(steps * SHORTER)
    if loss <= target:
        return float(steps)
    return interpolated((steps, loss), below, target) if below else None


def interpolated(above: tuple[int, float], below: tuple[int, float], target: float) -> float:
    """The steps at which the loss is `target`, linear in the logarithm of the steps.

    Args:
      above, below: steps and loss of two runs: one that ends above `target`, one that does not.
    """
    share = (above[1] - target) / (above[1] - below[1])
    return math.exp(math.log(above[0]) + share * (math.log(below[0]) - math.log(above[0])))


def table(found: Sequence[Found], steps: int) -> list[str]:
    """The figures as lines of Markdown: means over the seeds.

    p is the chance of so few steps beside those of the row above, by a paired t-test of their
    logarithms over the seeds; only with two seeds or more.
    """
    lines = [f"| size | optimizer | loss after {steps:,} steps | bits per byte | CPU s per step "
             "| steps to AdamW's | of the row above | p | settings |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for size in dict.fromkeys(seen.size for seen in found):
        before: list[Found] = []
        for name in dict.fromkeys(seen.row for seen in found if seen.size == size):
            its = [seen for seen in found if (seen.size, seen.row) == (size, name)]
            loss, bits, seconds = (statistics.mean(getattr(seen, field) for seen in its)
                                   for field in ("loss", "bits_per_byte", "cpu_seconds"))
            all_needed = [seen.needed for seen in its if seen.needed is not None]
            needed = (f"{statistics.mean(all_needed):,.0f}" if len(all_needed) == len(its)
                      else "more")
            share, chance = ("", "") if not before else _beside(its, before)
            lines.append(f"| {size} | {name} | {loss:.4f} | {bits:.4f} | {seconds:.2f} | "
                         f"{needed} | {share} | {chance} | {' '.join(its[0].settings)} |")
            before = its
    return lines


def _beside(its: Sequence[Found], others: Sequence[Found]) -> tuple[str, str]:
    """The steps of a row as a share of another's, and the chance of so few, as text."""
    logs = [math.log(mine.needed / theirs.needed) for mine, theirs in zip(its, others, strict=True)
            if mine.needed and theirs.needed]
    if len(logs) < len(its):
        return "", ""
    share = f"{math.exp(statistics.mean(logs)):.2f}"
    if len(logs) < 2:
        return share, ""
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    t = statistics.mean(logs) / error if error else math.copysign(math.inf, sum(logs))
    return share, f"{stdtr(len(logs) - 1, t):.2g}"  # Student's distribution, from below


def _run(run: Run) -> dict[str, Any]:
    """The line of a run in results.jsonl; trains it if there is none of this recipe."""
    file = WORK / "results.jsonl"
    variant, model = SIZES[run.size]
    data = WORK / f"data{variant.replace(':', '-')}"
    recipe = build_recipe(load(RECIPE + variant, (
        *model, *run.settings, f"train.steps={run.steps}", f"train.seed={run.seed}",
        f"data.seed={run.seed}", f"data.directory={data}", "eval.every=0", "eval.batches=0",
        "sample.every=0", f"checkpoint.every={run.steps}")))
    name = hashlib.sha256(json.dumps(plain(recipe), sort_keys=True).encode()).hexdigest()[:12]
    if known := next((line for line in read_jsonl(file) if line["recipe"] == name), None):
        return known
    began = time.process_time()
    if train(recipe, WORK / name) == "stopped":
        raise KeyboardInterrupt
    jax.clear_caches()  # of a run's compiled programs, which are not needed any more
    last = [line for line in read_jsonl(WORK / name / "metrics.jsonl") if "eval/loss" in line][-1]
    line = {**run._asdict(), "step": run.steps, "recipe": name, "loss": last["eval/loss"],
            "bits_per_byte": last["eval/bits_per_byte"],
            "cpu_seconds": round(time.process_time() - began, 1)}
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
    shutil.rmtree(WORK / name)  # the figures are what is kept of a run
    print(f"{run.size} {run.row}, seed {run.seed}, {run.steps} steps: "
          f"{line['bits_per_byte']:.4f} bits per byte ({' '.join(run.settings)})", flush=True)
    return line
