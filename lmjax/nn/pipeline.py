"""Layers as a pipeline: each stage holds some of them, and the parts of a batch pass from one stage to the next.

The schedule is GPipe's (Huang et al. 2019, arXiv:1811.06965), written as GSPMD has it (Xu et al. 2021,
arXiv:2105.04663, 3.3): all stages are one computation, `vmap`ped over a leading dimension that the mesh splits, and an
activation moves on where that dimension is rolled by one. The backward pass is the derivative of the forward pass,
every other mesh axis works inside a stage as it does without stages, and no stage is a program of its own.

A circular schedule (Narayanan et al. 2021, arXiv:2104.04473, 2.2) would divide the idle share by the pieces that a
stage holds. Its stages hold every S-th piece of the layers, though, and a sharding splits an array into contiguous
parts: the stacked parameters, and what a checkpoint holds, would lie in an order that depends on the mesh, or move
before every step. Here any mesh reads any checkpoint; more microbatches make the idle share smaller, too.

Shape suffixes: S stages, M parts of a batch, B rows, T sequence, D embed_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.nn.sequence import stream_axis
from lmjax.sharding import constrain, current_layout, current_microbatches


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; row i goes to part i % parts: every device keeps the rows that it has."""
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def split_key(key: jax.Array, num: int) -> jax.Array:
    """`num` keys of a key, or of each of [M] keys: [num, M]."""
    return jax.vmap(lambda k: jax.random.split(k, num), out_axes=1)(key) if key.ndim else jax.random.split(key, num)


def per_part(fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, key: jax.Array) -> jax.Array:
    """fn(x, key), or for [M] keys fn of each of M parts of x and its own key."""
    return join_rows(jax.vmap(fn)(split_rows(x, key.shape[0]), key)) if key.ndim else fn(x, key)


def pipeline(layers: Callable[..., tuple[jax.Array, Any, Any]], block: tuple[Any, Any], x_BTD: jax.Array,
             per_layer: Any, shared: Sequence[Any], *, period: int) -> tuple[jax.Array, Any]:
    """`layers(block, x, per_layer, caches, shared) -> (x, caches, outs)`, a stage's share of them at a time.

    block: its structure, and parameters [layers, ...]. per_layer: a tree of arrays [layers], or [layers, M] of what
    also differs from part to part. shared: a tree in which every array has B rows. Returns x and the outs, [layers,
    ...], or [layers, M, ...] of several parts. Of M + S - 1 steps a stage idles in S - 1; what it computes then, on
    zeros, reaches nothing.

    Raises:
      ValueError: a stage would begin in the middle of the pattern of layers.
    """
    layout, (graph, params), M = current_layout(), block, current_microbatches()
    S, axes, num_layers = layout.ways("layers"), layout.on("layers"), jax.tree.leaves(params)[0].shape[0]
    if num_layers % (S * period):
        raise ValueError(f"mesh.{axes[0]}: expected {S} stages of whole repetitions of the {period} layers of "
                         f"model.layer_pattern, got {num_layers} layers; change one of them")
    leaves, tree = jax.tree.flatten(shared)
    parts = [split_rows(a, M) if isinstance(a, jax.Array) else a for a in leaves]

    def stage(params: Any, per_layer: Any, x: jax.Array, m: jax.Array) -> tuple[jax.Array, Any]:
        own = [jax.lax.dynamic_index_in_dim(a, m, keepdims=False) if isinstance(a, jax.Array) else a for a in parts]
        per_layer = jax.tree.map(lambda a: a[:, m] if a.ndim > 1 else a, per_layer)
        x, _, out = layers((graph, params), x, per_layer, (None,) * len(shared), jax.tree.unflatten(tree, own))
        return x, out

    stages = jax.vmap(stage, spmd_axis_name=axes)
    params, per_layer = jax.tree.map(lambda a: a.reshape(S, -1, *a.shape[1:]), (params, per_layer))
    number_S = jnp.arange(S)

    def step(held_SBTD: jax.Array, fed: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        at, x_BTD = fed
        held = jnp.where(number_S.reshape(S, 1, 1, 1) == 0, x_BTD[None], jnp.roll(held_SBTD, 1, axis=0))
        held = constrain(held, "layers", "batch", stream_axis(held), "act_embed")
        held, out = stages(params, per_layer, held, jnp.clip(at - number_S, 0, M - 1))
        held = constrain(held, "layers", "batch", stream_axis(held), "act_embed")
        return held, (held, out)

    x_MBTD = split_rows(x_BTD, M)
    fed = jnp.arange(M + S - 1), jnp.pad(x_MBTD, ((0, S - 1), *((0, 0),) * x_BTD.ndim))
    _, (held, outs) = jax.lax.scan(step, jnp.zeros((S, *x_MBTD.shape[1:]), x_BTD.dtype), fed)
    # Part m leaves stage s at step m + s.
    outs = jax.tree.map(lambda a: jnp.stack([a[s : s + M, s] for s in range(S)]).swapaxes(1, 2), outs)
    outs = jax.tree.map(lambda a: a.reshape(num_layers, *(a.shape[2:] if M > 1 else a.shape[3:])), outs)
    return constrain(join_rows(held[S - 1:, S - 1]), "batch", stream_axis(held), "act_embed"), outs
