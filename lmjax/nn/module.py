"""From Flax NNX modules to plain parameter trees and back; the only file that splits and merges.

Modules hold nothing but `nnx.Param`. Outside `nn/` and `models/`, parameters are nested dicts of
arrays, which `jax.jit`, `jax.grad` and `jax.lax.scan` take as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.nn.packed import as_packed

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # of key, shape and dtype
Params = dict[str, Any]  # nested; its leaves are arrays


def param(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...],
          axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter of `shape`, whose dimensions have the axis names `axes`."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initializes the scale of a norm."""
    return jnp.ones(shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initializes a bias."""
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A module as pure functions: how it is built, its structure, and its parameters' shapes."""

    build: Callable[[nnx.Rngs], nnx.Module]
    graph: Any  # the structure of the module, without values
    shapes: Params  # a `ShapeDtypeStruct` per parameter
    axes: Params  # a tuple of axis names per parameter

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Under `jax.jit` with output shardings, they are created in place."""
        return _params(self.build(nnx.Rngs(key)))

    def bind(self, params: Params) -> Any:
        """The module with `params` as its parameters, for use within one traced call."""
        return merge_module(self.graph, params)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Makes pure functions of the module `build(rngs)`, without creating any array."""
    graph, state = _abstract(build)
    axes = jax.tree.map(lambda p: p.get_metadata()["axes"], state, is_leaf=_is_param)
    return Functional(build, graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def stack_modules(build: Callable[[nnx.Rngs], nnx.Module], num: int,
                  rngs: nnx.Rngs) -> nnx.Module:
    """`num` modules in one, each parameter with a leading "layers" dimension."""
    keys = jax.random.split(rngs.params(), num)
    values = jax.vmap(lambda key: _params(build(nnx.Rngs(key))))(keys)
    graph, state = _abstract(build)
    params, treedef = jax.tree.flatten(state, is_leaf=_is_param)
    stacked = [nnx.Param(x, axes=("layers", *p.get_metadata()["axes"]))
               for p, x in zip(params, jax.tree.leaves(values), strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(treedef, stacked))


def split_module(module: nnx.Module) -> tuple[Any, Params]:
    """The structure of `module` and its parameters."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def merge_module(graph: Any, params: Params) -> Any:
    """The inverse of `split_module`. A dict of integers and scales becomes a `Packed` matrix."""
    return nnx.merge(graph, as_packed(params))


def _abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any]:
    """The structure of the module `build(rngs)`, and its state with shapes in place of arrays."""
    return nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def _params(module: nnx.Module) -> Params:
    return split_module(module)[1]


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
