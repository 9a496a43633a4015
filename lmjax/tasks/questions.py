"""Questions whose answers are spans of a text: extractive question answering.

An encoder reads the question and a window of the text. A head of two outputs gives, within the
window, the distribution of the answer's first token and that of its last one. Both point to the
first token of the window where it holds no answer (Devlin et al. 2018, arXiv:1810.04805, sections
4.2 and 4.3).

Shape suffixes: B batch, T sequence, O the two outputs, W answers, D lengths of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.models.heads import HEAD_KINDS, HeadConfig
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.tasks import squad
from lmjax.tasks.losses import LossFn, tokens_of, with_routers
from lmjax.tasks.task import (
    Answer,
    Encoded,
    Facts,
    Predicted,
    Record,
    Sizes,
    Task,
    token_head,
)
from lmjax.tasks.templates import value

START, END = 1, 2  # bits of `targets`


class Span(NamedTuple):
    """An answer, and where it lies in its text."""

    text: str
    start: int  # its first character


@dataclass(frozen=True)
class Questions(Task):
    """Which part of a text answers a question."""

    name: str = "questions"
    question: str = "question"  # the column of the question
    context: str = "context"  # the column of the text that holds the answer
    # The column of the right answers, of which the first is trained: {"text": [...],
    # "answer_start": [...]} as SQuAD has them, a list of texts, or one text. An empty list or an
    # empty text: the context does not answer the question.
    answers: str = "answers"
    # The column of the first character of a single answer; "": where it first occurs.
    start: str = ""
    stride: int = 64  # tokens of the context that a window shares with the one before it
    max_question: int = 64  # tokens of a question; the rest is cut
    max_answer: int = 30  # tokens of an answer that the model gives
    best: int = 3  # spans that an answer lists
    # No answer is given where it is this much likelier than the best span, in nats; only by models
    # that were trained on questions without an answer.
    no_answer_threshold: float = 0.0
    head_kind: str = ""  # of models.heads; "": the one that suits the model
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, stride=self.stride)
        at_least(1, max_question=self.max_question, max_answer=self.max_answer, best=self.best)
        choice("head_kind", self.head_kind, ("", *HEAD_KINDS))

    @property
    def measures(self) -> tuple[str, ...]:
        return "exact_match", "f1"

    @property
    def templates(self) -> dict[str, str]:
        return {"question": self.question, "context": self.context, "answers": self.answers} | (
            {"start": self.start} if self.start else {})

    def check_installed(self) -> None:
        """Nothing: the metrics are those of `squad`."""

    def check(self, model: ModelConfig) -> None:
        if model.family != "encoder":
            raise UserError("an encoder", f"the family {model.family}", "let it write the answer: "
                            "task.name=pairs, with the answer's column as the target",
                            where="task.name")

    def texts(self, record: Record) -> list[str]:
        return [self._text(record, self.question), self._text(record, self.context)]

    def facts(self, records: Iterable[Record]) -> Facts:
        answered = empty = 0
        for record in records:
            with contextlib.suppress(UserError):  # told where the record is encoded
                some = bool(self._answers(record))
                answered, empty = answered + some, empty + (not some)
        if not answered:
            raise UserError("a training example with an answer", f"{empty} without any",
                            "correct task.answers", where="config.task.answers")
        return {"unanswerable": empty > 0}

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        asked = reader.names.encode(self._text(record, self.question))
        context = self._text(record, self.context)
        ids, spans = reader.names.tokenizer.spans(context)
        spans = _inner(spans, context)
        before = [*reader.prefix, *asked[: self.max_question], *reader.middle]
        room = sizes.tokens - len(before) - len(reader.suffix)
        if room <= self.stride:
            raise UserError(f"room for more than task.stride={self.stride} tokens of the context "
                            "beside the question", room, "raise data.seq_len, or lower task.stride "
                            "or task.max_question")
        truth = self._answers(record) if labelled else []
        place = _tokens_of(truth[0], spans) if truth else None
        windows = []
        for at in range(0, max(len(ids) - self.stride, 1), room - self.stride):
            its = ids[at : at + room]
            tokens = np.array([*before, *its, *reader.suffix], np.int32)
            types, targets = np.zeros_like(tokens), np.zeros_like(tokens)
            types[len(before):] = reader.second_type
            first = last = 0  # where the answer is not in the window as a whole
            if place is not None and at <= place[0] and place[1] < at + len(its):
                first, last = (len(before) + token - at for token in place)
            if labelled:
                targets[first] += START
                targets[last] += END
            begins, ends = np.pad(spans[at : at + room], ((len(before), len(reader.suffix)),
                                                          (0, 0))).T
            windows.append({"tokens": tokens, "token_types": types, "targets": targets,
                            "loss_mask": (np.arange(len(tokens)) == 0).astype(np.int32),
                            "begins": begins, "ends": ends})
        return Encoded(windows[0], max(len(asked) - self.max_question, 0), tuple(windows[1:]))

    def head(self, model: ModelConfig, facts: Facts) -> HeadConfig:
        return HeadConfig(2, self.head_kind or token_head(model), self.head_dropout)

    @property
    def has_targets(self) -> bool:
        return False

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        return span_loss(model)

    def truth(self, record: Record) -> Any:
        return [answer.text for answer in self._answers(record)]

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        context = self._text(predicted.record, self.context)
        windows = [predicted.arrays, *predicted.more]
        ranked = self._ranked(windows)
        best = [{"text": context[begin:end], "start": begin, "end": end, "confidence": _chance(p)}
                for (begin, end), p in ranked.items()]
        answer: Answer = {**(best[0] if best else {"text": "", "confidence": 0.0}), "best": best}
        if facts["unanswerable"]:
            none = min(float(window["start"][0] + window["end"][0]) for window in windows)
            answer["no_answer"] = _chance(none)
            if not best or none - max(ranked.values()) > self.no_answer_threshold:
                answer = {"text": "", "confidence": _chance(none), "best": best,
                          "no_answer": _chance(none)}
        return answer

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        pairs = [(self.answer(p, facts)["text"], self.truth(p.record)) for p in predicted]
        return {name: float(np.mean([score(*pair) for pair in pairs]))
                for name, score in (("exact_match", squad.exact_match), ("f1", squad.f1))}

    def _ranked(self, windows: Sequence[dict[str, np.ndarray]]) -> dict[tuple[int, int], float]:
        """The likeliest spans of characters, best first, each with its log-probability."""
        found: dict[tuple[int, int], float] = {}
        for its in windows:
            n, inside_T = len(its["start"]), its["ends"] > 0
            p_DT = np.full((min(self.max_answer, n), n), -np.inf)  # [i, t]: from t to t + i
            for i, row_T in enumerate(p_DT):
                both = its["start"][: n - i].astype(np.float64) + its["end"][i:]
                row_T[: n - i] = np.where(inside_T[: n - i] & inside_T[i:], both, -np.inf)
            most = min(self.best, p_DT.size)
            for at in np.argpartition(-p_DT, most - 1, axis=None)[:most]:
                i, t = divmod(int(at), n)
                if p_DT[i, t] > -np.inf:
                    span = int(its["begins"][t]), int(its["ends"][t + i])
                    found[span] = max(found.get(span, -np.inf), float(p_DT[i, t]))
        return dict(sorted(found.items(), key=lambda item: -item[1])[: self.best])

    def _text(self, record: Record, column: str) -> str:
        text = value(record, column)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"a text under {column!r}", repr(text)[:60], "correct the record")
        return text

    def _answers(self, record: Record) -> list[Span]:
        """The right answers, each of which lies in the context."""
        context, found = self._text(record, self.context), value(record, self.answers)
        texts, starts = found, None
        if isinstance(found, dict):
            texts, starts = found.get("text"), found.get("answer_start")
        elif isinstance(found, str):
            texts = [found] if found.strip() else []
            starts = [value(record, self.start)] if self.start and texts else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or (
                starts is not None and len(starts) != len(texts)):
            raise UserError(f"answers under {self.answers!r}: {{'text': [...], 'answer_start': "
                            "[...]}, a list of texts, or a text", repr(found)[:60],
                            "correct the record")
        spans = [Span(text, context.find(text) if starts is None else _number(starts[i]))
                 for i, text in enumerate(texts)]
        for text, at in spans:
            if at < 0 or not text.strip() or context[at : at + len(text)] != text:
                where = "in the context" if starts is None else f"at character {at} of the context"
                raise UserError(f"the answer {text[:60]!r} {where}",
                                repr(context[max(at, 0) : max(at, 0) + 60]), "correct the record")
        return spans


def span_loss(model: Model) -> LossFn:
    """The mean of the cross-entropies of first and last token, each over the tokens of its window.

    `weight` counts windows. `extra` holds the log-probabilities `start` and `end` of every token,
    and `begins` and `ends`, the characters of it in the context, each [B, T].
    """

    @jax.checkpoint
    def normalised(logits_BTO: jax.Array, segment_BT: jax.Array) -> jax.Array:
        same_BTT1 = (segment_BT[:, :, None] == segment_BT[:, None, :])[..., None]
        log_z = jax.nn.logsumexp(
            jnp.where(same_BTT1, logits_BTO[:, None], -jnp.inf), axis=2)
        return logits_BTO - log_z

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        log_p_BTO = normalised(model.logits_of(hidden), batch["segment_ids"])
        hit_BTO = jnp.stack([batch["targets"] & START, batch["targets"] & END], axis=-1) > 0
        total = -0.5 * jnp.sum(jnp.where(hit_BTO, log_p_BTO, 0.0))
        loss = Loss(total, jax.lax.stop_gradient(total), jnp.sum(batch["loss_mask"]))
        if key is not None:
            return with_routers(loss, hidden.routing, model.config.moe, tokens_of(batch))
        return loss._replace(extra={"start": log_p_BTO[..., 0], "end": log_p_BTO[..., 1],
                                    "begins": batch["begins"], "ends": batch["ends"]})

    return loss_fn


def _inner(spans: np.ndarray, text: str) -> np.ndarray:
    """The spans of tokens without the white space at their ends; 0, 0 where nothing is left."""
    out = np.zeros_like(spans)
    for i, (begin, end) in enumerate(spans.tolist()):
        piece = text[begin:end]
        if piece.strip():
            out[i] = begin + len(piece) - len(piece.lstrip()), begin + len(piece.rstrip())
    return out


def _tokens_of(answer: Span, spans: np.ndarray) -> tuple[int, int]:
    """The first and the last token that have a character of an answer."""
    found = np.flatnonzero((spans[:, 1] > answer.start)
                           & (spans[:, 0] < answer.start + len(answer.text)))
    if not len(found):
        raise UserError("an answer with at least one token", repr(answer.text)[:60],
                        "correct the record")
    return int(found[0]), int(found[-1])


def _number(start: Any) -> int:
    if not re.fullmatch(r"\d+", str(start)):  # a file of CSV has it as text
        raise UserError("the number of an answer's first character", repr(start)[:60],
                        "correct the record")
    return int(start)


def _chance(log_p: float) -> float:
    return round(float(np.exp(log_p)), 6)
