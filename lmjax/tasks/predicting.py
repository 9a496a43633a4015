"""What a trained model answers to examples of its task: each has a row of its own.

The compiled program runs over its rows in passes of a fixed shape, as in `decoding.scoring`, so an
answer does not depend on the other examples.

Shape suffixes: B rows, T sequence, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.reading import Reader
from lmjax.data.rows import Rows, empty
from lmjax.decoding.generate import Generator, jit_on, size
from lmjax.decoding.scoring import LENGTH, ROWS, TOKENS, in_passes
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout
from lmjax.tasks.classification import Classification
from lmjax.tasks.rows import side_of
from lmjax.tasks.task import Answer, Facts, Predicted, Record, Sizes, Task
from lmjax.tasks.templates import columns_of
from lmjax.tasks.writing import WritingTask, write_texts

Arrays = dict[str, jax.Array]
Columns = Mapping[str, np.ndarray]
PAIR = " pair"  # the column of a second text, where the task names none


class Ready(NamedTuple):
    """An example that the model can read."""

    id: str
    record: Record
    windows: tuple[Columns, ...] = ()  # its columns, a row per window
    prompt: Sequence[int] = ()  # of a task that writes text


def ready(task: Task, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
          name: str = "") -> Ready:
    """An example as the model reads it; it needs nothing of what is to be predicted.

    Raises:
      UserError: the record lacks a column, or is no example for another reason.
    """
    if not isinstance(record, Mapping):
        raise UserError("a record: a dict with columns", type(record).__name__,
                        "pass a list of dicts", where=name)
    try:
        if isinstance(task, WritingTask):
            return Ready(name, record, prompt=task.prompt(record, reader, sizes))
        encoded = task.encode(record, reader, facts, sizes, labelled=False)
    except UserError as error:
        raise UserError(error.expected, error.got, error.fix, where=error.where or name) from None
    return Ready(name, record, (encoded.columns, *encoded.more))


class Predictor:
    """Answers examples of a task.

    Args:
      task, facts: that the model was trained for.
      model: with the head of the task.
      layout: of its parameters.
      reader: how it reads texts.
      sizes: the most tokens of an example; longer ones are cut as in training.
      writer: writes the answers of a task that has texts as answers.
    """

    def __init__(self, task: Task, facts: Facts, model: Model, layout: Layout, reader: Reader,
                 sizes: Sizes, writer: Generator):
        self.task, self.facts, self.reader, self.sizes = task, facts, reader, sizes
        self.model, self.writer = model, writer
        whole = {"out_shardings": layout.replicated}
        evaluated = task.eval_loss(model, facts)
        self._extra = jit_on(layout, functools.partial(
            _by_row, lambda params, batch: evaluated(params, batch, None).extra), **whole)
        self._logits = jit_on(layout, functools.partial(
            _by_row, functools.partial(_read_logits, model)), **whole)

    def example(self, record: Record, name: str = "", task: Task | None = None) -> Ready:
        """An example as the model reads it: see `ready`."""
        return ready(task or self.task, record, self.reader, self.facts, self.sizes, name=name)

    def answers(self, params: Params, examples: Sequence[Ready]) -> list[Answer]:
        """The answers to examples, in order."""
        if isinstance(self.task, WritingTask):
            return self._written(self.task, params, examples)
        found = iter(self._run(self._extra, params, examples))
        return [self.task.answer(Predicted(example.id, example.record, next(found), tuple(
            itertools.islice(found, len(example.windows) - 1))), self.facts)
                for example in examples]

    def _written(self, task: WritingTask, params: Params,
                 examples: Sequence[Ready]) -> list[Answer]:
        found = []
        for at in range(0, len(examples), ROWS):
            part = examples[at : at + ROWS]
            texts = write_texts(task, self.writer, params, self.reader, [e.prompt for e in part])
            found += [task.answer(Predicted(e.id, e.record, {}, text=text), self.facts)
                      for e, text in zip(part, texts, strict=True)]
        return found

    def classify(self, params: Params, texts: Sequence[str],
                 pairs: Sequence[str] | None) -> list[Answer]:
        """The classes of texts, or of pairs of texts: see `LM.classify`."""
        task = self.task
        if not isinstance(task, Classification):
            raise UserError("a model that classifies texts", f"one for the task {task.name}",
                            "use lm.predict(records)")
        if pairs is not None and not task.pair:
            task = dataclasses.replace(task, pair=f"{{{PAIR}}}")
        if task.pair and len(pairs or ()) != len(texts):
            raise UserError(f"{len(texts)} second texts, one per text", len(pairs or ()),
                            "pass them", where="pairs")
        task.check(self.model.config)
        columns = [columns_of(template) for template in (task.input, task.pair) if template]
        names = [name for part in columns for name in part]
        if len(names) > len(columns) or len(set(names)) < len(names):
            raise UserError("a task that reads one column per text", " and ".join(names),
                            "use lm.predict(records)")
        rows = zip(texts, pairs or (), strict=True) if task.pair else ((text,) for text in texts)
        examples = [self.example(dict(zip(names, row, strict=True)), task=task) for row in rows]
        return [task.classified(arrays["row_logits"], self.facts)
                for arrays in self._run(self._logits, params, examples)]

    def _run(self, run: Callable[..., Arrays], params: Params,
             examples: Sequence[Ready]) -> list[dict[str, np.ndarray]]:
        """Per window, the arrays that `run` gives at its tokens; `row_...` of its whole row."""
        windows = [window for example in examples for window in example.windows]
        out: list[dict[str, np.ndarray]] = [{} for _ in windows]
        for part, batch in _batches(windows):
            found = jax.device_get(run(params, batch, np.int32(len(part))))
            for i, at in enumerate(part):
                length = len(windows[at]["tokens"])
                out[at] = {name: values[i] if name.startswith("row_") else values[i, :length]
                           for name, values in found.items()}
        return out


def _batches(windows: Sequence[Columns]) -> Iterator[tuple[list[int], Rows]]:
    """Puts windows of like lengths together: (their numbers, the batch)."""
    groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for i, columns in enumerate(windows):
        groups.setdefault(tuple(_lengths(columns).items()), []).append(i)
    for group, members in sorted(groups.items()):
        lengths = dict(group)
        count = max(1, min(ROWS, TOKENS // max(lengths.values())))
        for at in range(0, len(members), count):
            part = members[at : at + count]
            yield part, _rows([windows[i] for i in part], lengths, count)


def _lengths(columns: Columns) -> dict[str, int]:
    """How long the row of a window is, per side: one of few lengths."""
    found = {side_of(column): len(values) for column, values in columns.items()}
    return {side: n if side == "label_" else size(n, LENGTH) for side, n in found.items()}


def _rows(windows: Sequence[Columns], lengths: Mapping[str, int], rows: int) -> Rows:
    """A batch of windows, each in its row; further rows are padding."""
    of_side = {side_of(column): column for column in windows[0] if side_of(column) != "label_"}
    fields = {column: lengths[side_of(column)] for column in windows[0]}
    for side in of_side:
        fields |= {f"{side}positions": lengths[side], f"{side}segment_ids": lengths[side]}
    out = empty(fields, rows)
    for i, columns in enumerate(windows):
        for column, values in columns.items():
            out[column][i, : len(values)] = values
        for side, column in of_side.items():
            n = len(columns[column])
            out[f"{side}positions"][i, :n] = np.arange(n)
            out[f"{side}segment_ids"][i, :n] = 1
    return out


def _by_row(run: Callable[[Params, Batch], Arrays], params: Params, batch: Batch,
            count: jax.Array) -> Arrays:
    """The arrays that `run` gives for the first `count` rows of a batch."""
    def part(rows: Batch) -> Arrays:
        n = rows["tokens"].shape[0]
        return {name: values for name, values in run(params, rows).items()
                if values.ndim and values.shape[0] == n}

    return in_passes(part, batch, count)


def _read_logits(model: Model, params: Params, batch: Batch) -> Arrays:
    """The logits [B, C] at the one position of each row that counts."""
    logits_BTC: Any = model.logits(params, batch)
    return {"row_logits": jnp.einsum("BTC,BT->BC", logits_BTC, batch["loss_mask"])}
