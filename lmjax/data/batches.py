"""Batches of global arrays, made ahead in the background, from a split's rows.

A batch is the next `batch_size` rows of the run. Nothing here has state to save: going on from another row is
passing another `start_row`, and each process reads only the rows that its own devices hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from lmjax.data import packing
from lmjax.data.hashing import key_of, permute
from lmjax.data.packing import Rows
from lmjax.data.pipeline import Split

PREFETCH = 4  # batches made ahead: enough to ride over one slow read, little memory
Batch = dict[str, jax.Array]


def make_batches(split: Split, *, batch_size: int, start_row: int, steps: int,
                 sharding: jax.sharding.Sharding) -> Iterator[Batch]:
    """`steps` batches: rows start_row .. start_row + batch_size - 1, and so on without a gap.

    Args:
      split: what to read.
      batch_size: rows in a global batch.
      sharding: of the dimensions (batch, seq) over the devices of all processes.
    Returns:
      an iterator of dicts of global arrays [batch_size, length], one for each of the split's fields; the work is
      done ahead, in the background, from this call on.
    Raises:
      ValueError: the batch or the sequence does not divide over the mesh, or TensorFlow is needed and not installed (at
        once, not at the first batch).
    """
    local = _check_shapes(split, batch_size, sharding)

    def host_batch(step: int) -> Rows:
        return split.rows(start_row + step * batch_size + local)

    return _device_batches(split, host_batch, range(steps), batch_size, sharding, local)


def eval_batches(split: Split, batch_size: int, sharding: jax.sharding.Sharding, *, most: int = 0) -> Iterator[Batch]:
    """Every row of the split once, in order; rows that fill up the last batch are all padding, masked.

    most: only so many batches, of rows drawn from all over the split, the same ones every time; 0: all.

    Arguments, result and errors are those of `make_batches`.
    """
    local, total = _check_shapes(split, batch_size, sharding), split.num_rows()

    def host_batch(step: int) -> Rows:
        g = step * batch_size + local
        rows = packing.empty(split.fields, len(g))
        inside = g < total
        chosen = permute(g[inside], total, key_of("eval")) if most else g[inside]
        for name, values in split.rows(chosen).items() if inside.any() else ():
            rows[name][inside] = values
        return rows

    steps = -(-total // batch_size)
    return _device_batches(split, host_batch, range(min(most or steps, steps)), batch_size, sharding, local)


def _check_shapes(split: Split, batch_size: int, sharding: jax.sharding.Sharding) -> np.ndarray:
    """The rows of a batch that are this process's, the same for every field."""
    return [local_rows((batch_size, length), sharding) for length in set(split.fields.values())][0]


def local_rows(shape: tuple[int, int], sharding: jax.sharding.Sharding) -> np.ndarray:
    """Rows of a global batch that this process's devices hold under `sharding`; int64, ascending."""
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        where = f"{sharding.spec} on {dict(sharding.mesh.shape)}"
        raise ValueError(f"batch_size, seq_len: expected multiples of the axes that split them ({where}), "
                         f"got {shape}; change them or the mesh") from error
    return rows_of(sharding.addressable_devices_indices_map(shape).values(), shape[0])


def rows_of(indices: Any, batch_size: int) -> np.ndarray:
    """The rows that any of these (batch, seq) index pairs covers; int64, ascending."""
    wanted = np.zeros(batch_size, bool)
    for index in indices:
        wanted[index[0] if index else slice(None)] = True
    return np.flatnonzero(wanted)


def to_global(rows: Rows, batch_size: int, sharding: jax.sharding.Sharding, local: np.ndarray) -> Batch:
    """Global arrays [batch, length] from the rows `local` of this process."""
    place = np.zeros(batch_size, np.int64)
    place[local] = np.arange(len(local))

    def shard(values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        begin, stop, _ = index[0].indices(batch_size)
        return values[place[begin] : place[begin] + stop - begin, index[1]]

    return {name: jax.make_array_from_callback((batch_size, values.shape[1]), sharding,
                                               lambda index, v=values: shard(v, index))
            for name, values in rows.items()}


def _device_batches(split, host_batch, steps, batch_size, sharding, local) -> Iterator[Batch]:
    feed = _TfData if split.through_tensorflow else _Thread
    host = feed(host_batch, steps, tuple(split.fields))

    def batches() -> Iterator[Batch]:
        with contextlib.closing(host):
            for rows in host:
                yield to_global(rows, batch_size, sharding, local)

    return batches()


class _Thread:
    """host_batch(step) for every step, a few ahead, in a thread: for data that needs no TensorFlow."""

    def __init__(self, host_batch: Callable[[int], Rows], steps: range, names: tuple[str, ...]):
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

    def __init__(self, host_batch: Callable[[int], Rows], steps: range, names: tuple[str, ...]):
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError("data.sources: expected TensorFlow, which feeds rows of text, got none; pip install "
                             "tensorflow-cpu, or train on synthetic data")
        self._error: list[Exception] = []
        self._made: Future[Any] = Future()
        self._names = names
        args = (self._made, self._error, host_batch, steps, names)
        # In a thread because importing TensorFlow takes seconds, in which the model can be compiled.
        threading.Thread(target=self._work, args=args, name="lmjax-data", daemon=True).start()

    @staticmethod
    def _work(made, errors, host_batch, steps, names) -> None:
        try:
            made.set_result(_dataset(errors, host_batch, steps, names).as_numpy_iterator())
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
            yield dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        """tf.data stops when its iterator is dropped."""


def _dataset(errors: list[Exception], host_batch: Callable[[int], Rows], steps: range, names: tuple[str, ...]) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is first imported
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow feeds data and nothing else

    def call(step: np.ndarray) -> list[np.ndarray]:
        try:
            rows = host_batch(int(step))
        except Exception as error:
            errors.append(error)
            raise
        return [rows[name] for name in names]

    types = [tf.as_dtype(packing.dtype_of(name)) for name in names]
    data = tf.data.Dataset.range(steps.start, steps.stop)
    data = data.map(lambda step: tf.numpy_function(call, [step], types, stateful=False))
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1  # the cores belong to XLA
    options.threading.max_intra_op_parallelism = 1
    return data.prefetch(PREFETCH).with_options(options)
