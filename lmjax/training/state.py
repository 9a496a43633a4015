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
    """All that training changes, as trees of arrays; also of their shapes or shardings."""

    step: Any  # int32 scalar: steps done
    params: Params  # float32
    opt_state: Any  # Optax's
    ema: Params | None  # float32: the moving average of `params`; None when off


class StateSpec(NamedTuple):
    """Describes a state without holding an array of it."""

    model: Model
    tx: optax.GradientTransformation
    shapes: TrainState  # of `ShapeDtypeStruct`s with shardings

    @property
    def shardings(self) -> TrainState:
        """The `NamedSharding` of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def init(self, seed: int) -> TrainState:
        """Makes a state with random parameters; each device makes only its own shards."""

        def make() -> TrainState:
            return _init(self.model.init(jax.random.key(seed)), self.tx,
                         ema=self.shapes.ema is not None)

        return jax.jit(make, out_shardings=self.shardings)()

    def start(self, params: Params) -> TrainState:
        """Makes the state before the first step from these parameters, placed as `shardings`."""

        def make(params: Params) -> TrainState:
            # Copies: arrays that were read from a file may lie in memory that cannot be donated.
            return _init(jax.tree.map(jnp.copy, params), self.tx, ema=self.shapes.ema is not None)

        return jax.jit(make, out_shardings=self.shardings)(params)


def state_spec(model: Model, tx: optax.GradientTransformation, layout: Layout, *,
               ema: bool) -> StateSpec:
    """Describes the state of `model` under the optimizer `tx` on `layout`.

    Raises:
      UserError: the mesh does not divide an axis of a parameter.
    """
    shapes = jax.eval_shape(lambda params: _init(params, tx, ema=ema), model.shapes)
    params = layout.tree(model.axes, model.shapes)
    shardings = TrainState(layout.replicated, params,
                           state_shardings(tx, model.shapes, params, layout.mesh),
                           params if ema else None)
    return StateSpec(model, tx, jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes, shardings))


def _init(params: Params, tx: optax.GradientTransformation, *, ema: bool) -> TrainState:
    # The average is a copy: the step donates the state, and one buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)
