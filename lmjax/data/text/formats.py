"""The formats of files of records, told by content; and what a file is, in a few words."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

from lmjax.data.text import columns, csvfiles, jsonfiles
from lmjax.data.text.records import MOST_BYTES, Broken, Record
from lmjax.data.text.streams import (
    CHUNK,
    LFS_POINTER,
    compression,
    encoding,
    opened,
    readable,
    refuse_pointers,
    unread,
    utf8,
)
from lmjax.errors import UserError, first_line

_DELIMITERS = {"csv": ",;\t|", "tsv": "\t"}
# What the end of a file's name says of its format, where its content does not.
_SUFFIXES = {"csv": "csv", "tsv": "tsv", "json": "json", "jsonl": "json", "ndjson": "json"}


@dataclass(frozen=True)
class CorpusFile:
    """What a file of text or records is, by its content."""

    format: str                   # text, json, csv, tsv, parquet, arrow, or what else it is
    compression: tuple[str, ...]  # from the outside inwards
    encoding: str                 # utf-8, utf-16-le, ...; "" for Parquet and Arrow
    records: int                  # number of records looked at
    broken: int                   # number of those without a text
    problem: str                  # why it cannot be read, or the first broken record; "" if whole


def format_of(head: bytes) -> str:
    """Returns the format that a file's first bytes show, "" for text."""
    if head[:4] in (b"PAR1", b"PARE"):
        return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff" and head[8:9] == b"\x10":
        return "arrow"
    return unread(head)


def read_records(name: str, path: str, field: str, kind: str) -> Iterator[Record]:
    """The records of a file.

    Args:
      name: the file's part of the ids.
      path: of the file.
      field: the key or column of the text.
      kind: json, csv or tsv: how to read text. Parquet and Arrow are told by their content.
    Raises:
      UserError: the file is damaged, or of another format.
    """
    with opened(path) as file:
        head = file.head
        found = format_of(head)
        if found == "parquet":
            yield from columns.read_parquet(name, path, file.stream if file.compression else None,
                                            field)
        elif found == "arrow":
            yield from columns.read_arrow(name, path, file.stream, field)
        elif found:
            raise UserError("a file of records", f"{found} in {path}", "unpack or convert it")
        elif kind == "parquet" or kind == "arrow":
            start = head[:20].decode(errors="backslashreplace")
            raise UserError(f"a whole {kind.capitalize()} file", f"{start!r}... in {path}",
                            "fetch it again, or write jsonl: or csv: in the uri")
        else:
            yield from _read_text(name, path, utf8(file.stream), field, kind)


def _read_text(name: str, path: str, stream: io.BufferedReader, field: str,
               kind: str) -> Iterator[Record]:
    head = stream.peek(CHUNK)
    if (start := head[:200].lstrip().lower()).startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("a file of records", f"a web page in {path} "
                        f"({start[:40].decode(errors='replace')!r}...)", "fetch it again")
    if kind in _DELIMITERS:
        if head.lstrip()[:1] in (b"{", b"[") and jsonfiles.is_json(head):
            raise UserError(f"a {kind.upper()} file", f"JSON in {path}", "write jsonl: in the uri")
        yield from csvfiles.read_csv(name, path, stream, field, _DELIMITERS[kind])
    else:
        yield from jsonfiles.read_json(name, path, stream, field)


def read_text(name: str, path: str) -> Iterator[Record]:
    """A file as one document; what is no text is broken."""
    with readable(path):
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    head = data[:CHUNK]
    if compression(head, path):
        with opened(path) as unpacked:
            data = unpacked.stream.read(MOST_BYTES + 1)
            size = len(data)
        head = data[:CHUNK]
    if head.startswith(LFS_POINTER):
        refuse_pointers(head, path)
    start = data[:200].decode(errors="backslashreplace")
    if found := format_of(head):
        if found in ("parquet", "arrow"):
            raise UserError("text", f"a file of {found.capitalize()} in {path}",
                            f"write {found}: in the uri")
        yield name, Broken("", f"no text: {found}", start, size)
    elif len(data) > MOST_BYTES:
        yield name, Broken("", f"more than {MOST_BYTES:,} bytes", start, size)
    elif encoding(head) == "utf-8":
        yield name, data.removeprefix(b"\xef\xbb\xbf")
    else:
        try:
            yield name, data.decode(encoding(head)).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            yield name, Broken("", f"no {encoding(head)}: {error.reason}", start, size)


def describe_file(path: str, field: str = "text", limit: int = 1000) -> CorpusFile:
    """Tells what a file of a corpus is, and whether it reads.

    Args:
      path: of the file.
      field: the key or column of the text.
      limit: the most records that are looked at.
    """
    kinds: tuple[str, ...] = ()
    form, code, seen, broken, problem = "", "", 0, 0, ""
    try:
        with opened(path) as file:
            kinds, head = file.compression, file.head
        form = format_of(head)
        code = "" if form else encoding(head)
        name = os.path.basename(path)
        suffixes = name.lower().split(".")[1:]
        plain = head.decode(code or "latin-1", errors="replace").lstrip("\ufeff \t\r\n")
        if not form:
            form = next((_SUFFIXES[suffix] for suffix in suffixes if suffix in _SUFFIXES), "text")
            if plain[:1] in ("{", "[") and form == "text":
                form = "json"
        records = read_text(name, path) if form == "text" else (
            read_records(name, path, field, form))
        for where, record in records:
            seen += 1
            if isinstance(record, Broken):
                broken += 1
                problem = problem or f"{where}: {record.reason}"
            if seen == limit:
                break
    except UserError as error:
        problem = first_line(error)
    return CorpusFile(form, kinds, code, seen, broken, problem)
