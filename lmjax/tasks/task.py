"""What every task is: how an example becomes arrays, which head, loss, answers and metrics.

A task is a frozen dataclass, the group `config.task` of a recipe: one file in this room, and one
row of `table.TASKS`. The step knows none of it. An example becomes arrays over its tokens; what is
to be predicted lies in `targets`, at the positions where `loss_mask` is not 0.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import plain
from lmjax.data.reading import Reader
from lmjax.data.text.sources import SourceConfig
from lmjax.data.tokenizers import Tokenizer
from lmjax.models.heads import HeadConfig
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss, cross_entropy
from lmjax.nn.module import Params
from lmjax.tasks.losses import LossFn, next_token_loss
from lmjax.tasks.metrics import check_installed

Record = Mapping[str, Any]  # one example as its file has it
Facts = dict[str, Any]  # what a task keeps of its training examples, as plain JSON: labels, counts
Answer = dict[str, Any]  # what a model says of an example, as plain JSON


class Encoded(NamedTuple):
    """An example as arrays."""

    columns: dict[str, np.ndarray]  # 1-D, one per column of the task; integers or float32
    cut: int = 0  # tokens that were cut to make it fit
    more: tuple[dict[str, np.ndarray], ...] = ()  # the columns of its further windows, if any
    cut_target: int = 0  # tokens of what is to be written that were cut


class Predicted(NamedTuple):
    """An example with what the model gave for it."""

    id: str
    record: Record
    # Of the `extra` of `Task.eval_loss`: what is at the tokens of the example; of an array
    # `row_...`, which has one entry per row, that of its row.
    arrays: dict[str, np.ndarray]
    more: tuple[dict[str, np.ndarray], ...] = ()  # the same of its further windows
    text: str = ""  # what a model wrote for it


class Sizes(NamedTuple):
    """How long the rows of a batch are."""

    tokens: int  # of the model, or of its decoder
    encoder: int = 0  # of the encoder of an encoder-decoder
    prefix: bool = False  # whether a decoder reads what it is given in both directions
    positions: int = 0  # that the model has learned; 0: it has no such limit


@dataclass(frozen=True)
class Task(abc.ABC):
    """The settings that all tasks share, and what each of them does."""

    name: str
    validation: tuple[SourceConfig, ...] = ()  # (): data.heldout_fraction of the examples
    test: tuple[SourceConfig, ...] = ()  # read once, after the last step
    target_len: int = 0  # tokens in a row of an encoder-decoder's decoder; 0: data.seq_len

    @property
    def samples(self) -> int:
        """How many rows of a batch an example makes: the answers that the model writes to it."""
        return 1

    @property
    def whole_batch(self) -> bool:
        """Whether the loss compares the examples of a batch, which then is computed in one part."""
        return False

    @property
    def has_targets(self) -> bool:
        """Whether the loss is the cross-entropy of `targets`, which a teacher can predict too."""
        return True

    @property
    def writes(self) -> bool:
        """Whether the model writes text, with its unembedding."""
        return False

    @property
    @abc.abstractmethod
    def measures(self) -> tuple[str, ...]:
        """The names of the figures that `metrics` gives."""

    @property
    def packs(self) -> bool:
        """Whether several examples may share a row."""
        return True

    def decides(self) -> dict[str, Any]:
        """The settings that decide what is prepared, as plain JSON values."""
        return plain(self)

    def length_of(self, side: str, sizes: Sizes, facts: Facts) -> int:
        """The length of the rows of a side: "" (the model, or its decoder), "encoder_", ..."""
        return sizes.encoder if side == "encoder_" else sizes.tokens

    @property
    @abc.abstractmethod
    def templates(self) -> dict[str, str]:
        """Keys of this config that name columns, with their templates or names."""

    @abc.abstractmethod
    def texts(self, record: Record) -> list[str]:
        """The texts of an example, of which a tokenizer may be trained."""

    def tokenizer(self, tokenizer: Tokenizer, log: Callable[[str], None]) -> Tokenizer:
        """The tokenizer with what the task adds to its files; its ids stay as they are."""
        return tokenizer

    def facts(self, records: Iterable[Record]) -> Facts:
        """What is to be known of the training examples before any of them is encoded."""
        return {}

    @abc.abstractmethod
    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        """An example as arrays: a pure function of the record.

        Args:
          record: the example.
          reader: makes ids of texts.
          facts: of `facts`.
          sizes: the example must fit into a row.
          labelled: whether the example has what is to be predicted; else its place is empty.
        Raises:
          UserError: the record is no example of the task.
        """

    def check_installed(self) -> None:
        """Raises a UserError if a package that the metrics need is missing."""
        check_installed("sklearn")

    @abc.abstractmethod
    def check(self, model: ModelConfig) -> None:
        """Refuses a model that the task has no use for.

        Raises:
          UserError: it has none.
        """

    def head(self, model: ModelConfig, facts: Facts) -> HeadConfig:
        """The head that the model gets."""
        return HeadConfig()

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        """What training minimises."""
        return next_token_loss(model, z_loss=z_loss, chunk=chunk)

    def eval_loss(self, model: Model, facts: Facts) -> LossFn:
        """The loss, with the arrays [B, T] that `answer` reads as `extra`."""
        return self.loss(model, facts)

    @abc.abstractmethod
    def truth(self, record: Record) -> Any:
        """The right answer, as plain JSON.

        Raises:
          UserError: the record has none.
        """

    @abc.abstractmethod
    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        """What the model says of an example."""

    @abc.abstractmethod
    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        """The figures of a set of examples, from the predicted and the right answers."""


def token_head(model: ModelConfig) -> str:
    """The kind of head that `transformers` puts on every token of a model of this architecture.

    ModernBERT keeps the layers of its masked-LM head, BERT and decoders have a matrix alone.
    """
    keeps = getattr(model, "mlm_head", False) and model.norm_position == "pre"
    return "transform" if keeps else "linear"


def class_arrays(model: Model) -> LossFn:
    """The cross-entropy of a head's classes, with the likeliest class of every position.

    Its `extra` holds `predicted` (int32), `confidence` (its probability), `truth` and `counts`
    (the batch's targets and where they count), each [B, T].
    """

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        loss = cross_entropy(hidden.x_BTD, hidden.table_VD, batch["targets"], batch["loss_mask"],
                             bias_V=hidden.bias_V)
        log_p = jax.nn.log_softmax(model.logits_of(hidden))
        return loss._replace(extra={
            "predicted": jnp.argmax(log_p, axis=-1), "confidence": jnp.exp(jnp.max(log_p, axis=-1)),
            "truth": batch["targets"], "counts": batch["loss_mask"]})

    return loss_fn
