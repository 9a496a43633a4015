"""Where text comes from: the documents of a source, whatever its files are.

A source is named by a URI, `scheme:rest`; the table `SCHEMES` has all schemes. Nothing is dropped
silently: a broken record comes out as `Broken`, named by its file and line, and a file that ends
too early is an error.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.config import PathText, paths
from lmjax.errors import UserError, first_line

STDLIB_SUFFIXES = {".py", ".txt", ".rst", ".md", ".html", ".c", ".h"}
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One text of a source."""

    id: str    # its name, the same in every run
    data: str  # the text


@dataclass(frozen=True)
class SourceConfig:
    """One source of text."""

    name: str  # of its directory in the prepared data; letters, digits, '.', '_' and '-'
    # builtin:python-stdlib | text:GLOB | jsonl:GLOB (also .gz and .zst) | parquet:GLOB |
    # tfds:NAME[#SPLIT], where NAME is a dataset or its directory | synthetic[:ROWS].
    # `**` in a GLOB descends into directories.
    uri: str
    weight: float = 1.0       # its share of the training rows, relative to the other sources
    text_field: str = "text"  # the column or key that holds the text (jsonl, parquet, tfds)
    data_dir: PathText = ""   # where TensorFlow Datasets keeps its data; "": its own default

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise UserError("letters, digits, '.', '_' or '-'", repr(self.name), "rename it",
                            where="name")
        if not self.weight > 0:
            raise UserError("more than 0", self.weight, "raise it or drop the source",
                            where="weight")
        scheme, _, rest = self.uri.partition(":")
        if is_synthetic(self):
            if rest and not (rest.isdecimal() and int(rest)):
                raise UserError("synthetic or synthetic:ROWS", repr(self.uri), "give a number",
                                where="uri")
        elif scheme not in SCHEMES or not rest:
            known = ", ".join([*(f"{s}:..." for s in SCHEMES), "synthetic"])
            raise UserError(f"one of {known}", repr(self.uri),
                            "put the scheme in front, e.g. text:books/*.txt", where="uri")


def is_synthetic(source: SourceConfig) -> bool:
    """Whether the rows of a source are generated rather than read."""
    return source.uri.partition(":")[0] == "synthetic"


class Broken(NamedTuple):
    """A record that gave no document."""

    id: str      # as the document's would be
    reason: str
    raw: str     # the beginning of the record


def units(source: SourceConfig, size: int) -> list[list[tuple[str, str]]]:
    """Groups the (id, path) pairs of a source's files into units of work.

    A unit has up to `size` bytes, or is one file.

    Raises:
      UserError: the source has no file.
    """
    scheme, _, rest = source.uri.partition(":")
    out: list[list[tuple[str, str]]] = []
    room = 0
    for name, path in SCHEMES[scheme].files(rest, source):
        length = os.path.getsize(path) if os.path.isfile(path) else size
        if not out or length > room:
            out.append([])
            room = size
        out[-1].append((name, path))
        room -= length
    return out


def read(source: SourceConfig, files: Sequence[tuple[str, str]]) -> Iterator[Document | Broken]:
    """The documents and the broken records of some files of a source.

    Raises (while iterating):
      UserError: a file cannot be read to its end, or has no text field.
    """
    scheme = SCHEMES[source.uri.partition(":")[0]]
    for name, path in files:
        for where, raw in scheme.read(name, path, source):
            where = where.replace("\n", "\\n")
            if isinstance(raw, Broken):
                yield raw._replace(id=where)
                continue
            try:
                yield Document(where, raw.decode() if isinstance(raw, bytes) else _encodable(raw))
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                start = raw[:200]
                if isinstance(start, str):
                    start = start.encode(errors="surrogatepass")
                yield Broken(where, f"no UTF-8: {error.reason}",
                             start.decode(errors="backslashreplace"))


def check_budget(source: SourceConfig, *, documents: int, broken: int, example: Sequence[str],
                 budget: float) -> None:
    """Raises a UserError if a source has no records, or too large a share of broken ones.

    Args:
      source: where the records come from.
      documents: number of its documents.
      broken: number of its broken records.
      example: id and reason of one broken record, if there is one.
      budget: the share of broken records that is allowed, `data.broken_budget`.
    """
    total = documents + broken
    if not total:
        raise _problem(source, "at least one document", "none", "correct the uri")
    if broken > budget * total:
        raise _problem(source, f"at most {budget:.1%} of broken records",
                       f"{broken} of {total} (such as {example[0]}: {example[1]})",
                       "repair them, or raise data.broken_budget")


def identity(source: SourceConfig) -> str:
    """A cheap hash of a source's files (names, sizes, times), "" if they cannot be listed."""
    scheme, _, rest = source.uri.partition(":")
    try:
        stats = [(name, os.stat(path)) for name, path in SCHEMES[scheme].files(rest, source)]
    except (ValueError, OSError):
        return ""
    listing = [[name, s.st_size, s.st_mtime_ns] for name, s in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _encodable(text: str) -> str:
    text.encode()  # raises for half a surrogate pair, which a JSON escape may hold
    return text


def _problem(source: SourceConfig, expected: str, got: str, fix: str) -> UserError:
    return UserError(expected, got, fix, where=f"source {source.name} ({source.uri})")


def _glob(pattern: str, source: SourceConfig) -> list[tuple[str, str]]:
    """The files that match, sorted: id (the path after the part without wildcards) and path."""
    pattern = paths.expand(pattern, f"source {source.name}", bucket=False)
    if os.path.isdir(pattern):
        raise _problem(source, "files", f"the directory {pattern}",
                       f"write {pattern.rstrip('/')}/**/*")
    base = pattern if os.path.exists(pattern) else re.split(r"[*?\[]", pattern)[0]
    base = os.path.dirname(base)
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(path for path in found if os.path.isfile(path))
    if not files:
        where = "" if os.path.isdir(base or ".") else f" ({base} does not exist)"
        raise _problem(source, "files that match", f"none{where}",
                       "correct the path or the wildcards")
    return [(_name(os.path.relpath(path, base or ".")), path) for path in files]


def _stdlib(rest: str, source: SourceConfig) -> list[tuple[str, str]]:
    if rest != "python-stdlib":
        raise _problem(source, "builtin:python-stdlib", f"builtin:{rest}", "correct the uri")
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        files += [os.path.join(folder, n) for n in names
                  if os.path.splitext(n)[1] in STDLIB_SUFFIXES]
    return sorted((_name(os.path.relpath(path, root)), path) for path in files)


def _name(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace").replace(os.sep, "/")


def _whole(name: str, path: str, source: SourceConfig) -> Iterator[tuple[str, bytes]]:
    try:
        yield name, Path(path).read_bytes()
    except OSError as error:
        raise _problem(source, "readable files", str(error), "correct its permissions") from error


def _jsonl(name: str, path: str,
           source: SourceConfig) -> Iterator[tuple[str, str | bytes | Broken]]:
    for number, line in enumerate(_lines(path, source), 1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                # -sig: some tools begin files with a byte-order mark.
                yield where, _field(json.loads(line.decode("utf-8-sig")), source)
            except UnicodeDecodeError:
                yield where, line
            except (ValueError, RecursionError) as error:
                yield where, Broken("", f"no JSON: {error}",
                                    line[:200].decode(errors="backslashreplace"))


def _lines(path: str, source: SourceConfig) -> Iterator[bytes]:
    import pyarrow as pa  # its streams notice a truncated .gz or .zst; others just end

    compression = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1])
    try:
        with pa.input_stream(path, compression=compression) as stream:
            yield from io.BufferedReader(stream, 1 << 20)
    except OSError as error:
        raise _problem(source, "a whole file", f"{first_line(error)} in {path}",
                       "fetch it again") from error


def _field(record: Any, source: SourceConfig) -> str | bytes | Broken:
    got = record.get(source.text_field) if isinstance(record, dict) else None
    if isinstance(got, str | bytes):
        return got
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    what = "nothing" if got is None else type(got).__name__
    return Broken("", f"{what} under {source.text_field!r} (it has {keys})", ascii(record)[:200])


def _parquet(name: str, path: str,
             source: SourceConfig) -> Iterator[tuple[str, str | bytes | Broken]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if source.text_field not in table.schema_arrow.names:
                raise _problem(source, f"a column {source.text_field!r}",
                               f"{table.schema_arrow.names} in {path}", "set text_field")
            row = 0
            for batch in table.iter_batches(columns=[source.text_field], batch_size=1024):
                # As bytes, because Parquet does not check that its strings are UTF-8.
                for value in batch.column(0).cast(pa.binary()):
                    yield f"{name}:{row}", _field({source.text_field: value.as_py()}, source)
                    row += 1
    except (OSError, pa.ArrowException) as error:
        raise _problem(source, "a whole Parquet file", f"{first_line(error)} in {path}",
                       "fetch it again, or use a text column") from error


def _tfds_builder(rest: str, source: SourceConfig) -> tuple[Any, str]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise _problem(source, "the package tensorflow-datasets", f"none ({error})",
                       "pip install 'lmjax[tfds]'") from error
    name, _, split = rest.partition("#")
    split = split or "train"
    try:
        name = paths.expand(name, f"source {source.name}")  # a dataset, or its directory
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=source.data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
        raise _problem(source, "a dataset of TensorFlow Datasets", f"{name!r}, not found",
                       "correct the name, or data_dir") from error
    if split not in builder.info.splits:
        raise _problem(source, f"a prepared split {split!r} in {builder.data_dir}",
                       f"{sorted(builder.info.splits)}",
                       "prepare it with `tfds build`, or set data_dir beside the source's uri")
    return builder, split


def _tfds_files(rest: str, source: SourceConfig) -> list[tuple[str, str]]:
    builder, _ = _tfds_builder(rest, source)
    return [(rest, str(builder.data_dir))]


def _tfds(name: str, path: str, source: SourceConfig) -> Iterator[tuple[str, str | bytes | Broken]]:
    import tensorflow_datasets as tfds

    builder, split = _tfds_builder(name, source)
    # The same order every time.
    in_order = tfds.ReadConfig(interleave_cycle_length=1, shuffle_seed=None)
    records = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
    for i, record in enumerate(tfds.as_numpy(records)):
        yield f"{split}:{i}", _field(record, source)


class Scheme(NamedTuple):
    """How to list the files of a source, (id, path) each, and how to read the records of a file."""

    files: Callable[[str, SourceConfig], list[tuple[str, str]]]
    read: Callable[[str, str, SourceConfig], Iterator[tuple[str, str | bytes | Broken]]]


SCHEMES: dict[str, Scheme] = {
    "builtin": Scheme(_stdlib, _whole),
    "text": Scheme(_glob, _whole),
    "jsonl": Scheme(_glob, _jsonl),
    "parquet": Scheme(_glob, _parquet),
    "tfds": Scheme(_tfds_files, _tfds),
}
