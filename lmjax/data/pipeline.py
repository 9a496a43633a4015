"""From a data config to batches: splits whose rows are a pure function, and iterators over steps.

Global row g = step * batch_size + i. Nothing here has state to save: starting at another step is
passing another `start_step`, and each process reads only the rows that its own devices hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from lmjax.config import at_least, choice, plain
from lmjax.data import packing
from lmjax.data.order import BlockMixture
from lmjax.data.packing import Rows
from lmjax.data.sources import SourceConfig, is_synthetic
from lmjax.data.store import SplitStore, canonical, read_manifest
from lmjax.data.synthetic import SyntheticRows
from lmjax.data.tokenizer import TokenizerConfig

NAMES = ("tokens", "targets", "segment_ids", "positions", "loss_mask")  # of a row dict
PREFETCH = 4  # batches made ahead: enough to ride over one slow read, little memory
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
    invalid_utf8_budget: share of documents that may be skipped because they are not UTF-8.
    min_chars: documents that are shorter once cleaned are dropped.
    clean: rules of lmjax/data/clean.py, applied in this order.
    memory_limit_mib: a split's tokens that fit are held in memory, others are read as they are needed.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(name="python-stdlib", uri="builtin:python-stdlib"),)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    directory: str = ""
    seq_len: int = 256
    packing: str = "best_fit"
    seed: int = 0
    heldout_fraction: float = 0.02
    invalid_utf8_budget: float = 0.02
    min_chars: int = 32
    clean: tuple[str, ...] = ("newlines", "control", "nfc")
    memory_limit_mib: int = 1024

    def __post_init__(self) -> None:
        from lmjax.data.clean import RULES

        choice("packing", self.packing, packing.METHODS)
        at_least(2, seq_len=self.seq_len)
        at_least(0, min_chars=self.min_chars, memory_limit_mib=self.memory_limit_mib, seed=self.seed)
        for rule in self.clean:
            choice("clean", rule, RULES)
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction: expected a share in (0, 1), got {self.heldout_fraction}; use e.g. 0.02")
        if not 0 <= self.invalid_utf8_budget <= 1:
            raise ValueError(f"invalid_utf8_budget: expected a share in [0, 1], got {self.invalid_utf8_budget}; use e.g. 0.02")
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
        keys = ("tokenizer", "heldout_fraction", "invalid_utf8_budget", "min_chars", "clean")
        sources = [{"name": s.name, "uri": s.uri, "text_field": s.text_field, "data_dir": s.data_dir} for s in self.sources]
        return {"sources": sources} | {key: plain(getattr(self, key)) for key in keys}


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


class Split:
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

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers int64 [n] -> (source, packed row of that source), int64 [n] each."""
        raise NotImplementedError


class Mixture(Split):
    """Training rows without end: sources mixed by weight, each shuffled anew every epoch."""

    def __init__(self, sources: Sequence[RowSource], *, weights: Sequence[float], seed: int):
        super().__init__(sources, f"mixture-1 {list(weights)} {seed}")
        self.order = BlockMixture(names=[s.name for s in sources], sizes=[s.num_rows for s in sources],
                                  weights=weights, seed=seed)  # fmt: skip

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
    train, heldout = ([make(config, source, split) for source in config.sources] for split in ("train", "heldout"))
    return Mixture(train, weights=[s.weight for s in config.sources], seed=config.seed), InOrder(heldout)


def _synthetic(config: DataConfig, source: SourceConfig, split: str) -> SyntheticRows:
    rows = int(source.uri.partition(":")[2] or SYNTHETIC_ROWS)
    rows = rows if split == "train" else max(1, round(rows * config.heldout_fraction))
    return SyntheticRows(name=source.name, vocab_size=config.tokenizer.vocab_size, seq_len=config.seq_len,
                         num_rows=rows, seed=config.seed, split=split)  # fmt: skip


def _stored(config: DataConfig, directory: str, verify: bool) -> Callable[[DataConfig, SourceConfig, str], PackedRows]:
    manifest = read_manifest(directory)
    check_prepared_by(config, manifest, directory)

    def make(config: DataConfig, source: SourceConfig, split: str) -> PackedRows:
        store = SplitStore(directory, source.name, split, manifest["sources"][source.name][split],
                           memory_limit=config.memory_limit_mib << 20, verify=verify)  # fmt: skip
        return PackedRows(store, name=source.name, vocab_size=manifest["tokenizer"]["vocab_size"],
                          seq_len=config.seq_len, method=config.packing)  # fmt: skip

    return make


def check_prepared_by(config: DataConfig, manifest: dict[str, Any], directory: str) -> None:
    """Raises a ValueError that names the first key in which the data was prepared otherwise."""
    got, expected = manifest["config"], config.prepared_by()
    for key in expected:
        if got.get(key) != expected[key]:
            raise ValueError(f"{directory}: expected data prepared with {key} = {canonical(expected[key])}, got "
                             f"{canonical(got.get(key))}; use another directory, or delete this one")


def make_batches(split: Split, *, batch_size: int, start_step: int, stop_step: int,
                 sharding: jax.sharding.Sharding) -> Iterator[dict[str, jax.Array]]:  # fmt: skip
    """Batches of the steps [start_step, stop_step): step s holds rows s * batch_size .. + batch_size - 1.

    Args:
      split: what to read.
      batch_size: rows in a global batch.
      sharding: of the dimensions (batch, seq) over the devices of all processes.
    Returns:
      an iterator of row dicts of global arrays [batch_size, seq_len]; the work is done ahead, in the
      background, from this call on.
    Raises:
      ValueError: the batch or the sequence does not divide over the mesh (at once, not at the first batch).
    """
    shape = (batch_size, split.seq_len)
    local = local_rows(shape, sharding)

    def host_batch(step: int) -> Rows:
        return split.rows(step * batch_size + local)

    return _device_batches(split, host_batch, range(start_step, stop_step), shape, sharding, local)


def eval_batches(split: Split, batch_size: int, sharding: jax.sharding.Sharding) -> Iterator[dict[str, jax.Array]]:
    """Every row of the split once, in order; rows that fill up the last batch are all padding, masked.

    Arguments, result and errors are those of `make_batches`.
    """
    shape, total = (batch_size, split.seq_len), split.num_rows()
    local = local_rows(shape, sharding)

    def host_batch(step: int) -> Rows:
        g = step * batch_size + local
        rows = packing.empty_rows(len(g), split.seq_len)
        inside = g < total
        for name, values in split.rows(g[inside]).items() if inside.any() else ():
            rows[name][inside] = values
        return rows

    return _device_batches(split, host_batch, range(-(-total // batch_size)), shape, sharding, local)


def local_rows(shape: tuple[int, int], sharding: jax.sharding.Sharding) -> np.ndarray:
    """Rows of a global batch that this process's devices hold under `sharding`; int64, ascending."""
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(f"batch_size, seq_len: expected sizes that the mesh divides, got {shape} for {sharding}; "
                         "make them multiples of the mesh axes that they are split over") from error
    return rows_of(sharding.addressable_devices_indices_map(shape).values(), shape[0])


def rows_of(indices: Any, batch_size: int) -> np.ndarray:
    """The rows that any of these (batch, seq) index pairs covers; int64, ascending."""
    wanted = np.zeros(batch_size, bool)
    for index in indices:
        wanted[index[0] if index else slice(None)] = True
    return np.flatnonzero(wanted)


def to_global(rows: Rows, shape: tuple[int, int], sharding: jax.sharding.Sharding, local: np.ndarray) -> dict[str, jax.Array]:
    """Global arrays from the rows `local` of this process."""
    place = np.zeros(shape[0], np.int64)
    place[local] = np.arange(len(local))

    def shard(values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        begin, stop, _ = index[0].indices(shape[0])
        return values[place[begin] : place[begin] + stop - begin, index[1]]

    return {name: jax.make_array_from_callback(shape, sharding, lambda index, v=values: shard(v, index))
            for name, values in rows.items()}  # fmt: skip


def _device_batches(split, host_batch, steps, shape, sharding, local) -> Iterator[dict[str, jax.Array]]:
    feed = _TfData if split.through_tensorflow else _Thread
    host = feed(host_batch, steps, split.seq_len)

    def batches() -> Iterator[dict[str, jax.Array]]:
        with contextlib.closing(host):
            for rows in host:
                yield to_global(rows, shape, sharding, local)

    return batches()


class _Thread:
    """host_batch(step) for every step, a few ahead, in a thread: for data that needs no TensorFlow."""

    def __init__(self, host_batch: Callable[[int], Rows], steps: range, seq_len: int):
        self._queue: queue.Queue[Rows | Exception | None] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        args = (host_batch, steps, self._queue, self._stop)
        threading.Thread(target=self._work, args=args, name="lmjax-data", daemon=True).start()

    @staticmethod
    def _work(host_batch, steps, out, stop) -> None:
        def put(item: Rows | Exception | None) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return out.put(item, timeout=0.2)

        try:
            for step in steps:
                put(host_batch(step))
                if stop.is_set():
                    return
            put(None)
        except Exception as error:  # raised again where the batch is asked for
            put(error)

    def __iter__(self) -> Iterator[Rows]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()

    __del__ = close


class _TfData:
    """The same by tf.data: Dataset.range(start, stop) mapped over host_batch, deterministic, prefetched."""

    def __init__(self, host_batch: Callable[[int], Rows], steps: range, seq_len: int):
        self._error: list[Exception] = []
        self._made: Future[Any] = Future()
        args = (self._made, self._error, host_batch, steps)
        # In a thread because importing TensorFlow takes seconds, in which the model can be compiled.
        threading.Thread(target=self._work, args=args, name="lmjax-data", daemon=True).start()

    @staticmethod
    def _work(made, errors, host_batch, steps) -> None:
        try:
            made.set_result(_dataset(errors, host_batch, steps).as_numpy_iterator())
        except Exception as error:
            made.set_exception(error)

    def __iter__(self) -> Iterator[Rows]:
        iterator = self._made.result()
        while True:
            try:
                values = next(iterator)
            except StopIteration:
                return
            except Exception:
                if self._error:  # what host_batch raised, rather than TensorFlow's account of it
                    raise self._error[0] from None
                raise
            yield dict(zip(NAMES, values, strict=True))

    def close(self) -> None:
        """tf.data stops when its iterator is dropped."""


def _dataset(errors: list[Exception], host_batch: Callable[[int], Rows], steps: range) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is first imported
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow feeds data and nothing else

    def call(step: np.ndarray) -> list[np.ndarray]:
        try:
            rows = host_batch(int(step))
        except Exception as error:
            errors.append(error)
            raise
        return [rows[name] for name in NAMES]

    types = [tf.float32 if name == "loss_mask" else tf.int32 for name in NAMES]
    data = tf.data.Dataset.range(steps.start, steps.stop)
    data = data.map(lambda step: tf.numpy_function(call, [step], types, stateful=False))
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1  # the cores belong to XLA
    options.threading.max_intra_op_parallelism = 1
    return data.prefetch(PREFETCH).with_options(options)
