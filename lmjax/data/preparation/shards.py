"""Shards of documents: Arrow files with one record batch each, compressed with zstd.

The same documents always give the same bytes.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

SHARD_BYTES = 8 << 20  # of text per shard; a longer document has a shard of its own
SAMPLES = 12  # examples kept per rule
EXCERPT = 600  # characters kept per example


class Shard(NamedTuple):
    """A file of consecutive documents of one source.

    The documents of a corpus are numbered from shard to shard. Records refer to documents by this
    number.
    """

    path: str
    source: str  # name of the source
    first: int  # number of the first document
    documents: int

    @property
    def end(self) -> int:
        """The number of the last document, plus one."""
        return self.first + self.documents

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def write(path: str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Writes columns of equal length; `id`, `text` and `language` are strings."""
    types = {name: pa.string() for name in ("id", "text", "language")}
    arrays = [pa.array(values, types.get(name)) for name, values in columns.items()]
    batch = pa.record_batch(arrays, names=list(columns))
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, batch.schema, options=options) as out:
        out.write_batch(batch)


def read(path: str, columns: Sequence[str] = ()) -> pa.RecordBatch:
    """Reads columns of a shard, by default all; other columns are not decompressed."""
    with pa.memory_map(path) as file:
        schema = pa.ipc.open_file(file).schema
        options = pa.ipc.IpcReadOptions(use_threads=False)
        if columns:
            options.included_fields = [schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(file, options=options).get_batch(0)


def texts(shard: Shard) -> list[str]:
    """Returns the texts of the documents."""
    return read(shard.path, ["text"]).column(0).to_pylist()


def raw_texts(shard: Shard) -> list[memoryview]:
    """Returns the texts of the documents as UTF-8 bytes, without copying them."""
    column = read(shard.path, ["text"]).column(0)
    _, offsets, data = column.buffers()
    at = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    return [view[a:b] for a, b in zip(at[:-1], at[1:], strict=True)]


def shard_of(shards: Sequence[Shard], document: int) -> int:
    """Returns the index of the shard that holds the document with this number."""
    return bisect.bisect_right(shards, document, key=lambda shard: shard.first) - 1


class Samples:
    """Keeps a few examples per rule, those with the lowest hashes, whatever order they come in."""

    def __init__(self, samples: Mapping[str, Sequence[Sequence[Any]]] | None = None):
        self.kept: dict[str, list] = {rule: list(kept) for rule, kept in (samples or {}).items()}

    def add(self, rule: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Offers an example of a rule. `make` returns its fields; only a kept one calls it."""
        rank = hashlib.sha256(f"{rule}\0{name}".encode()).hexdigest()[:16]
        kept = self.kept.setdefault(rule, [])
        if len(kept) < SAMPLES or rank < kept[-1][0]:
            kept.append([rank, {"id": name} | make()])
            kept.sort(key=lambda item: item[0])
            del kept[SAMPLES:]

    def merge(self, other: Samples) -> None:
        """Offers all examples of another collection."""
        for rule, values in other.kept.items():
            mine = self.kept.setdefault(rule, [])
            mine += values
            mine.sort(key=lambda item: item[0])
            del mine[SAMPLES:]

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the examples per rule, without their hashes."""
        return {rule: [value for _, value in values] for rule, values in sorted(self.kept.items())}


def excerpt(text: str) -> str:
    """Returns the beginning of a text, at most `EXCERPT` characters."""
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}\u2026"
