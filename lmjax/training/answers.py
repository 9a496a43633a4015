"""What a model answers to the held-out examples of a task, and the figures of its answers."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from lmjax.data.batches import eval_rows
from lmjax.data.pipeline import Split
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.runtime.files import write_whole
from lmjax.tasks.rows import ExampleRows
from lmjax.tasks.task import Facts, Predicted, Task
from lmjax.tasks.writing import WritingTask, write_texts
from lmjax.training.run import Run
from lmjax.training.task_data import sizes_of

Parts = list[Predicted]
Each = Callable[[Iterator[Parts]], Iterator[Parts]]  # passes on what it is given, and may stop it


class Answers:
    """Collects what an evaluation gives for each example, batch by batch.

    Args:
      task, facts: of the run.
      split: what is evaluated.
      batch_size: rows per batch.
      most: as for `data.batches.eval_batches`.
      asks_all: whether a model that writes texts answers every example, or `task.asked` ones.
    """

    def __init__(self, task: Task, facts: Facts, split: Split, *, batch_size: int, most: int,
                 asks_all: bool = False):
        self.task, self.facts, self.split, self.asks_all = task, facts, split, asks_all
        self._batch_size, self._most = batch_size, most
        self._batches: list[dict[str, jax.Array]] = []

    def __call__(self, sums: Loss) -> None:
        """Takes what the evaluation step gave for the next batch."""
        self._batches.append(sums.extra)
        for extra in self._batches[-3:-2]:  # two batches may still be on their way
            extra |= jax.device_get(extra)

    def predicted(self) -> list[Predicted]:
        """The examples, in the order in which they were evaluated, each with all its windows."""
        found: dict[tuple[int, int], Predicted] = {}  # by source and record
        for step, extra in enumerate(self._batches):
            arrays = {name: np.asarray(values) for name, values in extra.items()}
            g = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
            rows = eval_rows(self.split, g, self._most)
            sources, _, packed = self.split.locate(rows)
            for i, (source, row) in enumerate(zip(sources, packed, strict=True)):
                for record, its in _in_row(cast(ExampleRows, self.split.sources[source]), int(row),
                                           i, arrays):
                    first = found.setdefault((int(source), record), its)
                    if first is not its:
                        found[int(source), record] = first._replace(
                            more=(*first.more, its.arrays))
        return list(found.values())

    def figures(self, path: Path,
                write: Callable[[WritingTask, Parts], Parts]) -> dict[str, float]:
        """The metrics of the answers; process 0 writes the answers themselves to `path`.

        Args:
          path: a file.
          write: gives examples the texts that the model writes, as `written` does.
        """
        predicted = self.predicted()
        found: dict[str, float] = {"examples": len(predicted)}
        if isinstance(self.task, WritingTask):
            predicted = write(self.task,
                              predicted if self.asks_all else self.task.asked(predicted))
            found["answered"] = len(predicted)
        if jax.process_index() == 0:
            self.write(path, predicted)
        return self.task.metrics(predicted, self.facts) | found

    def write(self, path: Path, predicted: Sequence[Predicted]) -> None:
        """Writes one line of JSON per example: its id, what the file had, and the answer."""
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"id": p.id, "answer": self.task.answer(p, self.facts),
                             "truth": self.task.truth(p.record), "record": p.record},
                            ensure_ascii=False) for p in predicted]
        write_whole(path, "".join(f"{line}\n" for line in lines))


def answers_of(run: Run, split: Split, batch_size: int, most: int) -> Answers | None:
    """What collects the answers of an evaluation; None without a task."""
    if not isinstance(run.recipe.task, Task) or run.facts is None:
        return None
    return Answers(run.recipe.task, run.facts, split, batch_size=batch_size, most=most,
                   asks_all=split is run.test)


def written(run: Run, params: Params, task: WritingTask, examples: Parts,
            each: Each = iter) -> Parts:
    """Gives examples the texts that the model of a run writes for them.

    Args:
      run: with a tokenizer.
      params: of its model.
      task: says what the model reads.
      examples: to be answered; a text does not depend on the other examples.
      each: is given the batches of examples.
    """
    reader, sizes = run.reader, sizes_of(run.recipe)
    size, found = run.recipe.eval.batch_size or run.recipe.train.batch_size, Parts()
    for part in each(examples[at : at + size] for at in range(0, len(examples), size)):
        prompts = [task.prompt(example.record, reader, sizes) for example in part]
        texts = write_texts(task, run.writer, params, reader, prompts)
        found += [example._replace(text=text)
                  for example, text in zip(part, texts, strict=True)]
    return found


def _in_row(source: ExampleRows, row: int, i: int,
            arrays: dict[str, np.ndarray]) -> list[tuple[int, Predicted]]:
    """The examples in a packed row of a source, each after the number of its record.

    The row is row `i` of the arrays of its batch.
    """
    found = []
    for example, start, length in source.places(row):
        its: dict[str, Any] = {
            name: values[i] if name.startswith("row_") else values[i, start : start + length]
            for name, values in arrays.items()}
        record = int(source.record_E[example])
        found.append((record, Predicted(source.ids[example], source.records[record], its)))
    return found
