"""Tagging: a class per word, such as its part of speech, or IOB2 tags of the entities in a text.

Each word is encoded by itself, and the model says its tag at the word's first piece, as in Devlin
et al. 2018 (arXiv:1810.04805), section 5.3.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lmjax.config import choice
from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.models.heads import HEAD_KINDS, HeadConfig
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.tasks.entities import entities, entity_scores, is_iob2
from lmjax.tasks.labels import check_different, check_examples, index_of
from lmjax.tasks.losses import LossFn
from lmjax.tasks.task import (
    Answer,
    Encoded,
    Facts,
    Predicted,
    Record,
    Sizes,
    Task,
    class_arrays,
    token_head,
)
from lmjax.tasks.templates import as_text, value

IOB2, NONE = "iob2", "none"


@dataclass(frozen=True)
class Tagging(Task):
    """Which word has which tag."""

    name: str = "tagging"
    tokens: str = "words"  # the column with the list of words
    tags: str = "tags"  # the column with as many tags: texts, or numbers of task.labels from 0
    labels: tuple[str, ...] = ()  # the tags, in order; (): those of the training examples
    # iob2: B-X begins an entity of the kind X, I-X goes on with it, O is outside; none: every word
    # has a tag of its own; "": iob2 if all tags look like it.
    scheme: str = ""
    label_all_pieces: bool = False  # whether every piece of a word is trained; else its first
    head_kind: str = ""  # of models.heads; "": the one that suits the model
    head_dropout: float = 0.1

    def __post_init__(self) -> None:
        choice("scheme", self.scheme, ("", IOB2, NONE))
        choice("head_kind", self.head_kind, ("", *HEAD_KINDS))
        check_different(self.labels)

    @property
    def measures(self) -> tuple[str, ...]:
        return "accuracy", "precision", "recall", "f1"

    @property
    def templates(self) -> dict[str, str]:
        return {"tokens": self.tokens, "tags": self.tags}

    def check(self, model: ModelConfig) -> None:
        if model.family == "encdec":
            raise UserError("a decoder or an encoder", "an encdec", "start from another model",
                            where="task.name")

    def texts(self, record: Record) -> list[str]:
        return [" ".join(self._words(record))]

    def facts(self, records: Iterable[Record]) -> Facts:
        counts: Counter[str] = Counter()
        for record in records:
            with contextlib.suppress(UserError):  # told where the record is encoded
                counts.update(self.truth(record))
        labels = list(self.labels) or sorted(counts, key=_by_kind)
        check_examples(labels, counts)
        if len(labels) < 2:
            raise UserError("at least two tags", labels, "correct task.tags",
                            where="config.task.tags")
        if self.scheme == IOB2 and not is_iob2(labels):
            odd = next(label for label in labels if not is_iob2([label]))
            raise UserError("tags O, B-X and I-X for task.scheme=iob2", repr(odd)[:60],
                            "correct the tags, or set it to none", where="config.task.scheme")
        named = self.scheme or (IOB2 if is_iob2(labels) else NONE)
        return {"labels": labels, "counts": [counts[label] for label in labels], "scheme": named}

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        tokenizer = reader.names.tokenizer
        pieces = tokenizer.encode_words(self._words(record))
        prefix = reader.prefix or (() if any(pieces) else (tokenizer.bos_id,))
        room = sizes.tokens - len(prefix) - len(reader.suffix)
        ends = np.cumsum([len(its) for its in pieces])
        fit = max(int(np.searchsorted(ends, room, side="right")), 1)  # words; one in any case
        ids = [*itertools.chain(*pieces[:fit])][:room]
        number = np.repeat(np.arange(1, fit + 1), [len(its) for its in pieces[:fit]])[:room]
        around = len(prefix), len(reader.suffix)
        number_T = np.pad(number, around).astype(np.int32)
        first_T = number_T * np.pad(np.diff(number, prepend=0) > 0, around)
        tags = [index_of(tag, facts["labels"]) for tag in self.truth(record)] if labelled else []
        of_word = np.array([0, *(tags or [0] * len(pieces))], np.int32)
        counts_T = number_T if self.label_all_pieces else first_T
        return Encoded({"tokens": np.array([*prefix, *ids, *reader.suffix], np.int32),
                        "targets": of_word[counts_T], "words": first_T,
                        "loss_mask": (counts_T > 0).astype(np.int32)}, int(ends[-1]) - len(ids))

    def head(self, model: ModelConfig, facts: Facts) -> HeadConfig:
        kind = self.head_kind or token_head(model)
        return HeadConfig(len(facts["labels"]), kind, self.head_dropout)

    def eval_loss(self, model: Model, facts: Facts) -> LossFn:
        classes = class_arrays(model)

        def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            loss = classes(params, batch, key)
            return loss._replace(extra={**loss.extra, "words": batch["words"]})

        return loss_fn

    def truth(self, record: Record) -> Any:
        words, tags = self._words(record), value(record, self.tags)
        if not isinstance(tags, list) or len(tags) != len(words):
            got = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)[:60]
            raise UserError(f"a list of {len(words)} tags under {self.tags!r}, one per word", got,
                            "correct the record")
        return [self._tag(tag) for tag in tags]

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        words = self._words(predicted.record)
        tags, sure = _of_words(predicted, facts, len(words))
        answer: Answer = {"words": words, "tags": tags, "confidence": sure}
        if facts["scheme"] == IOB2:
            answer["entities"] = [
                {"text": " ".join(words[e.start : e.end]), **e._asdict(),
                 "confidence": round(float(np.mean(sure[e.start : e.end])), 6)}
                for e in entities(tags)]
        return answer

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        from lmjax.tasks import metrics

        truth = [self.truth(p.record) for p in predicted]
        tags = [_of_words(p, facts, len(its))[0] for p, its in zip(predicted, truth, strict=True)]
        flat, wanted = [*itertools.chain(*tags)], [*itertools.chain(*truth)]
        if facts["scheme"] == IOB2:
            right = sum(a == b for a, b in zip(flat, wanted, strict=True))
            return {"accuracy": right / len(wanted), **entity_scores(tags, truth)}
        return metrics.tags([tag or "" for tag in flat], wanted, facts["labels"])

    def _words(self, record: Record) -> list[str]:
        words = value(record, self.tokens)
        if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
            raise UserError(f"a list of words under {self.tokens!r}", repr(words)[:60],
                            "correct the record")
        return words

    def _tag(self, tag: Any) -> str:
        is_number = isinstance(tag, int) and str(tag) not in self.labels
        return self.labels[tag] if is_number and 0 <= tag < len(self.labels) else as_text(tag)


def _of_words(predicted: Predicted, facts: Facts,
              count: int) -> tuple[list[str | None], list[float]]:
    """The tag of every word and its probability; None and 0 for a word that was not read."""
    tags, sure = list[str | None]([None] * count), [0.0] * count
    arrays = predicted.arrays
    for at in np.flatnonzero(arrays["words"]):
        word = int(arrays["words"][at]) - 1
        tags[word] = facts["labels"][int(arrays["predicted"][at])]
        sure[word] = round(float(arrays["confidence"][at]), 6)
    return tags, sure


def _by_kind(tag: str) -> tuple[str, str]:
    """Orders IOB2 tags by the kind of entity, O first, and others by their names."""
    return tag.partition("-")[2] if is_iob2([tag]) else "", tag
