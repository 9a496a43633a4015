"""`lmjax data`: what a run trained on, row by row, from the function that training itself takes its rows from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmjax.data import DataConfig, open_splits
from lmjax.data.objectives import Objective
from lmjax.data.order import Steps
from lmjax.data.pipeline import Mixture
from lmjax.data.tokenizers import NamedIds, prepared_tokenizer
from lmjax.training.checkpoint import checkpoint_steps, read_about
from lmjax.training.recipe import Recipe, build_recipe

CHUNK = 1024  # rows located at once
# What of a row is shown; a decoder's targets are the whole text of its documents.
SHOWN = {"decoder": ("targets",), "encoder": ("tokens", "targets"), "encdec": ("encoder_tokens", "targets")}


class Trained(NamedTuple):
    """The data of a run: its rows, and which of them each step takes."""

    recipe: Recipe
    split: Mixture
    steps: Steps
    text: Callable[[np.ndarray], str]


def open_run(workdir: str | Path) -> Trained:
    """Reads the configuration, the newest checkpoint's place in the data, and the data of a run.

    Raises:
      ValueError: there is no run, or its data is not what it was trained on.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir}: expected a run's directory, got no config.json there; correct --workdir")
    recipe = build_recipe(json.loads((workdir / "config.json").read_text()))
    directory = recipe.data.directory or str(workdir.absolute() / "data")
    split, _ = open_splits(recipe.data, directory)
    steps, saved = Steps([(0, 0, recipe.train.batch_size)]), checkpoint_steps(recipe.checkpoint.path(workdir))
    if saved:
        data = read_about(f"{recipe.checkpoint.path(workdir)}/{saved[-1]}")["data"]
        if split.fingerprint_of(data["next_row"]) != data["fingerprint"]:
            raise ValueError(f"{directory}: expected the data that {workdir} was trained on "
                             f"({data['fingerprint'][:12]}), got other data; restore it")
        steps = Steps.restored(data, saved[-1]).resumed(saved[-1], recipe.train.batch_size)
    return Trained(recipe, split, steps, make_reader(recipe.data, directory))


def show(workdir: str | Path, step: int) -> None:
    """Prints the rows that `step` (from 1, as in metrics.jsonl) trained on: source, documents, and what they say.

    Raises:
      ValueError: no such step; see also `open_run`.
    """
    run = open_run(workdir)
    if not 1 <= step <= run.recipe.train.steps:
        raise ValueError(f"--step: expected 1 to {run.recipe.train.steps}, as the run has, got {step}; correct it")
    g = np.arange(run.steps.rows(step - 1), run.steps.rows(step))
    rows = run.split.rows(g)
    objective = run.recipe.data.objective
    shown = SHOWN[objective.architecture]
    shown = ("tokens", *shown) if objective.augment.share else shown
    print(f"step {step}: rows {g[0]:,} to {g[-1]:,} of the run, by {objective.name}")
    for i, (row, source, epoch, place) in enumerate(zip(g, *run.split.locate(g), strict=True)):
        part = run.split.sources[source]
        print(f"\nrow {row:,}: {part.name}, epoch {epoch}, packed row {place:,}")
        for segment, (name, first, length) in enumerate(part.documents_at(place), 1):
            print(f"  document {name}, {length} from {first} on")
            for field in shown:
                segments = rows["encoder_segment_ids" if field.startswith("encoder_") else "segment_ids"][i]
                text = run.text(rows[field][i][segments == segment])
                label = f"{field}: " if len(shown) > 1 else ""
                print("\n".join(f"    {label}{line}" for line in text.split("\n")))


def order(workdir: str | Path, first: int, last: int) -> None:
    """Prints a line for each of the rows `first` to `last` of the run: row, source, epoch, packed row, documents.

    Raises:
      ValueError: last < first; see also `open_run`.
    """
    if not 0 <= first <= last:
        raise ValueError(f"--from, --to: expected 0 <= from <= to, got {first} and {last}; correct them")
    split = open_run(workdir).split
    print("row\tsource\tepoch\tpacked_row\tdocuments")
    for begin in range(first, last + 1, CHUNK):
        g = np.arange(begin, min(begin + CHUNK, last + 1))
        for row, source, epoch, place in zip(g, *split.locate(g), strict=True):
            part = split.sources[source]
            documents = " ".join(f"{name}[{at}:{at + n}]" for name, at, n in part.documents_at(place))
            print(f"{row}\t{part.name}\t{epoch}\t{place}\t{documents}")


def make_reader(config: DataConfig, directory: str) -> Callable[[np.ndarray], str]:
    """A function from token ids [n] to text; made-up tokens are shown as their numbers, added ids by their names."""
    if config.synthetic:
        return lambda ids: " ".join(map(str, ids))
    tokenizer = prepared_tokenizer(directory)
    objective = Objective(config.objective, seq_len=config.seq_len, vocab_size=tokenizer.vocab_size)
    return NamedIds(tokenizer, objective.extra).decode
