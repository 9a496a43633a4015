"""Batches of global arrays from the rows of a split, made ahead in the background.

A batch is the next `batch_size` rows of the run. There is no state to save: a resumed run passes
another `start_row`. Each process reads only the rows that its own devices hold.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from lmjax.data.hashing import key_of, permute
from lmjax.data.pipeline import Split
from lmjax.data.rows import Rows, dtype_of, empty
from lmjax.errors import UserError

PREFETCH = 4  # batches made ahead: enough to hide one slow read, in little memory
Batch = dict[str, jax.Array]
HostBatch = Callable[[int], Rows]  # step -> the rows of this process


def make_batches(split: Split, *, batch_size: int, start_row: int | Callable[[int], int],
                 steps: int, sharding: jax.sharding.Sharding) -> Batches:
    """Batches of rows of a split; the work starts at once, in the background.

    Args:
      split: what to read.
      batch_size: rows in a global batch.
      start_row: the first row of the first batch, if the rows of all batches are consecutive, or
        the first row of each batch, by its number from 0.
      steps: number of batches.
      sharding: of the dimensions (batch, seq) over the devices of all processes.
    Returns:
      an iterator of dicts of global arrays [batch_size, length], one per field of the split. Close
      it, also after an error: this ends the threads of the background work.
    Raises:
      UserError: the batch or the sequence does not divide over the mesh, or TensorFlow is needed
        and not installed. It is raised by this call, before the first batch.
    """
    local = _local_rows(split, batch_size, sharding)

    def host_batch(step: int) -> Rows:
        first = start_row(step) if callable(start_row) else start_row + step * batch_size
        return split.rows(first + local)

    return _device_batches(split, host_batch, range(steps), batch_size, sharding, local)


def eval_batches(split: Split, batch_size: int, sharding: jax.sharding.Sharding, *,
                 most: int = 0) -> Batches:
    """Every row of the split once, in order; rows of masked padding fill up the last batch.

    Args:
      split, batch_size, sharding: as for `make_batches`, like the result and the errors.
      most: 0: all rows. Else so many batches, of rows drawn from the whole split, the same in
        every call.
    """
    local, total = _local_rows(split, batch_size, sharding), split.num_rows()

    def host_batch(step: int) -> Rows:
        g = step * batch_size + local
        rows, inside = empty(split.fields, len(g)), g < total
        chosen = eval_rows(split, g, most)
        for name, values in split.rows(chosen).items() if len(chosen) else ():
            rows[name][inside] = values
        return rows

    steps = -(-total // batch_size)
    return _device_batches(split, host_batch, range(min(most or steps, steps)), batch_size,
                           sharding, local)


def eval_rows(split: Split, g: np.ndarray, most: int) -> np.ndarray:
    """The rows of the split that are numbers `g` of an evaluation; none for its padding."""
    total = split.num_rows()
    g = g[g < total]
    return permute(g, total, key_of("eval")) if most and len(g) else g


def _local_rows(split: Split, batch_size: int, sharding: jax.sharding.Sharding) -> np.ndarray:
    """`local_rows` of a batch, the same for every field; checks the shapes of all fields."""
    return [local_rows((batch_size, length), sharding) for length in set(split.fields.values())][0]


def local_rows(shape: tuple[int, int], sharding: jax.sharding.Sharding) -> np.ndarray:
    """The rows of a global batch that this process's devices hold; int64, ascending."""
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        axes = str(sharding)
        if isinstance(sharding, jax.sharding.NamedSharding):
            axes = f"{sharding.spec} on {dict(sharding.mesh.shape)}"
        raise UserError(f"multiples of the axes that split them ({axes})", shape,
                        "change them or the mesh",
                        where="batch_size, seq_len") from error
    return rows_of(sharding.addressable_devices_indices_map(shape).values(), shape[0])


def rows_of(indices: Iterable[tuple[slice, ...] | None], batch_size: int) -> np.ndarray:
    """The rows that any of these (batch, seq) pairs of slices covers; int64, ascending."""
    wanted = np.zeros(batch_size, bool)
    for index in indices:
        wanted[index[0] if index else slice(None)] = True
    return np.flatnonzero(wanted)


def to_global(rows: Rows, batch_size: int, sharding: jax.sharding.Sharding,
              local: np.ndarray) -> Batch:
    """Global arrays [batch_size, length] from this process's rows, whose numbers are `local`."""
    place = np.zeros(batch_size, np.int64)
    place[local] = np.arange(len(local))

    def shard(values: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        begin, stop, _ = index[0].indices(batch_size)
        return values[place[begin] : place[begin] + stop - begin, index[1]]

    return {name: jax.make_array_from_callback((batch_size, values.shape[1]), sharding,
                                               functools.partial(shard, values))
            for name, values in rows.items()}


def _device_batches(split: Split, host_batch: HostBatch, steps: range, batch_size: int,
                    sharding: jax.sharding.Sharding, local: np.ndarray) -> Batches:
    feed: type[_TfData | _Thread] = _TfData if split.through_tensorflow else _Thread
    host = feed(host_batch, steps, tuple(split.fields))
    return Batches(host, lambda rows: to_global(rows, batch_size, sharding, local))


class Batches(Iterator[Batch]):
    """Batches in order, until `close` ends the threads that make them.

    Args:
      host: makes the rows of this process.
      place: makes global arrays of them.
    """

    def __init__(self, host: _TfData | _Thread, place: Callable[[Rows], Batch]):
        self._host, self._rows, self._place = host, iter(host), place

    def __next__(self) -> Batch:
        return self._place(next(self._rows))

    def close(self) -> None:
        """Returns when no thread makes batches any more, whether all were taken or not."""
        self._host.close()


class _Thread:
    """host_batch(step) of every step, made ahead in a thread, for data that needs no TensorFlow."""

    def __init__(self, host_batch: HostBatch, steps: range, names: tuple[str, ...]):
        self._queue: queue.Queue[Rows | Exception | None] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        args = (host_batch, steps, self._queue, self._stop)
        threading.Thread(target=self._work, args=args, name="lmjax-data", daemon=True).start()

    @staticmethod
    def _work(host_batch: HostBatch, steps: range, out: queue.Queue[Rows | Exception | None],
              stop: threading.Event) -> None:
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
        except Exception as error:  # `__iter__` raises it again
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
    """The same by tf.data: `host_batch` mapped over Dataset.range, deterministic and prefetched."""

    def __init__(self, host_batch: HostBatch, steps: range, names: tuple[str, ...]):
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError("TensorFlow, which feeds rows of text", "none",
                            "pip install tensorflow-cpu, or train on synthetic data",
                            where="data.sources")
        self._error: list[Exception] = []
        self._made: Future[tuple[Any, Any]] = Future()  # the iterator, and what `close` sets
        self._names = names
        args = (self._made, self._error, host_batch, steps, names)
        # In a thread: importing TensorFlow takes seconds, during which the model can compile.
        threading.Thread(target=self._work, args=args, name="lmjax-data", daemon=True).start()

    @staticmethod
    def _work(made: Future[tuple[Any, Any]], errors: list[Exception], host_batch: HostBatch,
              steps: range, names: Sequence[str]) -> None:
        try:
            data, going = _dataset(errors, host_batch, steps, names)
            made.set_result((data.as_numpy_iterator(), going))
        except Exception as error:
            made.set_exception(error)

    def __iter__(self) -> Iterator[Rows]:
        while (values := self._take()) is not None:
            yield dict(zip(self._names, values, strict=True))

    def _take(self) -> Sequence[np.ndarray] | None:
        iterator, _ = self._made.result()
        try:
            return next(iterator)
        except StopIteration:
            return None
        except Exception:
            if self._error:  # the exception of host_batch instead of TensorFlow's
                raise self._error[0] from None
            raise

    def close(self) -> None:
        """Ends the sequence and takes what is left of it: then no thread of tf.data calls Python.

        One that did while the interpreter ends would abort the process or hang it.
        """
        try:
            iterator, going = self._made.result()
        except Exception:  # there is no iterator; `__iter__` has raised why
            return
        going.assign(False)
        for _ in range(2 * PREFETCH):  # those made ahead, and the one being made
            try:
                next(iterator)
            except StopIteration:
                return
            except Exception:  # of a batch that nobody wants
                continue


def _dataset(errors: list[Exception], host_batch: HostBatch, steps: range,
             names: Sequence[str]) -> tuple[Any, Any]:
    """The tf.data.Dataset of host_batch(step), and a tf.Variable that ends it when set to False.

    It appends an exception of `host_batch` to `errors`.
    """
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

    types = [tf.as_dtype(dtype_of(name)) for name in names]
    going = tf.Variable(True)
    data = tf.data.Dataset.range(steps.start, steps.stop).take_while(lambda _: going)
    data = data.map(lambda step: tf.numpy_function(call, [step], types, stateful=False))
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1  # the cores belong to XLA
    options.threading.max_intra_op_parallelism = 1
    return data.prefetch(PREFETCH).with_options(options), going
