"""The engine on Apache Beam: Dataflow, Flink, Spark, or Beam's own runner on one machine.

It makes the same bytes as `engine.Engine`. Beam runs the maps, and Beam's shuffle brings the
records of a range of keys together. Shards are read and written in the folder of the stages, so
every worker must see that folder under the same path and have lmjax installed.
"""

from __future__ import annotations

import functools
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lmjax.data.preparation.engine import Engine, Log, sample_keys, sort_by_key
from lmjax.errors import UserError


class BeamEngine(Engine):
    """Runs stages in one folder with Beam.

    Args:
      folder: where the folders of the stages are; all workers must see it.
      options: of Beam's pipeline, such as `--runner=FlinkRunner`.
      workers: how many ranges of keys may be in memory at once.
      memory_mib: limit for the records of these ranges together.
      log: called with each line of progress.
    Raises:
      UserError: Beam is not installed.
    """

    def __init__(self, folder: str, *, options: Sequence[str], workers: int = 0,
                 memory_mib: int = 2048, log: Log = print):
        super().__init__(folder, workers=workers, memory_mib=memory_mib, log=log)
        self.options = tuple(options)
        try:
            import apache_beam  # noqa: F401
        except ImportError as error:
            raise UserError("Apache Beam", f"none ({error})",
                            "pip install lmjax[beam], or leave it empty",
                            where="data.curate.beam") from error

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Returns `[function(item) for item in items]`, computed by Beam's workers."""
        # A pipeline returns nothing, so the workers write files.
        results = os.path.join(self.folder, ".results")
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
        """See `Engine.group`.

        Calls `emit` twice per item: once to cut the keys into ranges, once to shuffle the records.
        """
        os.makedirs(folder, exist_ok=True)
        samples = self.map(functools.partial(_sample, emit), items)
        size = sum(size for _, size in samples)
        ranges = self.ranges([keys for keys, _ in samples], size, folder)
        self._run(list(enumerate(items)),
                  functools.partial(_pieces, emit, [low for low, _, _ in ranges]),
                  functools.partial(_reduce, reduce, [path for _, _, path in ranges]))
        return [path for _, _, path in ranges]

    def _run(self, items: Sequence[Any], each: Callable[[Any], Iterable],
             by_key: Callable[[Any], None] | None = None) -> None:
        """Calls `each` on all items, then `by_key` on (key, values) of the pairs it returned."""
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
            made = pipeline | beam.Create(items) | beam.Reshuffle() | beam.FlatMap(each)
            if by_key:
                made | beam.GroupByKey() | beam.Map(by_key)


def _keep(function: Callable[[Any], Any], results: str, task: tuple[int, Any]) -> Iterable[None]:
    """Calls the function on one item and writes its result, or its exception, to a file."""
    number, item = task
    try:
        result = True, function(item)
    except Exception as error:  # raised again by `BeamEngine.map`
        result = False, error
    path = os.path.join(results, str(number))
    with open(f"{path}.{os.getpid()}", "wb") as file:
        pickle.dump(result, file)
    os.replace(f"{path}.{os.getpid()}", path)  # complete even where Beam runs an item twice
    return ()


def _sample(emit: Callable[[Any], np.ndarray], item: Any) -> tuple[np.ndarray, int]:
    """Returns some keys of an item's records, and the size of the records in bytes."""
    rows = emit(item)
    return sample_keys(np.sort(rows[0])), rows.nbytes


def _pieces(emit: Callable[[Any], np.ndarray], lows: Sequence[int],
            task: tuple[int, Any]) -> Iterator[tuple[int, tuple[int, np.ndarray]]]:
    """Yields (range number, (item number, the item's records in that range)) for every range."""
    number, item = task
    rows = sort_by_key(emit(item))
    cuts = np.searchsorted(rows[0], np.array(lows[1:], np.uint64))
    for part, piece in enumerate(np.split(rows, cuts, axis=1)):
        yield part, (number, np.ascontiguousarray(piece))


def _reduce(reduce: Callable[[np.ndarray], np.ndarray], paths: Sequence[str],
            task: tuple[int, Iterable[tuple[int, np.ndarray]]]) -> None:
    part, pieces = task
    rows = np.concatenate([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], axis=1)
    np.save(paths[part], reduce(sort_by_key(rows)))
