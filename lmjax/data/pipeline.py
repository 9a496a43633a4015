"""From a data config to splits: rows of several sources, found by their number in the run alone."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from lmjax.config import plain
from lmjax.data import packing
from lmjax.data.config import SYNTHETIC_ROWS, DataConfig, check_prepared_by
from lmjax.data.hashing import fold, key_of
from lmjax.data.objectives import AugmentConfig, Objective, ObjectiveConfig, Pieces
from lmjax.data.order import StagedMixture
from lmjax.data.packing import Rows
from lmjax.data.store import Documents, SplitStore, canonical, read_manifest
from lmjax.data.synthetic import SyntheticRows
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import prepared_tokenizer, word_tables


class RowSource(Protocol):
    """Packed rows of one split of one source."""

    name: str
    vocab_size: int
    seq_len: int
    fields: dict[str, int]
    num_rows: int
    predictions: int
    bytes: int
    fingerprint: str

    def rows_at(self, rows: np.ndarray, keys: np.ndarray) -> Rows: ...
    def documents_at(self, row: int) -> list[tuple[str, int, int]]: ...


class PackedRows:
    """Rows packed from stored documents, as an objective has them.

    Args:
      documents: a token store, or documents in memory.
      objective: what becomes of a row's pieces.
      name: of the source. method: of packing.
      words: for an objective that asks for whole words (see `Objective.rows`).
    """

    def __init__(self, documents: Documents, objective: Objective, *, name: str, method: str,
                 words: tuple[np.ndarray, np.ndarray] | None = None):
        self.store, self.objective, self.name, self.words = documents, objective, name, words
        self.vocab_size, self.seq_len, self.fields = objective.vocab_size, objective.seq_len, objective.fields
        lengths = documents.lengths + 1 - objective.kind.fewer  # those are predictions, one less than tokens
        self.plan = packing.make_plan(method, lengths, self.seq_len, objective.cost)
        self.num_rows, self.predictions, self.bytes = self.plan.num_rows, documents.predictions, documents.bytes
        self.fingerprint = f"{documents.fingerprint}-{method}-{self.seq_len}"
        if objective.config != ObjectiveConfig():
            self.fingerprint += canonical(plain(objective.config))

    def rows_at(self, rows: np.ndarray, keys: np.ndarray | None = None) -> Rows:
        """Packed row numbers int64 [n], in [0, num_rows), and a key of each one's randomness -> the batch's arrays."""
        rows = np.asarray(rows, np.int64)
        keys = rows.astype(np.uint64) if keys is None else keys
        pieces, place = self.plan.select(rows)
        length, kind = self.plan.length_P[pieces], self.objective.kind
        begin = self.store.offsets[self.plan.document_P[pieces]] + self.plan.start_P[pieces] + kind.begin
        flat, at = self.store.gather(begin, length + kind.beyond)
        made = Pieces(flat, at, length, place, fold(keys[place], packing.segments(place)))
        return self.objective.rows(made, len(rows), self.store.specials, self.words)

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(id, first token, number of tokens) of what a packed row holds, counted as the objective does."""
        pieces, _ = self.plan.select(np.array([row]))
        parts = (self.plan.document_P, self.plan.start_P, self.plan.length_P)
        return [(self.store.ids[document], int(start), int(length))
                for document, start, length in zip(*(part[pieces] for part in parts), strict=True)]


class Split(abc.ABC):
    """Rows of several sources. `rows` is pure; `fingerprint` names everything that decides them."""

    def __init__(self, sources: Sequence[RowSource], order: str, key: np.ndarray):
        self.sources, self.seq_len, self.fields = tuple(sources), sources[0].seq_len, sources[0].fields
        self.vocab_size, self.key = sources[0].vocab_size, key
        self.predictions = sum(s.predictions for s in sources)  # of a decoder, in an epoch
        self.bytes = sum(s.bytes for s in sources)  # UTF-8 bytes of text that they stand for
        parts = [order, *([s.name, s.fingerprint] for s in sources)]
        self.fingerprint = hashlib.sha256(canonical(parts).encode()).hexdigest()
        self.through_tensorflow = any(isinstance(getattr(s, "store", None), SplitStore) for s in sources)

    def num_rows(self, source: str | None = None) -> int:
        """Rows in one pass over everything, or over the source of that name."""
        return sum(s.num_rows for s in self.sources if source in (None, s.name))

    def rows(self, g: np.ndarray) -> Rows:
        """Row numbers int64 [n] -> the row dict, in their order."""
        source, _, row = self.locate(np.asarray(g, np.int64))
        keys = fold(self.key, g)
        if len(self.sources) == 1:
            return self.sources[0].rows_at(row, keys)
        out = packing.empty(self.fields, len(row))
        for s in np.unique(source):
            mine = np.flatnonzero(source == s)
            for name, values in self.sources[s].rows_at(row[mine], keys[mine]).items():
                out[name][mine] = values
        return out

    @abc.abstractmethod
    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers int64 [n] -> (source, epoch, packed row of that source), int64 [n] each."""


class Mixture(Split):
    """Training rows without end: sources mixed by weight, each shuffled anew every epoch."""

    def __init__(self, sources: Sequence[RowSource], *, stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        super().__init__(sources, f"mixture-1 {list(stages[0][1])} {seed}",
                         key_of("objective", seed))
        self.stages = stages
        self.order = StagedMixture(names=[s.name for s in sources], sizes=[s.num_rows for s in sources],
                                   stages=stages, seed=seed)

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.order.locate(g)

    def fingerprint_of(self, rows: int) -> str:
        """Names everything that decides the first `rows` rows of the run: stages that begin later do not."""
        later = [[row, list(weights)] for row, weights in self.stages[1:] if row < rows]
        return hashlib.sha256(canonical([self.fingerprint, *later]).encode()).hexdigest() if later else self.fingerprint

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows of the run go through each source."""
        seen = self.order.seen(rows)
        return {s.name: float(n) / s.num_rows for s, n in zip(self.sources, seen, strict=True)}

    def check_epochs(self, rows: int, most: dict[str, float]) -> None:
        """Raises a ValueError that names the first source that `rows` rows go through more often than `most` allows."""
        for name, epochs in self.epochs(rows).items():
            if epochs > most.get(name, np.inf):
                raise ValueError(f"data.max_epochs.{name}: expected at most {most[name]:g} epochs of it, got a run of "
                                 f"{rows:,} rows that takes {epochs:.2f}; lower its weight, shorten the run, or raise "
                                 "max_epochs")

    def plan(self, rows: int) -> list[str]:
        """What the first `rows` rows of the run are, in lines to read: shares by stage, epochs by source."""
        starts = [row for row, _ in self.stages if row < rows]
        lines = []
        for begin, end in zip(starts, [*starts[1:], rows], strict=True):
            counts = zip(self.sources, self.order.seen(end) - self.order.seen(begin), strict=True)
            shares = ", ".join(f"{s.name} {n / (end - begin):.1%}" for s, n in counts if n)
            lines.append(f"rows {begin:,} to {end - 1:,}: {shares}")
        seen, epochs = self.order.seen(rows), self.epochs(rows)
        lines += [f"{s.name}: {n:,} rows, {epochs[s.name]:.2f} epochs of {s.num_rows:,}"
                  for s, n in zip(self.sources, seen, strict=True)]
        return lines


class InOrder(Split):
    """Every row once, source after source: for evaluation. Row numbers are in [0, num_rows())."""

    def __init__(self, sources: Sequence[RowSource]):
        super().__init__(sources, "sequence-1", key_of("objective", "in order"))
        self._ends = np.cumsum([s.num_rows for s in sources])

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source = np.searchsorted(self._ends, g, side="right")
        return source, np.zeros_like(g), g - np.concatenate([[0], self._ends])[source]


def open_splits(config: DataConfig, directory: str = "", *, verify: bool = False) -> tuple[Mixture, InOrder]:
    """Opens the training and the held-out rows of prepared (or synthetic) data.

    Args:
      config: sources, weights, seq_len, packing and seed; the rest must be what the data was prepared with.
      directory: the prepared data; not read for synthetic sources.
      verify: hash every array against the manifest.
    Raises:
      ValueError: no prepared data, prepared by another config, or damaged.
    """
    make = _synthetic if config.synthetic else _stored(config, directory, verify)
    clean_text = replace(config, objective=replace(config.objective, augment=AugmentConfig()))
    train = [make(config, source, "train") for source in config.sources]
    heldout = [make(clean_text, source, "heldout") for source in config.sources]
    return Mixture(train, stages=config.mixture, seed=config.seed), InOrder(heldout)


def _synthetic(config: DataConfig, source: SourceConfig, split: str) -> RowSource:
    rows = int(source.uri.partition(":")[2] or SYNTHETIC_ROWS)
    rows = rows if split == "train" else max(1, round(rows * config.heldout_fraction))
    made = SyntheticRows(name=source.name, vocab_size=config.tokenizer.vocab_size, seq_len=config.seq_len,
                         num_rows=rows, seed=config.seed, split=split)
    if config.objective == ObjectiveConfig():
        return made
    objective = Objective(config.objective, seq_len=config.seq_len, vocab_size=made.vocab_size)
    return PackedRows(made.documents(), objective, name=source.name, method=config.packing)


def _stored(config: DataConfig, directory: str, verify: bool) -> Callable[..., RowSource]:
    manifest = read_manifest(directory)
    check_prepared_by(config, manifest, directory)
    words = word_tables(prepared_tokenizer(directory)) if config.objective.whole_word else None

    def make(config: DataConfig, source: SourceConfig, split: str) -> PackedRows:
        store = SplitStore(directory, source.name, split, manifest["sources"][source.name][split],
                           memory_limit=config.memory_limit_mib << 20, verify=verify)
        objective = Objective(config.objective, seq_len=config.seq_len, vocab_size=manifest["tokenizer"]["vocab_size"])
        return PackedRows(store, objective, name=source.name, method=config.packing, words=words)

    return make


