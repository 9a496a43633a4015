"""How decoding keeps keys and values: as floats, or as int8 with a scale per head and position.

Shape suffixes: B batch, G kv heads, S cache slots, K head_dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.nn.packed import rounded_rows

KV_CACHES = ("float", "int8")


class Int8Rows(NamedTuple):
    """Keys or values [..., K] as integers, each row with a scale of its own."""

    values: jax.Array  # int8 [..., K]
    # float32 [..., 1]. With this dimension, what moves slots or rows of the cache treats both
    # arrays alike.
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys or values that they stand for."""
        return self.values.shape

    def dense(self, dtype: Any) -> jax.Array:
        """The keys or values in `dtype`."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


CacheArray = jax.Array | Int8Rows  # keys or values


def empty_rows(shape: tuple[int, ...], kv_cache: str, dtype: Any) -> CacheArray:
    """Room for keys or values of this shape.

    Args:
      kv_cache: a row of KV_CACHES.
      dtype: of floats.
    """
    if kv_cache == "float":
        return jnp.zeros(shape, dtype)
    return Int8Rows(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))


def like(x_BGSK: jax.Array, cache: CacheArray) -> CacheArray:
    """Keys or values in the form in which `cache` keeps them."""
    return Int8Rows(*rounded_rows(x_BGSK)) if isinstance(cache, Int8Rows) else x_BGSK
