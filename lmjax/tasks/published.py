"""Tasks of models in Hugging Face directories, in and out."""

from __future__ import annotations

from typing import Any, NamedTuple

from lmjax.errors import UserError
from lmjax.huggingface import TaskHead
from lmjax.models.heads import HeadConfig
from lmjax.models.model import ModelConfig
from lmjax.tasks.classification import Classification
from lmjax.tasks.entities import is_iob2
from lmjax.tasks.questions import Questions
from lmjax.tasks.tagging import Tagging
from lmjax.tasks.task import Facts


class Published(NamedTuple):
    """The task of an imported model, as its recipe and its checkpoint say it."""

    task: dict[str, Any]  # the group `task` of a recipe
    facts: Facts | None  # what a run would keep of its training examples; None without a task


def imported_task(head: TaskHead | None, model: ModelConfig) -> Published:
    """What the head of an imported model was trained for, if lmjax has that task for the model."""
    if head is None or (head.task == Questions.name and model.family != "encoder"):
        return Published({}, None)
    task: dict[str, Any] = {"name": head.task}
    if head.task == Questions.name:
        # No file says whether some questions had no answer. So the likelihood of none decides, as
        # in pipelines of transformers with handle_impossible_answer.
        return Published(task, {"unanswerable": True})
    if head.kind == "regression":
        return Published({**task, "kind": head.kind}, {})
    labels = list(head.labels)
    facts = {"labels": labels, "counts": [0] * len(labels)}
    if head.task == Tagging.name:
        scheme = "iob2" if is_iob2(labels) else "none"
        return Published({**task, "labels": labels}, {**facts, "scheme": scheme})
    return Published({**task, "kind": head.kind, "labels": labels}, facts)


def exported_head(task: object, facts: Facts, head: HeadConfig) -> TaskHead:
    """What a Hugging Face directory says of the head of a task.

    Raises:
      UserError: `transformers` has no class for the task.
    """
    if not isinstance(task, Classification | Tagging | Questions):
        raise UserError("classification, tagging or questions, for which transformers has classes",
                        f"the task {getattr(task, 'name', '') or 'of another head'}",
                        "keep lmjax's own checkpoint", where="task.name")
    labels = facts.get("labels", [f"LABEL_{i}" for i in range(head.outputs)])
    kind = task.kind if isinstance(task, Classification) else ""
    return TaskHead(task.name, tuple(labels), kind, head.dropout)
