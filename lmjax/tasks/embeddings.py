"""Sentence embeddings: texts that belong together get vectors that are close.

Each first text is to find its second text among those of the whole batch (in-batch negatives, as in
arXiv:1705.00652), and among texts that records name as near but wrong (hard negatives, as in
arXiv:2004.04906). A vector is what `lm.embed` gives: the mean of a text's last hidden states, of
length 1.

Shape suffixes: B pairs of the batch, S texts among which a first text is to find its own, K texts
of a record, T sequence, D embed_dim, N pairs of an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.reading import Reader
from lmjax.errors import UserError
from lmjax.models.model import Batch, Model, ModelConfig
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.nn.routing import Routing
from lmjax.tasks.losses import LossFn, with_routers
from lmjax.tasks.reading import read_text
from lmjax.tasks.task import Answer, Encoded, Facts, Predicted, Record, Sizes, Task
from lmjax.tasks.templates import check_template, fill

SECOND, NEGATIVE = "second_", "negative_"  # prefixes of the columns of further texts
COMPARED = 1024  # first texts whose similarities to all second texts are in memory at a time


@dataclass(frozen=True)
class Embeddings(Task):
    """Which text finds which."""

    name: str = "embeddings"
    first: str = "{first}"
    second: str = "{second}"  # the text that belongs to the first
    negative: str = ""  # a text that does not, though it seems to; "": there are none
    temperature: float = 0.05  # similarities are divided by it

    def __post_init__(self) -> None:
        for key, template in self.templates.items():
            check_template(template, key)
        if not self.temperature > 0:
            raise UserError("more than 0", self.temperature, "0.05 is usual", where="temperature")

    @property
    def packs(self) -> bool:
        return False

    @property
    def whole_batch(self) -> bool:
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        return ("accuracy", "mrr")

    @property
    def templates(self) -> dict[str, str]:
        return {"first": self.first, "second": self.second} | (
            {"negative": self.negative} if self.negative else {})

    def decides(self) -> dict[str, Any]:
        return {key: value for key, value in super().decides().items() if key != "temperature"}

    def check_installed(self) -> None:
        """Its metrics need no package."""

    def check(self, model: ModelConfig) -> None:
        if model.family == "encdec":
            raise UserError("an encoder or a decoder", model.family, "use one", where="task.name")

    def texts(self, record: Record) -> list[str]:
        return [fill(template, record) for template in self.templates.values()]

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        texts = {"": self.first, SECOND: self.second} | (
            {NEGATIVE: self.negative} if self.negative and labelled else {})
        read = {prefix: read_text(reader, fill(template, record), sizes.tokens)
                for prefix, template in texts.items()}
        return Encoded({f"{prefix}tokens": its.ids for prefix, its in read.items()},
                       sum(its.cut for its in read.values()))

    @property
    def has_targets(self) -> bool:
        return False

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            (first_BD, *others), routing = vectors(model, params, batch, key)
            real_B = (batch["segment_ids"][:, 0] > 0).astype(jnp.float32)
            scores_BS = first_BD @ jnp.concatenate(others).T / self.temperature
            real_1S = jnp.tile(real_B, len(others))[None]
            scores_BS = jnp.where(real_1S > 0, scores_BS, -1e9)
            log_p_B = jnp.diagonal(jax.nn.log_softmax(scores_BS))
            total = -jnp.sum(log_p_B * real_B)
            loss = Loss(total, jax.lax.stop_gradient(total), jnp.sum(real_B))
            if key is not None:
                texts = 1 + len(others)
                return with_routers(loss, routing, model.config.moe,
                                    jnp.repeat(real_B / texts, texts))
            return loss._replace(extra={"row_first": first_BD, "row_second": others[0]})

        return loss_fn

    def answer(self, predicted: Predicted, facts: Facts) -> Answer:
        first, second = (predicted.arrays[f"row_{name}"] for name in ("first", "second"))
        return {"similarity": float(first @ second)}

    def truth(self, record: Record) -> Any:
        return fill(self.second, record)

    def metrics(self, predicted: Sequence[Predicted], facts: Facts) -> dict[str, float]:
        first_ND, second_ND = (np.stack([p.arrays[f"row_{name}"] for p in predicted])
                               for name in ("first", "second"))
        ranks: list[np.ndarray] = []
        for at in range(0, len(first_ND), COMPARED):
            some = slice(at, at + COMPARED)
            own = np.sum(first_ND[some] * second_ND[some], axis=1)
            better = first_ND[some] @ second_ND.T > own[:, None] + 1e-6
            ranks.append(1 + np.sum(better, axis=1))
        rank_N = np.concatenate(ranks)
        return {"accuracy": float(np.mean(rank_N == 1)), "mrr": float(np.mean(1 / rank_N))}


def vectors(model: Model, params: Params, batch: Batch,
            key: jax.Array | None) -> tuple[list[jax.Array], Routing | None]:
    """The vectors of the first, the second and any further texts, and how experts were chosen.

    Returns:
      float32 [B, D] per text of a record; the routing.
    """
    texts = ["", SECOND, *([NEGATIVE] if f"{NEGATIVE}tokens" in batch else [])]
    names = [name.removeprefix(SECOND) for name in batch if name.startswith(SECOND)]
    # The texts of a record are neighbours, and stay on their device.
    rows = {name: jnp.stack([batch[text + name] for text in texts], axis=1).reshape(
        -1, batch[name].shape[1]) for name in names}
    states, routing = model.states(params, rows, key)
    states, real = states.astype(jnp.float32), (rows["segment_ids"] > 0).astype(jnp.float32)
    mean = jnp.sum(states * real[..., None], axis=1) / jnp.maximum(
        jnp.sum(real, axis=1, keepdims=True), 1.0)
    # Not by the norm: its gradient at 0, where a row is padding, is not a number.
    squares = jnp.sum(jnp.square(mean), axis=1, keepdims=True)
    unit_BKD = (mean * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).reshape(
        -1, len(texts), mean.shape[1])
    return [unit_BKD[:, i] for i in range(len(texts))], routing
