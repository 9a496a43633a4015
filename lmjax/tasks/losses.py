"""Losses as functions of parameters and batch: what the train step minimises."""

from typing import Protocol

import jax
import jax.numpy as jnp

from lmjax.models.model import Batch, Model
from lmjax.nn.losses import Loss, cross_entropy, with_experts
from lmjax.nn.module import Params
from lmjax.nn.pipeline import split_rows
from lmjax.nn.routing import MoEConfig, Routing
from lmjax.sharding import current_microbatches


class LossFn(Protocol):
    """(params, batch, key) -> sums over the batch.

    The step differentiates the sum of `total` over all microbatches, divided by that of `weight`.
    key: for dropout and other noise; None when evaluating. A batch that goes through a pipeline has
    one key per microbatch, [M].
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array | None) -> Loss: ...


def next_token_loss(model: Model, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
    """Returns the cross-entropy of `targets` where `loss_mask` counts, with the routers' losses."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        loss = cross_entropy(hidden.x_BTD, hidden.table_VD, batch["targets"], batch["loss_mask"],
                             bias_V=hidden.bias_V, softcap=model.config.output_softcap, chunk=chunk,
                             z_loss=z_loss)
        return with_routers(loss, hidden.routing, model.config.moe, tokens_of(batch))

    return loss_fn


def tokens_of(batch: Batch) -> jax.Array:
    """How many tokens count in each row, float32 [B]."""
    return jnp.sum(batch["loss_mask"].astype(jnp.float32), axis=1)


def with_routers(loss: Loss, routing: Routing | None, config: MoEConfig,
                 weight_B: jax.Array) -> Loss:
    """Adds the losses of the routers to that of a batch, if the model has experts.

    Args:
      loss: of the batch.
      routing: how the model chose its experts; None without any.
      config: of the experts.
      weight_B: what each row that the model read weighs in `loss.weight`, of which it is a part.
    """
    if routing is None:
        return loss
    parts = current_microbatches()
    if parts == 1:
        return with_experts(loss, routing, config)
    # In a pipeline, each microbatch has a balance of its own, and weighs as it would if the
    # microbatches were computed one after the other.
    weights = jnp.sum(split_rows(weight_B, parts), axis=1)
    each = jax.vmap(lambda weight, routing: with_experts(
        Loss(jnp.zeros(()), jnp.zeros(()), weight), routing, config), (0, 1))(weights, routing)
    experts = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
    return loss._replace(total=loss.total + experts.total, extra=loss.extra | experts.extra)
