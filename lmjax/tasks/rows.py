"""Rows of examples: several to a row where the task allows it, as documents are packed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.packing import make_plan
from lmjax.data.pipeline import InOrder, Mixture
from lmjax.data.rows import Rows, empty, ramps, segments, starts
from lmjax.data.store import SplitStore, canonical
from lmjax.runtime.sealed import read_listed
from lmjax.tasks.columns import FLOATS
from lmjax.tasks.prepare import RECORDS, read_manifest
from lmjax.tasks.task import Record, Sizes, Task

# The sides of a row: columns that begin with these names lie at the tokens of that side.
SIDES = ("encoder_", "rejected_", "second_", "negative_", "label_", "")


class Place(NamedTuple):
    """Where an example lies in a row."""

    example: int  # its number in the split of its source, where every window counts
    start: int  # its first token in the row, of the model or of its decoder
    length: int  # its tokens there


class ExampleRows:
    """Packed rows of one split of one source; a `data.pipeline.RowSource`.

    Args:
      columns: a store per column.
      sizes: length of a row, per side of the columns.
      name: of the source.
      method: of packing.
      vocab_size: number of ids.
      fingerprint: names what decides the columns.
      records: reads the file with what the examples were made from, if it was kept.
    """

    stored, exact, bytes = True, True, 0

    def __init__(self, columns: dict[str, SplitStore], sizes: dict[str, int], *, name: str,
                 method: str, vocab_size: int, fingerprint: str,
                 records: Callable[[], str] | None = None):
        self.columns, self.sizes, self.name, self.vocab_size = columns, sizes, name, vocab_size
        self.seq_len, self._records = sizes.get("encoder_", sizes[""]), records
        self._of_side = {side: [c for c in columns if side_of(c) == side] for side in sizes}
        self._length_E = {side: np.diff(columns[names[0]].offsets)
                          for side, names in self._of_side.items()}
        self.fields = {column: sizes[side_of(column)] for column in columns}
        for side, length in sizes.items():
            if side != "label_":
                self.fields |= {f"{side}positions": length, f"{side}segment_ids": length}
        taken = [-(-length_E * self.seq_len // sizes[side])
                 for side, length_E in self._length_E.items()]
        self.plan = make_plan(method, np.max(taken, axis=0), self.seq_len)
        self.num_rows = self.plan.num_rows
        self.predictions = int(self._length_E[""].sum())
        self.fingerprint = f"{fingerprint}-{method}-{sorted(sizes.items())}"

    def rows_at(self, rows: np.ndarray, keys: np.ndarray) -> Rows:
        """The arrays of packed rows, int64 [n]; `keys` are not used, for nothing is random."""
        rows = np.asarray(rows, np.int64)
        pieces, place_P = self.plan.select(rows)
        example_P, out = self.plan.document_P[pieces], empty(self.fields, len(rows))
        for side, names in self._of_side.items():
            length_P, width = self._length_E[side][example_P], self.sizes[side]
            slot_T = ramps(starts(length_P, place_P, width), length_P)
            for column in names:
                begin_P = self.columns[column].offsets[example_P]
                flat, at_P = self.columns[column].gather(begin_P, length_P)
                values_T = flat[ramps(at_P, length_P)]
                values_T = values_T.view(np.float32) if column in FLOATS else values_T
                out[column].reshape(-1)[slot_T] = values_T
            if side != "label_":
                out[f"{side}positions"].reshape(-1)[slot_T] = ramps(np.zeros_like(length_P),
                                                                    length_P)
                out[f"{side}segment_ids"].reshape(-1)[slot_T] = np.repeat(segments(place_P),
                                                                          length_P)
        return out

    def places(self, row: int) -> list[Place]:
        """The examples in a packed row, in order."""
        pieces, _ = self.plan.select(np.array([row]))
        example_P = self.plan.document_P[pieces]
        length_P = self._length_E[""][example_P]
        start_P = np.cumsum(length_P) - length_P
        return [Place(*map(int, place)) for place in zip(example_P, start_P, length_P,
                                                         strict=True)]

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(name, 0, number of tokens) of the examples in a packed row."""
        return [(self.ids[place.example], 0, place.length) for place in self.places(row)]

    @property
    def ids(self) -> list[str]:
        """The names of the examples."""
        return next(iter(self.columns.values())).ids

    @functools.cached_property
    def record_E(self) -> np.ndarray:
        """The number of the record of every example: windows of one have its id, one by one."""
        ids = self.ids
        return np.cumsum([i == 0 or name != ids[i - 1] for i, name in enumerate(ids)]) - 1

    @functools.cached_property
    def records(self) -> list[Record]:
        """What the examples were made from, in order; only of held-out and test examples."""
        assert self._records is not None
        return [json.loads(line) for line in self._records().split("\n")[:-1]]


def side_of(column: str) -> str:
    """The side that a column belongs to."""
    return next(side for side in SIDES if column.startswith(side))


def open_examples(task: Task, data: DataConfig, directory: str, *, sizes: Sizes,
                  vocab_size: int,
                  verify: bool = False) -> tuple[Mixture, dict[str, InOrder]]:
    """Opens the rows of prepared examples.

    Args:
      task, data: those that the examples were prepared with.
      directory: of the prepared examples.
      sizes: likewise.
      vocab_size: number of ids of the model's tokens.
      verify: hash every array against the manifest.
    Returns:
      the training rows, and the rows of each other split (heldout, and test if there is one).
    """
    found: dict[str, list[ExampleRows]] = {}
    for place in read_manifest(directory)["splits"]:
        found.setdefault(place.rpartition("/")[2], []).append(open_rows(
            task, data, directory, place, sizes=sizes, vocab_size=vocab_size, verify=verify))
    train = Mixture(found.pop("train"), stages=data.mixture, seed=data.seed)
    return train, {split: InOrder(rows) for split, rows in found.items()}


def open_rows(task: Task, data: DataConfig, directory: str, place: str, *, sizes: Sizes,
              vocab_size: int, verify: bool = False) -> ExampleRows:
    """Opens the rows of one split of one source; `place` is SOURCE/SPLIT."""
    manifest, (name, _, split) = read_manifest(directory), place.rpartition("/")
    columns = {column: SplitStore(directory, place, column, facts,
                                  memory_limit=data.memory_limit_mib << 20, verify=verify)
               for column, facts in manifest["splits"][place]["columns"].items()}
    text = canonical([manifest["facts"],
                      {column: kept.fingerprint for column, kept in columns.items()}])
    lengths = {side_of(column): task.length_of(side_of(column), sizes, manifest["facts"])
               for column in columns}
    packs = task.packs and data.packing != "none"  # concat would cut examples
    return ExampleRows(
        columns, lengths, name=name, method="best_fit" if packs else "none",
        vocab_size=vocab_size, fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        records=None if split == "train" else lambda: read_listed(
            directory, f"{name}/{split}/{RECORDS}", manifest).decode())
