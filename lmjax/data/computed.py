"""What a model computed of the training rows: stored once, in the order in which they are used.

    manifest.json  0/  8192/  ...

Each folder is an array with `count` pairs for every position of some rows, from the row of that
number on; rows count in the order of their first use in the run, so that a longer run only adds to
them. A pair is a token id and a float. The ids of a position come first, then its floats: as uint16
and float16, or as uint32 and float32 for a vocabulary over 65,536. The manifest names the folders
that are complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from lmjax.data.hashing import key_of
from lmjax.data.pipeline import Mixture, Split
from lmjax.data.rows import Rows
from lmjax.data.store import SHARD, open_array, token_dtype, write_array
from lmjax.errors import UserError, first_line
from lmjax.runtime.sealed import read_sealed, write_sealed

MANIFEST = "manifest.json"
FIX = "delete the directory, and it is computed again"
Pairs = tuple[np.ndarray, np.ndarray]  # ids and floats of some rows, [rows, length * count]


class ComputedMixture(Mixture):
    """Training rows with two more arrays [B, length * count]; `cover` says which are needed.

    Args:
      split: whose rows are the same in every epoch.
      directory: what is stored; `write` may still have to fill it.
      names: of the arrays with the ids and the floats.
      length: positions of a row that have pairs.
      count: pairs per position.
      fingerprint: names what computes the pairs.
    """

    def __init__(self, split: Mixture, directory: str, names: tuple[str, str], *, length: int,
                 count: int, fingerprint: str):
        super().__init__(split.sources, stages=split.stages, seed=split.seed)
        self.directory, self._names, self._count = directory, names, count
        self._width, self._dtype = length * count, token_dtype(self.vocab_size)
        self.fields = {**self.fields, **dict.fromkeys(names, self._width)}
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {fingerprint}".encode()).hexdigest()
        self.through_tensorflow = split.through_tensorflow
        self._begin = np.cumsum([0, *(source.num_rows for source in self.sources)])
        self._first = np.zeros(0, np.int64)  # the run's row in which each is used first
        self._slot = np.full(self._begin[-1], -1, np.int64)  # its place in that order
        self._parts: list[ts.TensorStore] = []  # the array of each folder

    def cover(self, rows: int) -> None:
        """Makes the first `rows` rows of the run those that are needed.

        The folders are opened again when the next row is read: `write` may add some until then.
        """
        self._parts = []
        used = self._number(np.arange(rows))
        _, first = np.unique(used, return_index=True)
        self._first = np.sort(first)
        self._slot[used[self._first]] = np.arange(len(first))

    def rows(self, g: np.ndarray) -> Rows:
        """The arrays of the rows numbered `g` (int64 [n]), in that order."""
        g = np.asarray(g, np.int64)
        pairs = self._read(self._slot[self._number(g)]).reshape(len(g), -1, 2, self._count)
        floats = np.ascontiguousarray(pairs[:, :, 1]).view(_float(self._dtype))
        new = (pairs[:, :, 0].astype(np.int32), floats.astype(np.float32))
        return {**super().rows(g), **{name: x.reshape(len(g), -1)
                                      for name, x in zip(self._names, new, strict=True)}}

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return int(self._manifest["stops"][-1]) if self._manifest["stops"] else 0

    def missing(self, stored: int) -> Split:
        """The rows that are to be computed after the first `stored` ones, in order."""
        return _Chosen(self, self._first[stored:])

    def write(self, parts: Iterable[Pairs], stored: int, about: dict[str, Any]) -> None:
        """Stores the pairs of the rows that are `missing(stored)`.

        Args:
          parts: pairs of consecutive rows.
          stored: how many rows are stored.
          about: what the manifest says besides.

        Raises:
          UserError: another process stores in the directory, too.
        """
        most = max(1, SHARD // (2 * self._width))
        held: list[np.ndarray] = []
        for ids, floats in parts:
            both = np.stack([
                ids.reshape(len(ids), -1, self._count).astype(self._dtype),
                floats.reshape(len(ids), -1, self._count).astype(
                    _float(self._dtype)).view(self._dtype)], axis=2)
            held += list(both.reshape(len(ids), -1))
            while len(held) >= most:
                self._add(held[:most], stored, about)
                held, stored = held[most:], stored + most
        if held:
            self._add(held, stored, about)

    def _add(self, rows: list[np.ndarray], begin: int, about: dict[str, Any]) -> None:
        """Writes one folder, and then the manifest."""
        found = self._manifest
        if self.stored != begin:
            raise UserError(f"{begin:,} stored rows, as there were",
                            f"{self.stored:,}: another run stores there, too",
                            "start this one again when that is done", where=self.directory)
        digest = write_array(f"{self.directory}/{begin}", rows,
                             size=2 * self._width * len(rows), dtype=self._dtype)
        made = {**about, "stops": [*found["stops"], begin + len(rows)],
                "sha256": [*found["sha256"], digest]}
        write_sealed(epath.Path(self.directory) / MANIFEST, made)

    @property
    def _manifest(self) -> dict[str, Any]:
        path = epath.Path(self.directory) / MANIFEST
        return read_sealed(path, FIX) if path.exists() else {"stops": [], "sha256": []}

    def _number(self, g: np.ndarray) -> np.ndarray:
        """The packed rows of the run's rows `g`, counted through all sources."""
        source, _, row = self.locate(g)
        return self._begin[source] + row

    def _read(self, slots: np.ndarray) -> np.ndarray:
        """The stored values of these rows, [n, 2 * width]."""
        each = 2 * self._width
        if not self._parts:  # all of them: `write` is done
            self._begins = np.array([0, *self._manifest["stops"][:-1]])
            self._parts = self._opened()
        try:
            with ts.Batch() as batch:
                pending = []
                for slot in slots:
                    part = np.searchsorted(self._begins, slot, side="right") - 1
                    at = int(slot - self._begins[part]) * each
                    pending.append(self._parts[part][at : at + each].read(batch=batch))
            return np.stack([p.result() for p in pending])
        except ValueError as error:
            raise UserError("what was stored of the rows", first_line(error),
                            FIX, where=self.directory) from error


    def _opened(self) -> list[ts.TensorStore]:
        """Opens the arrays of all folders.

        Raises:
          UserError: one of them cannot be read, or has another size.
        """
        parts = []
        for begin, end in zip(self._begins.tolist(), self._manifest["stops"], strict=True):
            where, size = f"{self.directory}/{begin}", 2 * self._width * (end - begin)
            try:
                parts.append(open_array(where))
            except ValueError as error:
                raise UserError(f"an array of {size} values", first_line(error), FIX,
                                where=where) from error
            if parts[-1].shape != (size,):
                raise UserError(f"an array of {size} values", list(parts[-1].shape), FIX,
                                where=where)
        return parts


class _Chosen(Split):
    """Some rows of a mixture, in order."""

    def __init__(self, split: Mixture, g: np.ndarray):
        super().__init__(split.sources, "chosen", key_of("chosen"))
        self._split, self._g = split, g

    def num_rows(self, source: str | None = None) -> int:
        return len(self._g)

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._split.locate(self._g[g])


def _float(dtype: np.dtype) -> type[np.floating]:
    """The floats that are stored in the place of ids of `dtype`."""
    return np.float16 if dtype == np.uint16 else np.float32
