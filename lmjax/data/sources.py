"""Where text comes from: one iterator of documents for every kind of source.

A source is named by a URI, `scheme:rest`, and `SCHEMES` is the table of them. Reading counts what it
skips; nothing is dropped in silence, and a broken record is an error that names its file and line.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

STDLIB_SUFFIXES = {".py", ".txt", ".rst", ".md", ".html", ".c", ".h"}
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and a name for it that is stable from run to run."""

    id: str
    data: str


@dataclass(frozen=True)
class SourceConfig:
    """One source of text.

    name: of its directory in the prepared data; letters, digits, '.', '_' and '-'.
    uri: builtin:python-stdlib | text:GLOB | jsonl:GLOB (.gz and .zst too) | parquet:GLOB |
      tfds:NAME[#SPLIT] | synthetic[:ROWS]. `**` in a glob descends into directories.
    weight: its share of the training rows, relative to the other sources.
    text_field: the column or key that holds the text (jsonl, parquet, tfds).
    data_dir: where TensorFlow Datasets keeps its data; "" for its own default.
    """

    name: str
    uri: str
    weight: float = 1.0
    text_field: str = "text"
    data_dir: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: expected letters, digits, '.', '_' or '-', got {self.name!r}; rename it")
        if not self.weight > 0:
            raise ValueError(f"weight: expected more than 0, got {self.weight}; raise it or drop the source")
        scheme, _, rest = self.uri.partition(":")
        if is_synthetic(self):
            if rest and not (rest.isdecimal() and int(rest)):
                raise ValueError(f"uri: expected synthetic or synthetic:ROWS, got {self.uri!r}; "
                                 "give a number")
        elif scheme not in SCHEMES or not rest:
            known = ", ".join([*(f"{s}:..." for s in SCHEMES), "synthetic"])
            raise ValueError(f"uri: expected one of {known}, got {self.uri!r}; put the scheme in front, "
                             "e.g. text:books/*.txt")


def is_synthetic(source: SourceConfig) -> bool:
    return source.uri.partition(":")[0] == "synthetic"


class Reader:
    """Iterates over a source's documents, once; afterwards `read`, `skipped` and `bytes` say what there was.

    Args:
      source: what to read.
      invalid_utf8_budget: share of the documents that may be skipped because they are not UTF-8.
    Raises (while iterating):
      ValueError: nothing there, a broken record, a missing text field, or over the budget.
    """

    def __init__(self, source: SourceConfig, *, invalid_utf8_budget: float = 0.02):
        self.source, self.budget = source, invalid_utf8_budget
        self.read = self.bytes = 0
        self.skipped: list[str] = []  # ids of the documents that are not UTF-8

    def __iter__(self) -> Iterator[Document]:
        scheme, _, rest = self.source.uri.partition(":")
        for name, raw in SCHEMES[scheme].read(rest, self.source):
            name = name.replace("\n", "\\n")
            try:
                data = raw.decode() if isinstance(raw, bytes) else _encodable(raw)
            except UnicodeError:
                self.skipped.append(name)
                continue
            self.read += 1
            self.bytes += len(raw)
            yield Document(name, data)
        total = self.read + len(self.skipped)
        if not total:
            raise _problem(self.source, "at least one document", "none", "correct the uri")
        if len(self.skipped) > self.budget * total:
            raise _problem(self.source, f"at most {self.budget:.1%} of documents that are not UTF-8",
                           f"{len(self.skipped)} of {total} (first: {self.skipped[0]})",
                           "convert them to UTF-8, or raise data.invalid_utf8_budget")


def identity(source: SourceConfig) -> str:
    """A cheap hash of what the source holds now (names, sizes, times), "" where files cannot be listed."""
    scheme, _, rest = source.uri.partition(":")
    if SCHEMES[scheme].files is None:
        return ""
    try:
        stats = [(name, os.stat(path)) for name, path in SCHEMES[scheme].files(rest, source)]
    except (ValueError, OSError):
        return ""
    listing = [[name, s.st_size, s.st_mtime_ns] for name, s in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _encodable(text: str) -> str:
    text.encode()  # a JSON escape may hold half a surrogate pair, which no encoding can
    return text


def _problem(source: SourceConfig, expected: str, got: str, fix: str) -> ValueError:
    return ValueError(f"source {source.name} ({source.uri}): expected {expected}, got {got}; {fix}")


def _glob(pattern: str, source: SourceConfig) -> list[tuple[str, str]]:
    """(id, path) of the files that match: ids are relative to the part without wildcards, in sorted order."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise _problem(source, "files", f"the directory {pattern}", f"write {pattern.rstrip('/')}/**/*")
    base = pattern if os.path.exists(pattern) else re.split(r"[*?\[]", pattern)[0]
    base = os.path.dirname(base)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(path for path in found if os.path.isfile(path))
    if not files:
        where = "" if os.path.isdir(base or ".") else f" ({base} does not exist)"
        raise _problem(source, "files that match", f"none{where}", "correct the path or the wildcards")
    return [(_name(os.path.relpath(path, base or ".")), path) for path in files]


def _stdlib(rest: str, source: SourceConfig) -> list[tuple[str, str]]:
    if rest != "python-stdlib":
        raise _problem(source, "builtin:python-stdlib", f"builtin:{rest}", "correct the uri")
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        files += [os.path.join(folder, n) for n in names if os.path.splitext(n)[1] in STDLIB_SUFFIXES]
    return sorted((_name(os.path.relpath(path, root)), path) for path in files)


def _name(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace").replace(os.sep, "/")


def _whole_files(list_files: Callable) -> Callable:
    def read(rest: str, source: SourceConfig) -> Iterator[tuple[str, bytes]]:
        for name, path in list_files(rest, source):
            try:
                yield name, Path(path).read_bytes()
            except OSError as error:
                raise _problem(source, "readable files", str(error), "correct its permissions") from error

    return read


def _jsonl(rest: str, source: SourceConfig) -> Iterator[tuple[str, str | bytes]]:
    for name, path in _glob(rest, source):
        lines = enumerate(_lines(path, source), 1)
        for number, line in lines:
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError:
                yield where, line
                continue
            except ValueError as error:
                raise _problem(source, "one JSON object a line", f"{error} at {where}",
                               "repair the line") from error
            yield where, _field(record, where, source)


def _lines(path: str, source: SourceConfig) -> Iterator[bytes]:
    import io

    import pyarrow as pa  # its streams notice a truncated .gz and .zst, which others end in silence

    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1])
    try:
        with pa.input_stream(path, compression=compression) as stream:
            yield from io.BufferedReader(stream, 1 << 20)
    except OSError as error:
        raise _problem(source, "a whole file", f"{str(error).splitlines()[0]} in {path}",
                       "fetch it again") from error


def _field(record: Any, where: str, source: SourceConfig) -> str | bytes:
    got = record.get(source.text_field) if isinstance(record, dict) else None
    if not isinstance(got, str | bytes):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        what = "nothing there" if got is None else type(got).__name__
        raise _problem(source, f"text under {source.text_field!r}", f"{what} at {where} (it has {keys})",
                       "set text_field, or repair the record")
    return got


def _parquet(rest: str, source: SourceConfig) -> Iterator[tuple[str, str | bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, path in _glob(rest, source):
        try:
            with pq.ParquetFile(path) as table:
                if source.text_field not in table.schema_arrow.names:
                    raise _problem(source, f"a column {source.text_field!r}",
                                   f"{table.schema_arrow.names} in {path}", "set text_field")
                row = 0
                for batch in table.iter_batches(columns=[source.text_field]):
                    # as bytes: Parquet does not check that its strings are UTF-8
                    for value in batch.column(0).cast(pa.binary()):
                        record = {source.text_field: value.as_py()}
                        yield f"{name}:{row}", _field(record, f"{path}:{row}", source)
                        row += 1
        except (OSError, pa.ArrowException) as error:
            raise _problem(source, "a whole Parquet file", f"{str(error).splitlines()[0]} in {path}",
                           "fetch it again, or use a text column") from error


def _tfds(rest: str, source: SourceConfig) -> Iterator[tuple[str, bytes]]:
    import tensorflow_datasets as tfds

    name, _, split = rest.partition("#")
    split = split or "train"
    try:
        builder = tfds.builder(name, data_dir=source.data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise _problem(source, "a dataset of TensorFlow Datasets", f"{name!r}, not found",
                       "correct the name, or data_dir") from error
    if split not in builder.info.splits:
        raise _problem(source, f"a prepared split {split!r} in {builder.data_dir}",
                       f"{sorted(builder.info.splits)}", "prepare it with `tfds build`, or set data_dir")
    one_by_one = tfds.ReadConfig(interleave_cycle_length=1, shuffle_seed=None)  # the same order every time
    records = builder.as_dataset(split=split, shuffle_files=False, read_config=one_by_one)
    for i, record in enumerate(tfds.as_numpy(records)):
        yield f"{split}:{i}", _field(record, f"{split}:{i}", source)


class Scheme(NamedTuple):
    """How to read a kind of source, and how to list its files where it has some."""

    read: Callable[[str, SourceConfig], Iterator[tuple[str, str | bytes]]]
    files: Callable[[str, SourceConfig], list[tuple[str, str]]] | None = None


SCHEMES: dict[str, Scheme] = {
    "builtin": Scheme(_whole_files(_stdlib), _stdlib),
    "text": Scheme(_whole_files(_glob), _glob),
    "jsonl": Scheme(_jsonl, _glob),
    "parquet": Scheme(_parquet, _glob),
    "tfds": Scheme(_tfds),
}
