"""Examples of a task: records of files, and which of them are held out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lmjax.data.config import DataConfig
from lmjax.data.hashing import key_of
from lmjax.data.store import canonical
from lmjax.data.text.records import Broken
from lmjax.data.text.sources import SourceConfig, read, units
from lmjax.errors import UserError
from lmjax.tasks.task import Record, Task
from lmjax.tasks.templates import as_text, columns_of, value

OF_SPLIT = {"train": "sources", "heldout": "validation", "test": "test"}  # keys of a config


class Example(NamedTuple):
    """A record and its name."""

    id: str
    record: Record


def sources_of(task: Task, data: DataConfig) -> list[tuple[str, str, SourceConfig]]:
    """Lists (source, split, where its examples are read).

    Without `task.validation`, the held-out examples of a source are some of its own.
    """
    found = [(source.name, "train", source) for source in data.sources]
    if not task.validation:
        found += [(source.name, "heldout", source) for source in data.sources]
    for split, sources in (("heldout", task.validation), ("test", task.test)):
        found += [(source.name, split, source) for source in sources]
    places = [place[:2] for place in found]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError("sources of different names", f"two that are named {twice[0]!r}",
                        "rename one", where=f"config.task.{OF_SPLIT[twice[1]]}")
    return found


def examples(source: SourceConfig, budget: float) -> Iterator[Example | Broken]:
    """The records of a source's files, each a JSON object: those that `source.where` chooses.

    Raises (while iterating):
      UserError: a file cannot be read, has more broken records than `budget` allows, or lacks the
        column of `source.where`; or no record is chosen.
    """
    column, chooses, wanted = source.where.partition("=")
    chosen = 0
    source = dataclasses.replace(source, text_field="")  # the whole record, as JSON
    for unit in units(source, 1 << 62):
        for item in read(source, unit, budget):
            if isinstance(item, Broken):
                yield item
                continue
            try:
                record = json.loads(item.data)
            except ValueError:  # a file of text, which is no file of records
                record = None
            if not isinstance(record, dict):
                raise UserError("records with columns", f"text in {item.id}", "name a source of "
                                "jsonl:, csv:, tsv:, parquet:, arrow: or tfds:",
                                where=f"source {source.name} ({source.uri})")
            if not chooses or as_text(_named(record, column, source)) == wanted:
                chosen += 1
                yield Example(item.id, record)
    if chooses and not chosen:
        raise UserError(f"records with where={source.where!r}", "none", "correct it, or the file",
                        where=f"source {source.name} ({source.uri})")


def _named(record: Record, column: str, source: SourceConfig) -> Any:
    """The value of the column that chooses a source's records."""
    try:
        return value(record, column)
    except UserError as error:
        raise UserError(f"{error.expected} for where={source.where!r}", error.got, "correct it, or "
                        "the file", where=f"source {source.name} ({source.uri})") from None


def is_heldout(record: Record, fraction: float) -> bool:
    """Whether a record is held out: a function of its content, so that copies stay together."""
    return int(key_of("example", canonical(record))) < int(fraction * 2.0**64)


def check_columns(task: Task, record: Record, source: SourceConfig) -> None:
    """Refuses a source whose first record lacks a column of the task.

    Raises:
      UserError: it does; the line names the columns that there are.
    """
    for key, template in task.templates.items():
        for column in columns_of(template) or [template]:
            try:
                value(record, column)
            except UserError as error:
                if column in record:
                    continue  # null in this record, which is told where it is read
                has: Sequence[str] = sorted(map(str, record))
                raise UserError(f"the column {column!r} of config.task.{key}",
                                f"the columns {', '.join(map(repr, has))[:300]}",
                                f"set config.task.{key}, or correct the file",
                                where=f"source {source.name} ({source.uri})") from error
