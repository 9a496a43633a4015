"""Tasks whose answers are texts that the model writes: settings, answers and their figures."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmjax.config import at_least, choice
from lmjax.data.chat import Ends
from lmjax.data.hashing import key_of, permute
from lmjax.data.reading import Reader
from lmjax.decoding.answers import DecodingOptions, answer
from lmjax.decoding.generate import Generator
from lmjax.errors import UserError
from lmjax.models.model import Model, ModelConfig
from lmjax.nn.module import Params
from lmjax.tasks import metrics
from lmjax.tasks.losses import LossFn
from lmjax.tasks.task import Answer, Encoded, Facts, Predicted, Record, Sizes, Task

# What `metric` may be: the figures that it gives, and the module that computes them.
MEASURES = {"bleu": (("bleu", "chrf"), "sacrebleu"),
            "rouge": (("rouge1", "rouge2", "rougeL"), "rouge_score"),
            "accuracy": (("accuracy", "f1", "matthews"), "sklearn"),
            "exact_match": (("exact_match",), "")}
# Settings of evaluation, which decide nothing of what is prepared.
OF_EVALUATION = ("metric", "num_beams", "max_tokens", "eval_examples")


@dataclass(frozen=True)
class WritingTask(Task):
    """The settings that all tasks share in which a model writes text."""

    # bleu (with chrf), rouge (1, 2 and L), accuracy (of labels, with f1 and matthews), exact_match
    metric: str = "rouge"
    num_beams: int = 1  # of the answers in evaluation: 1 takes the likeliest token each time
    max_tokens: int = 64  # tokens of an answer at most, for which a decoder's rows leave room
    # Held-out examples that are answered in an evaluation; the loss is of all of them, and all of
    # the test examples are answered.
    eval_examples: int = 256

    def __post_init__(self) -> None:
        choice("metric", self.metric, MEASURES)
        at_least(1, num_beams=self.num_beams, max_tokens=self.max_tokens,
                 eval_examples=self.eval_examples)
        at_least(0, target_len=self.target_len)

    @property
    def writes(self) -> bool:
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES[self.metric][0]

    def decides(self) -> dict[str, Any]:
        return {key: value for key, value in super().decides().items() if key not in OF_EVALUATION}

    def check(self, model: ModelConfig) -> None:
        if model.family == "encoder":
            raise UserError("a decoder or an encdec, which write text", "an encoder",
                            "use another model, or task.name=classification", where="task.name")

    def check_installed(self) -> None:
        if module := MEASURES[self.metric][1]:
            metrics.check_installed(module)

    def eval_loss(self, model: Model, facts: Facts) -> LossFn:
        loss_fn = self.loss(model, facts)
        return lambda params, batch, key: loss_fn(params, batch, key)._replace(extra={})

    def ends(self, reader: Reader) -> Ends:
        """What ends an answer."""
        return Ends()

    def room(self, sizes: Sizes) -> int:
        """The most ids of a prompt, in training as in evaluation.

        A decoder's row also has room for the answer, whatever its length: a prompt without its
        target is cut as it would be with it.
        """
        return sizes.encoder or sizes.tokens - min(self.max_tokens, sizes.tokens // 2)

    @abc.abstractmethod
    def prompt(self, record: Record, reader: Reader, sizes: Sizes) -> list[int]:
        """The ids that the model reads before it writes its answer, cut as in `encode`."""

    def asked(self, predicted: Sequence[Predicted]) -> list[Predicted]:
        """The examples of an evaluation that are answered: the same ones each time."""
        count = len(predicted)
        chosen = permute(np.arange(min(count, self.eval_examples)), count, key_of("answers"))
        return [predicted[i] for i in sorted(chosen)]

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        return {"text": predicted.text}

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        answers = [p.text for p in predicted]
        truths = [self.truth(p.record) for p in predicted]
        if self.metric == "accuracy":
            return metrics.single_label(answers, truths, sorted(set(truths)))
        return {"bleu": metrics.translation, "rouge": metrics.summary,
                "exact_match": metrics.exact_match}[self.metric](answers, truths)


def write_texts(task: WritingTask, writer: Generator, params: Params, reader: Reader,
                prompts: Sequence[Sequence[int]]) -> list[str]:
    """What a model writes after prompts: the likeliest answers, without space around them."""
    options = DecodingOptions(max_tokens=task.max_tokens, temperature=0.0,
                              num_beams=task.num_beams, stop=task.ends(reader).strings)
    return [text.strip() for text in answer(writer, params, reader.names, prompts, options)]


def target_end(reader: Reader) -> int:
    """The id that a model learns to write after its answer: one that ends generation."""
    eos = reader.names.tokenizer.eos_id
    return eos if eos in reader.end_ids or not reader.end_ids else reader.end_ids[0]


def prompt_ids(reader: Reader, given: str, separator: str, room: int) -> tuple[list[int], int]:
    """The ids before a decoder's answer, and how many were cut from the end of what is given.

    Args:
      reader: of the model.
      given: the text of the prompt.
      separator: what follows it, which is not cut.
      room: the most ids.
    """
    ids = reader.ids(given + separator, end=False)
    over = len(ids) - room
    if over <= 0:
        return ids, 0
    after = reader.names.encode(separator)
    kept = reader.names.encode(given)[: max(room - len(reader.prefix) - len(after), 0)]
    return [*reader.prefix, *kept, *after][: max(room, 1)], over


def prompt_and_target(reader: Reader, prompt: tuple[list[int], int], target: Sequence[int],
                      sizes: Sizes, most: int = 0) -> Encoded:
    """A decoder's example: it reads a prompt, and learns a target and its end.

    Args:
      reader: of the model.
      prompt: of `prompt_ids`.
      target: ids, which are cut to fit.
      sizes: of the row.
      most: ids of the target at most; 0: what the prompt leaves.
    """
    given, cut = prompt
    left = max(sizes.tokens - len(given), 0)
    kept = target[: min(most or left, left)]
    written = [*kept, target_end(reader)]
    return given_and_written(given, written, np.ones(len(written), np.int32), sizes,
                             (cut, len(target) - len(kept)))


def given_and_written(given: Sequence[int], written: Sequence[int], counts: np.ndarray,
                      sizes: Sizes, cut: tuple[int, int] = (0, 0)) -> Encoded:
    """A decoder's example: ids that it reads and ids that it writes, in one row.

    Args:
      given: the first ids, at least one.
      written: the ids after them.
      counts: int [written]; 1 where the loss counts.
      sizes: with `prefix`, the tokens of `given` see each other.
      cut: tokens that did not fit, of what is given and of what is written.
    """
    ids = np.array([*given, *written], np.int32)
    n = len(ids) - 1
    columns = {"tokens": ids[:-1], "targets": ids[1:], "loss_mask": np.zeros(n, np.int32)}
    columns["loss_mask"][len(given) - 1:] = counts
    if sizes.prefix:
        columns["bidirectional"] = (np.arange(n) < len(given)).astype(np.int32)
    return Encoded(columns, cut[0], cut_target=cut[1])
