"""Ring attention (Liu et al. 2023, arXiv:2310.01889): the sequence stays split, keys and values go round.

Every device keeps its queries and works on the keys that it holds while it sends them on, so that no device ever has
all keys. Within a device the work is that of `kernels_chunked`, whose letters are used here; blocks of keys that
cannot be seen cost nothing but their passage.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.kernels.chunked import Rule, Tokens, backward, dot_along, forward, join, split
from lmjax.nn.masking import Visibility
from lmjax.nn.sequence import RESIDUALS, axes_of, per_shard, ways

Ring = tuple[tuple[str, ...], int]  # the mesh axes of the sequence, and how many devices they have


def ring_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
                   softcap: float, bias: None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v, with queries, keys and values split by "seq"."""
    rule, ring = Rule(visibility.causal, visibility.window, scale, softcap), (axes_of("seq"), ways("seq"))

    def body(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, _: None) -> jax.Array:
        return join(_attend(*split(q, k, v, see), rule, ring), q.shape)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, visibility.by_index(), keys="seq")


def _pass_on(tree: Any, ring: Ring) -> Any:
    axes, size = ring
    if size == 1:
        return tree
    return jax.tree.map(lambda x: lax.ppermute(x, axes, [(i, (i + 1) % size) for i in range(size)]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, rule: Rule,
            ring: Ring) -> jax.Array:
    return _attend_forward(q, k, v, queries, keys, rule, ring)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, rule: Rule,
                    ring: Ring) -> tuple[jax.Array, tuple]:
    def add(held: tuple, sums: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array]:
        """(y, log-sum) over what was held before and what is held now."""
        y, log_sum = forward(q, held[0], held[1], queries, held[2], rule)
        if sums is None:
            return y, log_sum
        both = jnp.logaddexp(sums[1], log_sum)
        return sums[0] * jnp.exp(sums[1] - both) + y * jnp.exp(log_sum - both), both

    def hop(carry: tuple, _: None) -> tuple[tuple, None]:
        held, sums = carry
        return (_pass_on(held, ring), add(held, sums)), None

    held = k, v, keys
    sums = None
    if ring[1] > 1:  # the first hop makes the sums that the others carry
        start = _pass_on(held, ring), add(held, None)
        (held, sums), _ = lax.scan(hop, start, None, length=ring[1] - 2)
    y, log_sum = add(held, sums)
    y, log_sum = (checkpoint_name(x, RESIDUALS) for x in (y.astype(q.dtype), log_sum))
    return y, (q, k, v, queries, keys, y, log_sum)


def _attend_backward(rule: Rule, ring: Ring, saved: tuple, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, queries, keys, y, log_sum = saved
    along = dot_along(g, y)

    def add(held: tuple, dq: jax.Array, dkv: tuple) -> tuple[jax.Array, tuple]:
        part, dk, dv = backward(q, held[0], held[1], queries, held[2], rule, log_sum, along, g)
        return dq + part, (dkv[0] + dk, dkv[1] + dv)

    def hop(carry: tuple, _: None) -> tuple[tuple, None]:
        held, dq, dkv = carry
        dq, dkv = add(held, dq, dkv)
        return (_pass_on(held, ring), dq, _pass_on(dkv, ring)), None

    # The gradients of keys and values travel with them, and one hop further: home.
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    start = (k, v, keys), zeros[0], tuple(zeros[1:])
    (held, dq, dkv), _ = lax.scan(hop, start, None, length=ring[1] - 1)
    dq, dkv = add(held, dq, dkv)
    dk, dv = _pass_on(dkv, ring)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
