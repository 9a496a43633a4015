"""Records of JSON files: one per line, or values of any layout (arrays, pretty-printed, joined)."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from lmjax.data.text.records import MOST_BYTES, Broken, Record, broken_line, text_of, value_of
from lmjax.data.text.streams import CHUNK, lines
from lmjax.errors import UserError, first_line

_SPACE = re.compile(r"[ \t\n\r]*")
Value = tuple[int, Any]  # a record's number, and what was read or a `Broken`


def read_json(name: str, path: str, stream: io.BufferedReader, field: str) -> Iterator[Record]:
    """The records of a file of JSON; in a file of lines the id has the number of the line.

    Raises:
      UserError: JSON that is not written in lines is damaged.
    """
    found = _by_line(stream) if written_in_lines(stream.peek(CHUNK)) else _values(stream, path)
    first, second = next(found, None), next(found, None)
    if first is not None and second is None:
        found = iter(_only_list(first, field))
    else:
        found = itertools.chain([v for v in (first, second) if v is not None], found)
    for number, value in found:
        text = value if isinstance(value, Broken) else text_of(value, field)
        yield f"{name}:{number}", text


def written_in_lines(head: bytes) -> bool:
    """Whether a file of JSON, by its beginning, has one record per line."""
    end = b"\r" if b"\r" in head[:-1] and b"\n" not in head else b"\n"
    whole = [line for line in head.split(end) if line.strip()]
    if len(whole) < 2 and not head.lstrip().startswith(b"["):
        return True  # a single record, whose end may not be in sight
    parsed = [_parse(line) for line in whole[:100]]
    records = [isinstance(value, dict) for value in parsed]
    if not isinstance(parsed[0] if parsed else None, Broken):
        return not isinstance(parsed[0], list) or any(records[1:])
    return 2 * sum(records) > len(records) or head.lstrip()[:1] not in (b"[", b"{")


def _by_line(stream: io.BufferedReader) -> Iterator[Value]:
    for number, (line, size) in enumerate(lines(stream), 1):
        if size > MOST_BYTES:
            yield number, broken_line(f"{size:,} bytes in one line", line, size)
        elif line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    if line.startswith(codecs.BOM_UTF8):  # some tools begin files with it, which are then joined
        line = line[3:]
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return broken_line(f"no UTF-8: {error.reason}", line)
    except (ValueError, RecursionError) as error:
        return broken_line(f"no JSON: {error}", line)


def _only_list(only: Value, field: str) -> Iterator[Value]:
    """The records of a file with a single value: the items of its one list of records, if any."""
    number, value = only
    if field and isinstance(value, dict) and value_of(value, field) is None:
        lists = [item for item in value.values() if isinstance(item, list)
                 and any(isinstance(one, dict) and value_of(one, field) is not None
                         for one in item)]
        if len(lists) == 1:
            yield from enumerate(lists[0], 1)
            return
    yield number, value


def _values(stream: io.BufferedReader, path: str) -> Iterator[Value]:
    """The values of a file one after the other, those in an array each by itself."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, at, ended, number, inside, comma = "", 0, False, 0, False, True
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        token = text[at : at + 1]
        if inside and token == "]":
            inside, at = False, at + 1
            continue
        if inside and token == "," and not comma:
            comma, at = True, at + 1
            continue
        if not inside and token == "[":
            inside, comma, at = True, True, at + 1
            continue
        if token or not ended:
            try:
                if not comma and inside and token:
                    raise ValueError(f"{token!r} instead of a comma")
                value, end = scan(text, at)
                if end < len(text) or ended:
                    at, comma, number = end, False, number + 1
                    yield number, value
                    continue
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError) or len(text) - at > MOST_BYTES:
                    raise UserError("JSON, in lines or whole", f"{first_line(error)} in record "
                                    f"{number + 1} of {path}", "repair it") from error
        if ended:
            break
        block = stream.read(max(CHUNK, len(text) - at))
        text, at, ended = text[at:] + decode(block, not block), 0, not block
    if inside:
        raise UserError("a whole file", f"an array that does not end in {path}", "fetch it again")


def is_json(head: bytes) -> bool:
    """Whether the first line is JSON, or only the beginning of it."""
    first = head.strip().splitlines()[0].strip()
    return first in (b"{", b"[") or not isinstance(_parse(first), Broken)
