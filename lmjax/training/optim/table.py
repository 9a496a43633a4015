"""Optimizers and learning-rate schedules on Optax, told what each parameter is by its axis names.

Scanned layers are stacked on a leading axis, so a parameter's rank says little: a ("layers", "norm") scale is
a vector a layer and ("layers", "embed", "heads", "head_dim") a matrix a layer. `Kind` is read from the names.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lmjax.config import at_least, choice

Axes = tuple[str, ...]
Kind = Literal["matrix", "embedding", "vector"]

STACKED = ("layers", "experts")  # leading axes with these names hold one parameter each along them
TABLES = ("vocab", "positions")  # a table with one row for each of these: embedding, unembedding
# Adafactor's own constants (Shazeer and Stern 2018, arXiv:1804.04235, section 9).
FACTOR_MIN_DIM = 128
FACTOR_CLIP_RMS = 1.0
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What becomes of a gradient.

    name: adamw, adafactor, lion, muon (for matrices, AdamW for the rest) or sgd.
    peak_lr: the learning rate after warm-up. It serves Muon and AdamW alike; Lion wants about a fifth.
    schedule: cosine, linear, exponential, wsd, inverse_sqrt or constant.
    warmup_steps: steps of linear increase from peak_lr/(warmup_steps+1); 0: none.
    final_lr_fraction: of peak_lr, where the decay ends: one step after the last one, so that with 0 no step is
      wasted (inverse_sqrt and constant end elsewhere).
    decay_fraction: the share of all steps in which `wsd` decays.
    b1, b2: decay of the first and second moment (AdamW, Lion).
    eps: added to the root of the second moment (AdamW).
    momentum: of sgd. muon_momentum, muon_iterations: Muon's Nesterov momentum and Newton-Schulz iterations.
    weight_decay: times the learning rate, decoupled from the gradient; matrices only.
    decay_embeddings: whether embedding tables decay too, and with them the output's, tied to them or not.
    clip_norm: largest global norm of a gradient; 0: no clipping.
    ema_decay: of an average of the weights that is kept beside them; 0: none.
    """

    name: str = "adamw"
    peak_lr: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    muon_momentum: float = 0.95
    muon_iterations: int = 5
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    clip_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        choice("name", self.name, OPTIMIZERS)
        choice("schedule", self.schedule, SCHEDULES)
        at_least(0, peak_lr=self.peak_lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay,
                 clip_norm=self.clip_norm, eps=self.eps)
        at_least(1, muon_iterations=self.muon_iterations)
        for key in ("b1", "b2", "momentum", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: expected 0 <= {key} < 1, got {getattr(self, key)}; change it")
        for key in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: expected 0 to 1, got {getattr(self, key)}; write it as a fraction")
        if self.schedule == "exponential" and self.final_lr_fraction == 0:
            raise ValueError("final_lr_fraction: expected more than 0 for the exponential schedule, got 0; "
                             "set it to 0.01, say")


def _down(config: OptimizerConfig, height: jax.Array) -> jax.Array:
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * height


# The share of peak_lr after warm-up: of the config, the progress of the decay (0 to 1) and the step.
Shape = Callable[[OptimizerConfig, jax.Array, jax.Array], jax.Array]
SCHEDULES: dict[str, Shape] = {
    "cosine": lambda c, p, t: _down(c, 0.5 * (1 + jnp.cos(jnp.pi * p))),
    "linear": lambda c, p, t: _down(c, 1 - p),
    "exponential": lambda c, p, t: jnp.power(c.final_lr_fraction, p),
    "wsd": lambda c, p, t: _down(c, 1 - jnp.sqrt(p)),  # Hägele et al. 2024, arXiv:2405.18392
    "inverse_sqrt": lambda c, p, t: jnp.sqrt(max(c.warmup_steps, 1) / jnp.maximum(t, max(c.warmup_steps, 1))),
    "constant": lambda c, p, t: jnp.ones_like(p),
}


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of each step: `step` (an integer, traced or not, from 0) -> float32 scalar.

    Warm-up is linear: step t takes (t+1)/(warmup_steps+1) of the peak, so that no step is wasted at 0 and
    step `warmup_steps` is the first at the peak. For the same reason the decay would end at step `total_steps`, one
    after the last.

    Raises:
      ValueError: warm-up (with wsd: and decay) does not fit into `total_steps`.
    """
    warmup = start = config.warmup_steps
    if config.schedule == "wsd":
        start = total_steps - round(config.decay_fraction * total_steps)
    if warmup > min(start, total_steps - 1):
        raise ValueError(f"config.optimizer.warmup_steps: expected at most {min(start, total_steps - 1)} for "
                         f"{total_steps} steps of the {config.schedule} schedule, got {warmup}; "
                         "shorten it or train longer")
    shape = SCHEDULES[config.schedule]

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        share = shape(config, jnp.clip((step - start) / max(total_steps - start, 1), 0, 1), step)
        return config.peak_lr * jnp.where(step < warmup, (step + 1) / (warmup + 1), share)

    return schedule


def kind_of(axes: Axes) -> Kind:
    """What a parameter with these axis names is to an optimizer, for each of the layers or experts in it."""
    own = _own_axes(axes)
    if "norm" in own:  # scales and biases, of whatever rank
        return "vector"
    if set(own) & set(TABLES):
        return "embedding"
    return "matrix" if len(_sides(axes)) >= 2 else "vector"


def make_optimizer(config: OptimizerConfig, total_steps: int, axes: Any) -> optax.GradientTransformation:
    """Clip, rescale, decay weights, apply the learning rate: in this order, with the step count in its state.

    Args:
      config: which rescaling, and the numbers.
      total_steps: at which the schedule ends.
      axes: nested dicts like the parameters, whose leaves are tuples of logical axis names.
    """
    decayed = ("matrix", "embedding") if config.decay_embeddings else ("matrix",)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        OPTIMIZERS[config.name](config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=_map_axes(lambda a: kind_of(a) in decayed, axes)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def _adamw(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _lion(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.b1, config.b2)


def _sgd(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    return optax.trace(config.momentum) if config.momentum else optax.identity()


def _adafactor(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=FACTOR_MIN_DIM), _clip_rms(axes))


def _clip_rms(axes: Any) -> optax.GradientTransformation:
    """Bounds the RMS of each parameter's update: Optax's would take that of all layers together."""

    def clip(update: jax.Array, names: Axes) -> jax.Array:
        own = tuple(range(len(names) - len(_own_axes(names)), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=own, keepdims=True))
        return update / jnp.maximum(1.0, rms / FACTOR_CLIP_RMS)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates, axes))


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Orthogonalised momentum for matrices (Jordan et al. 2024), AdamW for the rest."""
    dims = _map_axes(_matrix_dimensions, axes)
    labels = _map_axes(lambda a: "muon" if kind_of(a) == "matrix" else "adamw", axes)
    muon = optax.chain(
        scale_by_muon(ns_steps=config.muon_iterations, beta=config.muon_momentum,
                      weight_dimension_numbers=lambda _: dims),
        optax.stateless(lambda updates, params: jax.tree.map(_to_adamw_rms, updates, dims)),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, axes)}, labels)


def _to_adamw_rms(update: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    """Scales an orthogonal matrix to an RMS of 0.2, AdamW's usual one (Liu et al. 2025, arXiv:2502.16982)."""
    sides = [math.prod(update.shape[i] for i in side) for side in dims]
    return update * (MUON_RMS * math.sqrt(max(sides)))


def _matrix_dimensions(axes: Axes) -> MuonDimensionNumbers | optax.MaskedNode:
    """Which axes are the rows (inputs) and which the columns (outputs) of each matrix in a parameter."""
    if kind_of(axes) != "matrix":
        return optax.MaskedNode()
    sides = _sides(axes)
    if len(sides) != 2:
        raise ValueError(f"optimizer.name: expected matrices with two sides for muon, got axes {axes}; "
                         "use adamw")
    return MuonDimensionNumbers(reduction_axis=sides[0], output_axis=sides[1])


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the optimizer state and the field of the state that it is in (mu, nu, v_row, ...)."""

    field: str
    shape: tuple[int, ...]


def state_shardings(tx: optax.GradientTransformation, params_shape: Any, param_shardings: Any,
                    mesh: Mesh) -> Any:
    """A `NamedSharding` for every leaf of `tx.init(params)`.

    Moments lie where their parameter lies; Adafactor's row and column statistics as their parameter does
    without the axis that was averaged out; counts are replicated. (`jax.jit(tx.init)` left to itself
    replicates what is initialised to zeros.)

    Args:
      tx: from `make_optimizer`.
      params_shape: the parameters, or their `ShapeDtypeStruct`s.
      param_shardings: a `NamedSharding` for each of these.
      mesh: that of the shardings.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def leaf_of(path: tuple[Any, ...], leaf: Any) -> _Leaf:
        # State fields are attributes; below the last of them come the parameter's own dict keys.
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        return _Leaf(names[-1] if names else "", tuple(leaf.shape))

    def sharding_of(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.shape == tuple(param.shape):
            return sharding
        spec, shape = [*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec))], list(param.shape)
        if leaf.field in ("v_row", "v_col") and len(param.shape) > 1:
            # optax averages rows over the largest axis, columns over the second largest.
            averaged = int(np.argsort(param.shape)[-1 if leaf.field == "v_row" else -2])
            del spec[averaged], shape[averaged]
            if leaf.shape == tuple(shape):
                return NamedSharding(mesh, PartitionSpec(*spec))
        assert math.prod(leaf.shape) == 1, (leaf, param.shape)  # Adafactor's stand-in for what it lacks
        return replicated

    state = jax.tree_util.tree_map_with_path(leaf_of, jax.eval_shape(tx.init, params_shape))
    return optax.tree_map_params(tx, sharding_of, state, params_shape, param_shardings,
                                 transform_non_params=lambda _: replicated,
                                 is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def ema_update(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """The moving average `d * ema + (1 - d) * params`, with d = min(decay, (1 + step) / (10 + step)).

    The ramp keeps the random start out of the average of a short run. `step` counts from 0.
    """
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)


def _own_axes(axes: Axes) -> Axes:
    """`axes` without the leading ones along which separate parameters are stacked."""
    lead = 0
    while lead < len(axes) and axes[lead] in STACKED:
        lead += 1
    return axes[lead:]


def _sides(axes: Axes) -> list[tuple[int, ...]]:
    """The dimensions of each side of the matrix: (heads, head_dim) are one side, any other axis is one."""
    sides: list[tuple[int, ...]] = []
    for i in range(len(axes) - len(_own_axes(axes)), len(axes)):
        if axes[i] == "head_dim" and sides and axes[i - 1] in ("heads", "kv_heads"):
            sides[-1] = (i - 1, i)
        else:
            sides.append((i,))
    return sides


def _map_axes(fn: Callable[[Axes], Any], axes: Any) -> Any:
    return jax.tree.map(fn, axes, is_leaf=lambda x: isinstance(x, tuple))
