"""Learning rates that differ between parameters: by groups of them, and by depth."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.errors import UserError
from lmjax.training.optim.config import OptimizerConfig
from lmjax.tree import named_leaves

STACK = "layers/block/"  # in the paths of a stack of layers, whose parameters have depth first
TOP = ("head", "task_head/", "transform", "pooler/", "projection")  # what lies above all layers


def multipliers(config: OptimizerConfig, shapes: Any) -> dict[str, np.ndarray]:
    """What the learning rate of each parameter is multiplied by.

    With `layer_decay` d and n layers, layer i (from 0) learns at d^(n - i), what lies below the
    layers at d^(n + 1), and what lies above them at 1 (Clark et al. 2020, arXiv:2003.10555; Bao et
    al. 2021, arXiv:2106.08254). The layers of a decoder lie above those of its encoder.

    Args:
      config: of the optimizer.
      shapes: those of all parameters of the model, trained or not.

    Returns:
      By path: a float32 scalar or, for a stack of layers, [layers]. Empty if all of them are 1.

    Raises:
      UserError: a group's expression is found in the path of no parameter.
    """
    leaves = named_leaves(shapes)
    for i, group in enumerate(config.groups):
        if not any(re.search(group.parameters, path) for path, _ in leaves):
            raise UserError(f"a regular expression for some of the parameters' paths, such as "
                            f"{leaves[0][0]} and {leaves[-1][0]}", repr(group.parameters),
                            "change it", where=f"config.optimizer.groups.{i}.parameters")
    if not config.groups and config.layer_decay == 1.0:
        return {}
    depths = {path.split(STACK)[0]: shape.shape[0] for path, shape in leaves if STACK in path}
    return {path: np.asarray(_of_group(config, path) * config.layer_decay**_below_top(path, depths),
                             np.float32) for path, _ in leaves}


def scale_by_multipliers(by_path: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by that of its path."""

    def scale(updates: Any, params: Any) -> Any:
        leaves = []
        for path, update in named_leaves(updates):
            by = by_path[path]
            leaves.append(update * jnp.asarray(by.reshape(*by.shape, *(1,) * (
                update.ndim - by.ndim))))
        return jax.tree.unflatten(jax.tree.structure(updates), leaves)

    return optax.stateless(scale)


def _of_group(config: OptimizerConfig, path: str) -> float:
    """The multiplier of the first group that the parameter is in; 1 if it is in none."""
    found = (group.multiplier for group in config.groups if re.search(group.parameters, path))
    return next(found, 1.0)


def _below_top(path: str, depths: dict[str, int]) -> Any:
    """How many steps of depth a parameter lies below the top: a number, or [layers]."""
    left = sum(depths.values())
    for stack in ("encoder/", "decoder/", ""):
        if stack in depths and path.startswith(f"{stack}{STACK}"):
            return left - np.arange(depths[stack])
        left -= depths.get(stack, 0)
        if stack in depths and path.startswith(f"{stack}norm/"):
            return left
    return 0 if path.startswith(TOP) else sum(depths.values()) + 1
