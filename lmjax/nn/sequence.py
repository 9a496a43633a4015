"""Attention kernels on a mesh: one call a device, on its own rows, heads and queries.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lmjax.nn.masking import Visibility
from lmjax.sharding import constrain, current_layout

RESIDUALS = "kernel"  # what remat policies know a kernel's output and log-sums by
Body = Callable[..., jax.Array]


def axes_of(name: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that `name` is split over, in the layout that is being traced for."""
    layout = current_layout()
    return () if layout is None else layout.on(name)


def ways(name: str) -> int:
    """Into how many parts `name` is split."""
    layout = current_layout()
    return 1 if layout is None else layout.ways(name)


def per_shard(body: Body, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, see: Visibility, *,
              keys: str = "kv_seq", extra: Any = None, extra_spec: Any = None) -> jax.Array:
    """body(q, k, v, see, extra) on every device's share: rows by "batch", queries by "seq", heads by "act_heads".

    Where key/value heads are split less than query heads, they are repeated until every device has those of its
    queries. keys: what the keys' sequence is split by; each device has all of them by default (an all-gather over the
    context axis). extra: a tree of arrays, split by `extra_spec`.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return body(q_BTHK, k_BSGK, v_BSGK, see, extra)
    G = k_BSGK.shape[2]
    repeats = math.lcm(G, ways("act_heads")) // G
    k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_BSGK, v_BSGK))
    at_q = layout.spec(("batch", "seq", "act_heads", None), q_BTHK.shape)
    at_k = layout.spec(("batch", keys, "act_heads", None), k.shape)
    arrays = see.q_positions, see.kv_positions, see.q_segments, see.kv_segments

    def local(q: jax.Array, k: jax.Array, v: jax.Array, arrays: tuple[jax.Array, ...], extra: Any) -> jax.Array:
        return body(q, k, v, Visibility(*arrays, causal=see.causal, window=see.window, in_order=see.in_order), extra)

    rows_q, rows_k = PartitionSpec(*at_q[:2]), PartitionSpec(*at_k[:2])
    # The kernels' loops and Pallas calls do not say over which axes their results vary, so that is not checked.
    run = jax.shard_map(local, mesh=layout.mesh, out_specs=at_q, check_vma=False,
                        in_specs=(at_q, at_k, at_k, (rows_q, rows_k, rows_q, rows_k), extra_spec))
    return run(q_BTHK, k, v, arrays, extra)


def stream(x: jax.Array) -> str:
    """What T of the residual stream [..., T, D] is placed by: "stream_seq", if that splits it further than "seq" and
    divides it."""
    n = ways("stream_seq")
    return "seq" if n == ways("seq") or x.shape[-2] % n else "stream_seq"


def whole(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, for matmuls whose weights are split by `tensor`: gathered along T. Its gradient, of which
    every device has a part of the sum, is scattered (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2)."""
    return _moved(x_BTD, "seq", stream(x_BTD)) if stream(x_BTD) != "seq" else x_BTD


def scattered(x_BTD: jax.Array) -> jax.Array:
    """The inverse of `whole`: what such matmuls made is summed and scattered along T, its gradient gathered."""
    return _moved(x_BTD, stream(x_BTD), "seq") if stream(x_BTD) != "seq" else x_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x_BTD: jax.Array, to: str, back: str) -> jax.Array:
    return constrain(x_BTD, "batch", to, "act_embed")


_moved.defvjp(lambda x, to, back: (_moved(x, to, back), None), lambda to, back, _, g: (_moved(g, back, to),))


def pieces(n: int) -> list[int]:
    """Of 2n pieces of a sequence, which lie where once `balanced` has spread them over n devices."""
    return [piece for i in range(n) for piece in (i, 2 * n - 1 - i)]


def balanced(x: jax.Array, *, back: bool = False) -> jax.Array:
    """x [B, T, ...] with its sequence in the order in which every device of `n` has as much before it: the i-th holds
    pieces i and 2n - 1 - i of 2n. back: in reading order again.

    One of the two pieces is even and the other odd, so the even ones travel together and the odd ones do.
    """
    layout, axes, n = current_layout(), axes_of("seq"), ways("seq")
    spec = layout.spec(("batch", "seq", *(None,) * (x.ndim - 2)), x.shape)
    hops = [[(i, min(piece, 2 * n - 1 - piece)) for i, piece in enumerate(range(odd, 2 * n, 2))] for odd in (0, 1)]

    def local(x: jax.Array) -> jax.Array:
        halves, even_first = jnp.split(x, 2, axis=1), jax.lax.axis_index(axes) % 2 == 0

        def sorted_by(even_first: jax.Array, a: jax.Array, b: jax.Array) -> list[jax.Array]:
            return [jnp.where(even_first, a, b), jnp.where(even_first, b, a)]

        if back:
            halves = sorted_by(even_first, *halves)
            halves = [jax.lax.ppermute(a, axes, [(j, i) for i, j in hop]) for a, hop in zip(halves, hops, strict=True)]
        else:
            halves = [jax.lax.ppermute(a, axes, hop) for a, hop in zip(halves, hops, strict=True)]
            halves = sorted_by(even_first, *halves)
        return jnp.concatenate(halves, axis=1)

    return jax.shard_map(local, mesh=layout.mesh, in_specs=spec, out_specs=spec)(x)


def in_reading_order(x: jax.Array, n: int) -> jax.Array:
    """A whole x [B, S, ...] that `balanced` spread over n devices, on each of them."""
    parts = jnp.split(x, 2 * n, axis=1)
    return jnp.concatenate([parts[pieces(n).index(piece)] for piece in range(2 * n)], axis=1)


def padded(multiple: int, q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
           see: Visibility) -> tuple[jax.Array, jax.Array, jax.Array, Visibility]:
    """T and S padded at their end to multiples of `multiple`, with segment 0, which sees and is seen by nothing."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))

    arrays = {name: pad(getattr(see, name)) for name in ("q_positions", "kv_positions", "q_segments", "kv_segments")}
    return pad(q_BTHK), pad(k_BSGK), pad(v_BSGK), see._replace(**arrays, made=None)
