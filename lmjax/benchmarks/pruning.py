"""`lmjax bench pruning`: what pruned and retrained models are worth beside small ones alone.

Every way of pruning begins with one dense run and trains on for a number of steps. Beside each
smaller model stands one of the same shape that began with random weights and trained with the FLOPs
of the dense run and of the retraining together.

    WORK/dense         the dense run, trained on
    WORK/WAY/pruned    a pruned model
    WORK/WAY/run       the run that trains it on
    WORK/WAY/gradual   the run that prunes along the schedule
    WORK/WAY/alone     the run of its shape from random weights
    WORK/results.jsonl a line per run; what it has is not run again
    WORK/curves.png    the picture
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax.benchmarks.rounds import Report, write_report
from lmjax.compression.prune import Pruning, parse_pruning, prune
from lmjax.compression.sparse import TWO_OF_FOUR
from lmjax.config import plain
from lmjax.errors import UserError
from lmjax.lm import LM, load
from lmjax.models.flops import flops_per_token
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.training.loop import train
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.tree import named_leaves

WAYS = ("weights=2:4", "weights=0.75", "layers=1", "layers=2", "mlp=0.5", "heads=0.34,mlp=0.34")
DENSE, GRADUAL, ALONE, PRUNED = "dense", "gradual", "alone", "pruned"
KINDS = {DENSE: "not pruned, trained on", PRUNED: "pruned and trained on",
         GRADUAL: "along the schedule", ALONE: "the same shape alone"}


class Bench(NamedTuple):
    """What all runs here have in common."""

    recipe: Recipe  # of the dense run, with overrides
    run: str  # its directory
    lm: LM  # its model
    work: Path  # where the models and runs go
    steps: int  # of training after pruning
    texts: Sequence[str]  # by which what matters least is found


def bench_pruning(recipe: Recipe, *, run: str, work: str, ways: Sequence[str], steps: int,
                  texts: Sequence[str], out: str = "") -> Report:
    """Runs what results.jsonl lacks, prints the table in Markdown and draws WORK/curves.png.

    Args:
      recipe: of the dense run, with overrides for all runs here.
      run: the dense run, a directory.
      work: where the models and runs go.
      ways: what `--prune` of `lmjax compress` takes, each a way of its own; none: `WAYS`.
      steps: of training after pruning.
      texts: by which what matters least is found.
      out: a file for the results as JSON; "": none.

    Raises:
      UserError: a way is none, or WORK has results of other settings.
    """
    prunings = {way: parse_pruning(way) for way in ways or WAYS}  # refuses all mistakes at once
    bench = Bench(recipe, run, load(run), Path(work), steps, texts)
    done = Results(bench.work / "results.jsonl", {
        "run": run, "steps": steps, "config": plain(recipe),
        "texts": [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]})
    done.add("nothing", DENSE, lambda: _trained_on(bench, bench.lm, run, bench.work / DENSE))
    for way, pruning in prunings.items():
        done.add(way, PRUNED, lambda: _pruned(bench, way, pruning))  # noqa: B023
        if pruning.weights in (0.0, TWO_OF_FOUR):
            continue
        done.add(way, GRADUAL, lambda: _gradual(bench, way, pruning))  # noqa: B023
    for way, pruning in prunings.items():  # these take longest
        if not pruning.weights:
            done.add(way, ALONE, lambda: _alone(bench, way))  # noqa: B023
    print("\n".join(table(done.lines)))
    draw(done.lines, bench.work / "curves.png")
    write_report({"rows": done.lines}, out)
    return {"rows": done.lines}


class Results:
    """The lines of results.jsonl, which are never computed twice."""

    def __init__(self, file: Path, settings: dict[str, Any]):
        self._file, self._settings = file, settings
        self.lines = [*read_jsonl(file)] if file.exists() else []
        for line in self.lines:
            if line["settings"] != json.loads(json.dumps(settings)):
                raise UserError("results of this run, these steps and this config", "others",
                                "name another --work", where=str(file))

    def add(self, way: str, kind: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Adds what `compute` measures, unless it is there."""
        if any((line["way"], line["kind"]) == (way, kind) for line in self.lines):
            return
        line = {"way": way, "kind": kind, **compute(), "settings": self._settings}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(json.loads(json.dumps(line)))
        print(f"{way}, {KINDS[kind]}: perplexity {line['perplexity']:.3f}", flush=True)


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The results as lines of Markdown."""
    dense = next(line for line in lines if line["kind"] == DENSE)
    rows = ["| pruned | weights, M | FLOPs per token | steps | perplexity | beside dense |",
            "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for line in lines:
        how = "" if line["kind"] in (DENSE, PRUNED) else f", {KINDS[line['kind']]}"
        rows.append(
            f"| {line['way']}{how} | {line['nonzero'] / 1e6:.2f} | "
            f"{line['flops'] / dense['flops']:.0%} | {line['steps']:,} | "
            f"{line['perplexity']:.2f} | {line['perplexity'] / dense['perplexity'] - 1:+.1%} |")
    return rows


def draw(lines: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws perplexity against the weights that are not 0."""
    import matplotlib
    from matplotlib.figure import Figure

    from lmjax.reporting.plots import COLORS, STYLE

    colors = dict(zip(KINDS, (COLORS[name] for name in ("ink", "train", "second", "heldout")),
                      strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axes = figure.subplots()
        for kind, label in KINDS.items():
            its = [line for line in lines if line["kind"] == kind]
            x, y = ([line[name] for line in its] for name in ("nonzero", "perplexity"))
            axes.scatter([value / 1e6 for value in x], y, s=40, label=label, color=colors[kind])
            for line in its if kind != ALONE else ():
                axes.annotate(line["way"], (line["nonzero"] / 1e6, line["perplexity"]),
                              xytext=(6, 4), textcoords="offset points")
        axes.set_xlabel("millions of weights that are not 0")
        axes.set_title("held-out perplexity", loc="left")
        axes.margins(x=0.2)
        axes.legend(frameon=False)
        figure.savefig(out, dpi=150)


def _recipe(bench: Bench, lm: LM, steps: int, tokenizer: str, **groups: Any) -> Recipe:
    """The recipe of a run here, whose model is `lm`'s: evaluated after its last step only."""
    config = plain(bench.recipe)
    config["model"] = plain(lm.model.config)
    if config["data"]["directory"] or (prepared := Path(bench.run, "data")).is_dir():
        config["data"]["directory"] = config["data"]["directory"] or str(prepared)
    else:
        config["data"]["tokenizer"] = {"path": tokenizer}
    config["optimizer"]["warmup_steps"] = min(config["optimizer"]["warmup_steps"], steps // 10)
    changed = {"train": {"steps": steps}, "eval": {"every": 0}, "sample": {"every": 0}}
    for name, values in [*changed.items(), *groups.items()]:
        config[name].update(values)
    return build_recipe(config)


def _folder(bench: Bench, way: str) -> Path:
    return bench.work / way.replace(",", "-").replace(":", "of")


def _trained_on(bench: Bench, lm: LM, start: str, workdir: Path, *, keep_zeros: bool = False,
                pruning: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Trains the model at `start` on."""
    train_keys = {"init_from": start, "keep_zeros": keep_zeros}
    return _measured(_recipe(bench, lm, bench.steps, start, train=train_keys,
                             pruning=pruning or {}), workdir)


def _pruned(bench: Bench, way: str, pruning: Pruning) -> dict[str, Any]:
    start = _folder(bench, way) / "pruned"
    if not start.exists():
        prune(bench.lm, pruning, texts=bench.texts).save(start)
    return _trained_on(bench, load(start), str(start), _folder(bench, way) / "run",
                       keep_zeros=bool(pruning.weights))


def _gradual(bench: Bench, way: str, pruning: Pruning) -> dict[str, Any]:
    schedule = {"weights": pruning.weights, "every": max(bench.steps // 50, 1)}
    return _trained_on(bench, bench.lm, bench.run, _folder(bench, way) / GRADUAL, pruning=schedule)


def _alone(bench: Bench, way: str) -> dict[str, Any]:
    """The run from random weights, with the FLOPs of the dense run and of the retraining."""
    start = _folder(bench, way) / "pruned"
    small, length = load(start), bench.recipe.data.seq_len
    ratio = flops_per_token(bench.lm.model, length) / flops_per_token(small.model, length)
    enough = round(int(bench.lm.about["step"]) * ratio) + bench.steps
    return _measured(_recipe(bench, small, enough, str(start)), _folder(bench, way) / ALONE)


def _measured(recipe: Recipe, workdir: Path) -> dict[str, Any]:
    """Trains, which goes on where it was cut off, and reads what came out."""
    if train(recipe, workdir) == "stopped":
        raise KeyboardInterrupt
    jax.clear_caches()  # of compiled programs, which are not needed any more
    last = [line for line in read_jsonl(workdir / "metrics.jsonl") if "eval/perplexity" in line][-1]
    lm = load(workdir)
    nonzero = sum(int((leaf != 0).sum()) for _, leaf in named_leaves(lm.params))
    return {"perplexity": last["eval/perplexity"], "steps": recipe.train.steps,
            "nonzero": nonzero, "flops": flops_per_token(lm.model, recipe.data.seq_len)}
