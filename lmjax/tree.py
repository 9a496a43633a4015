"""Named paths into nested dicts of arrays, and their sizes."""

import math
from collections.abc import Callable
from typing import Any

import jax


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Lists `("blocks/attention/query/kernel", leaf)` pairs in the order of `jax.tree.leaves`."""
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def split_tree(tree: dict[str, Any], accept: Callable[[str], bool],
               within: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits nested dicts into the leaves whose path `accept` is true of, and all others.

    Anything that is not a dict counts as a leaf. A dict that keeps no leaf is left out.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key, node in tree.items():
        path = within + key
        if not isinstance(node, dict):
            parts[not accept(path)][key] = node
            continue
        for part, kept in zip(parts, split_tree(node, accept, f"{path}/"), strict=True):
            if kept:
                part[key] = kept
    return parts


def join_trees(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Joins nested dicts that have no leaf in common: the inverse of `split_tree`."""
    out = {**a, **b}
    for key in a.keys() & b.keys():
        assert isinstance(a[key], dict) and isinstance(b[key], dict), f"{key} is in both"
        out[key] = join_trees(a[key], b[key])
    return out


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
