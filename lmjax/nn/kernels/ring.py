"""Ring attention (Liu et al. 2023, arXiv:2310.01889): the sequence stays split over devices.

Every device keeps its queries. It attends to the keys and values that it holds while it sends them
on to the next device, so that no device ever holds all keys. Within a device the work is done by
`chunked`, whose shape suffixes are used here. A device skips keys that its queries cannot see, so
these cost only their transfer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.kernels.chunked import (
    OutputGrad,
    Scoring,
    Tokens,
    backward,
    forward,
    grad_dot_output,
    grad_of_sinks,
    join,
    sinks_of_blocks,
    split,
    with_sinks,
)
from lmjax.nn.masking import AttentionMask
from lmjax.nn.sequence import KERNEL_RESIDUALS, heads_spec, mesh_axes, num_shards, per_shard


class Ring(NamedTuple):
    """The devices that share a sequence."""

    axes: tuple[str, ...]  # mesh axes of the sequence
    size: int  # devices along them


def ring_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask, *,
                   scale: float, softcap: float, bias: None = None,
                   sinks: jax.Array | None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v, with queries, keys and values split by "seq".

    `bias` is never set (see `choose.KERNELS`); `sinks` [H] are those of `choose.attend`.
    """
    scoring = Scoring(mask.causal, mask.window, scale, softcap)
    ring = Ring(mesh_axes("seq"), num_shards("seq"))

    def body(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask,
             sinks: jax.Array | None) -> jax.Array:
        blocks = split(q, k, v, mask)
        return join(_attend(*blocks, sinks_of_blocks(sinks, blocks), scoring, ring), q.shape)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, mask.by_index(), keys="seq", extra=sinks,
                     extra_spec=heads_spec(sinks))


def _pass_on(tree: Any, ring: Ring) -> Any:
    """Sends every array of `tree` to the next device of the ring."""
    if ring.size == 1:
        return tree
    hop = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axes, hop), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens,
            sinks: jax.Array | None, scoring: Scoring, ring: Ring) -> jax.Array:
    return _attend_forward(q, k, v, queries, keys, sinks, scoring, ring)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens,
                    sinks: jax.Array | None, scoring: Scoring,
                    ring: Ring) -> tuple[jax.Array, tuple]:

    def attend(held: tuple) -> tuple[jax.Array, jax.Array]:
        """y and log-sum over the keys that this device holds now."""
        k, v, keys = held
        return forward(q, k, v, queries, keys, scoring)

    def add(sums: tuple[jax.Array, jax.Array], held: tuple) -> tuple[jax.Array, jax.Array]:
        """y and log-sum over all keys seen so far and those held now."""
        (y_before, before), (y, log_sum) = sums, attend(held)
        total = jnp.logaddexp(before, log_sum)
        return y_before * jnp.exp(before - total) + y * jnp.exp(log_sum - total), total

    def hop(carry: tuple, _: None) -> tuple[tuple, None]:
        held, sums = carry
        return (_pass_on(held, ring), add(sums, held)), None

    held = k, v, keys
    if ring.size == 1:
        y, log_sum = attend(held)
    else:  # the first hop computes the sums that the other hops carry
        start = _pass_on(held, ring), attend(held)
        (held, sums), _ = lax.scan(hop, start, None, length=ring.size - 2)
        y, log_sum = add(sums, held)
    y, log_sum = with_sinks(y, log_sum, sinks)
    y, log_sum = (checkpoint_name(x, KERNEL_RESIDUALS) for x in (y.astype(q.dtype), log_sum))
    return y, (q, k, v, queries, keys, sinks, y, log_sum)


def _attend_backward(scoring: Scoring, ring: Ring, saved: tuple,
                     g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, queries, keys, sinks, y, log_sum = saved
    output = OutputGrad(g, log_sum, grad_dot_output(g, y))

    def add(held: tuple, dq: jax.Array, dkv: tuple) -> tuple[jax.Array, tuple]:
        k, v, keys = held
        part, dk, dv = backward(q, k, v, queries, keys, scoring, output)
        return dq + part, (dkv[0] + dk, dkv[1] + dv)

    def hop(carry: tuple, _: None) -> tuple[tuple, None]:
        held, dq, dkv = carry
        dq, dkv = add(held, dq, dkv)
        return (_pass_on(held, ring), dq, _pass_on(dkv, ring)), None

    # The gradients of keys and values travel with them. After the last device has added its share,
    # one more hop brings them to the device where their keys started.
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    start = (k, v, keys), dq, (dk, dv)
    (held, dq, dkv), _ = lax.scan(hop, start, None, length=ring.size - 1)
    dq, dkv = add(held, dq, dkv)
    dk, dv = _pass_on(dkv, ring)
    grads = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return *grads, None, None, grad_of_sinks(sinks, output)


_attend.defvjp(_attend_forward, _attend_backward)
