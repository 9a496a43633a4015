"""JSON-lines files that survive a kill: appended line by line, cut back when a run resumes."""

from __future__ import annotations

import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax.errors import UserError
from lmjax.runtime.files import write_whole


def _json_value(value: Any) -> Any:
    """Turns NumPy and JAX scalars into Python ones.

    A float becomes the shortest decimal that reads back to the same bits. JSON has no NaN and no
    infinities, so these become strings.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
        return number if math.isfinite(number) else str(number)


def _encode(record: Mapping[str, Any]) -> bytes:
    values = {key: _json_value(value) for key, value in record.items()}
    text = json.dumps(values, allow_nan=False, ensure_ascii=False)
    return text.encode("utf-8", "replace") + b"\n"  # UTF-8 has no lone surrogates: they become "?"


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file; none if there is no file.

    A last line without its end is left out: a kill has cut it off.

    Raises:
      UserError: a whole line is not a JSON object with a step.
    """
    return (record for _, record in _whole_lines(Path(path)))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each complete line of the file with its object."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError("a JSON object with a step", repr(line[:60]),
                                "remove that line, or move the file away",
                                where=f"{path}, line {number}")
            yield line, record


def _truncate(path: Path, last_step: float) -> Counter[bytes]:
    """Removes the lines after `last_step` from the file, and returns the lines of `last_step`."""
    kept = [(line, record) for line, record in _whole_lines(path) if record["step"] <= last_step]
    content = b"".join(line for line, _ in kept)
    if path.exists() and path.stat().st_size != len(content):
        write_whole(path, content)
    return Counter(line for line, record in kept if record["step"] == last_step)


class Appender:
    """Appends lines to a file. A line survives a kill as soon as it is appended.

    Args:
      path: the file; None on processes that write nothing.
      last_step: the step that the run resumes from. Lines of later steps are removed.
    """

    def __init__(self, path: Path | None, last_step: float = math.inf):
        # A run that resumes at a step may log this step again: the same line is not added twice.
        self._seen = _truncate(path, last_step) if path else Counter[bytes]()
        self._path, self._file = path, path.open("ab") if path else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line, unless the file had the same line of `last_step` before."""
        if self._file is None:
            return
        line = _encode(record)
        if self._seen[line]:
            self._seen[line] -= 1
        else:
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Returns when every line is on the disk, safe from a power cut.

        Raises:
          FileNotFoundError: the file is no longer where it was made.
        """
        if self._file:
            os.fsync(self._file.fileno())
            assert self._path is not None
            if not (self._path.exists() and os.path.samestat(
                    os.fstat(self._file.fileno()), self._path.stat())):
                raise FileNotFoundError(
                    f"{self._path}: expected the file that this run writes, got another or none; "
                    "bring the directory or its mount back and run the same command again")

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
