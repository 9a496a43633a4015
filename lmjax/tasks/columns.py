"""Columns of examples: named arrays per example, spooled to disk and written as token stores."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lmjax.data import store

FLOATS = ("values", "label_values")  # columns of float32, which are stored by their bits


class ColumnWriter:
    """Collects examples on disk and writes each column as a token store.

    All examples have the same columns. Use it as a context: it removes its temporary files.

    Attributes:
      ids: the names of the examples so far.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._spools: dict[str, _Spool] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, columns: Mapping[str, np.ndarray]) -> None:
        """Adds an example: a 1-D array of integers per column, or of float32 for `FLOATS`."""
        if not self._spools:
            self._spools = {column: self._stack.enter_context(_Spool()) for column in columns}
        assert set(columns) == set(self._spools), (name, list(columns), list(self._spools))
        self.ids.append(name.replace("\n", "\\n"))
        for column, values in columns.items():
            bits = column in FLOATS
            self._spools[column].add(np.asarray(values, np.float32).view(np.uint32) if bits
                                     else np.asarray(values))

    def most(self, column: str) -> int | None:
        """The largest number in a column of integers so far; None without the column."""
        return self._spools[column].most if column in self._spools else None

    def write(self, directory: str, place: str) -> dict[str, Any]:
        """Writes directory/place/COLUMN of every column; returns the entries of the manifest."""
        found = {}
        for i, (column, spool) in enumerate(self._spools.items()):
            size = 1 << 32 if column in FLOATS else spool.most + 1
            found[column] = store.write_split(
                directory, place, column, spool.arrays(), self.ids if i == 0 else [],
                vocab_size=size, text_bytes=0, lengths=spool.lengths)
        return found


class _Spool:
    """Arrays of integers of at most 32 bits, one after the other in a temporary file."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.most = 0
        self._file = tempfile.TemporaryFile()

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, values: np.ndarray) -> None:
        assert not len(values) or values.min() >= 0, values
        self.lengths.append(len(values))
        self.most = max(self.most, int(values.max(initial=0)))
        self._file.write(values.astype(np.uint32).tobytes())

    def arrays(self) -> Iterator[np.ndarray]:
        """The arrays, in order."""
        self._file.seek(0)
        for length in self.lengths:
            yield np.frombuffer(self._file.read(4 * length), np.uint32)
