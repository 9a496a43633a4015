"""Named paths into nested dicts of arrays, and their sizes."""

import math
from typing import Any

import jax


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Lists `("blocks/attention/query/kernel", leaf)` pairs in the order of `jax.tree.leaves`."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def num_elements(tree: Any) -> int:
    """Counts the elements of all arrays (or `ShapeDtypeStruct`s) in `tree`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Counts the bytes of all arrays (or `ShapeDtypeStruct`s) in `tree`: one copy of each."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shard_bytes(tree: Any) -> int:
    """Counts the bytes of `tree` on one device; every leaf (array or shape) has a sharding."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
