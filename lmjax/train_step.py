"""The one train step. Objectives differ in the batch and in `loss_fn`, nothing else."""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from lmjax.losses import Loss, cross_entropy, with_experts
from lmjax.models import Batch, Model
from lmjax.nn.module import Params
from lmjax.optim import ema_update
from lmjax.sharding import Layout, constrain, use_layout
from lmjax.train_state import StateSpec, TrainState


class LossFn(Protocol):
    """(params, batch, key) -> sums; the step differentiates total / weight, over all microbatches together.

    key: for dropout and other noise, None when evaluating.
    """

    def __call__(self, params: Params, batch: Batch, key: jax.Array | None) -> Loss: ...


Metrics = Mapping[str, jax.Array]


def next_token_loss(model: Model, *, z_loss: float = 0.0, chunk: int = 0) -> LossFn:
    """`cross_entropy` of the batch's `targets` where its `loss_mask` counts, and the routers' losses if there are."""

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
        hidden = model.hidden(params, batch, key)
        loss = cross_entropy(hidden.x_BTD, hidden.table_VD, batch["targets"], batch["loss_mask"],
                             bias_V=hidden.bias_V, softcap=model.config.logit_softcap, chunk=chunk, z_loss=z_loss)
        return loss if hidden.routing is None else with_experts(loss, hidden.routing, model.config.moe)

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


def make_eval_step(loss_fn: LossFn, layout: Layout) -> Callable[[Params, Batch], Loss]:
    """The jitted (params, batch) -> sums, without noise; add them up over a split."""

    def step(params: Params, batch: Batch) -> Loss:
        with use_layout(layout):
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

    def split(x: jax.Array) -> jax.Array:
        # Row i goes to microbatch i % microbatches: every device keeps the rows that it has.
        x = jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", "seq")

    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = (jax.tree.map(split, dict(batch)), jnp.arange(microbatches))
    first = jax.tree.map(lambda x: x[0], parts[0])
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(loss_fn, params, first, key))
    return jax.lax.scan(body, (start, zeros), parts)[0]
