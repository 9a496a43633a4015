"""Shards of documents: Arrow files of one record batch, zstd inside; the same bytes for the same documents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

SHARD_BYTES = 8 << 20  # of text in a shard; a longer document is one by itself
SAMPLES = 12  # examples that are kept of what each rule removed
EXCERPT = 600  # characters of each


class Shard(NamedTuple):
    """Where documents lie: their file, their source, and the number of the first (they count on from shard to shard).

    That number is of the run of the whole corpus: documents are known by it wherever records are grouped.
    """

    path: str
    source: str
    first: int
    documents: int

    @property
    def end(self) -> int:
        return self.first + self.documents

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def write(path: str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Writes columns of one length; `id` and `text` are strings."""
    arrays = [pa.array(v, pa.string()) if k in ("id", "text", "language") else pa.array(v) for k, v in columns.items()]
    batch = pa.record_batch(arrays, names=list(columns))
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, batch.schema, options=options) as out:
        out.write_batch(batch)


def read(path: str, columns: Sequence[str] = ()) -> pa.RecordBatch:
    """The columns of a shard, all by default; only those are decompressed."""
    with pa.memory_map(path) as file:
        schema = pa.ipc.open_file(file).schema
        options = pa.ipc.IpcReadOptions(use_threads=False)
        if columns:
            options.included_fields = [schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(file, options=options).get_batch(0)


def texts(shard: Shard) -> list[str]:
    return read(shard.path, ["text"]).column(0).to_pylist()


def raw_texts(shard: Shard) -> list[memoryview]:
    """The documents' UTF-8 bytes, not copied."""
    column = read(shard.path, ["text"]).column(0)
    _, offsets, data = column.buffers()
    at = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    return [view[a:b] for a, b in zip(at[:-1], at[1:], strict=True)]


class Samples:
    """Keeps the same few of any number of things in whatever order they come: those whose ids hash lowest."""

    def __init__(self, samples: Mapping[str, Sequence[Sequence[Any]]] | None = None):
        self.kept: dict[str, list] = {rule: list(values) for rule, values in (samples or {}).items()}

    def add(self, rule: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Offers an example of a rule; `make` gives what is kept of it, and is called only if it is kept."""
        rank = hashlib.sha256(f"{rule}\0{name}".encode()).hexdigest()[:16]
        kept = self.kept.setdefault(rule, [])
        if len(kept) < SAMPLES or rank < kept[-1][0]:
            kept.append([rank, {"id": name} | make()])
            kept.sort(key=lambda item: item[0])
            del kept[SAMPLES:]

    def merge(self, other: Samples) -> None:
        for rule, values in other.kept.items():
            mine = self.kept.setdefault(rule, [])
            mine += values
            mine.sort(key=lambda item: item[0])
            del mine[SAMPLES:]

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        return {rule: [value for _, value in values] for rule, values in sorted(self.kept.items())}


def excerpt(text: str) -> str:
    """The beginning of a text, short enough to look at."""
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}\u2026"
