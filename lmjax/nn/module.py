"""The only file that knows how Flax NNX stores things: modules to plain parameter trees and back.

Modules hold nothing but `nnx.Param`, and everything outside `nn/` and `models/` sees nested dicts of
arrays that plain `jax.jit`, `jax.grad` and `jax.lax.scan` take as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
Params = dict[str, Any]


def param(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter of `shape` whose dimensions carry the logical names `axes`."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The start of every norm's scale."""
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The start of every bias."""
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module taken apart: its structure without values, and what its parameters look like.

    shapes: nested dict of `ShapeDtypeStruct`. axes: the same tree with a tuple of axis names a leaf.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graph: Any
    shapes: Params
    axes: Params

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; trace it under `jax.jit` with output shardings to create them in place."""
        return _params(self.build(nnx.Rngs(key)))

    def bind(self, params: Params) -> Any:
        """The module with `params` in it, for the time of one traced call."""
        return nnx.merge(self.graph, params)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Takes `build(rngs)` apart without making a single array."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    is_param = _is_param
    axes = jax.tree.map(lambda p: p.get_metadata()["axes"], state, is_leaf=is_param)
    return Functional(build, graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def stack_modules(build: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num` modules in one, each parameter with a leading "layers" dimension."""
    keys = jax.random.split(rngs.params(), num)
    values = jax.vmap(lambda key: _params(build(nnx.Rngs(key))))(keys)
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    flat = jax.tree.leaves(values)
    params, treedef = jax.tree.flatten(state, is_leaf=_is_param)
    stacked = [nnx.Param(x, axes=("layers", *p.get_metadata()["axes"])) for p, x in zip(params, flat, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(treedef, stacked))


def split_module(module: nnx.Module) -> tuple[Any, Params]:
    """The structure of `module` and its parameters, for a scan over stacked layers."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def merge_module(graph: Any, params: Params) -> Any:
    """The inverse of `split_module`."""
    return nnx.merge(graph, params)


def _params(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(module)[1])


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
