"""The table of optimizers, and the optimizer that a config asks for."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.config import choice
from lmjax.models.parametrization import Factors
from lmjax.training.optim.adam import adamw, lion, sgd
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.factored import adafactor
from lmjax.training.optim.groups import own_configs, per_group, scale_by_multipliers
from lmjax.training.optim.muon import muon
from lmjax.training.optim.parameters import kind_of, map_axes
from lmjax.training.optim.schedules import make_schedule

# name -> (config, axes, the config of each parameter) -> how a gradient is rescaled, before weight
# decay and learning rate
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Any, Any], optax.GradientTransformation]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "sgd": sgd,
}


def make_optimizer(config: OptimizerConfig, total_steps: int, axes: Any,
                   by_path: Mapping[str, np.ndarray] | None = None, *,
                   factors: Mapping[str, Factors] | None = None,
                   keep_zeros: bool = False) -> optax.GradientTransformation:
    """Returns the transformation that turns a gradient into an update of the weights.

    It clips, rescales, decays the weights and applies the learning rate, in this order; its state
    holds the step count.

    Args:
      config: the optimizer and its numbers.
      total_steps: the step at which the schedule ends.
      axes: a tree like the parameters, whose leaves are tuples of axis names.
      by_path: of `groups.multipliers`; None or empty: all parameters learn at one rate.
      factors: of the model's parametrization; None or empty: all are 1. Those of the rates are in
        `by_path`.
      keep_zeros: the elements of matrices that are exactly 0 stay 0.
    """
    choice("optimizer.name", config.name, OPTIMIZERS)
    own = own_configs(config, axes, factors)
    # Zeros take no part in the norm of the gradient. Muon and Adafactor mix the elements of a
    # matrix, so that their update has to be cut as well.
    cut = [_without_zeros(axes)] if keep_zeros else []
    return optax.chain(
        *cut,
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        OPTIMIZERS[config.name](config, axes, own),
        _decay(own),
        # Weights decay at their learning rate, so a multiplier holds for the decay, too.
        *([scale_by_multipliers(by_path)] if by_path else []),
        per_group(own, ("decay_fraction", "final_lr_fraction"),
                  lambda its: optax.scale_by_learning_rate(make_schedule(its, total_steps))),
        *cut,
    )


def _decay(own: Any) -> optax.GradientTransformation:
    """Adds to each update the weight times the decay of its own config."""

    def decay(update: jax.Array, weight: jax.Array, config: OptimizerConfig) -> jax.Array:
        return update + config.weight_decay * weight if config.weight_decay else update

    return optax.stateless(lambda updates, params: jax.tree.map(decay, updates, params, own))


def _without_zeros(axes: Any) -> optax.GradientTransformation:
    """Replaces the update of each element of a matrix that is 0 by 0.

    It needs no state: what is 0 before a step is 0 after it, in a resumed run, too.
    """
    is_matrix = map_axes(lambda a: kind_of(a) == "matrix", axes)

    def cut(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, matrix: jnp.where(p == 0, 0, u) if matrix else u,
                            updates, params, is_matrix)

    return optax.stateless(cut)
