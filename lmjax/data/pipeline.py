"""From a data config to splits: rows of several sources, found by their number in the run alone."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lmjax.config import at_least, choice, plain
from lmjax.data import clean, packing
from lmjax.data.curate import CurateConfig
from lmjax.data.order import BlockMixture
from lmjax.data.packing import Rows
from lmjax.data.sources import SourceConfig, is_synthetic
from lmjax.data.store import SplitStore, canonical, read_manifest
from lmjax.data.synthetic import SyntheticRows
from lmjax.data.tokenizer import TokenizerConfig

SYNTHETIC_ROWS = 4096  # an epoch of `synthetic`; `synthetic:N` has N


@dataclass(frozen=True)
class DataConfig:
    """What a model is trained on, how it is cut into rows, and in which order they come.

    sources: what is read, in which proportion.
    tokenizer: how it is tokenised.
    directory: the prepared data, local or gs:// or s3://; "" for `data` in the run's own directory.
    seq_len: tokens in a row.
    packing: best_fit (cuts no document unless it is longer than a row), concat, or none.
    seed: of the order of training rows, and of synthetic data.
    heldout_fraction: share of documents, chosen by hash, that is only evaluated on.
    broken_budget: share of records that may be skipped because they are broken: not UTF-8, not JSON, without text.
    min_chars: documents that are shorter once cleaned are dropped.
    clean: rules of lmjax/data/clean.py, applied in this order.
    curate: filters, redundancy removal, decontamination, and what preparing may use.
    memory_limit_mib: a split's tokens that fit are held in memory, others are read as they are needed.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(name="python-stdlib", uri="builtin:python-stdlib"),)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    directory: str = ""
    seq_len: int = 256
    packing: str = "best_fit"
    seed: int = 0
    heldout_fraction: float = 0.02
    broken_budget: float = 0.02
    min_chars: int = 32
    clean: tuple[str, ...] = ("newlines", "control", "nfc")
    curate: CurateConfig = field(default_factory=CurateConfig)
    memory_limit_mib: int = 1024

    def __post_init__(self) -> None:
        choice("packing", self.packing, packing.METHODS)
        at_least(2, seq_len=self.seq_len)
        at_least(0, min_chars=self.min_chars, memory_limit_mib=self.memory_limit_mib, seed=self.seed)
        for rule in self.clean:
            choice("clean", rule, clean.RULES)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction: expected a share in (0, 1), got {self.heldout_fraction}; "
                             "use e.g. 0.02")
        if not 0 <= self.broken_budget <= 1:
            raise ValueError("broken_budget: expected a share in [0, 1], got "
                             f"{self.broken_budget}; use e.g. 0.02")
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: expected one or more with different names, got {names}; rename them")
        if 0 < sum(map(is_synthetic, self.sources)) < len(self.sources):
            raise ValueError("sources: expected all or none to be synthetic, got a mixture; "
                             "train on them separately")

    @property
    def synthetic(self) -> bool:
        """Whether the data is made up on the fly: nothing to prepare, no tokenizer."""
        return is_synthetic(self.sources[0])

    def prepared_by(self) -> dict[str, Any]:
        """The part of the config that decides what `prepare` writes, as plain JSON values."""
        keys = ("tokenizer", "heldout_fraction", "broken_budget", "min_chars", "clean")
        sources = [plain(source) for source in self.sources]
        for source in sources:
            del source["weight"]  # may change from run to run
        decided = {key: plain(getattr(self, key)) for key in keys}
        return {"sources": sources} | decided | {"curate": self.curate.decides()}


class RowSource(Protocol):
    """Packed rows of one split of one source."""

    name: str
    vocab_size: int
    num_rows: int
    predictions: int
    bytes: int
    fingerprint: str

    def rows_at(self, rows: np.ndarray) -> Rows: ...


class PackedRows:
    """Rows packed from a token store."""

    def __init__(self, store: SplitStore, *, name: str, vocab_size: int, seq_len: int, method: str):
        self.store, self.name, self.vocab_size, self.seq_len = store, name, vocab_size, seq_len
        self.plan = packing.make_plan(method, store.lengths, seq_len)
        self.num_rows, self.predictions, self.bytes = self.plan.num_rows, store.predictions, store.bytes
        self.fingerprint = f"{store.fingerprint}-{method}-{seq_len}"

    def rows_at(self, rows: np.ndarray) -> Rows:
        """Packed row numbers int64 [n], in [0, num_rows) -> the row dict."""
        plan = self.plan
        pieces, place = plan.select(np.asarray(rows, np.int64))
        length = plan.length_P[pieces]
        starts = self.store.offsets[plan.document_P[pieces]] + plan.start_P[pieces]
        flat, at = self.store.gather(starts, length + 1)
        return packing.fill_rows(flat, at, length, place, plan.offset_P[pieces], len(rows), self.seq_len)


class Split(abc.ABC):
    """Rows of several sources. `rows` is pure; `fingerprint` names everything that decides them."""

    def __init__(self, sources: Sequence[RowSource], order: str):
        self.sources, self.seq_len = tuple(sources), sources[0].seq_len
        self.vocab_size = sources[0].vocab_size
        self.predictions = sum(s.predictions for s in sources)  # targets in an epoch
        self.bytes = sum(s.bytes for s in sources)  # UTF-8 bytes of text that they stand for
        parts = [order, *([s.name, s.fingerprint] for s in sources)]
        self.fingerprint = hashlib.sha256(canonical(parts).encode()).hexdigest()
        self.through_tensorflow = any(isinstance(s, PackedRows) for s in sources)

    def num_rows(self, source: str | None = None) -> int:
        """Rows in one pass over everything, or over the source of that name."""
        return sum(s.num_rows for s in self.sources if source in (None, s.name))

    def rows(self, g: np.ndarray) -> Rows:
        """Row numbers int64 [n] -> the row dict, in their order."""
        source, row = self.locate(np.asarray(g, np.int64))
        if len(self.sources) == 1:
            return self.sources[0].rows_at(row)
        out = packing.empty_rows(len(row), self.seq_len)
        for s, part in enumerate(self.sources):
            mine = np.flatnonzero(source == s)
            for name, values in part.rows_at(row[mine]).items() if len(mine) else ():
                out[name][mine] = values
        return out

    @abc.abstractmethod
    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers int64 [n] -> (source, packed row of that source), int64 [n] each."""


class Mixture(Split):
    """Training rows without end: sources mixed by weight, each shuffled anew every epoch."""

    def __init__(self, sources: Sequence[RowSource], *, weights: Sequence[float], seed: int):
        super().__init__(sources, f"mixture-1 {list(weights)} {seed}")
        self.order = BlockMixture(names=[s.name for s in sources], sizes=[s.num_rows for s in sources],
                                  weights=weights, seed=seed)

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source, _, row = self.order.locate(g)
        return source, row

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows of the run go through each source."""
        seen = self.order.seen(rows)
        return {s.name: float(n) / s.num_rows for s, n in zip(self.sources, seen, strict=True)}


class InOrder(Split):
    """Every row once, source after source: for evaluation. Row numbers are in [0, num_rows())."""

    def __init__(self, sources: Sequence[RowSource]):
        super().__init__(sources, "sequence-1")
        self._ends = np.cumsum([s.num_rows for s in sources])

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = np.searchsorted(self._ends, g, side="right")
        return source, g - np.concatenate([[0], self._ends])[source]


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
    train = [make(config, source, "train") for source in config.sources]
    heldout = [make(config, source, "heldout") for source in config.sources]
    return Mixture(train, weights=[s.weight for s in config.sources], seed=config.seed), InOrder(heldout)


def _synthetic(config: DataConfig, source: SourceConfig, split: str) -> SyntheticRows:
    rows = int(source.uri.partition(":")[2] or SYNTHETIC_ROWS)
    rows = rows if split == "train" else max(1, round(rows * config.heldout_fraction))
    return SyntheticRows(name=source.name, vocab_size=config.tokenizer.vocab_size, seq_len=config.seq_len,
                         num_rows=rows, seed=config.seed, split=split)


def _stored(config: DataConfig, directory: str, verify: bool) -> Callable[..., PackedRows]:
    manifest = read_manifest(directory)
    check_prepared_by(config, manifest, directory)

    def make(config: DataConfig, source: SourceConfig, split: str) -> PackedRows:
        store = SplitStore(directory, source.name, split, manifest["sources"][source.name][split],
                           memory_limit=config.memory_limit_mib << 20, verify=verify)
        return PackedRows(store, name=source.name, vocab_size=manifest["tokenizer"]["vocab_size"],
                          seq_len=config.seq_len, method=config.packing)

    return make


def check_prepared_by(config: DataConfig, manifest: dict[str, Any], directory: str) -> None:
    """Raises a ValueError that names the first key in which the data was prepared otherwise."""
    got, expected = manifest["config"], config.prepared_by()
    for key in expected:
        if got.get(key) != expected[key]:
            raise ValueError(f"{directory}: expected data prepared with {key} = {canonical(expected[key])}, "
                             f"got {canonical(got.get(key))}; use another directory, or delete this one")
