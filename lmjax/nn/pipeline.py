"""Layers as a pipeline: each stage holds some of them, and microbatches pass through the stages.

The schedule is GPipe's (Huang et al. 2019, arXiv:1811.06965) in the formulation of GSPMD (Xu et al.
2021, arXiv:2105.04663, 3.3). All stages are one computation, `vmap`ped over a leading dimension
that the mesh splits; rolling that dimension by one moves each activation to the next stage. The
backward pass is the derivative of the forward pass. All other mesh axes work inside a stage as they
do without stages.

A circular schedule (Narayanan et al. 2021, arXiv:2104.04473, 2.2) gives each device several pieces
of the layers, called virtual stages, and divides the bubble (the share of time in which a stage
idles) by their number. But a device would hold every S-th piece of the layers, while a
sharding splits an array into contiguous parts. So the stacked parameters, and the checkpoints,
would lie in an order that depends on the mesh, or would have to move before every step. With this
schedule, any mesh reads any checkpoint, and more microbatches reduce the bubble as well.

Shape suffixes: S stages, M microbatches, B rows (of one microbatch in arrays with S or M), T
sequence, D embed_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.nn.sequence import required_layout, stream_axis
from lmjax.sharding import constrain, current_microbatches


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; row i goes to part i % parts.

    So every device keeps the rows that it has.
    """
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse of `split_rows`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def split_key(key: jax.Array, num: int) -> jax.Array:
    """Splits one key into [num] keys; splits M keys, each into num, into [num, M] keys in all."""
    if not key.ndim:
        return jax.random.split(key, num)
    return jax.vmap(lambda k: jax.random.split(k, num), out_axes=1)(key)


def per_part(fn: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array,
             key: jax.Array) -> jax.Array:
    """fn(x, key); with [M] keys, fn on each of M parts of x with its own key."""
    return join_rows(jax.vmap(fn)(split_rows(x, key.shape[0]), key)) if key.ndim else fn(x, key)


def pipeline(layers: Callable[..., tuple[jax.Array, Any, Any]], block: tuple[Any, Any],
             x_BTD: jax.Array, per_layer: Any, shared: Sequence[Any], *,
             period: int) -> tuple[jax.Array, Any]:
    """Runs x through all layers in stages, one microbatch after another.

    This takes M + S - 1 ticks. Each stage idles in S - 1 of them: what it then computes is dropped.

    Args:
      layers: runs the layers of one stage:
        (block, x, per_layer, caches, shared) -> (x, caches, outs).
      block: the structure of a layer, and the parameters [layers, ...] of all layers.
      per_layer: a tree of arrays [layers], or [layers, M] where they differ between microbatches.
      shared: one tree per kind of layer, whose arrays all have as many rows as x_BTD.
      period: the length of the pattern of layers.

    Returns:
      x, and the layers' outs: [layers, ...], or [layers, M, ...] if M > 1.

    Raises:
      UserError: a stage would begin in the middle of the pattern.
    """
    layout = required_layout()
    graph, params = block
    M = current_microbatches()
    S = layout.ways("layers")
    axes = layout.on("layers")
    _check_stages(jax.tree.leaves(params)[0].shape[0], S, period, where=f"mesh.{axes[0]}")
    leaves, tree = jax.tree.flatten(shared)
    parts = [split_rows(a, M) if isinstance(a, jax.Array) else a for a in leaves]

    def stage(params: Any, per_layer: Any, x: jax.Array, m: jax.Array) -> tuple[jax.Array, Any]:
        """One stage's layers on microbatch m."""
        own = jax.tree.unflatten(tree, [_microbatch(part, m) for part in parts])
        per_layer = jax.tree.map(lambda a: a[:, m] if a.ndim > 1 else a, per_layer)
        no_caches = (None,) * len(shared)  # one per kind of layer: a pipeline never decodes
        x, _, out = layers((graph, params), x, per_layer, no_caches, own)
        return x, out

    stages = jax.vmap(stage, spmd_axis_name=axes)
    params, per_layer = jax.tree.map(lambda a: a.reshape(S, -1, *a.shape[1:]), (params, per_layer))
    number_S = jnp.arange(S)
    along_T = stream_axis(x_BTD)  # depends on T only, which all arrays below have

    def tick(x_SBTD: jax.Array, fed: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        """Moves every activation to the next stage, feeds the first stage, and runs all stages."""
        time, x_BTD = fed
        x_SBTD = jnp.roll(x_SBTD, 1, axis=0)
        x_SBTD = jnp.where(number_S.reshape(S, 1, 1, 1) == 0, x_BTD[None], x_SBTD)
        x_SBTD = constrain(x_SBTD, "layers", "batch", along_T, "act_embed")
        x_SBTD, out = stages(params, per_layer, x_SBTD, jnp.clip(time - number_S, 0, M - 1))
        x_SBTD = constrain(x_SBTD, "layers", "batch", along_T, "act_embed")
        return x_SBTD, (x_SBTD, out)

    x_MBTD = split_rows(x_BTD, M)
    fed = jnp.arange(M + S - 1), jnp.pad(x_MBTD, ((0, S - 1), *((0, 0),) * x_BTD.ndim))
    start_SBTD = jnp.zeros((S, *x_MBTD.shape[1:]), x_BTD.dtype)
    _, (x_of_ticks, outs) = jax.lax.scan(tick, start_SBTD, fed)
    done_MBTD = x_of_ticks[S - 1:, S - 1]  # what the last stage gives, from microbatch 0 on
    x_BTD = constrain(join_rows(done_MBTD), "batch", along_T, "act_embed")
    return x_BTD, _by_layer(outs, S, M)


def _microbatch(parts: Any, m: jax.Array) -> Any:
    """Microbatch m of an array [M, ...]; anything that is not an array is returned as it is."""
    if not isinstance(parts, jax.Array):
        return parts
    return jax.lax.dynamic_index_in_dim(parts, m, keepdims=False)


def _check_stages(num_layers: int, S: int, period: int, *, where: str) -> None:
    """Refuses stages that would begin in the middle of the pattern of layers."""
    if num_layers % (S * period):
        raise UserError(
            f"{S} stages of whole repetitions of the {period} layers of model.layer_pattern",
            f"{num_layers} layers", "change one of them", where=where)


def _by_layer(outs: Any, S: int, M: int) -> Any:
    """Arrays [ticks, S, layers per stage, ...] as [layers, M, ...], or [layers, ...] if M is 1."""
    # Microbatch m leaves stage s at tick m + s.
    outs = jax.tree.map(
        lambda a: jnp.stack([a[s : s + M, s] for s in range(S)]).swapaxes(1, 2), outs)
    return jax.tree.map(lambda a: a.reshape(-1, *(a.shape[2:] if M > 1 else a.shape[3:])), outs)
