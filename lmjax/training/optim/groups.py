"""Parameters that learn in other ways than the rest: groups of them, and rates by depth."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmjax.errors import UserError
from lmjax.models.parametrization import Factors
from lmjax.training.optim.config import GroupConfig, OptimizerConfig
from lmjax.training.optim.parameters import Axes, kind_of
from lmjax.tree import named_leaves

STACK = "layers/block/"  # in the paths of a stack of layers, whose parameters have depth first
TOP = ("head", "task_head/", "transform", "pooler/", "projection")  # what lies above all layers
# What a group may set besides the multiplier of its rate.
OWN = ("b1", "b2", "weight_decay", "decay_fraction", "final_lr_fraction")


def multipliers(config: OptimizerConfig, shapes: Any, axes: Any,
                factors: Mapping[str, Factors] | None = None) -> dict[str, np.ndarray]:
    """What the learning rate of each parameter is multiplied by.

    With `layer_decay` d and n layers, layer i (from 0) learns at d^(n - i), what lies below the
    layers at d^(n + 1), and what lies above them at 1 (Clark et al. 2020, arXiv:2003.10555; Bao et
    al. 2021, arXiv:2106.08254). The layers of a decoder lie above those of its encoder.

    Args:
      config: of the optimizer.
      shapes: those of all parameters of the model, trained or not.
      axes: their axis names.
      factors: of the model's parametrization, by path; None or empty: all are 1.

    Returns:
      By path: a float32 scalar or, for a stack of layers, [layers]. Empty if all of them are 1.

    Raises:
      UserError: a group has no parameter.
    """
    leaves, names = named_leaves(shapes), _axes_by_path(axes)
    for i, group in enumerate(config.groups):
        if not any(_is_in(group, path, names[path]) for path, _ in leaves):
            fix, where = "change it", f"config.optimizer.groups.{i}"
            if group.kind:
                raise UserError("a kind of parameter that the model has", f"{group.kind} (with "
                                "tie_embeddings, the one table is an embedding)", fix, where=where)
            raise UserError(f"a regular expression for some of the parameters' paths, such as "
                            f"{leaves[0][0]} and {leaves[-1][0]}", repr(group.parameters), fix,
                            where=f"{where}.parameters")
    found = {path: group_of(config, path, names[path]) for path, _ in leaves}
    by_group = {path: its.multiplier if its else 1.0 for path, its in found.items()}
    if factors:
        by_group = {path: by * factors[path].rate for path, by in by_group.items()}
    if config.layer_decay == 1.0 and set(by_group.values()) == {1.0}:
        return {}
    depths = {path.split(STACK)[0]: shape.shape[0] for path, shape in leaves if STACK in path}
    return {path: np.asarray(by_group[path] * config.layer_decay**_below_top(path, depths),
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


def group_of(config: OptimizerConfig, path: str, axes: Axes) -> GroupConfig | None:
    """The first group that a parameter is in; None if it is in none."""
    return next((group for group in config.groups if _is_in(group, path, axes)), None)


def with_group(config: OptimizerConfig, group: GroupConfig | None) -> OptimizerConfig:
    """The config of the parameters in a group, which has no groups itself."""
    set_there = {} if group is None else {
        key: value for key in OWN if (value := getattr(group, key)) is not None}
    return dataclasses.replace(config, groups=(), **set_there)


def own_configs(config: OptimizerConfig, axes: Any,
                factors: Mapping[str, Factors] | None = None) -> Any:
    """The optimizer's config as it is for each parameter.

    Args:
      config: of the optimizer.
      axes: a tree like the parameters, whose leaves are tuples of axis names.
      factors: of the model's parametrization, by path; None or empty: all are 1.

    Returns:
      A tree of `OptimizerConfig`s without groups. `weight_decay` is 0 for what does not decay.
    """
    decayed = ("matrix", "embedding") if config.decay_embeddings else ("matrix",)

    def own(path: str, names: Axes) -> OptimizerConfig:
        group, its = group_of(config, path, names), config
        if kind_of(names) not in decayed:
            its = dataclasses.replace(its, weight_decay=0.0)
        its = with_group(its, group)
        by = factors.get(path) if factors else None
        return its if by is None else dataclasses.replace(
            its, weight_decay=its.weight_decay * by.decay, eps=its.eps * by.eps)

    leaves = [own(*item) for item in _axes_by_path(axes).items()]
    return jax.tree.unflatten(jax.tree.structure(axes, is_leaf=_is_axes), leaves)


def per_group(configs: Any, fields: tuple[str, ...],
              make: Callable[[OptimizerConfig], optax.GradientTransformation],
              ) -> optax.GradientTransformation:
    """Transforms each parameter by `make` of its own config.

    Parameters whose configs agree on `fields` share one transformation. If all of them do, it is
    `make` of that config, so that an optimizer without groups has the state that it always had.
    """
    labels = jax.tree.map(lambda c: ", ".join(f"{f}={getattr(c, f)}" for f in fields), configs)
    found = dict(zip(jax.tree.leaves(labels), jax.tree.leaves(configs), strict=True))
    made = {label: make(config) for label, config in found.items()}
    return next(iter(made.values())) if len(made) == 1 else optax.partition(made, labels)


def _is_in(group: GroupConfig, path: str, axes: Axes) -> bool:
    kind: str = kind_of(axes)
    if kind == "embedding" and path.startswith(TOP):
        kind = "unembedding"
    return group.kind in ("", kind) and re.search(group.parameters, path) is not None


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple)


def _axes_by_path(axes: Any) -> dict[str, Axes]:
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): names
            for path, names in leaves}


def _below_top(path: str, depths: dict[str, int]) -> Any:
    """How many steps of depth a parameter lies below the top: a number, or [layers]."""
    left = sum(depths.values())
    for stack in ("encoder/", "decoder/", "dense_", ""):
        if stack in depths and path.startswith(f"{stack}{STACK}"):
            return left - np.arange(depths[stack])
        left -= depths.get(stack, 0)
        if stack in depths and path.startswith(f"{stack}norm/"):
            return left
    return 0 if path.startswith(TOP) else sum(depths.values()) + 1
