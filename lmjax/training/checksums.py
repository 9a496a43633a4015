"""Checksums of arrays that do not depend on how an array is sharded."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.errors import UserError
from lmjax.tree import named_leaves


def checksums(tree: Any) -> dict[str, str]:
    """Returns name -> 64-bit checksum, in hexadecimal, of the bits of every array.

    A bijection mixes each element's bits with its index, and the results are added modulo 2^32,
    twice with different constants. The order of a sum of integers does not matter, so devices add
    up their own shards; and a change of any one element changes the sum.
    """
    names, leaves = zip(*named_leaves(tree), strict=True)
    mesh = getattr(leaves[0].sharding, "mesh", None)
    sums = np.asarray(_jitted(mesh)(list(leaves)))
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(names, sums, strict=True)}


def verify(trees: Mapping[str, Any], expected: Mapping[str, Mapping[str, str]]) -> None:
    """Compares the checksums of `trees` to those that were saved with them.

    Args:
      trees: item -> tree of arrays.
      expected: item -> name -> checksum.

    Raises:
      UserError: names the first array whose bits are not those that were saved.
    """
    for item, tree in trees.items():
        got = checksums(tree)
        for name, checksum in expected[item].items():
            if checksum != got.get(name):
                raise UserError(f"checksum {checksum}", got.get(name), "the checkpoint is damaged",
                                where=f"{item}/{name}")


def non_finite(tree: Any) -> str:
    """Returns the name of the first array with an element that is not finite; "" if none has."""
    leaves = [(name, leaf) for name, leaf in named_leaves(tree)
              if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not leaves:
        return ""
    mesh = getattr(leaves[0][1].sharding, "mesh", None)
    fine = np.asarray(_finite(mesh)([leaf for _, leaf in leaves]))
    return "" if fine.all() else leaves[int(fine.argmin())][0]


@functools.cache
def _finite(mesh: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    def each(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])

    return jax.jit(each, out_shardings=mesh and NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _jitted(mesh: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(sums_of, out_shardings=mesh and NamedSharding(mesh, PartitionSpec()))


def sums_of(leaves: list[jax.Array]) -> jax.Array:
    """The checksums of arrays, uint32 [leaves, 2], while a function is traced."""

    def mix(x: jax.Array, constant: int) -> jax.Array:  # the finalizer of MurmurHash3, a bijection
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(constant)
        return x ^ (x >> 16)

    def one(leaf: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, width)
        bits = bits.astype(jnp.uint32)
        index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
        for d in reversed(range(leaf.ndim)):
            counted = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, d)
            index += counted * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[d]
        bits = bits + index * jnp.uint32(0x9E3779B9)
        return jnp.stack([jnp.sum(mix(bits, constant), dtype=jnp.uint32)
                          for constant in (0xC2B2AE35, 0x27D4EB2F)])

    return jnp.stack([one(leaf) for leaf in leaves])
