"""Where text comes from: the documents of a source, whatever its files are.

A source is named by a URI, `scheme:rest`; the table `SCHEMES` has all schemes. Nothing is dropped
silently: a broken record comes out as `Broken`, named by its file and line, and a file that ends
too early is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.config import PathText, paths
from lmjax.data.text import formats, listing
from lmjax.data.text.listing import Files
from lmjax.data.text.records import Broken, Document, Record, text_of
from lmjax.data.text.streams import readable
from lmjax.errors import UserError, masked


@dataclass(frozen=True)
class SourceConfig:
    """One source of text."""

    name: str  # of its directory in the prepared data; letters, digits, '.', '_' and '-'
    # builtin:python-stdlib | text:GLOB | jsonl:GLOB | csv:GLOB | tsv:GLOB | parquet:GLOB |
    # arrow:GLOB | tfds:NAME[#SPLIT], where NAME is a dataset or its directory | synthetic[:ROWS].
    # `**` in a GLOB descends into directories. Files may be compressed (docs/data.md).
    uri: str
    weight: float = 1.0       # its share of the training rows, relative to the other sources
    # The column or key that holds the text; `a.b`: the key b of a. Tasks read whole records.
    text_field: str = "text"
    data_dir: PathText = ""   # where TensorFlow Datasets keeps its data; "": its own default
    # Of a task: COLUMN=VALUE reads only the records with this value, as "split=test"; "": all.
    where: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name):
            raise UserError("letters, digits, '.', '_' or '-'", repr(self.name), "rename it",
                            where="name")
        if not self.weight > 0:
            raise UserError("more than 0", self.weight, "raise it or drop the source",
                            where="weight")
        column, equals, _ = self.where.partition("=")
        if self.where and not (column and equals):
            raise UserError("COLUMN=VALUE, such as split=test", repr(self.where), "correct it",
                            where="where")
        if masked(self.uri) != self.uri:  # it would be written into the records of the data
            raise UserError("an address without credentials", self.uri, "leave them out",
                            where="uri")
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


def units(source: SourceConfig, size: int) -> list[list[tuple[str, str]]]:
    """Groups the (id, path) pairs of a source's files into units of work.

    A unit has up to `size` bytes, or is one file.

    Raises:
      UserError: the source has no file.
    """
    scheme, _, rest = source.uri.partition(":")
    out: list[list[tuple[str, str]]] = []
    room = 0
    with _named(source):
        files = SCHEMES[scheme].files(rest, source)
    for name, path in files:
        length = os.path.getsize(path) if os.path.isfile(path) else size
        if not out or length > room:
            out.append([])
            room = size
        out[-1].append((name, path))
        room -= length
    return out


def read(source: SourceConfig, files: Sequence[tuple[str, str]],
         budget: float = 1.0) -> Iterator[Document | Broken]:
    """The documents and the broken records of some files of a source.

    Args:
      source: that the files belong to.
      files: (id, path) of each.
      budget: the share of a file of records that may be broken. One broken record never is too
        many in a file that has others.
    Raises (while iterating):
      UserError: a file cannot be read to its end, has no text field or too many broken records.
    """
    scheme = SCHEMES[source.uri.partition(":")[0]]
    if source.where and source.text_field:
        raise _problem(source, '"" where texts are read', f"where={source.where!r}",
                       "leave it out; it chooses records of a task")
    for name, path in files:
        texts = broken = size = lost = 0
        example = ("", "")
        with _named(source):
            for where, raw in scheme.read(name, path, source):
                item = _item(where.replace("\n", "\\n"), raw)
                if isinstance(item, Broken):
                    example = example if broken else (item.id, item.reason)
                    broken, lost = broken + 1, lost + item.size
                else:
                    texts, size = texts + 1, size + _bytes_of(item.data)
                yield item
            if broken and not scheme.whole:
                share = _share((texts, size), (broken, lost))
                if share > budget and (broken > 1 or share > 0.5):
                    raise _too_many(f" in {path}", texts + broken, broken, example, budget)


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _item(where: str, raw: str | bytes | Broken) -> Document | Broken:
    if isinstance(raw, Broken):
        return raw._replace(id=where)
    try:
        return Document(where, raw.decode() if isinstance(raw, bytes) else _encodable(raw))
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        start = raw[:200]
        if isinstance(start, str):
            start = start.encode(errors="surrogatepass")
        return Broken(where, f"no UTF-8: {error.reason}", start.decode(errors="backslashreplace"),
                      len(raw))


def check_budget(source: SourceConfig, *, documents: int, broken: int, example: Sequence[str],
                 budget: float, size: int = 0, lost: int = 0) -> None:
    """Raises a UserError if a source has no records, or too large a share of broken ones.

    Args:
      source: where the records come from.
      documents: number of its documents.
      broken: number of its broken records.
      example: id and reason of one broken record, if there is one.
      budget: the share of broken records, and of lost bytes, that is allowed.
      size: bytes of its documents.
      lost: bytes of its broken records, as far as they are counted.
    """
    with _named(source):
        if not documents + broken:
            raise UserError("at least one document", "none", "correct the uri")
        if _share((documents, size), (broken, lost)) > budget:
            raise _too_many("", documents + broken, broken, example, budget)


def _share(kept: tuple[int, int], broken: tuple[int, int]) -> float:
    """The larger share that is broken: of records or of bytes."""
    return max(lost / max(lost + rest, 1) for rest, lost in zip(kept, broken, strict=True))


def _too_many(where: str, total: int, broken: int, example: Sequence[str],
              budget: float) -> UserError:
    return UserError(f"at most {budget:.1%} of broken records",
                     f"{broken} of {total} (such as {example[0]}: {example[1]})",
                     "set text_field, " * ("(it has [" in example[1])
                     + f"repair them{where}, or raise data.broken_budget")


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


@contextlib.contextmanager
def _named(source: SourceConfig) -> Iterator[None]:
    """Names the source in a `UserError` about one of its files."""
    try:
        yield
    except UserError as error:
        if error.where:
            raise
        raise _problem(source, error.expected, str(error.got), error.fix) from error


def _matching(rest: str, source: SourceConfig) -> Files:
    return listing.matching(paths.expand(rest, f"source {source.name}", bucket=False))


def _stdlib(rest: str, source: SourceConfig) -> Files:
    return listing.stdlib(rest)


def _as_it_is(name: str, path: str, source: SourceConfig) -> Iterator[Record]:
    with readable(path):
        data = Path(path).read_bytes()
    yield name, data


def _text(name: str, path: str, source: SourceConfig) -> Iterator[Record]:
    return formats.read_text(name, path)


def _records(kind: str) -> Callable[[str, str, SourceConfig], Iterator[Record]]:
    return lambda name, path, source: formats.read_records(name, path, source.text_field, kind)


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


def _tfds_files(rest: str, source: SourceConfig) -> Files:
    builder, _ = _tfds_builder(rest, source)
    return [(rest, str(builder.data_dir))]


def _tfds(name: str, path: str, source: SourceConfig) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    builder, split = _tfds_builder(name, source)
    # The same order every time.
    in_order = tfds.ReadConfig(interleave_cycle_length=1, shuffle_seed=None)
    records = builder.as_dataset(split=split, shuffle_files=False, read_config=in_order)
    for i, record in enumerate(tfds.as_numpy(records)):
        yield f"{split}:{i}", text_of(record, source.text_field)


class Scheme(NamedTuple):
    """How to list the files of a source, (id, path) each, and how to read the records of a file."""

    files: Callable[[str, SourceConfig], Files]
    read: Callable[[str, str, SourceConfig], Iterator[Record]]
    whole: bool = False  # a file is one record


SCHEMES: dict[str, Scheme] = {
    "builtin": Scheme(_stdlib, _as_it_is, whole=True),
    "text": Scheme(_matching, _text, whole=True),
    "jsonl": Scheme(_matching, _records("json")),
    "csv": Scheme(_matching, _records("csv")),
    "tsv": Scheme(_matching, _records("tsv")),
    "parquet": Scheme(_matching, _records("parquet")),
    "arrow": Scheme(_matching, _records("arrow")),
    "tfds": Scheme(_tfds_files, _tfds),
}
