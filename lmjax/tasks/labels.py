"""The classes of a task: their names, which of them have examples, and the number of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmjax.errors import UserError
from lmjax.tasks.templates import as_text


def check_different(labels: Sequence[str]) -> None:
    """Raises a UserError if `labels` of a config name a class twice."""
    if len(set(labels)) < len(labels):
        raise UserError("different labels", list(labels), "name each once", where="labels")


def check_examples(labels: Sequence[str], counts: Mapping[str, int]) -> None:
    """Raises a UserError if a class has no training example; `counts`: the examples of each."""
    empty = [label for label in labels if not counts.get(label)]
    if empty:
        raise UserError("a training example of every class", f"none of {empty[0]!r}",
                        "add some, or take the class out of task.labels",
                        where="config.task.labels")


def name_of(label: Any, labels: Sequence[str]) -> str:
    """The class that a record names, or whose number it has in `labels`, the names of a config.

    Raises:
      UserError: it names none.
    """
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if is_number and str(label) not in labels and 0 <= label < len(labels):
        return labels[label]
    text = as_text(label)
    if not text.strip() or label != label:  # empty, or NaN
        raise UserError("a class", repr(label), "correct the record")
    return text


def index_of(label: Any, labels: Sequence[str]) -> int:
    """The number of a class that a record names.

    Raises:
      UserError: there is no such class.
    """
    text = as_text(label)
    if text not in labels:
        raise UserError(f"one of the labels {', '.join(labels)[:200]}", repr(text)[:60],
                        "correct the record, or name the class in task.labels")
    return labels.index(text)
