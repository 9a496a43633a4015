"""From a data config to splits: rows of several sources, each found by its number in the run."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from lmjax.config import plain
from lmjax.data.augmentation import AugmentConfig
from lmjax.data.config import SYNTHETIC_ROWS, DataConfig, check_prepared_by
from lmjax.data.hashing import fold, key_of
from lmjax.data.objectives import Objective, ObjectiveConfig, WordTables
from lmjax.data.order import StagedMixture
from lmjax.data.packing import make_plan
from lmjax.data.rows import Pieces, Rows, empty, segments
from lmjax.data.store import Documents, SplitStore, canonical, read_manifest
from lmjax.data.synthetic import SyntheticRows
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import prepared_tokenizer, word_tables
from lmjax.errors import UserError


class RowSource(Protocol):
    """Packed rows of one split of one source."""

    name: str               # of the source
    vocab_size: int         # number of ids, with those that the objective adds
    seq_len: int            # length of a row that the model (or its encoder) reads
    fields: dict[str, int]  # row length of each array of a batch
    num_rows: int           # rows in an epoch
    predictions: int        # predictions of a decoder in an epoch
    bytes: int              # UTF-8 bytes of the text in an epoch
    fingerprint: str        # names everything that decides the rows
    stored: bool            # whether rows are read from a token store
    exact: bool             # whether decoded tokens are the text; if not, `bytes` are of those

    def rows_at(self, rows: np.ndarray, keys: np.ndarray) -> Rows:
        """The arrays of packed rows, int64 [n]; `keys`, uint64 [n], key their random decisions."""

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(id, first token, number of tokens) of the pieces in a packed row."""


class PackedRows:
    """Rows packed from documents, as an objective makes them.

    Args:
      documents: a token store, or documents in memory.
      objective: makes rows from pieces.
      name: of the source.
      method: of packing.
      words: for an objective of whole words (see `Objective.rows`).
    """

    def __init__(self, documents: Documents, objective: Objective, *, name: str, method: str,
                 words: WordTables | None = None):
        self.store, self.objective, self.name, self.words = documents, objective, name, words
        self.stored = isinstance(documents, SplitStore)
        self.exact = not (isinstance(documents, SplitStore) and "lost" in documents.facts)
        self.vocab_size, self.seq_len = objective.vocab_size, objective.seq_len
        self.fields = objective.fields
        tokens = documents.lengths + 1  # `lengths` counts predictions, one fewer than tokens
        self.plan = make_plan(method, tokens - objective.kind.uncounted, self.seq_len,
                              objective.cost)
        self.num_rows = self.plan.num_rows
        self.predictions, self.bytes = documents.predictions, documents.bytes
        self.fingerprint = f"{documents.fingerprint}-{method}-{self.seq_len}"
        if objective.config != ObjectiveConfig():
            settings = plain(objective.config)
            del settings["own_ids"]
            self.fingerprint += canonical(settings)
        if objective.own:
            self.fingerprint += canonical(objective.own)

    def rows_at(self, rows: np.ndarray, keys: np.ndarray | None = None) -> Rows:
        """The arrays of a batch.

        Args:
          rows: numbers of packed rows in [0, num_rows), int64 [n].
          keys: key of the random decisions in each row, uint64 [n]; by default the row's number.
        """
        rows = np.asarray(rows, np.int64)
        keys = rows.astype(np.uint64) if keys is None else keys
        pieces, place = self.plan.select(rows)
        length, kind = self.plan.length_P[pieces], self.objective.kind
        begin = self.store.offsets[self.plan.document_P[pieces]] + self.plan.start_P[pieces]
        begin = begin + kind.skipped
        flat, at = self.store.gather(begin, length + kind.lookahead)
        made = Pieces(flat, at, length, place, fold(keys[place], segments(place)))
        return self.objective.rows(made, len(rows), self.store.specials, self.words)

    def documents_at(self, row: int) -> list[tuple[str, int, int]]:
        """(id, first token, number of tokens) of a packed row's pieces, as the objective counts."""
        pieces, _ = self.plan.select(np.array([row]))
        parts = (self.plan.document_P, self.plan.start_P, self.plan.length_P)
        return [(self.store.ids[document], int(start), int(length))
                for document, start, length in zip(*(part[pieces] for part in parts), strict=True)]


class Split(abc.ABC):
    """Rows of several sources. `rows` is pure; `fingerprint` names everything that decides them."""

    def __init__(self, sources: Sequence[RowSource], order: str, key: np.ndarray):
        self.sources = tuple(sources)
        self.seq_len, self.fields = sources[0].seq_len, sources[0].fields
        self.vocab_size, self.key = sources[0].vocab_size, key
        self.predictions = sum(s.predictions for s in sources)  # of a decoder, in an epoch
        self.bytes = sum(s.bytes for s in sources)  # UTF-8 bytes of the text that they stand for
        self.exact = all(s.exact for s in sources)  # if not, that is the decoded text
        parts = [order, *([s.name, s.fingerprint] for s in sources)]
        self.fingerprint = hashlib.sha256(canonical(parts).encode()).hexdigest()
        self.through_tensorflow = any(s.stored for s in sources)

    def num_rows(self, source: str | None = None) -> int:
        """Rows in one pass over all sources, or over the source of that name."""
        return sum(s.num_rows for s in self.sources if source in (None, s.name))

    def rows(self, g: np.ndarray) -> Rows:
        """The arrays of the rows numbered `g` (int64 [n]), in that order."""
        source, _, row = self.locate(np.asarray(g, np.int64))
        keys = fold(self.key, g)
        if len(self.sources) == 1:
            return self.sources[0].rows_at(row, keys)
        out = empty(self.fields, len(row))
        for s in np.unique(source):
            mine = np.flatnonzero(source == s)
            for name, values in self.sources[s].rows_at(row[mine], keys[mine]).items():
                out[name][mine] = values
        return out

    @abc.abstractmethod
    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, packed row of that source) of each row number of `g`; int64 [n] each."""


class Mixture(Split):
    """Training rows without end: sources mixed by weight, each shuffled anew in every epoch.

    Args:
      sources: what is mixed.
      stages: (first row, weight of each source) of every stretch of the run with one mixture.
      seed: of the order and of the objective's random decisions.
    """

    def __init__(self, sources: Sequence[RowSource], *,
                 stages: Sequence[tuple[int, Sequence[float]]],
                 seed: int):
        super().__init__(sources, f"mixture-1 {list(stages[0][1])} {seed}",
                         key_of("objective", seed))
        self.stages, self.seed = stages, seed
        self.order = StagedMixture(names=[s.name for s in sources],
                                   sizes=[s.num_rows for s in sources],
                                   stages=stages, seed=seed)

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.order.locate(g)

    def fingerprint_of(self, rows: int) -> str:
        """Names everything that decides the first `rows` rows of the run: no later stage."""
        later = [[row, list(weights)] for row, weights in self.stages[1:] if row < rows]
        if not later:
            return self.fingerprint
        return hashlib.sha256(canonical([self.fingerprint, *later]).encode()).hexdigest()

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows of the run go through each source, by its name."""
        seen = self.order.seen(rows)
        return {s.name: float(n) / s.num_rows for s, n in zip(self.sources, seen, strict=True)}

    def check_epochs(self, rows: int, most: dict[str, float]) -> None:
        """Raises a UserError if `rows` rows go through a source more often than `most` allows."""
        for name, epochs in self.epochs(rows).items():
            if epochs > most.get(name, np.inf):
                raise UserError(f"at most {most[name]:g} epochs of it",
                                f"a run of {rows:,} rows that takes {epochs:.2f}",
                                "lower its weight, shorten the run, or raise max_epochs",
                                where=f"data.max_epochs.{name}")

    def plan(self, rows: int) -> list[str]:
        """Describes the first `rows` rows of the run: shares by stage, epochs by source."""
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
    """Every row once, source after source, for evaluation. Row numbers are in [0, num_rows())."""

    def __init__(self, sources: Sequence[RowSource]):
        super().__init__(sources, "sequence-1", key_of("objective", "in order"))
        self._ends = np.cumsum([s.num_rows for s in sources])

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        source = np.searchsorted(self._ends, g, side="right")
        return source, np.zeros_like(g), g - np.concatenate([[0], self._ends])[source]


def open_splits(config: DataConfig, directory: str = "", *,
                verify: bool = False) -> tuple[Mixture, InOrder]:
    """Opens the training rows and the held-out rows of prepared (or synthetic) data.

    Args:
      config: sources, weights, seq_len, packing and seed may be chosen anew; all other settings
        must be those that the data was prepared with.
      directory: the prepared data; not read for synthetic sources.
      verify: hash every array against the manifest.
    Raises:
      UserError: no prepared data, prepared with another config, or damaged.
    """
    make = _synthetic if config.synthetic else _stored(config, directory, verify)
    clean_text = replace(config, objective=replace(config.objective, augment=AugmentConfig()))
    train = [make(config, source, "train") for source in config.sources]
    heldout = [make(clean_text, source, "heldout") for source in config.sources]
    return Mixture(train, stages=config.mixture, seed=config.seed), InOrder(heldout)


def _synthetic(config: DataConfig, source: SourceConfig, split: str) -> RowSource:
    rows = int(source.uri.partition(":")[2] or SYNTHETIC_ROWS)
    rows = rows if split == "train" else max(1, round(rows * config.heldout_fraction))
    made = SyntheticRows(name=source.name, vocab_size=config.tokenizer.vocab_size,
                         seq_len=config.seq_len,
                         num_rows=rows, seed=config.seed, split=split)
    if config.objective == ObjectiveConfig():
        return made
    objective = Objective(config.objective, seq_len=config.seq_len, vocab_size=made.vocab_size)
    return PackedRows(made.documents(), objective, name=source.name, method=config.packing)


def _stored(config: DataConfig, directory: str, verify: bool) -> Callable[..., RowSource]:
    manifest = read_manifest(directory)
    check_prepared_by(config, manifest, directory)
    wanted = config.objective
    tokenizer = prepared_tokenizer(directory) if wanted.marks or wanted.whole_word else None
    words = word_tables(tokenizer) if tokenizer and wanted.whole_word else None
    vocab_size = manifest["tokenizer"]["vocab_size"]

    def make(config: DataConfig, source: SourceConfig, split: str) -> PackedRows:
        store = SplitStore(directory, source.name, split, manifest["sources"][source.name][split],
                           memory_limit=config.memory_limit_mib << 20, verify=verify)
        objective = Objective(config.objective, seq_len=config.seq_len, vocab_size=vocab_size,
                              tokenizer=tokenizer)
        return PackedRows(store, objective, name=source.name, method=config.packing, words=words)

    return make
