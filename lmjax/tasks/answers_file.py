"""A file of answers, written while a file of examples is read, and continued after a kill.

    OUT       a line of JSON per record: its id, the answer, the record, and an error if there is no
              answer
    OUT.json  what the lines were made of: answers of another model, input or task never mix
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.config import differences, plain
from lmjax.data.reading import Reader
from lmjax.data.text.records import Broken
from lmjax.data.text.sources import SourceConfig, identity
from lmjax.errors import UserError, first_line
from lmjax.nn.module import Params
from lmjax.runtime.files import write_whole
from lmjax.tasks.examples import Example, examples
from lmjax.tasks.predicting import Predictor, Ready, ready
from lmjax.tasks.task import Facts, Sizes, Task

FORMAT, VERSION = "lmjax-predictions", 1
CHUNK = 256  # records that are read, answered and written at a time
SPOKE_EVERY = 5.0  # seconds between lines of progress
Log = Callable[[str], None]


class Counts(NamedTuple):
    """How many records a file of answers has, and what this start added."""

    lines: int
    added: int
    failed: int  # of these, without an answer
    example: str  # why one of them has none


def origin_of(weights: str, source: SourceConfig, task: Task) -> dict[str, Any]:
    """What the lines of a file of answers are made of, as plain JSON.

    Args:
      weights: names those of the model.
      source: of the records.
      task: how they are read.
    """
    files = identity(source) or hashlib.sha256(source.uri.encode()).hexdigest()
    return {"format": FORMAT, "version": VERSION, "checkpoint": weights, "input": files,
            "task": plain(task)}


def check_records(source: SourceConfig, task: Task, reader: Reader, facts: Facts,
                  sizes: Sizes) -> None:
    """Refuses a file in whose first records nothing is an example of the task.

    Raises:
      UserError: it has no records, or the reason why the first of them is none.
    """
    wrong: UserError | None = None
    for item in itertools.islice(examples(source, 1.0), CHUNK):
        try:
            if isinstance(item, Broken):
                raise UserError("a record", item.reason, "repair it", where=item.id)
            ready(task, item.record, reader, facts, sizes, name=item.id)
            return
        except UserError as error:
            wrong = wrong or error
    raise wrong or UserError("at least one record", "none", "correct it",
                             where=f"{source.name} ({source.uri})")


def whole_lines(out: Path, origin: dict[str, Any]) -> int:
    """How many lines of a file of answers are whole; what follows them is cut off.

    Args:
      out: the file, which need not exist.
      origin: of `origin_of`; written beside it.
    Raises:
      UserError: its lines were made of something else.
    """
    about = Path(f"{out}.json")
    if out.exists() and out.stat().st_size:
        try:
            was = json.loads(about.read_text())
        except (OSError, ValueError):
            was = None
        changed = differences(was, origin) if isinstance(was, dict) else ["no record of its origin"]
        if changed:
            raise UserError("answers of this checkpoint to this input", f"others ({changed[0]})",
                            "choose another --out, or delete it", where=str(out))
    else:
        write_whole(about, json.dumps(origin, indent=2) + "\n")
        out.touch()
    lines = end = 0
    with out.open("rb+") as file:
        while part := file.read(1 << 20):
            if (count := part.count(b"\n")):
                lines += count
                end = file.tell() - len(part) + part.rindex(b"\n") + 1
        file.truncate(end)
    return lines


def write_answers(predictor: Predictor, params: Params, source: SourceConfig, out: Path,
                  done: int, log: Log) -> Counts:
    """Appends the answers to a source's records, from record `done` on, to `out`."""
    spoke, lines, failed, example = time.monotonic(), done, 0, ""
    items = itertools.islice(examples(source, 1.0), done, None)
    with out.open("ab") as file:
        while chunk := list(itertools.islice(items, CHUNK)):
            found = list(_answered(predictor, params, chunk))
            bad = [line["error"] for line in found if "error" in line]
            failed, example = failed + len(bad), example or next(iter(bad), "")
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n"
                               for line in found).encode())
            file.flush()
            lines += len(found)
            if time.monotonic() > spoke + SPOKE_EVERY:
                log(f"predict: {lines:,} records")
                spoke = time.monotonic()
    return Counts(lines, lines - done, failed, example)


def _answered(predictor: Predictor, params: Params,
              chunk: list[Example | Broken]) -> Iterator[dict[str, Any]]:
    """A line per record, in order."""
    read: dict[int, Ready] = {}
    errors: dict[int, str] = {}
    for i, item in enumerate(chunk):
        if isinstance(item, Broken):
            errors[i] = item.reason
            continue
        try:
            read[i] = predictor.example(item.record, item.id)
        except UserError as error:
            errors[i] = first_line(error)
    answers = dict(zip(read, predictor.answers(params, list(read.values())), strict=True))
    for i, item in enumerate(chunk):
        record = None if isinstance(item, Broken) else item.record
        line = {"id": item.id, "answer": answers.get(i), "record": record}
        yield line | ({"error": errors[i]} if i in errors else {})
