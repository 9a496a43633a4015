"""Records of CSV and TSV files: a header, then a record per row, whose fields may hold newlines."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from typing import Any

from lmjax.data.text.records import MOST_BYTES, Broken, Record, broken_line, text_of
from lmjax.data.text.streams import CHUNK, lines
from lmjax.errors import UserError

csv.field_size_limit(MOST_BYTES // 4)
_QUOTED: dict[str, Any] = dict(strict=True)
_ESCAPED = dict(strict=True, doublequote=False, escapechar="\\")
_PLAIN = dict(quoting=csv.QUOTE_NONE)


def read_csv(name: str, path: str, stream: io.BufferedReader, field: str,
             delimiters: str = ",;\t|") -> Iterator[Record]:
    """The records of a file; the id has the number of the row after the header.

    Raises:
      UserError: the header has no such field, or has it twice; or `field` is "", and two columns
        have one name.
    """
    options, header, number = dialect(stream.peek(CHUNK), delimiters), None, 0
    for row in _rows(stream, options):
        if header is None:
            header = row
            got = row.reason if isinstance(row, Broken) else row
            if not field and (isinstance(row, Broken) or len(set(row)) < len(row)):
                raise UserError("a header of different columns", f"{got} in {path}", "mend it")
            if field and (isinstance(row, Broken) or row.count(field) != 1):
                raise UserError(f"one column {field!r} in the header", f"{got} in {path}",
                                "set text_field")
            continue
        number += 1
        if not isinstance(row, Broken) and len(row) != len(header):
            row = Broken("", f"{len(row)} fields where the header has {len(header)}",
                         ascii(row)[:200])
        text = row if isinstance(row, Broken) else text_of(
            dict(zip(header, row, strict=True)), field)
        yield f"{name}:{number}", text


def dialect(head: bytes, delimiters: str) -> dict[str, Any]:
    """Chooses delimiter and quoting: those with which the beginning of a file reads best."""
    sample = head.decode(errors="surrogateescape").splitlines(keepends=True)[:200]
    delimiter = max(delimiters, key=sample[0].count) if sample else ","
    ways = [_QUOTED, *([_PLAIN] if delimiter == "\t" else []),
            *([_ESCAPED] if b'\\"' in head else [])]  # which Python never finds fault with
    return {"delimiter": delimiter} | max(ways, key=lambda way: _agreement(sample, way, delimiter))


def _agreement(sample: list[str], way: dict[str, Any], delimiter: str) -> int:
    """How many lines are in rows with as many fields as the header, before the first error."""
    reader, good, width = csv.reader(iter(sample), delimiter=delimiter, **way), 0, 0
    try:
        for row in reader:
            width = width or len(row)
            if row and len(row) != width:
                break
            good = reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error) and len(sample) == 200:
            good += 1  # the sample ends within a field
    return good


def _rows(stream: io.BufferedReader, options: dict[str, Any]) -> Iterator[list[str] | Broken]:
    """Rows; a broken one is a single line, after which reading goes on with the next line."""
    source, again, taken = lines(stream), deque[bytes](), list[bytes]()

    def feed() -> Iterator[str]:
        while True:
            line = again.popleft() if again else None
            if line is None:
                line, size = next(source, (None, 0))
                if line is None:
                    return
                if size > MOST_BYTES:
                    raise csv.Error(f"{size:,} bytes in one line")
            taken.append(line)
            yield line.decode(errors="surrogateescape") + "\n"

    width = 0
    while True:
        reader = csv.reader(feed(), **options)  # a new one after each error
        try:
            for row in reader:
                if row and width and len(row) != width and len(taken) > 1:
                    raise csv.Error(f"{len(row)} fields in {len(taken)} lines")
                width = width or len(row)
                taken.clear()
                if row:
                    yield row
            return
        except csv.Error as error:
            first = taken[0] if taken else b""
            again.extendleft(reversed(taken[1:]))
            taken.clear()
            yield broken_line(f"no CSV: {error}", first)
