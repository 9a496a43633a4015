"""JSONL files that survive a kill: appended line by line, truncated on resume."""

from __future__ import annotations

import json
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmjax.runtime.files import write_whole


def _plain(value: Any) -> Any:
    """Numpy and JAX scalars as Python ones; NaN and infinities as strings, since JSON has no such numbers.

    A float is written as its shortest decimal that reads back to the same bits.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        number = float(value)
        return number if math.isfinite(number) else str(number)


def _line(record: Mapping[str, Any]) -> bytes:
    plain = {key: _plain(value) for key, value in record.items()}
    # A half of a surrogate pair cannot be written as UTF-8; it becomes "?".
    return json.dumps(plain, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; none if there is no file. A torn last line is left out.

    Raises ValueError at a whole line that is not a JSON object with a step.
    """
    return (record for _, record in _whole_lines(Path(path)))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line of the file with the object on it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill in the middle of a write
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}; "
                    "remove that line, or move the file away"
                )
            yield line, record


def _truncate(path: Path, last_step: float) -> Counter[bytes]:
    """Keeps exactly the whole lines with step <= last_step, in one rename. Returns those of last_step."""
    kept = [(line, record) for line, record in _whole_lines(path) if record["step"] <= last_step]
    content = b"".join(line for line, _ in kept)
    if path.exists() and path.stat().st_size != len(content):
        write_whole(path, content)
    return Counter(line for line, record in kept if record["step"] == last_step)


class Appender:
    """Appends whole lines, each given to the system at once: what was appended survives a kill.

    path: None on processes that write nothing.
    """

    def __init__(self, path: Path | None, last_step: float = math.inf):
        # A run resumed at step k may replay what it logged at step k; no line is added twice.
        self._seen = _truncate(path, last_step) if path else Counter[bytes]()
        self._file = path.open("ab") if path else None

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds it, unless it is one of the last step that is there."""
        if self._file is None:
            return
        line = _line(record)
        if self._seen[line]:
            self._seen[line] -= 1
        else:
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Returns once all of it is on the disk."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
