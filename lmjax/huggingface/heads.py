"""The classes of `transformers` that have the head of a task: what config.json says of it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmjax.errors import UserError
from lmjax.huggingface.schema import HeadType, ModelType, Setting
from lmjax.huggingface.tables import both
from lmjax.huggingface.weights import Stored, Table
from lmjax.models.decoder import DecoderConfig
from lmjax.models.encoder import EncoderConfig
from lmjax.models.model import ModelConfig

# The task -> how the names of its classes end.
SUFFIXES = {"classification": "ForSequenceClassification", "tagging": "ForTokenClassification",
            "questions": "ForQuestionAnswering"}
KINDS = {"single_label_classification": "single", "multi_label_classification": "multi",
         "regression": "regression"}  # problem_type -> the kind of a classification
# Settings that speak of the head: an export writes them anew.
HEAD_SETTINGS = ("id2label", "label2id", "problem_type", "num_labels", "_num_labels",
                 "finetuning_task", "classifier_dropout")


class TaskHead(NamedTuple):
    """What config.json says of the head of a task."""

    task: str  # a key of `SUFFIXES`
    labels: tuple[str, ...]  # the names of its outputs, in order
    kind: str = ""  # of a classification: single, multi or regression
    dropout: float = 0.0  # before its last matrix


def linear(theirs: str) -> Table:
    """The rows of a matrix and a bias."""
    return {"task_head/table": Stored(f"{theirs}.weight"),
            "task_head/bias": Stored(f"{theirs}.bias")}


def decoder_heads(stem: str, *, tagging: str = "score", only: tuple[str, ...] = tuple(SUFFIXES),
                  prefix: str = "") -> dict[str, HeadType]:
    """The heads of a decoder.

    Args:
      stem: with which the names of its classes begin.
      tagging: their name of the matrix of the tags.
      only: the tasks for which there is a class.
      prefix: of the other tensors of the class for questions, where that is another.
    """
    found = {
        "classification": HeadType(stem + SUFFIXES["classification"], "plain",
                                   {"task_head/table": Stored("score.weight")}),
        "tagging": HeadType(stem + SUFFIXES["tagging"], "linear", linear(tagging)),
        "questions": HeadType(stem + SUFFIXES["questions"], "linear", linear("qa_outputs"),
                              prefix)}
    return {task: found[task] for task in only}


def encoder_heads(stem: str, dense: str, out: str,
                  pooler: str = "pooler") -> dict[str, HeadType]:
    """The heads of BERT and its kin.

    Args:
      stem: with which the names of its classes begin.
      dense: their name of the first matrix of a classification.
      out: their name of the second.
      pooler: the kind of a classification, of `lmjax.models.heads.POOLERS`.
    """
    return {
        "classification": HeadType(
            stem + SUFFIXES["classification"], pooler,
            {**both("task_head/dense", dense, "out,in"), **linear(out)}),
        "tagging": HeadType(stem + SUFFIXES["tagging"], "linear", linear("classifier")),
        "questions": HeadType(stem + SUFFIXES["questions"], "linear", linear("qa_outputs"))}


MODERNBERT_HEADS = {
    task: HeadType(f"ModernBert{suffix}", "transform", linear("classifier"),
                   settings=(Setting("classifier_pooling", "", "cls"),)
                   if task == "classification" else ())
    for task, suffix in SUFFIXES.items()}


def with_head(model_type: ModelType, head: TaskHead) -> ModelType:
    """The model type of the class that has `head`.

    Raises:
      ValueError: there is no such class; the message names what is missing.
    """
    found = model_type.heads.get(head.task)
    if found is None:
        raise ValueError(f"a head for {head.task}")
    fixed = {**model_type.fixed, "head.outputs": len(head.labels), "head.kind": found.kind,
             "head.dropout": head.dropout}
    if model_type.config is EncoderConfig:
        fixed |= {"mlm_head": found.kind == "transform", "pooler": found.kind == "pooler"}
    prefix = found.prefix or model_type.prefix
    table = {ours: _renamed(row, model_type.prefix, prefix)
             for ours, row in model_type.table.items()}
    used = {row.theirs for row in found.table.values()}
    unused = [re.escape(row.theirs) for ours, row in table.items()  # older files hold them
              if ours.startswith("pooler/") and row.theirs not in used]
    return dataclasses.replace(
        model_type, architecture=found.architecture, table={**table, **found.table}, fixed=fixed,
        settings=model_type.settings + found.settings, prefix=prefix, tied=(),
        ignore=(*model_type.ignore, *unused),
        present={name: told for name, told in model_type.present.items() if name not in fixed})


def normal_form(c: ModelConfig) -> dict[str, Any]:
    """What a model with a head has in place of fields that only its unembedding would use."""
    kind = c.head.kind
    changes: dict[str, Any] = {"head": dataclasses.replace(c.head, dropout=0.0, first_dropout=0.0),
                               "tie_embeddings": True, "logit_softcap": 0.0}
    if isinstance(c, DecoderConfig):
        changes |= {"logit_divisor": 1.0, "output_bias": False}
    if isinstance(c, EncoderConfig):
        changes |= {"mlm_head": kind == "transform", "pooler": kind == "pooler",
                    "head_activation": c.head_act if kind == "transform" else "gelu"}
    return changes


def read_head(settings: Mapping[str, Any], model_type: ModelType, where: str) -> TaskHead | None:
    """The head that a config.json speaks of; None without one.

    Raises:
      UserError: lmjax does not compute it, or its labels contradict each other.
    """
    names = settings.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    task = next((task for task, suffix in SUFFIXES.items() if name.endswith(suffix)), None)
    if task is None:
        return None
    known = [model_type.architecture, *(head.architecture for head in model_type.heads.values())]
    if name not in known:
        raise UserError(f"a class that lmjax computes ({', '.join(known)})", name,
                        "take another model", where)
    labels = _labels(settings, where)
    kind = _kind(settings, labels, where) if task == "classification" else ""
    if task == "questions" and len(labels) != 2:
        raise UserError("two labels, for the start and the end of an answer", len(labels),
                        "take another model", where)
    return TaskHead(task, labels, kind, _dropout(settings, model_type.heads[task].kind))


def head_settings(head: TaskHead) -> dict[str, Any]:
    """The settings of config.json from which `read_head` reads `head`."""
    back = {kind: problem for problem, kind in KINDS.items()}
    return {"id2label": {str(i): label for i, label in enumerate(head.labels)},
            "label2id": {label: i for i, label in enumerate(head.labels)},
            "problem_type": back.get(head.kind), "classifier_dropout": head.dropout}


def told_twice(settings: Mapping[str, Any]) -> list[str]:
    """Which decides where id2label and label2id contradict each other, as a line."""
    labels, back = (settings.get(name) for name in ("id2label", "label2id"))
    if not (isinstance(labels, dict) and isinstance(back, dict) and labels and back):
        return []
    same = {str(label): str(i) for i, label in labels.items()} == {
        str(label): str(i) for label, i in back.items()}
    return [] if same else ["id2label decides over label2id, which names other labels"]


def _labels(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    named = settings.get("id2label")
    count = settings.get("num_labels", settings.get("_num_labels"))
    if not named:
        count = 2 if count is None else count
        if not isinstance(count, int) or count < 1:
            raise UserError("num_labels of at least 1", repr(count), "correct it", where)
        return tuple(f"LABEL_{i}" for i in range(count))
    keys = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not isinstance(named, dict) or sorted(map(str, named)) != sorted(keys) or not all(
            isinstance(label, str) for label in named.values()):
        raise UserError("id2label with a name for each of 0, 1, ...", f"{named!r:.80}",
                        "correct it", where)
    labels = tuple({str(i): label for i, label in named.items()}[key] for key in keys)
    if len(set(labels)) < len(labels):
        raise UserError("different labels in id2label", f"{list(labels)!r:.80}",
                        "give each a name of its own", where)
    if count not in (None, len(labels)):
        raise UserError(f"num_labels={len(labels)}, as id2label says", repr(count),
                        "remove the one that is wrong", where)
    return labels


def _kind(settings: Mapping[str, Any], labels: tuple[str, ...], where: str) -> str:
    """The kind of a classification."""
    problem = settings.get("problem_type")
    if problem is None:
        return "regression" if len(labels) == 1 else "single"
    if problem not in tuple(KINDS):
        raise UserError(f"problem_type to be one of {', '.join(KINDS)}", f"{problem!r:.60}",
                        "correct it", where)
    if (problem == "regression") > (len(labels) == 1) or (
            problem == "single_label_classification" and len(labels) == 1):
        raise UserError("one label for a regression, and several for other classes",
                        f"{len(labels)} with problem_type={problem}", "take another model", where)
    return KINDS[problem]


def _dropout(settings: Mapping[str, Any], kind: str) -> float:
    """That of the class: a plain head has none, ModernBERT's none by default."""
    if kind == "plain":
        return 0.0
    own = settings.get("classifier_dropout")
    default = 0.0 if kind == "transform" else settings.get("hidden_dropout_prob", 0.1)
    return float(default if own is None else own)


def _renamed(row: Stored, old: str, new: str) -> Stored:
    """A row whose tensors have another prefix."""
    def other(name: str) -> str:
        return new + name.removeprefix(old) if old and name.startswith(old) else name

    return row._replace(theirs=other(row.theirs), first=other(row.first))
