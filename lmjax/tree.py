"""Named paths into nested dicts of arrays, and what is counted over them."""

import math
from typing import Any

import jax


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`[("blocks/attention/query/kernel", leaf), ...]` in the tree's own order."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def num_elements(tree: Any) -> int:
    """Elements over all arrays (or shape structs) of `tree`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes over all arrays (or shape structs) of `tree`, counted once however they are sharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays, or shapes, that have shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
