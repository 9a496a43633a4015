"""`lmjax data`: shows the rows that a run trained on, by the function that training reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmjax.data.order import Steps
from lmjax.data.pipeline import Mixture
from lmjax.errors import UserError
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.recipe import Recipe, recorded_recipe
from lmjax.training.row_texts import make_reader, row_texts
from lmjax.training.task_data import open_data

CHUNK = 1024  # rows located at once


class TrainedData(NamedTuple):
    """The data of a run."""

    recipe: Recipe
    split: Mixture  # its rows
    steps: Steps  # which of these rows each step takes
    text: Callable[[np.ndarray], str]  # turns token ids into text


def open_run(workdir: str | Path) -> TrainedData:
    """Opens the data of a run, at the place that its newest checkpoint records.

    Raises:
      UserError: there is no run, or its data has changed since it trained.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError("a run's directory", "no config.json there", "correct --workdir",
                        where=str(workdir))
    recipe = recorded_recipe(json.loads((workdir / "config.json").read_text()))
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    split, *_ = open_data(recipe, directory)
    batch_size, checkpoints = recipe.train.batch_size, recipe.checkpoint.path(workdir)
    steps, saved = Steps([(0, 0, batch_size)]), checkpoint_steps(checkpoints)
    if saved:
        data = read_about(f"{checkpoints}/{saved[-1]}")["data"]
        if split.fingerprint_of(data["next_row"]) != data["fingerprint"]:
            raise UserError(f"the data that {workdir} was trained on ({data['fingerprint'][:12]})",
                            "other data", "restore it", where=directory)
        steps = Steps.restored(data, saved[-1]).resumed(saved[-1], batch_size)
    return TrainedData(recipe, split, steps, make_reader(recipe.data, directory))


def show(workdir: str | Path, step: int) -> None:
    """Prints the rows of one training step: source, documents and text.

    Args:
      workdir: the run's directory.
      step: from 1, as in metrics.jsonl.

    Raises:
      UserError: no such step, or an error of `open_run`.
    """
    run = open_run(workdir)
    if not 1 <= step <= run.recipe.train.steps:
        raise UserError(f"1 to {run.recipe.train.steps}, as the run has", step, "correct it",
                        where="--step")
    g = np.arange(*run.steps.of(step))
    name = run.recipe.task.name or run.recipe.data.objective.name
    print(f"step {step}: rows {g[0]:,} to {g[-1]:,} of the run, by {name}")
    for row in row_texts(run.recipe, run.split, run.text, g):
        print(f"\nrow {row.row:,}: {row.source}, epoch {row.epoch}, packed row {row.place:,}")
        for document in row.documents:
            print(f"  document {document.name}, {document.length} from {document.first} on")
            for field, text in document.texts:
                label = f"{field}: " if len(document.texts) > 1 else ""
                print("\n".join(f"    {label}{line}" for line in text.split("\n")))


def order(workdir: str | Path, first: int, last: int) -> None:
    """Prints a line per row of the run: row, source, epoch, packed row, documents.

    Args:
      workdir: the run's directory.
      first: the first row, from 0.
      last: the last row; it is printed, too.

    Raises:
      UserError: last < first, or an error of `open_run`.
    """
    if not 0 <= first <= last:
        raise UserError("0 <= from <= to", f"{first} and {last}", "correct them",
                        where="--from, --to")
    split = open_run(workdir).split
    print("row\tsource\tepoch\tpacked_row\tdocuments")
    for begin in range(first, last + 1, CHUNK):
        g = np.arange(begin, min(begin + CHUNK, last + 1))
        for row, source, epoch, place in zip(g, *split.locate(g), strict=True):
            part = split.sources[source]
            documents = " ".join(f"{name}[{start}:{start + length}]"
                                 for name, start, length in part.documents_at(place))
            print(f"{row}\t{part.name}\t{epoch}\t{place}\t{documents}")
