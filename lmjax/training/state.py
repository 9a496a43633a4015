"""The state that a train step maps to the next one, and where each array of it lives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmjax.models.model import Model
from lmjax.nn.adapters import initial_magnitudes
from lmjax.nn.module import Params
from lmjax.sharding import Layout
from lmjax.tasks.distillation import Taught
from lmjax.training.optim.sharding import state_shardings
from lmjax.tree import join_trees, named_leaves, split_tree


class TrainState(NamedTuple):
    """What a step takes and returns, as trees of arrays; also of their shapes or shardings."""

    step: Any  # int32 scalar: steps done
    params: Params  # float32: the trained parameters
    opt_state: Any  # Optax's
    ema: Params | None  # float32: the moving average of `params`; None when off
    frozen: Params | None = None  # the parameters that no step changes; None: all are trained
    # Those of the teacher of a distillation, in its compute dtype; a checkpoint does not hold them.
    teacher: Params | None = None

    def whole(self, params: Params) -> Params:
        """The model's parameters: `params`, trained or averaged, together with the frozen ones."""
        return params if self.frozen is None else join_trees(params, self.frozen)

    def for_loss(self, params: Params) -> Any:
        """What the loss takes: the model's parameters, with those of a teacher if there is one."""
        whole = self.whole(params)
        return whole if self.teacher is None else Taught(whole, self.teacher)


class Frozen(NamedTuple):
    """Which parameters of a model no step changes."""

    accepts: Callable[[str], bool]  # of a parameter's path
    # Whether they are those of a base model, which checkpoints name and do not hold. They are then
    # kept in the dtype in which the model computes.
    base: bool = False

    def split(self, model: Model, params: Params) -> tuple[Params, Params]:
        """Splits `params`, all of the model's, into the trained and the frozen ones."""
        trained, frozen = split_tree(params, self.accepts)[::-1]
        return trained, split_tree(model.cast(params), self.accepts)[0] if self.base else frozen


class StateSpec(NamedTuple):
    """Describes a state without holding an array of it."""

    model: Model
    tx: optax.GradientTransformation
    shapes: TrainState  # of `ShapeDtypeStruct`s with shardings
    frozen: Frozen | None = None  # None: all parameters are trained

    @property
    def is_frozen(self) -> Callable[[str], bool] | None:
        """Whether the parameter of a path is not trained; None: all are trained."""
        return self.frozen.accepts if self.frozen else None

    @property
    def shardings(self) -> TrainState:
        """The `NamedSharding` of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def init(self, seed: int) -> TrainState:
        """Makes a state with random parameters; each device makes only its own shards.

        It has no teacher yet: see `with_teacher`.
        """

        def make() -> TrainState:
            return self._init(self.model.init(jax.random.key(seed)))

        return jax.jit(make, out_shardings=self.shardings._replace(teacher=None))()

    def start(self, params: Params, seed: int) -> TrainState:
        """Makes the state before the first step from these parameters, placed as `shardings`.

        Parameters of the model that `params` lacks, such as adapters, are made from the seed.
        """
        given = {path for path, _ in named_leaves(params)}

        def make(params: Params) -> TrainState:
            fresh = self.model.init(jax.random.key(seed))
            fresh, _ = split_tree(fresh, lambda path: path not in given)
            # Copies: arrays that were read from a file may lie in memory that cannot be donated.
            params = join_trees(jax.tree.map(jnp.copy, params), fresh)
            return self._init(initial_magnitudes(params))

        return jax.jit(make, out_shardings=self.shardings._replace(teacher=None))(params)

    def with_teacher(self, state: TrainState, teacher: Params) -> TrainState:
        """Returns the state with its teacher's float32 parameters, as they are kept."""
        return state._replace(teacher=self._kept(teacher, self.shapes.teacher))

    def on_base(self, state: TrainState, frozen: Params) -> TrainState:
        """Returns a restored state with its frozen parameters, float32, as they are kept."""
        return state._replace(frozen=self._kept(frozen, self.shapes.frozen))

    def _kept(self, params: Params, shapes: Any) -> Params:
        """Copies `params`, which the step will donate, in the dtypes and places of `shapes`."""
        def make(params: Params) -> Params:
            return jax.tree.map(lambda x, shape: jnp.copy(x).astype(shape.dtype), params, shapes)

        return jax.jit(make, out_shardings=jax.tree.map(lambda s: s.sharding, shapes))(params)

    def _init(self, params: Params) -> TrainState:
        return _init(self.model, params, self.tx, self.frozen, ema=self.shapes.ema is not None)


def state_spec(model: Model, tx: optax.GradientTransformation, layout: Layout, *, ema: bool,
               frozen: Frozen | None = None, teacher: Model | None = None) -> StateSpec:
    """Describes the state of `model` on `layout`.

    Args:
      model: the model.
      tx: the optimizer of its trained parameters.
      layout: the mesh, and how arrays are placed on it.
      ema: whether the trained parameters are averaged.
      frozen: which parameters are not trained; None: all are trained.
      teacher: whose parameters the state holds as well; None: it has no teacher.

    Raises:
      UserError: the mesh does not divide an axis of a parameter.
    """
    shapes = jax.eval_shape(lambda params: _init(model, params, tx, frozen, ema=ema), model.shapes)
    params = layout.tree(model.axes, model.shapes)
    kept = None
    if frozen is not None:
        kept, params = split_tree(params, frozen.accepts)
    shardings = TrainState(layout.replicated, params,
                           state_shardings(tx, shapes.params, params, layout.mesh),
                           params if ema else None, kept)
    if teacher is not None:
        shapes = shapes._replace(teacher=jax.eval_shape(teacher.cast, teacher.shapes))
        shardings = shardings._replace(teacher=layout.tree(teacher.axes, teacher.shapes))
    return StateSpec(model, tx, jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes, shardings), frozen)


def _init(model: Model, params: Params, tx: optax.GradientTransformation, frozen: Frozen | None, *,
          ema: bool) -> TrainState:
    kept = None
    if frozen is not None:
        params, kept = frozen.split(model, params)
    # The average is a copy: the step donates the state, and one buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average, kept)
