"""What readers of files give: records, one text or one broken record each, and the text in them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

MOST_BYTES = 256 << 20  # of a record; a longer one is broken, so that memory is bounded
_LONG_LINE = 1 << 20    # a broken line beyond this is judged by its bytes too


class Document(NamedTuple):
    """One text of a source."""

    id: str    # its name, the same in every run
    data: str  # the text


class Broken(NamedTuple):
    """A record that gave no document."""

    id: str        # as the document's would be
    reason: str
    raw: str       # the beginning of the record
    size: int = 0  # bytes that are lost with it, where they are known and many


Record = tuple[str, str | bytes | Broken]  # id, and the text


def broken_line(reason: str, line: bytes, size: int = 0) -> Broken:
    """A broken record of a file of lines; `size` is the line's full length if it was cut."""
    size = max(size, len(line))
    return Broken("", reason, line[:200].decode(errors="backslashreplace"),
                  size if size > _LONG_LINE else 0)


def text_of(record: Any, field: str) -> str | bytes | Broken:
    """Returns the text of a record.

    Args:
      record: a dict, as JSON and Arrow have them.
      field: its key. `a.b` also names the key `b` of what is under `a`, unless there is a key
        `a.b`; in a list, it names that key of every item. "" is the whole record, as JSON.
    Returns:
      the text. A list of texts is joined by newlines.
    """
    if not field and isinstance(record, dict):
        return json.dumps(record, ensure_ascii=False, default=_as_json)
    got = value_of(record, field) if isinstance(record, dict) else None
    if isinstance(got, str | bytes):
        return got
    if isinstance(got, list) and got and all(isinstance(item, str) for item in got):
        return "\n".join(got)
    if isinstance(got, list) and got and all(isinstance(item, bytes) for item in got):
        return b"\n".join(got)
    keys = sorted(_keys(record)) if isinstance(record, dict) else type(record).__name__
    if len(keys) > 20 and isinstance(keys, list):
        keys = [*keys[:20], "..."]
    what = "nothing" if got is None else type(got).__name__
    return Broken("", f"{what} under {field!r} (it has {keys})", ascii(record)[:200])


def _keys(record: dict[str, Any]) -> Iterator[str]:
    """The keys of a record; those below a key that has no text itself as a.b."""
    for key, value in record.items():
        below = value[0] if isinstance(value, list) and value else value
        if isinstance(below, dict) and below:
            yield from (f"{key}.{name}" for name in below)
        else:
            yield str(key)


def _as_json(value: Any) -> Any:
    """What JSON can hold of a value that Parquet or TensorFlow Datasets gave."""
    if hasattr(value, "tolist"):  # NumPy's
        return value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)  # dates, decimals


def value_of(record: Any, field: str) -> Any:
    """Returns what a record has under a field (see `text_of`), None if that is missing."""
    if isinstance(record, list):
        found = [value_of(item, field) for item in record]
        return None if None in found else found
    if not isinstance(record, dict):
        return None
    if field in record:
        return record[field]
    head, dot, rest = field.partition(".")
    return value_of(record.get(head), rest) if dot else None
