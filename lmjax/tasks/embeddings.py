"""Sentence embeddings: texts that belong together get vectors that are close.

Each first text is to find its second text among those of the whole batch (in-batch negatives, as in
arXiv:1705.00652). A vector is what `lm.embed` gives: the mean of a text's last hidden states, of
length 1.

Shape suffixes: B pairs of the batch, T sequence, D embed_dim, N pairs of an evaluation.
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
from lmjax.nn.moe import Routing
from lmjax.tasks.losses import LossFn, with_routers
from lmjax.tasks.reading import read_text
from lmjax.tasks.task import Answer, Encoded, Facts, Predicted, Record, Sizes, Task
from lmjax.tasks.templates import check_template, fill

SECOND = "second_"  # the prefix of the columns of the second text
COMPARED = 1024  # first texts whose similarities to all second texts are in memory at a time


@dataclass(frozen=True)
class Embeddings(Task):
    """Which text finds which."""

    name: str = "embeddings"
    first: str = "{first}"
    second: str = "{second}"  # the text that belongs to the first
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
        return {"first": self.first, "second": self.second}

    def decides(self) -> dict[str, Any]:
        return {key: value for key, value in super().decides().items() if key != "temperature"}

    def check_installed(self) -> None:
        """Its metrics need no package."""

    def check(self, model: ModelConfig) -> None:
        if model.family == "encdec":
            raise UserError("an encoder or a decoder", model.family, "use one", where="task.name")

    def texts(self, record: Record) -> list[str]:
        return [fill(self.first, record), fill(self.second, record)]

    def encode(self, record: Record, reader: Reader, facts: Facts, sizes: Sizes, *,
               labelled: bool = True) -> Encoded:
        first = read_text(reader, fill(self.first, record), sizes.tokens)
        second = read_text(reader, fill(self.second, record), sizes.tokens)
        return Encoded({"tokens": first.ids, f"{SECOND}tokens": second.ids},
                       first.cut + second.cut)

    def loss(self, model: Model, facts: Facts, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
        def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            first_BD, second_BD, routing = vectors(model, params, batch, key)
            real_B = (batch["segment_ids"][:, 0] > 0).astype(jnp.float32)
            scores_BB = first_BD @ second_BD.T / self.temperature
            scores_BB = jnp.where(real_B[None] > 0, scores_BB, -1e9)
            log_p_B = jnp.diagonal(jax.nn.log_softmax(scores_BB))
            total = -jnp.sum(log_p_B * real_B)
            loss = Loss(total, jax.lax.stop_gradient(total), jnp.sum(real_B))
            if key is not None:
                return with_routers(loss, routing, model.config.moe, jnp.repeat(real_B / 2, 2))
            return loss._replace(extra={"row_first": first_BD, "row_second": second_BD})

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
            key: jax.Array | None) -> tuple[jax.Array, jax.Array, Routing | None]:
    """The vectors of the first and of the second texts, float32 [B, D] each.

    Returned as well: how experts were chosen.
    """
    names = [name.removeprefix(SECOND) for name in batch if name.startswith(SECOND)]
    both = {name: jnp.stack([batch[name], batch[SECOND + name]], axis=1).reshape(
        -1, batch[name].shape[1]) for name in names}
    states, routing = model.states(params, both, key)
    real_NT1 = (both["segment_ids"] > 0).astype(jnp.float32)[..., None]
    states = states.astype(jnp.float32)
    mean_ND = jnp.sum(states * real_NT1, axis=1) / jnp.maximum(jnp.sum(real_NT1, axis=1), 1.0)
    # Not by the norm: its gradient at 0, where a row is padding, is not a number.
    squares_N1 = jnp.sum(jnp.square(mean_ND), axis=1, keepdims=True)
    unit_ND = mean_ND * jax.lax.rsqrt(jnp.maximum(squares_N1, 1e-24))
    pairs_BD = unit_ND.reshape(-1, 2, unit_ND.shape[1])
    return pairs_BD[:, 0], pairs_BD[:, 1], routing
