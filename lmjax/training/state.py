"""The state that a train step maps to the next one, and where each array of it lives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout
from lmjax.training.optim.sharding import state_shardings


class TrainState(NamedTuple):
    """step: int32 scalar, steps done. params, ema: float32 trees (ema: None when off). opt_state: Optax's."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None


class StateSpec(NamedTuple):
    """Two trees of the same structure as `TrainState`: `ShapeDtypeStruct`s that carry their shardings."""

    model: Model
    tx: optax.GradientTransformation
    shapes: TrainState

    @property
    def shardings(self) -> TrainState:
        """The `NamedSharding` of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def init(self, seed: int) -> TrainState:
        """A fresh state, created in place: no device ever holds more than its own shards."""
        return jax.jit(lambda: _init(self.model.init(jax.random.key(seed)), self.tx, self.shapes.ema is not None),
                       out_shardings=self.shardings)()

    def start(self, params: Params) -> TrainState:
        """The state before the first step from these parameters, placed as `shardings` says."""
        # Copies: what was read from a file may lie in memory that no step can take over.
        return jax.jit(lambda params: _init(jax.tree.map(jnp.copy, params), self.tx, self.shapes.ema is not None),
                       out_shardings=self.shardings)(params)


def state_spec(model: Model, tx: optax.GradientTransformation, layout: Layout, *, ema: bool) -> StateSpec:
    """Shapes and shardings of the state of `model` under `tx` on `layout`, without making an array.

    Raises:
      ValueError: the mesh does not divide a parameter's axis.
    """
    shapes = jax.eval_shape(lambda params: _init(params, tx, ema), model.shapes)
    params = layout.tree(model.axes, model.shapes)
    shardings = TrainState(layout.replicated, params,
                           state_shardings(tx, model.shapes, params, layout.mesh), params if ema else None)
    with_sharding = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
    return StateSpec(model, tx, with_sharding)


def _init(params: Params, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    # A copy: the step donates its input, and one buffer cannot be given away twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)
