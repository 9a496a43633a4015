"""The one train step. Objectives differ in the batch and in `loss_fn`, in nothing else."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmjax.models.model import Batch
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params
from lmjax.nn.pipeline import split_rows
from lmjax.nn.routing import MoEConfig, corrected
from lmjax.sharding import Layout, constrain, use_layout
from lmjax.tasks.losses import LossFn
from lmjax.training.optim.ema import ema_update
from lmjax.training.state import StateSpec, TrainState
from lmjax.training.statistics import module_statistics, with_activations
from lmjax.tree import named_leaves

Metrics = Mapping[str, jax.Array]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# Scalars that a batch may have besides its rows: a step above one of them changes nothing.
LIMITS = ("max_loss", "max_grad_norm")


def make_train_step(loss_fn: LossFn, spec: StateSpec, layout: Layout, schedule: optax.Schedule, *,
                    seed: int, microbatches: int = 1, ema_decay: float = 0.0,
                    statistics: bool = False) -> jax.stages.Wrapped:
    """Returns the jitted step: (state, batch of [B, T] arrays) -> (next state, metrics).

    The state is donated; its frozen parameters and its teacher stay as they are. The
    gradient is that of the mean over the batch's tokens, however they are split into microbatches.
    Randomness is keyed by (seed, step, microbatch), so any step can be run again.

    A step whose loss or gradient norm is not finite, or above one of LIMITS in its batch, changes
    neither parameters nor moments nor their average. Steps are counted all the same.

    With `statistics`, the metrics also hold those of `training.statistics`.
    """
    if statistics and not layout.on("layers"):  # stages have no layer's output at one place
        loss_fn = with_activations(loss_fn, microbatches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        limits = {name: batch[name] for name in LIMITS if name in batch}
        batch = {name: x for name, x in batch.items() if name not in limits}

        def of_trained(params: Params, batch: Batch, key: jax.Array | None) -> Loss:
            return loss_fn(state.for_loss(params), batch, key)

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if layout.on("layers") and microbatches > 1:  # a pipeline takes them all in one pass
            with use_layout(layout, microbatches):
                keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
                sums, grads = _gradient(of_trained, state.params, batch, keys, 1)
        else:
            with use_layout(layout):
                sums, grads = _gradient(of_trained, state.params, batch, key, microbatches)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss, grad_norm = sums.nats / weight, optax.tree.norm(grads)
        healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        for name, value in zip(LIMITS, (loss, grad_norm), strict=True):
            healthy &= value <= limits[name] if name in limits else True
        updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = _with_even_experts(params, sums.extra, spec.model.config.moe)
        ema = None if state.ema is None else ema_update(state.ema, params, ema_decay, state.step)
        params, opt_state, ema = _where(healthy, (params, opt_state, ema),
                                        (state.params, state.opt_state, state.ema))
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "weight": sums.weight,
            **{name: x if x.ndim else x / weight for name, x in sums.extra.items()},
            **(module_statistics(gradient=grads, update=updates, weight=params)
               if statistics else {}),
        }
        return TrainState(state.step + 1, params, opt_state, ema, state.frozen,
                          state.teacher), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(spec.shardings, layout.replicated))


def make_eval_step(loss_fn: LossFn, layout: Layout,
                   microbatches: int = 1) -> Callable[[Params, Batch], Loss]:
    """Returns the jitted (params, batch) -> sums, without noise; add them up over a split.

    microbatches: how many a batch has in a pipeline; a batch of too few rows has fewer.
    """

    def step(params: Params, batch: Batch) -> Loss:
        rows = batch["tokens"].shape[0] // layout.ways("batch")
        with use_layout(layout, math.gcd(rows, microbatches) if layout.on("layers") else 1):
            return loss_fn(params, batch, None)

    return jax.jit(step, out_shardings=layout.replicated)


def _with_even_experts(params: Params, extra: Metrics, config: MoEConfig) -> Params:
    """The parameters with the biases of experts moved towards an even load, if they are to move."""
    if not config.correction_rate:
        return params
    leaves = [corrected(leaf, extra["expert_counts"], config.correction_rate)
              if path.endswith("mlp/correction") else leaf for path, leaf in named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _where(healthy: jax.Array, new: Any, old: Any) -> Any:
    """Takes the new arrays if `healthy`, else the old ones; counts of steps go on in any case.

    Learning rates and other schedules thereby depend on the number of the step alone.
    """
    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        counts = new.ndim == 0 and jnp.issubdtype(new.dtype, jnp.integer)
        return new if counts else jnp.where(healthy, new, old)

    return jax.tree.map(one, new, old)


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

    def body(carry: tuple[Loss, Params],
             part: tuple[Batch, jax.Array]) -> tuple[tuple[Loss, Params], None]:
        (_, sums), grads = gradient(params, part[0], jax.random.fold_in(key, part[1]))
        return jax.tree.map(jnp.add, carry, (sums, grads)), None

    parts = {name: constrain(split_rows(x, microbatches), None, "batch", "seq")
             for name, x in batch.items()}
    first = jax.tree.map(lambda x: x[0], parts)
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                        jax.eval_shape(loss_fn, params, first, key))
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(body, (sums, zeros), (parts, jnp.arange(microbatches)))[0]
