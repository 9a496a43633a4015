"""The engine of the stages on Apache Beam: Dataflow, Flink, Spark, or Beam's own runner on one machine.

It does what `engine.Engine` does, to the same bytes: Beam runs the maps, and its shuffle brings the records of a range
of keys together. Shards are read and written where the stages lie, so every worker has to see that folder under one
path, and to have lmjax installed.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lmjax.data.preparation.engine import Engine, Log, sample_keys


class BeamEngine(Engine):
    """Stages in one folder, run by Beam.

    Args:
      folder: where the stages lie: seen by all workers.
      options: of Beam's pipeline, such as `--runner=FlinkRunner`.
      workers, memory_mib: ranges of keys are cut so that so many at once take so much.
      log: called with each line of progress.
    Raises:
      ValueError: Beam is not installed.
    """

    def __init__(self, folder: str, *, options: Sequence[str], workers: int = 0, memory_mib: int = 2048,
                 log: Log = print):
        super().__init__(folder, workers=workers, memory_mib=memory_mib, log=log)
        self.options = tuple(options)
        try:
            import apache_beam  # noqa: F401
        except ImportError as error:
            raise ValueError(f"data.curate.beam: expected Apache Beam, got none ({error}); pip install lmjax[beam], or "
                             "leave it empty") from error

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """[function(item) for item in items], in Beam's workers; both have to be picklable."""
        results = os.path.join(self.folder, ".results")  # a pipeline returns nothing: its workers leave files
        os.makedirs(results, exist_ok=True)
        try:
            self._run(list(enumerate(items)), functools.partial(_keep, function, results))
            found = []
            for i in range(len(items)):
                with open(os.path.join(results, str(i)), "rb") as file:
                    ok, result = pickle.load(file)
                if not ok:
                    raise result
                found.append(result)
        finally:
            shutil.rmtree(results)
        return found

    def group(self, emit: Callable[[Any], np.ndarray], items: Sequence[Any],
              reduce: Callable[[np.ndarray], np.ndarray], folder: str) -> list[str]:
        """See `Engine.group`. Records are made twice: to find the ranges of keys, and to go through the shuffle."""
        os.makedirs(folder, exist_ok=True)
        samples = self.map(functools.partial(_sample, emit), items)
        ranges = self.ranges([keys for keys, _ in samples], sum(size for _, size in samples), folder)
        self._run(list(enumerate(items)), functools.partial(_pieces, emit, [low for low, _, _ in ranges]),
                  functools.partial(_reduce, reduce, [path for _, _, path in ranges]))
        return [path for _, _, path in ranges]

    def _run(self, items: Sequence[Any], each: Callable[[Any], Iterable],
             by_key: Callable[[Any], None] | None = None) -> None:
        """Calls `each` on all items, and `by_key`, if there is one, on the pairs that it gives: (key, its values)."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
            made = pipeline | beam.Create(items) | beam.Reshuffle() | beam.FlatMap(each)
            if by_key:
                made | beam.GroupByKey() | beam.Map(by_key)


def _keep(function: Callable[[Any], Any], results: str, task: tuple[int, Any]) -> Iterable[None]:
    number, item = task
    try:
        result = True, function(item)
    except Exception as error:  # handed to the one who asked, whatever it is
        result = False, error
    path = os.path.join(results, str(number))
    with open(f"{path}.{os.getpid()}", "wb") as file:
        pickle.dump(result, file)
    os.replace(f"{path}.{os.getpid()}", path)  # whole, also where Beam does a piece of work twice
    return ()


def _sample(emit: Callable[[Any], np.ndarray], item: Any) -> tuple[np.ndarray, int]:
    rows = emit(item)
    return sample_keys(np.sort(rows[0])), rows.nbytes


def _pieces(emit: Callable[[Any], np.ndarray], lows: Sequence[int],
            task: tuple[int, Any]) -> Iterator[tuple[int, tuple[int, np.ndarray]]]:
    """(number of the range, (number of the item, its records there)), for all ranges, also where there are none."""
    number, item = task
    rows = emit(item)
    rows = rows[:, np.argsort(rows[0], kind="stable")]
    cuts = np.searchsorted(rows[0], np.array(lows[1:], np.uint64))
    for part, piece in enumerate(np.split(rows, cuts, axis=1)):
        yield part, (number, np.ascontiguousarray(piece))


def _reduce(reduce: Callable[[np.ndarray], np.ndarray], paths: Sequence[str],
            task: tuple[int, Iterable[tuple[int, np.ndarray]]]) -> None:
    part, pieces = task
    rows = np.concatenate([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], axis=1)
    np.save(paths[part], reduce(rows[:, np.argsort(rows[0], kind="stable")]))
