"""Where each array of the optimizer state lives."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of the optimizer state."""

    field: str  # the field of Optax's state that holds the array: mu, nu, v_row, ...
    shape: tuple[int, ...]


def state_shardings(tx: optax.GradientTransformation, params_shape: Any, param_shardings: Any,
                    mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for every leaf of `tx.init(params)`.

    A moment is sharded as its parameter is; Adafactor's row and column means as their parameter
    without the averaged axis; counts are replicated. Plain `jax.jit(tx.init)` would replicate
    everything that starts as zeros.

    Args:
      tx: from `make_optimizer`.
      params_shape: the parameters, or their `ShapeDtypeStruct`s.
      param_shardings: their `NamedSharding`s, in the same tree.
      mesh: the mesh of those shardings.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def leaf_of(path: tuple[Any, ...], leaf: Any) -> _Leaf:
        # The path goes through attributes of Optax's states, then through the parameter's own keys.
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        return _Leaf(names[-1] if names else "", tuple(leaf.shape))

    def sharding_of(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.shape == tuple(param.shape):
            return sharding
        spec = [*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec))]
        shape = list(param.shape)
        if leaf.field in ("v_row", "v_col") and len(param.shape) > 1:
            # Optax averages v_row over the largest axis and v_col over the second largest.
            averaged = int(np.argsort(param.shape)[-1 if leaf.field == "v_row" else -2])
            del spec[averaged], shape[averaged]
            if leaf.shape == tuple(shape):
                return NamedSharding(mesh, PartitionSpec(*spec))
        assert math.prod(leaf.shape) == 1, (leaf, param.shape)  # Adafactor's unused placeholder
        return replicated

    state = jax.tree_util.tree_map_with_path(leaf_of, jax.eval_shape(tx.init, params_shape))
    return optax.tree_map_params(tx, sharding_of, state, params_shape, param_shardings,
                                 transform_non_params=lambda _: replicated,
                                 is_leaf=lambda x: isinstance(x, optax.MaskedNode))
