"""`lmjax bench tasks`: what pretraining is worth, for the recipes of configs/tasks.

Each recipe trains from its pretrained model and from the same network with random weights, with
several seeds. A fifth of its examples is kept for a test after the last step. Beside these stand
two columns without a network: see `baselines`.

    runs/NAME                    the pretrained models, as the recipes name them
    runs/tasks/TASK-START-SEED   the runs
    runs/tasks/results.jsonl     a line per run; what it has is not run again
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import not_
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax.benchmarks.baselines import baselines
from lmjax.benchmarks.rounds import Report, write_report
from lmjax.config import load
from lmjax.data.text.sources import SourceConfig
from lmjax.errors import UserError
from lmjax.monitoring.jsonl import read_jsonl
from lmjax.tasks.examples import Example, examples, is_heldout
from lmjax.tasks.task import Record, Task
from lmjax.training.loop import train
from lmjax.training.recipe import Recipe, build_recipe
from lmjax.training.task_config import with_source

# By task, the program of examples/ that writes its records, with its arguments.
TASKS = {
    "classification": ("python_functions.py", "swaps", "runs/data/python-swaps.jsonl"),
    "tagging": ("python_tags.py", "runs/data/python-tags.jsonl"),
    "questions": ("python_questions.py", "runs/data/python-questions.jsonl"),
    "pairs": ("python_functions.py", "summaries", "runs/data/python-summaries.jsonl"),
    "chat": ("python_functions.py", "chats", "runs/data/python-chats.jsonl"),
    "preferences": ("python_functions.py", "preferences", "runs/data/python-preferences.jsonl"),
    "embeddings": ("python_functions.py", "partners", "runs/data/python-partners.jsonl"),
    "grpo": ("sums.py", "runs/data/sums"),
}
# The recipes of the models that they start from.
BASES = {
    "bert": "configs/bert.py", "bert-tiny": "configs/bert.py:tiny",
    "t5": "configs/t5.py", "t5-tiny": "configs/t5.py:tiny",
    "quickstart": "configs/quickstart.py", "tiny": "configs/quickstart.py:tiny",
    "sums": "configs/tasks/sums.py", "sums-tiny": "configs/tasks/sums.py:tiny",
}
WORK = Path("runs/tasks")
TEST = 0.2  # share of the examples that are kept for the test
STARTS = ("random", "pretrained")
COLUMNS = {"majority": "majority", "words": "bag of words", "random": "random weights",
           "pretrained": "pretrained"}


class Row(NamedTuple):
    """A recipe of configs/tasks, as it is measured."""

    name: str  # of the recipe, such as classification or classification:tiny
    overrides: tuple[str, ...]  # KEY=VALUE of its config
    base: str  # the key in BASES of what it starts from
    of_base: tuple[str, ...]  # KEY=VALUE of that one's config

    @property
    def given(self) -> list[str]:
        """All of them, as they were given."""
        name = self.name.partition(":")[0]
        return [*(f"{name}.{item}" for item in self.overrides),
                *(f"{self.base}.{item}" for item in self.of_base)]

    @property
    def spec(self) -> str:
        name, colon, variant = self.name.partition(":")
        return f"configs/tasks/{name}.py{colon}{variant}"

    @property
    def slug(self) -> str:
        return self.name.replace(":", "-")


def bench_tasks(names: Sequence[str], overrides: Sequence[str], *, seeds: int = 3,
                out: str = "") -> Report:
    """Runs what results.jsonl lacks, and prints the table in Markdown.

    Args:
      names: keys of TASKS, each with `:tiny` for that variant; none: all.
      overrides: NAME.KEY=VALUE, where NAME is a task or a key of BASES.
      seeds: how many runs each start gets.
      out: a file for the results as JSON; "" writes none.
    Returns:
      the rows of results.jsonl that belong to `names`.
    Raises:
      UserError: there is no such task, or one of a run.
    """
    rows = [_row(name, overrides) for name in names or TASKS]
    known = {name: None for row in rows for name in (row.name.partition(":")[0], row.base)}
    if odd := next((item for item in overrides if item.partition(".")[0] not in known), None):
        raise UserError(f"one of {', '.join(known)}, a dot, and KEY=VALUE", repr(odd),
                        "correct it", where="--set")
    for row in rows:
        _write_records(row)
        _pretrain(row)
    for seed in range(seeds):  # a table of one seed comes first
        for row in rows:
            for start in STARTS:
                _fine_tune(row, start, seed)
            _add_baselines(row)
    found = [line for line in _results() if line["task"] in [row.name for row in rows]]
    print("\n".join(table(found)))
    write_report({"rows": found}, out)
    return {"rows": found}


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The results as lines of Markdown: means over the seeds, with their standard deviations."""
    lines = ["| task | figure | test examples | " + " | ".join(COLUMNS.values()) + " | gain |",
             "| --- | --- " + "| ---: " * (len(COLUMNS) + 2) + "|"]
    notes = []
    for name in dict.fromkeys(line["task"] for line in found):
        its = [line for line in found if line["task"] == name]
        values = {column: [line["value"] for line in its if line["start"] == column]
                  for column in COLUMNS}
        means = {column: statistics.mean(seen) for column, seen in values.items() if seen}
        others = [mean for column, mean in means.items() if column != "pretrained"]
        gain = (f"{means['pretrained'] - max(others):+.3f}"
                if others and "pretrained" in means else "")
        cells = [name, its[0]["metric"], f"{its[0]['examples']:,}",
                 *(_cell(seen) for seen in values.values()), gain]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"{name}, {COLUMNS[line['start']]}: {line['by']}" for line in its if "by" in line]
    return [*lines, "", *notes]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _row(name: str, overrides: Sequence[str]) -> Row:
    task = name.partition(":")[0]
    if task not in TASKS:
        raise UserError(f"some of {', '.join(TASKS)}", repr(name), "correct it", where="--tasks")
    row = Row(name, _of(task, overrides), "", ())
    start = str(load(row.spec, row.overrides)["train"]["init_from"])
    base = Path(start).name
    if BASES.get(base) is None or Path(start) != Path("runs", base):
        raise UserError(f"runs/ and one of {', '.join(BASES)}, which have recipes", start,
                        "correct it", where=f"--config.{task}.train.init_from")
    return row._replace(base=base, of_base=_of(base, overrides))


def _of(name: str, overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(item.removeprefix(f"{name}.") for item in overrides if item.startswith(f"{name}."))


def _write_records(row: Row) -> None:
    """Writes the records of a task, and the file of those that are kept for the test."""
    if not _source(row).exists():
        program, *arguments = TASKS[row.name.partition(":")[0]]
        subprocess.run([sys.executable, f"examples/{program}", *arguments], check=True)
    kept = {name: WORK / "data" / row.slug / f"{name}.jsonl" for name in ("train", "test")}
    if all(path.exists() for path in kept.values()):
        return
    kept["train"].parent.mkdir(parents=True, exist_ok=True)
    records = _read(_source(row))
    # A run holds out the records with the lowest hashes, so that these have the highest.
    tests = [not is_heldout(record, 1.0 - TEST) for record in records]
    for name, path in kept.items():
        path.write_text("".join(f"{json.dumps(record)}\n" for record, is_test in zip(
            records, tests, strict=True) if is_test == (name == "test")))


def _source(row: Row) -> Path:
    return Path(load(row.spec, row.overrides)["data"]["sources"][0]["uri"].partition(":")[2])


def _read(path: Path) -> list[Record]:
    source = SourceConfig(name="records", uri=f"jsonl:{path}")
    return [item.record for item in examples(source, 0.0) if isinstance(item, Example)]


def _pretrain(row: Row) -> None:
    """Trains the model that a task starts from, unless that is done."""
    _train(build_recipe(with_source(load(BASES[row.base], row.of_base))), Path("runs", row.base))


@functools.cache
def _random_weights(base: str, overrides: tuple[str, ...], seed: int) -> Path:
    """The network of a pretrained model with random weights: a run whose learning rate is 0."""
    workdir = WORK / f"random-{base}-{seed}"
    still = ["train.steps=1", "optimizer.peak_lr=0", "optimizer.warmup_steps=0", "eval.every=0",
             "sample.every=0", f"train.seed={seed + 1}"]
    if "task" not in load(BASES[base]):  # nothing is learned from a text: a short one will do
        short = json.dumps([{"name": "short", "uri": "text:examples/*.py"}])
        still += [f"data.sources={short}", f"data.tokenizer.path=runs/{base}",
                  "data.heldout_fraction=0.2"]
    _train(build_recipe(with_source(load(BASES[base], (*overrides, *still)))), workdir)
    return workdir


def _recipe(row: Row, seed: int, start: Path) -> Recipe:
    """The recipe of a run: its config, with other seeds and the examples kept for the test."""
    data = WORK / "data" / row.slug
    test = json.dumps([{"name": "test", "uri": f"jsonl:{data / 'test.jsonl'}"}])
    return build_recipe(with_source(load(row.spec, (
        *row.overrides, f"data.sources.0.uri=jsonl:{data / 'train.jsonl'}", f"task.test={test}",
        # Only the last step is evaluated, so that no figure is the best of several.
        "eval.every=0", "eval.metric=", "checkpoint.keep_best=false",
        f"train.seed={seed}", f"data.seed={seed}", f"train.init_from={start}"))))


def _metric(row: Row, task: Task) -> str:
    """The figure of the table: that by which the recipe keeps its best step, or else the first."""
    return str(load(row.spec, row.overrides)["eval"].get("metric") or task.measures[0])


def _fine_tune(row: Row, start: str, seed: int) -> None:
    """Trains from a start, unless results.jsonl has it."""
    if _known(row, start, seed):
        return
    base = (Path("runs", row.base) if start == "pretrained"
            else _random_weights(row.base, row.of_base, seed))
    recipe, workdir = _recipe(row, seed, base), WORK / f"{row.slug}-{start}-{seed}"
    assert isinstance(recipe.task, Task)
    began = time.process_time()
    _train(recipe, workdir)
    metric = _metric(row, recipe.task)
    last = [line for line in read_jsonl(workdir / "metrics.jsonl") if f"test/{metric}" in line][-1]
    _add(row, start, metric, last[f"test/{metric}"], seed=seed, step=recipe.train.steps,
         loss=last["test/loss"], cpu_seconds=round(time.process_time() - began, 1),
         examples=int(last.get("test/answered", last["test/examples"])))


def _add_baselines(row: Row) -> None:
    """Computes the columns without a network, unless results.jsonl has them."""
    if _known(row, "words", 0):
        return
    recipe = _recipe(row, 0, Path("runs", row.base))
    assert isinstance(recipe.task, Task)
    records = _read(WORK / "data" / row.slug / "train.jsonl")
    held = [is_heldout(record, recipe.data.heldout_fraction) for record in records]
    # The examples that a model has answered: not all of them, where it writes text.
    with (WORK / f"{row.slug}-pretrained-0" / "answers" / "test.jsonl").open() as answers:
        test = [json.loads(line)["record"] for line in answers]
    metric = _metric(row, recipe.task)
    found = baselines(recipe.task, metric, [*itertools.compress(records, map(not_, held))],
                      [*itertools.compress(records, held)], test)
    for column, (by, value) in found.items():
        _add(row, column, metric, value, seed=0, step=0, by=by, examples=len(test))


def _train(recipe: Recipe, workdir: Path) -> None:
    if train(recipe, workdir) == "stopped":
        raise KeyboardInterrupt
    jax.clear_caches()  # of a run's compiled programs, which are not needed any more


def _results() -> list[dict[str, Any]]:
    file = WORK / "results.jsonl"
    return [*read_jsonl(file)] if file.exists() else []


def _known(row: Row, start: str, seed: int) -> bool:
    """Whether results.jsonl has a run.

    Raises:
      UserError: it has one with other settings, which no table may mix with these.
    """
    for line in _results():
        if (line["task"], line["start"], line["seed"]) == (row.name, start, seed):
            if line["set"] != row.given:
                raise UserError(f"runs of {row.name} with --set {' '.join(row.given)}",
                                f"one with {' '.join(line['set'])}", "repeat those settings, or "
                                f"delete its lines and its directories in {WORK}",
                                where=str(WORK / "results.jsonl"))
            return True
    return False


def _add(row: Row, start: str, metric: str, value: float, **more: Any) -> None:
    line = {"task": row.name, "start": start, "metric": metric, "value": value, **more,
            "set": row.given}
    with (WORK / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{row.name} from {start}, seed {more['seed']}: {metric} {value:.4f}", flush=True)
