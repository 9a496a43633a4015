"""`lmjax scale ladder` and `forecast`: from small runs to what a large one will reach.

    WORKDIR/RUN          a run per size and number of tokens, as `lmjax sweep` makes them
    WORKDIR/law.json     the fitted law, its intervals, and the runs that it came from
    WORKDIR/law.md       the same as tables
    WORKDIR/law.png      curves of equal FLOPs, the fit, and its residuals
    RUN/forecast.json    what RUN will reach, written before it begins
"""

import dataclasses
import datetime
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lmjax.config import differences, load, plain
from lmjax.errors import UserError
from lmjax.models.flops import flops_per_token
from lmjax.monitoring.progress import to_stderr
from lmjax.monitoring.units import human_count
from lmjax.reporting.forecast import FILE
from lmjax.reporting.run_files import read_run
from lmjax.runtime.files import write_whole
from lmjax.scaling.law import CONFIDENCE, Fit, Observation, fit
from lmjax.scaling.processes import finished
from lmjax.scaling.sizes import Size, resized
from lmjax.scaling.sweep import Run
from lmjax.sharding import MeshConfig, make_layout
from lmjax.training.changes import MAY_CHANGE
from lmjax.training.program import make_model
from lmjax.training.recipe import Recipe, build_recipe, recorded_recipe
from lmjax.training.task_config import with_source

NAMES = {"floor": "E", "size_factor": "A", "size_exponent": "a", "data_factor": "B",
         "data_exponent": "b"}
# What the runs of one law may differ in, as patterns: the size, the length, the seeds, and what a
# run that is resumed may change. Batches and proportions of the data decide what a step learns.
MAY_DIFFER = (
    "model.embed_dim", "model.num_layers", "model.num_encoder_layers", "model.num_heads",
    "model.num_kv_heads", "model.mlp_dim", "model.moe.mlp_dim", "model.moe.shared_dim",
    "train.steps", "train.seed", "data.seed", "data.sources.*.data_dir",
    *(key for key in MAY_CHANGE
      if not key.startswith(("train.batch_size", "data.stages", "data.max_epochs"))))
FAR = 100  # by how much a ratio of tokens to size may leave those of the runs before it says little


def parse_sizes(texts: Sequence[str]) -> list[Size]:
    """Reads WIDTHxDEPTH.

    Raises:
      UserError: one of them is something else.
    """
    sizes = []
    for text in texts:
        width, _, depth = text.partition("x")
        if not (width.isdecimal() and depth.isdecimal() and int(width) and int(depth)):
            raise UserError("WIDTHxDEPTH, such as 256x4", repr(text), "correct it",
                            where="--sizes")
        sizes.append(Size(int(width), int(depth)))
    return sizes


def size_of(recipe: Recipe) -> float:
    """N: the FLOPs of a training token divided by 6, so that 6 N D are the FLOPs of a run."""
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    model = make_model(dataclasses.replace(recipe, mesh=MeshConfig()), layout,
                       vocab_size=recipe.model.vocab_size or recipe.data.tokenizer.vocab_size)
    return flops_per_token(model, recipe.data.seq_len) / 6


def tokens_of(recipe: Recipe) -> int:
    """D: the tokens that a recipe reads, whether it predicts them or not."""
    return recipe.train.steps * recipe.train.batch_size * recipe.data.seq_len


def rungs(spec: str, overrides: Sequence[str], sizes: Sequence[Size],
          ratios: Sequence[float]) -> list[Run]:
    """A run for each size and each ratio of tokens to size, with a schedule of its own length.

    Raises:
      UserError: a size does not fit the heads, or a run would be shorter than its warm-up.
    """
    own, found = build_recipe(load(spec, overrides)), []
    if any(not 0 < ratio < math.inf for ratio in ratios):
        raise UserError("ratios above 0", list(ratios), "correct them", where="--ratios")
    for size in sizes:
        settings = resized(own.model, size, "--sizes")
        recipe = build_recipe(load(spec, [*overrides, *settings]))
        a_step = recipe.train.batch_size * recipe.data.seq_len
        for ratio in ratios:
            steps = max(1, round(ratio * size_of(recipe) / a_step))
            found.append(Run(f"{size.name}-{ratio:g}", (*settings, f"train.steps={steps}")))
    return found


def observations(workdir: Path) -> tuple[dict[str, Observation], list[str]]:
    """The finished runs of a ladder by their names, and the names of those that diverged.

    Raises:
      UserError: there are none, or their data or their recipes differ.
    """
    found, diverged, data = {}, [], set()
    for name in sorted(finished(workdir)):
        run = read_run(workdir / name)
        loss = float(run.heldout["loss"][-1])
        if not math.isfinite(loss):
            diverged.append(name)
            continue
        data.add(run.facts["data"]["fingerprint"])
        found[name] = Observation(run.facts["flops_per_token"] / 6,
                                  float(run.step * run.facts["tokens_per_step"]), loss)
    if diverged:
        to_stderr(f"left out, since they diverged: {', '.join(diverged)}")
    if not found:
        raise UserError("a directory of finished runs", f"{workdir}, which has none",
                        "run lmjax scale ladder first", where="--workdir")
    if len(data) > 1:
        raise UserError("runs on the same data", f"{len(data)} kinds", "take another --workdir",
                        where=str(workdir))
    first, *others = (_recorded(workdir / name) for name in found)
    for name, recipe in zip([*found][1:], others, strict=True):
        _check_same_recipe(recipe, first, str(workdir / name))
    return found, diverged


def fit_ladder(workdir: Path,
               budgets: Sequence[float]) -> tuple[dict[str, Observation], Fit, list[str]]:
    """Fits the law to the finished runs, and writes law.json and law.md.

    Args:
      workdir: of the ladder.
      budgets: FLOPs for which the best size is told.

    Returns:
      (the runs by name, the fit, the lines of law.md).

    Raises:
      UserError: there are too few runs, or they differ in more than their size and length.
    """
    runs, diverged = observations(workdir)
    found = fit(list(runs.values()))
    lines = table(runs, found, budgets)
    if diverged:
        lines += ["", f"Left out, since they diverged: {', '.join(diverged)}"]
    write_whole(workdir / "law.json", json.dumps({
        "law": dataclasses.asdict(found.law),
        "intervals": {name: found.interval_of(name) for name in NAMES},
        "confidence": CONFIDENCE, "runs": _record(workdir, runs), "diverged": diverged},
        indent=1) + "\n")
    write_whole(workdir / "law.md", "\n".join(lines) + "\n")
    return runs, found, lines


def _record(workdir: Path, runs: Mapping[str, Observation]) -> list[dict[str, Any]]:
    """The runs with what identifies them: a hash of their config and their metrics."""
    return [{"run": name, **dataclasses.asdict(run), "sha256": hashlib.sha256(b"".join(
        (workdir / name / file).read_bytes() for file in ("config.json", "metrics.jsonl"))
        ).hexdigest()} for name, run in runs.items()]


def table(runs: Mapping[str, Observation], found: Fit, budgets: Sequence[float]) -> list[str]:
    """The law, the best size for each budget, and the runs with their residuals, in Markdown."""
    law = found.law
    rows = ["loss = E + A / N^a + B / D^b; N: FLOPs of a training token / 6, D: tokens", "",
            f"| | value | {CONFIDENCE:.0%} interval |", "| --- | ---: | --- |"]
    for name, letter in NAMES.items():
        low, high = found.interval_of(name)
        rows.append(f"| {letter} | {getattr(law, name):.4g} | {low:.4g} to {high:.4g} |")
    if budgets:
        rows += ["", f"| FLOPs | best N | {CONFIDENCE:.0%} interval | tokens | loss |",
                 "| ---: | ---: | --- | ---: | ---: |"]
    for flops in budgets:
        size, tokens = law.best(flops)
        rows.append(f"| {flops:.3g} | {human_count(size)} | "
                    f"{_interval_of_best(found, flops, list(runs.values()))} | "
                    f"{human_count(tokens)} | {law.loss(size, tokens):.4f} |")
    rows += ["", "| run | N | tokens | FLOPs | loss | law | residual |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    rows += [f"| {name} | {human_count(run.parameters)} | {human_count(run.tokens)} | "
             f"{run.flops:.3g} | {run.loss:.4f} | {law.loss(run.parameters, run.tokens):.4f} | "
             f"{residual:+.2%} |"
             for (name, run), residual in zip(runs.items(), found.residuals, strict=True)]
    return rows


def _interval_of_best(found: Fit, flops: float, runs: Sequence[Observation]) -> str:
    """The interval of the best size; an end that the runs say nothing of is open."""
    ratios = [run.tokens / run.parameters for run in runs]
    least, most = (math.sqrt(flops / 6 / ratio) for ratio in (
        max(ratios) * FAR, min(ratios) / FAR))
    low, high = found.interval_of_best(flops)
    if least <= low and high <= most:
        return f"{human_count(low)} to {human_count(high)}"
    if low < least and most < high:
        return "unknown"
    return (f"more than {human_count(min(low, most))}" if high > most else
            f"less than {human_count(max(high, least))}")


def forecast(spec: str, overrides: Sequence[str], workdir: Path, run: Path) -> dict[str, Any]:
    """Writes RUN/forecast.json: the loss that a recipe will reach, with an interval.

    Args:
      spec: the config of the run, FILE[:VARIANT].
      overrides: its KEY=VALUE.
      workdir: of the ladder.
      run: the directory that the run will have.

    Returns:
      what the file holds.

    Raises:
      UserError: the run has begun, has a forecast, or its recipe is not that of the ladder.
    """
    for name, what in (("metrics.jsonl", "has begun"), (FILE, "has a forecast")):
        if (run / name).exists():
            raise UserError("a run that is still to come", f"one that {what}",
                            "a forecast is written down before the run, once", where=str(run))
    recipe = build_recipe(with_source(load(spec, overrides)))
    runs, diverged = observations(workdir)
    _check_same_recipe(recipe, _recorded(workdir / next(iter(runs))), spec)
    found = fit(list(runs.values()))
    size, tokens = size_of(recipe), tokens_of(recipe)
    low, high = found.interval(size, tokens)
    made = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loss": found.law.loss(size, tokens), "low": low, "high": high, "confidence": CONFIDENCE,
        "parameters": size, "tokens": tokens, "flops": 6 * size * tokens,
        "times_the_largest": 6 * size * tokens / max(one.flops for one in runs.values()),
        "law": dataclasses.asdict(found.law),
        "recipe_sha256": hashlib.sha256(
            json.dumps(plain(recipe), sort_keys=True).encode()).hexdigest(),
        "runs": _record(workdir, runs), "diverged": diverged}
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / FILE, json.dumps(made, indent=1) + "\n")
    return made


def _recorded(run: Path) -> Recipe:
    """The recipe of a finished run."""
    return recorded_recipe(json.loads((run / "config.json").read_text()))


def _check_same_recipe(recipe: Recipe, of_ladder: Recipe, where: str) -> None:
    """Refuses a recipe whose losses do not follow the law of the ladder.

    Raises:
      UserError: it differs in a key that is not in MAY_DIFFER.
    """
    may = MAY_DIFFER
    if recipe.model.parametrization == of_ladder.model.parametrization == "standard":
        may += ("model.base_*",)  # nothing depends on them
    changes = [change for change in differences(plain(of_ladder), plain(recipe))
               if not any(fnmatch.fnmatchcase(change.partition(":")[0], key) for key in may)]
    if changes:
        raise UserError("the recipe of the ladder in all but size and length", "; ".join(changes),
                        "undo that, or make a ladder of this recipe", where=where)
