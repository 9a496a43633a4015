"""Classification and regression of a text or a pair of texts.

An encoder reads its first token through the pooler or another small head, a decoder its last token
through a matrix. An encoder-decoder writes the name of the class instead: the task `pairs`.

Shape suffixes: B batch, T sequence, C classes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import choice
from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.models.heads import HEAD_KINDS, HeadConfig
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.tasks.labels import check_different, check_examples, index_of, name_of
from lmjax.tasks.losses import LossFn, next_token_loss, tokens_of, with_routers
from lmjax.tasks.reading import read_text
from lmjax.tasks.task import (
    Answer,
    Encoded,
    Facts,
    Predicted,
    Record,
    Sizes,
    Task,
    class_arrays,
)
from lmjax.tasks.templates import check_template, fill, value

MEASURES = {"single": ("accuracy", "f1", "matthews"), "multi": ("f1_micro", "f1", "exact_match"),
            "regression": ("mse", "pearson", "spearman")}
BALANCED = "balanced"


@dataclass(frozen=True)
class Classification(Task):
    """Which text belongs to which class."""

    name: str = "classification"
    input: str = "{text}"  # the text, with columns in braces
    pair: str = ""  # a second text, which an encoder reads after the first
    label: str = "label"  # the column of the class, of a list of classes, or of a number
    kind: str = "single"  # single: one class; multi: any number of them; regression: a number
    labels: tuple[str, ...] = ()  # the classes, in order; (): those of the training examples
    # By class, what an example of it weighs in the loss; {"balanced": 1}: as much as each other's.
    class_weights: dict[str, float] = field(default_factory=dict)
    head_kind: str = ""  # of models.heads; "": the one that suits the model
    head_dropout: float = 0.1

    def __post_init__(self) -> None:
        choice("kind", self.kind, MEASURES)
        choice("head_kind", self.head_kind, ("", *HEAD_KINDS))
        check_template(self.input, "input")
        if self.pair:
            check_template(self.pair, "pair")
        if self.class_weights and self.kind != "single":
            raise UserError("kind=single with class_weights", self.kind, "leave them out",
                            where="class_weights")
        check_different(self.labels)
        for name, weight in self.class_weights.items():
            if not weight > 0:
                raise UserError("more than 0", weight, "raise it", where=f"class_weights.{name}")

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES[self.kind]

    @property
    def packs(self) -> bool:
        return self.kind != "multi"

    @property
    def templates(self) -> dict[str, str]:
        return {"input": self.input, "label": self.label} | (
            {"pair": self.pair} if self.pair else {})

    def check(self, model: ModelConfig) -> None:
        if model.family == "encdec":
            raise UserError("a decoder or an encoder", "an encdec", "let it write the class: "
                            "task.name=pairs, with the label's column as the target",
                            where="task.name")
        if self.pair and model.family == "decoder":
            raise UserError("'' for a decoder", repr(self.pair), "write both texts into task.input",
                            where="task.pair")

    def texts(self, record: Record) -> list[str]:
        return [fill(template, record) for template in (self.input, self.pair) if template]

    def facts(self, records: Iterable[Record]) -> Facts:
        if self.kind == "regression":
            return {}
        counts: Counter[str] = Counter()
        for record in records:
            with contextlib.suppress(UserError):  # told where the record is encoded
                named = self.truth(record)
                counts.update(named if isinstance(named, list) else [named])
        labels = list(self.labels) or sorted(counts, key=_natural)
        check_examples(labels, counts)
        if len(labels) < 2 and self.kind == "single":
            raise UserError("at least two classes", labels, "correct task.label",
                            where="config.task.label")
        unknown = set(self.class_weights) - {*labels, BALANCED}
        if unknown:
            raise UserError(f"classes ({', '.join(labels)}) or {BALANCED}", min(unknown),
                            "correct it", where="config.task.class_weights")
        return {"labels": labels, "counts": [counts[label] for label in labels]}

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        second = fill(self.pair, record) if self.pair else ""
        read = read_text(reader, fill(self.input, record), sizes.tokens, second)
        n, at = len(read.ids), len(read.ids) - 1 if reader.causal else 0
        columns = {"tokens": read.ids, "loss_mask": np.zeros(n, np.int32)}
        columns["loss_mask"][at] = 1
        if self.pair:
            columns["token_types"] = read.types
        truth = value(record, self.label) if labelled else None
        if self.kind == "regression":
            columns["values"] = np.zeros(n, np.float32)
            columns["values"][at] = _number(truth) if labelled else 0.0
        elif self.kind == "multi":
            if labelled:
                self.truth(record)  # refuses what is no list
            several = np.zeros(len(facts["labels"]), np.float32)
            several[[index_of(name_of(label, self.labels), facts["labels"])
                     for label in truth or ()]] = 1.0
            columns["label_values"] = several
        else:
            columns["targets"] = np.zeros(n, np.int32)
            columns["targets"][at] = index_of(name_of(truth, self.labels),
                                              facts["labels"]) if labelled else 0
        return Encoded(columns, read.cut)

    def length_of(self, side: str, sizes: Sizes, facts: Facts) -> int:
        return len(facts["labels"]) if side == "label_" else sizes.tokens

    def head(self, model: ModelConfig, facts: Facts) -> HeadConfig:
        kind = self.head_kind or suitable_head(model)
        # As in transformers: RoBERTa, whose positions have an offset, drops before both matrices.
        twice = kind == "pooler" and model.position_offset > 0
        return HeadConfig(len(facts["labels"]) if facts else 1, kind, self.head_dropout,
                          self.head_dropout if twice else 0.0)

    @property
    def has_targets(self) -> bool:
        return self.kind == "single" and not self.class_weights

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        if self.kind == "regression":
            return regression_loss(model)
        if self.kind == "multi":
            return multi_label_loss(model)
        loss_fn = next_token_loss(model, z_loss=z_loss, chunk=chunk)
        weights = self._weights(facts)
        if weights is None:
            return loss_fn

        def weighted(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            mask_BT = batch["loss_mask"] * jnp.asarray(weights)[batch["targets"]]
            return loss_fn(params, {**batch, "loss_mask": mask_BT}, key)

        return weighted

    def eval_loss(self, model: Model, facts: Facts) -> LossFn:
        if self.kind == "single":
            return class_arrays(model)
        return self.loss(model, facts)

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        if self.kind == "multi":
            p_C = predicted.arrays["row_probabilities"]
            chances = {label: round(float(p), 6)
                       for label, p in zip(facts["labels"], p_C, strict=True)}
            return {"labels": [label for label, p in chances.items() if p > 0.5],
                    "confidence": chances}
        at = int(np.argmax(predicted.arrays["counts"]))
        found = predicted.arrays["predicted"][at]
        if self.kind == "regression":
            return {"value": float(found)}
        return {"label": facts["labels"][int(found)],
                "confidence": round(float(predicted.arrays["confidence"][at]), 6)}

    def classified(self, logits_C: np.ndarray, facts: Facts) -> Answer:
        """Like `answer`, with the probability of every class."""
        if self.kind == "regression":
            return {"value": float(logits_C[0])}
        if self.kind == "multi":
            p_C = 1.0 / (1.0 + np.exp(-logits_C.astype(np.float64)))
        else:
            p_C = np.exp(logits_C - logits_C.max(), dtype=np.float64)
            p_C /= p_C.sum()
        chances = dict(zip(facts["labels"], p_C.tolist(), strict=True))
        if self.kind == "multi":
            return {"labels": [label for label, p in chances.items() if p > 0.5],
                    "probabilities": chances}
        best = max(chances, key=chances.__getitem__)
        return {"label": best, "confidence": chances[best], "probabilities": chances}

    def truth(self, record: Record) -> Any:
        found = value(record, self.label)
        if self.kind == "regression":
            return _number(found)
        if self.kind == "single":
            return name_of(found, self.labels)
        if not isinstance(found, list):
            raise UserError(f"a list of labels under {self.label!r}", repr(found)[:60],
                            "write a list, or set task.kind=single")
        return [name_of(label, self.labels) for label in found]

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        from lmjax.tasks import metrics

        truths = [self.truth(p.record) for p in predicted]
        answers = [self.answer(p, facts) for p in predicted]
        if self.kind == "regression":
            return metrics.regression([a["value"] for a in answers], truths)
        if self.kind == "multi":
            return metrics.multi_label([a["labels"] for a in answers], truths, facts["labels"])
        return metrics.single_label([a["label"] for a in answers], truths, facts["labels"])

    def _weights(self, facts: Facts) -> np.ndarray | None:
        if not self.class_weights:
            return None
        counts = np.array(facts["counts"], np.float64)
        balanced = BALANCED in self.class_weights
        weights = counts.sum() / (len(counts) * counts) if balanced else np.ones(len(counts))
        for i, label in enumerate(facts["labels"]):
            weights[i] = self.class_weights.get(label, weights[i])
        return weights.astype(np.float32)


def suitable_head(model: ModelConfig) -> str:
    """The kind of head that uses most of what a model has learned."""
    if model.family != "encoder":
        return "plain"
    if getattr(model, "pooler", False):
        return "pooler"
    return "transform" if getattr(model, "mlm_head", False) else "linear"


def regression_loss(model: Model) -> LossFn:
    """The squared error of the head's number where `loss_mask` counts."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        numbers_BT, mask_BT = model.logits_of(hidden)[..., 0], batch["loss_mask"]
        error = jnp.sum(jnp.square(numbers_BT - batch["values"]) * mask_BT)
        loss = Loss(error, jax.lax.stop_gradient(error), jnp.sum(mask_BT))
        if key is not None:
            return with_routers(loss, hidden.routing, model.config.moe, tokens_of(batch))
        return loss._replace(extra={"predicted": numbers_BT, "counts": mask_BT})

    return loss_fn


def multi_label_loss(model: Model) -> LossFn:
    """The mean over classes of the binary cross-entropy, at the one position that counts."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        logits_BC = jnp.einsum("BTC,BT->BC", model.logits_of(hidden), batch["loss_mask"])
        truth_BC, real_B = batch["label_values"], jnp.max(batch["loss_mask"], axis=1)
        each_BC = jnp.logaddexp(0.0, logits_BC) - truth_BC * logits_BC
        total = jnp.sum(jnp.mean(each_BC, axis=1) * real_B)
        loss = Loss(total, jax.lax.stop_gradient(total), jnp.sum(real_B))
        if key is not None:
            return with_routers(loss, hidden.routing, model.config.moe, real_B)
        return loss._replace(extra={"row_probabilities": jax.nn.sigmoid(logits_BC)})

    return loss_fn


def _number(found: Any) -> float:
    try:
        number = float(found)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise UserError("a number", repr(found)[:60], "correct the record, or set task.kind=single")
    return number


def _natural(label: str) -> tuple[bool, float, str]:
    """Orders numbers by value, before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label
