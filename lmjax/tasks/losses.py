"""Losses as functions of parameters and batch: what the train step minimises."""

from typing import Protocol

import jax
import jax.numpy as jnp

from lmjax.models.model import Batch, Hidden, Model
from lmjax.nn.losses import Loss, cross_entropy, with_experts
from lmjax.nn.module import Params
from lmjax.nn.pipeline import split_rows
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
        return with_routers(loss, model, hidden, batch)

    return loss_fn


def with_routers(loss: Loss, model: Model, hidden: Hidden, batch: Batch) -> Loss:
    """Adds the losses of the routers to that of a batch, if the model has experts."""
    if hidden.routing is None:
        return loss
    parts = current_microbatches()
    if parts == 1:
        return with_experts(loss, hidden.routing, model.config.moe)
    # In a pipeline, each microbatch has a balance of its own, and weighs as it would if the
    # microbatches were computed one after the other.
    weights = jnp.sum(split_rows(batch["loss_mask"], parts).astype(jnp.float32), axis=(1, 2))
    each = jax.vmap(lambda weight, routing: with_experts(
        Loss(jnp.zeros(()), jnp.zeros(()), weight), routing, model.config.moe), (0, 1))(
            weights, hidden.routing)
    experts = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
    return loss._replace(total=loss.total + experts.total, extra=experts.extra)
