"""The one train step. Objectives differ in the batch and in `loss_fn`, nothing else."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from lmjax.models.model import Batch, Model
from lmjax.nn.module import Params
from lmjax.nn.pipeline import split_rows
from lmjax.sharding import Layout, constrain, current_microbatches, use_layout
from lmjax.training.losses import Loss, cross_entropy, with_experts
from lmjax.training.optim.ema import ema_update
from lmjax.training.state import StateSpec, TrainState


class LossFn(Protocol):
    """(params, batch, key) -> sums; the step differentiates total / weight, over all microbatches together.

    key: for dropout and other noise, None when evaluating; of a batch that goes through a pipeline, [M] of its parts.
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array | None) -> Loss: ...


Metrics = Mapping[str, jax.Array]


def next_token_loss(model: Model, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
    """`cross_entropy` of the batch's `targets` where its `loss_mask` counts, and the routers' losses if there are."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        loss = cross_entropy(hidden.x_BTD, hidden.table_VD, batch["targets"], batch["loss_mask"],
                             bias_V=hidden.bias_V, softcap=model.config.logit_softcap, chunk=chunk, z_loss=z_loss)
        if hidden.routing is None:
            return loss
        parts = current_microbatches()
        if parts == 1:
            return with_experts(loss, hidden.routing, model.config.moe)
        # Balance is that of each part, weighed as where the parts are computed one after the other.
        weights = jnp.sum(split_rows(batch["loss_mask"], parts).astype(jnp.float32), axis=(1, 2))
        each = jax.vmap(lambda weight, routing: with_experts(Loss(jnp.zeros(()), jnp.zeros(()), weight), routing,
                                                             model.config.moe), (0, 1))(weights, hidden.routing)
        experts = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
        return loss._replace(total=loss.total + experts.total, extra=experts.extra)

    return loss_fn


StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(loss_fn: LossFn, spec: StateSpec, layout: Layout, schedule: optax.Schedule, *, seed: int,
                    microbatches: int = 1, ema_decay: float = 0.0) -> StepFn:
    """The jitted step: (state, donated; batch of [B, T] arrays) -> (next state, scalar metrics).

    The gradient is that of the mean over the batch's tokens, whatever their split into microbatches.
    Randomness is keyed by (seed, step, microbatch), so a step can be run again.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if layout.on("layers") and microbatches > 1:  # the stages take the parts from each other, in one pass
            with use_layout(layout, microbatches):
                keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(microbatches))
                sums, grads = _gradient(loss_fn, state.params, batch, keys, 1)
        else:
            with use_layout(layout):
                sums, grads = _gradient(loss_fn, state.params, batch, key, microbatches)
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else ema_update(state.ema, params, ema_decay, state.step)
        metrics = {
            "loss": sums.nats / weight,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "weight": sums.weight,
            **{name: value if value.ndim else value / weight for name, value in sums.extra.items()},
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, layout.replicated))


def make_eval_step(loss_fn: LossFn, layout: Layout, microbatches: int = 1) -> Callable[[Params, Batch], Loss]:
    """The jitted (params, batch) -> sums, without noise; add them up over a split.

    microbatches: parts in which a batch goes through the stages, if there are any; fewer of a smaller batch.
    """

    def step(params: Params, batch: Batch) -> Loss:
        rows = batch["tokens"].shape[0] // layout.ways("batch")
        with use_layout(layout, math.gcd(rows, microbatches) if layout.on("layers") else 1):
            return loss_fn(params, batch, None)

    return jax.jit(step, out_shardings=layout.replicated)


def _gradient(loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array,
              microbatches: int) -> tuple[Loss, Params]:
    """Sums over the batch and the gradient of their total, both accumulated in float32."""

    def total(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Loss]:
        loss = loss_fn(params, batch, key)
        return loss.total, loss

    gradient = jax.value_and_grad(total, has_aux=True)
    if microbatches == 1:
        (_, sums), grads = gradient(params, batch, key)
        return sums, grads

    def body(carry: tuple[Loss, Params], part: tuple[Batch, jax.Array]) -> tuple[tuple[Loss, Params], None]:
        (_, sums), grads = gradient(params, part[0], jax.random.fold_in(key, part[1]))
        return jax.tree.map(jnp.add, carry, (sums, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    split = {name: constrain(split_rows(x, microbatches), None, "batch", "seq") for name, x in batch.items()}
    parts = split, jnp.arange(microbatches)
    first = jax.tree.map(lambda x: x[0], parts[0])
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(loss_fn, params, first, key))
    return jax.lax.scan(body, (start, zeros), parts)[0]
