"""How sequences lie on a mesh: which axes split them, and how their parts move between devices.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
K head_dim, D embed_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.nn.masking import AttentionMask
from lmjax.sharding import Layout, constrain, current_layout

# The name under which remat policies find an attention kernel's output and log-sums.
KERNEL_RESIDUALS = "kernel"
Body = Callable[..., jax.Array]


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes, of more than one device, that split the axis `name` in the current layout."""
    layout = current_layout()
    return () if layout is None else layout.on(name)


def num_shards(name: str) -> int:
    """The number of parts into which the current layout splits the axis `name`."""
    layout = current_layout()
    return 1 if layout is None else layout.ways(name)


def required_layout() -> Layout:
    """The current layout, for code that runs only inside one."""
    layout = current_layout()
    assert layout is not None
    return layout


def per_shard(body: Body, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
              mask: AttentionMask, *, keys: str = "kv_seq", extra: Any = None,
              extra_spec: Any = None) -> jax.Array:
    """Runs body(q, k, v, mask, extra) on every device's share of the arguments.

    Rows are split by "batch", queries by "seq" and heads by "act_heads". Where key/value heads are
    split into fewer parts than query heads, they are repeated until every device has the ones that
    its queries read.

    Args:
      keys: the axis name of the keys' sequence. By default every device gets all keys, by an
        all-gather over the context axis.
      extra: a tree of arrays, split by `extra_spec`.

    Returns:
      [B, T, H, K], split as the queries are.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return body(q_BTHK, k_BSGK, v_BSGK, mask, extra)
    G = k_BSGK.shape[2]
    repeats = math.lcm(G, num_shards("act_heads")) // G
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_BSGK, v_BSGK))
    q_spec = layout.spec(("batch", "seq", "act_heads", None), q_BTHK.shape)
    k_spec = layout.spec(("batch", keys, "act_heads", None), k.shape)
    rows_q, rows_k = PartitionSpec(*q_spec[:2]), PartitionSpec(*k_spec[:2])

    def local(q: jax.Array, k: jax.Array, v: jax.Array, tokens: tuple[jax.Array, ...],
              extra: Any) -> jax.Array:
        q_positions, kv_positions, q_segments, kv_segments = tokens
        own = AttentionMask(q_positions, kv_positions, q_segments, kv_segments, mask.causal,
                            mask.window, in_order=mask.in_order)
        return body(q, k, v, own, extra)

    # The kernels' loops and Pallas calls do not declare over which axes their results vary, so that
    # cannot be checked.
    run = jax.shard_map(
        local, mesh=layout.mesh, out_specs=q_spec, check_vma=False,
        in_specs=(q_spec, k_spec, k_spec, (rows_q, rows_k, rows_q, rows_k), extra_spec))
    tokens = mask.q_positions, mask.kv_positions, mask.q_segments, mask.kv_segments
    return run(q_BTHK, k, v, tokens, extra)


def heads_spec(sinks_H: jax.Array | None) -> PartitionSpec | None:
    """How sinks are split over the mesh, as the query heads are."""
    layout = current_layout()
    if sinks_H is None or layout is None:
        return None
    return layout.spec(("act_heads",), sinks_H.shape)


def stream_axis(x: jax.Array) -> str:
    """The axis name that splits dimension T of the residual stream [..., T, D].

    "stream_seq" where it splits T into more parts than "seq" does, and evenly; else "seq".
    """
    n = num_shards("stream_seq")
    return "seq" if n == num_shards("seq") or x.shape[-2] % n else "stream_seq"


def gather_sequence(x_BTD: jax.Array) -> jax.Array:
    """Gathers the residual stream along T, for matmuls whose weights are split by `tensor`.

    In the backward pass every device holds a partial sum of the gradient, which is reduce-scattered
    along T (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
    """
    return _moved(x_BTD, "seq", stream_axis(x_BTD)) if stream_axis(x_BTD) != "seq" else x_BTD


def scatter_sequence(x_BTD: jax.Array) -> jax.Array:
    """The inverse of `gather_sequence`: reduce-scatters along T and gathers the gradient."""
    return _moved(x_BTD, stream_axis(x_BTD), "seq") if stream_axis(x_BTD) != "seq" else x_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x_BTD: jax.Array, to: str, back: str) -> jax.Array:
    """x with T split by the axis name `to`, and its gradient with T split by `back`."""
    return constrain(x_BTD, "batch", to, "act_embed")


_moved.defvjp(lambda x, to, back: (_moved(x, to, back), None),
              lambda to, back, _, g: (_moved(g, back, to),))


def balanced_pieces(n: int) -> list[int]:
    """The order in which `balance_sequence` lays out the 2n pieces of a sequence over n devices."""
    return [piece for i in range(n) for piece in (i, 2 * n - 1 - i)]


def balance_sequence(x: jax.Array, *, back: bool = False) -> jax.Array:
    """Reorders the sequence of x [B, T, ...] to balance causal work over devices.

    Of 2n equal pieces, device i of the n devices that split the sequence then holds pieces i and
    2n - 1 - i: an early one and a late one.

    Args:
      back: restores reading order instead.
    """
    layout, axes, n = required_layout(), mesh_axes("seq"), num_shards("seq")
    spec = layout.spec(("batch", "seq", *(None,) * (x.ndim - 2)), x.shape)
    # One of a device's two pieces is even and the other odd. All even pieces move in one
    # permutation of the devices, and all odd pieces in another.
    hops = [[(i, min(piece, 2 * n - 1 - piece)) for i, piece in enumerate(range(odd, 2 * n, 2))]
            for odd in (0, 1)]

    def local(x: jax.Array) -> jax.Array:
        halves, even_first = jnp.split(x, 2, axis=1), jax.lax.axis_index(axes) % 2 == 0

        def swap_if_odd(a: jax.Array, b: jax.Array) -> list[jax.Array]:
            return [jnp.where(even_first, a, b), jnp.where(even_first, b, a)]

        if back:
            halves = swap_if_odd(*halves)
            halves = [jax.lax.ppermute(half, axes, [(j, i) for i, j in hop])
                      for half, hop in zip(halves, hops, strict=True)]
        else:
            halves = [jax.lax.ppermute(half, axes, hop)
                      for half, hop in zip(halves, hops, strict=True)]
            halves = swap_if_odd(*halves)
        return jnp.concatenate(halves, axis=1)

    return jax.shard_map(local, mesh=layout.mesh, in_specs=spec, out_specs=spec)(x)


def in_reading_order(x: jax.Array, n: int) -> jax.Array:
    """Undoes `balance_sequence` over n devices, where every device holds all of x [B, S, ...]."""
    parts = jnp.split(x, 2 * n, axis=1)
    return jnp.concatenate([parts[balanced_pieces(n).index(i)] for i in range(2 * n)], axis=1)


def pad_sequences(multiple: int, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
                  mask: AttentionMask) -> tuple[jax.Array, jax.Array, jax.Array, AttentionMask]:
    """Appends tokens of segment 0 until T and S are multiples of `multiple`."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))

    mask = mask._replace(
        q_positions=pad(mask.q_positions), kv_positions=pad(mask.kv_positions),
        q_segments=pad(mask.q_segments), kv_segments=pad(mask.kv_segments), dense=None)
    return pad(q_BTHK), pad(k_BSGK), pad(v_BSGK), mask
