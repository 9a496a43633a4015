"""`lmjax predict`: the answers of a model to a file of examples of its task."""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmjax.cli.arguments import AnyPath, LocalPath
from lmjax.errors import UserError
from lmjax.runtime.files import Busy, check_writable, lock

if TYPE_CHECKING:
    from lmjax.data.text.sources import SourceConfig
    from lmjax.tasks.task import Task


def add_predict(parser: ArgumentParser) -> None:
    """Adds the arguments of `lmjax predict`."""
    parser.add_argument("checkpoint", type=AnyPath, metavar="CHECKPOINT",
                        help="a run's directory, one of its checkpoints or a Hugging Face "
                        "directory, of a model with a task")
    add = parser.add_argument
    add("--input", required=True, metavar="FILE",
        help="records as JSON lines, CSV, TSV, Parquet or Arrow; or the uri of a source, such as "
        "'jsonl:parts/*.jsonl.gz' or tfds:NAME")
    add("--out", required=True, type=LocalPath, metavar="FILE",
        help="gets one line of JSON per record; a command that was stopped goes on where it was")
    add("--column", action="append", default=[], metavar="KEY=COLUMN",
        help="read config.task.KEY from this column, such as input=review; repeat it for several")


def predict(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Writes the answers to the records of a file."""
    out = Path(arguments.out)
    check_writable(out, "--out", file=True)
    from lmjax.data.reading import make_reader
    from lmjax.lm import load
    from lmjax.tasks import answers_file
    from lmjax.training.pretrained import find, weights_id
    from lmjax.training.task_data import sizes_of
    from lmjax.training.task_model import task_of

    source, found = _source(arguments.input), find(arguments.checkpoint)
    task, facts, tokenizer = task_of(found.recipe, found.about, found.tokenizer)
    task = with_columns(task, arguments.column)
    recipe = dataclasses.replace(found.recipe, task=cast(Any, task))
    reader = make_reader(tokenizer, recipe.model.family, recipe.data, found.about)
    answers_file.check_records(source, task, reader, facts, sizes_of(recipe))
    out.parent.mkdir(parents=True, exist_ok=True)
    busy = Busy("a file that no other command writes", "one that is being written",
                "wait for it, or choose another", where=str(out))
    held = lock(f"{out}.lock", busy, os.O_RDWR | os.O_CREAT)
    try:
        done = answers_file.whole_lines(
            out, answers_file.origin_of(weights_id(found), source, task))
        if done:
            _tell(f"predict: {done:,} records are answered already")
        lm = load(arguments.checkpoint)
        lm.recipe = recipe
        counts = answers_file.write_answers(lm.predictor, lm.params, source, out, done, _tell)
    finally:
        os.close(held)
        os.unlink(f"{out}.lock")
    lost = f", {counts.failed:,} of them without an answer ({counts.example})"
    print(f"{out}: {counts.lines:,} records, {counts.added:,} of them new"
          + lost * bool(counts.failed))


def with_columns(task: Task, columns: Sequence[str]) -> Task:
    """The task with some of its columns named anew.

    Args:
      task: of the model.
      columns: KEY=COLUMN of each; KEY is a key of config.task.

    Raises:
      UserError: the task has no such key, or that is not KEY=COLUMN.
    """
    changes: dict[str, Any] = {}
    for given in columns:
        key, equals, column = given.partition("=")
        known = {**task.templates, **{name: "{}" for name in ("pair",) if hasattr(task, name)}}
        if not equals or not column or key not in known:
            raise UserError(f"KEY=COLUMN, with KEY one of {', '.join(known)}", repr(given),
                            "correct it", where="--column")
        is_template = "{" in known[key] and "{" not in column
        changes[key] = f"{{{column}}}" if is_template else column
    return dataclasses.replace(task, **changes)


def _source(given: str) -> SourceConfig:
    """The source that --input names: its uri, or a file, whose content tells its format.

    Raises:
      UserError: no such file, or none of records.
    """
    from lmjax.config.paths import expand
    from lmjax.data.text.formats import describe_file
    from lmjax.data.text.sources import SCHEMES, SourceConfig

    scheme, _, rest = given.partition(":")
    if scheme in SCHEMES and rest:
        return SourceConfig("input", given)
    path = expand(given, "--input", bucket=False)
    if not Path(path).is_file():
        raise UserError("a file of records", f"{given}, which is none", "correct the path",
                        where="--input")
    found = describe_file(path, limit=1).format
    scheme = "jsonl" if found == "json" else found
    if scheme not in SCHEMES or scheme == "text":
        raise UserError("records as JSON lines, CSV, TSV, Parquet or Arrow", f"{found} in {path}",
                        "convert it, or write its scheme in front, such as csv:FILE",
                        where="--input")
    return SourceConfig("input", f"{scheme}:{path}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
