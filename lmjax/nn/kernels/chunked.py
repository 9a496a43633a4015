"""Attention in blocks of queries and keys: exact, in memory that grows with T and not with T * S.

Flash attention (Dao et al. 2022, arXiv:2205.14135) in plain XLA, for where no hand-written kernel serves: a running
maximum and sum a query, and a backward pass that computes the probabilities again, block by block. Blocks of keys
that no query of a block can see are not visited.

Shape suffixes: B batch, G key/value heads, R query heads a key/value head, K head_dim; t and s queries and keys of a
block, N = R * t query rows, I and J blocks of queries and of keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.masking import Visibility
from lmjax.nn.ops import dot_rows
from lmjax.nn.sequence import RESIDUALS, per_shard

QUERIES, SCORES = 256, 256 * 512  # queries a block, and scores a block and head: with few queries, more keys
UNSEEN = -1e30  # the score of a key that is not seen
LOWEST = -5e29  # where the running maximum starts: above UNSEEN, so that exp(UNSEEN - maximum) is always 0
HEADS = ((0, 1), (0, 1))  # batch dimensions of the matmuls below: B and G
FAR = 2**30


class Rule(NamedTuple):
    """What is the same for all blocks."""

    causal: bool
    window: int
    scale: float
    softcap: float


class Tokens(NamedTuple):
    """Where the tokens of every block stand: int32 [I or J, B, t or s]."""

    positions: jax.Array
    segments: jax.Array


def chunked_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *,
                      scale: float, softcap: float, bias: None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v, block by block."""
    rule = Rule(visibility.causal, visibility.window, scale, softcap)

    def body(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, _: None) -> jax.Array:
        return join(_attend(*split(q, k, v, see), rule), q.shape)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, visibility.by_index())


def split(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
          see: Visibility) -> tuple[jax.Array, jax.Array, jax.Array, Tokens, Tokens]:
    """q [I, B, G, N, K], k and v [J, B, G, s, K] and where their tokens stand; segment 0 pads the last blocks."""
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    t = min(QUERIES, T)
    s = min(SCORES // t, S)
    q = _blocks(q_BTHK, t).reshape(-1, B, t, G, H // G, K).transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, G, H // G * t, K)
    k, v = (_blocks(x, s).swapaxes(2, 3) for x in (k_BSGK, v_BSGK))
    queries = Tokens(_blocks(see.q_positions, t), _blocks(see.q_segments, t))
    return q, k, v, queries, Tokens(_blocks(see.kv_positions, s), _blocks(see.kv_segments, s))


def join(y_IBGNK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of what `split` did to q."""
    (B, T, H, K), (blocks, _, G, N, _) = shape, y_IBGNK.shape
    t = N // (H // G)
    y = y_IBGNK.reshape(blocks, B, G, H // G, t, K).transpose(1, 0, 4, 2, 3, 5)
    return y.reshape(B, blocks * t, H, K)[:, :T]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [blocks, B, size, ...], the last one padded with zeros."""
    B, T = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)


def _ranges(queries: Tokens, keys: Tokens, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """int32 [I], [I]: the first key block that each query block may see, and the one after the last.

    From the least and greatest position and segment of each block: what they rule out cannot be seen, in any row.
    """
    def bounds(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(real, x, FAR), axis=-1), jnp.max(jnp.where(real, x, -FAR), axis=-1)

    def pairs(tokens: Tokens, axis: int) -> list[jax.Array]:
        real = tokens.segments > 0
        return [jnp.expand_dims(x, axis) for field in tokens for x in bounds(field, real)]

    q_first, q_last, q_low, q_high = pairs(queries, 1)  # [I, 1, B]
    k_first, k_last, k_low, k_high = pairs(keys, 0)  # [1, J, B]
    live = (q_low <= k_high) & (k_low <= q_high)
    if rule.causal:
        live &= k_first <= q_last
    if rule.window:
        live &= q_first - k_last < rule.window
        if not rule.causal:
            live &= k_first - q_last < rule.window
    live = jnp.any(live, axis=-1)
    J = live.shape[1]
    first = jnp.argmax(live, axis=1)
    end = jnp.where(jnp.any(live, axis=1), J - jnp.argmax(live[:, ::-1], axis=1), first)
    return first.astype(jnp.int32), end.astype(jnp.int32)


def _scores(q_BGNK: jax.Array, k_BGsK: jax.Array, queries: Tokens, keys: Tokens,
            rule: Rule) -> tuple[jax.Array, jax.Array | None]:
    """float32 scores [B, G, N, s], `UNSEEN` where not seen, and the slope of the softcap there."""
    scores = lax.dot_general(q_BGNK, k_BGsK, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32) * rule.scale
    slope = None
    if rule.softcap:
        scores = jnp.tanh(scores / rule.softcap)
        slope = 1 - jnp.square(scores)
        scores = rule.softcap * scores
    mask = Visibility(queries.positions, keys.positions, queries.segments, keys.segments, rule.causal,
                      rule.window).mask()
    B, t, s = mask.shape
    shape = scores.shape
    return jnp.where(mask[:, None, None], scores.reshape(B, shape[1], -1, t, s), UNSEEN).reshape(shape), slope


def forward(q_IBGNK: jax.Array, k_JBGsK: jax.Array, v_JBGsK: jax.Array, queries: Tokens, keys: Tokens,
            rule: Rule) -> tuple[jax.Array, jax.Array]:
    """y [I, B, G, N, K] in float32, 0 where nothing is seen, and the log of the sum of exp(scores) [I, B, G, N, 1]."""

    def one_query_block(_: None, block: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q, queries, first, end = block

        def one_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, y = carry
            k, v, at = jax.tree.map(lambda x: x[j], (k_JBGsK, v_JBGsK, keys))
            scores, _ = _scores(q, k, queries, at, rule)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, old = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            part = lax.dot_general(weights.astype(v.dtype), v, (((3,), (2,)), HEADS),
                                   preferred_element_type=jnp.float32)
            return new_top, total * old + jnp.sum(weights, axis=-1, keepdims=True), y * old + part

        column = (*q.shape[:-1], 1)
        start = jnp.full(column, LOWEST), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32)
        top, total, y = lax.fori_loop(first, end, one_key_block, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, (y / total, top + jnp.log(total))

    return lax.scan(one_query_block, None, (q_IBGNK, queries, *_ranges(queries, keys, rule)))[1]


def backward(q_IBGNK: jax.Array, k_JBGsK: jax.Array, v_JBGsK: jax.Array, queries: Tokens, keys: Tokens, rule: Rule,
             log_sum_IBGN1: jax.Array, along_IBGN1: jax.Array,
             g_IBGNK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """float32 gradients by q, k and v, given `forward`'s log-sums over all keys and along = sum(g * y)."""

    def one_query_block(carry: tuple[jax.Array, ...], block: tuple) -> tuple[tuple[jax.Array, ...], jax.Array]:
        q, g, log_sum, along, queries, first, end = block

        def one_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            k, v, at = jax.tree.map(lambda x: x[j], (k_JBGsK, v_JBGsK, keys))
            scores, slope = _scores(q, k, queries, at, rule)
            weights = jnp.exp(scores - log_sum)
            d_weights = lax.dot_general(g, v, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - along) * rule.scale
            d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
            dq += lax.dot_general(d_scores, k, (((3,), (2,)), HEADS), preferred_element_type=jnp.float32)
            dk = dk.at[j].add(dot_rows(d_scores, q, 2, dtype=jnp.float32))
            return dq, dk, dv.at[j].add(dot_rows(weights.astype(g.dtype), g, 2, dtype=jnp.float32))

        dq, *carry = lax.fori_loop(first, end, one_key_block, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), dq

    start = jnp.zeros(k_JBGsK.shape, jnp.float32), jnp.zeros(v_JBGsK.shape, jnp.float32)
    blocks = q_IBGNK, g_IBGNK, log_sum_IBGN1, along_IBGN1, queries, *_ranges(queries, keys, rule)
    (dk, dv), dq = lax.scan(one_query_block, start, blocks)
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, rule: Rule) -> jax.Array:
    return forward(q, k, v, queries, keys, rule)[0].astype(q.dtype)


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens,
                    rule: Rule) -> tuple[jax.Array, tuple]:
    y, log_sum = forward(q, k, v, queries, keys, rule)
    y, log_sum = (checkpoint_name(x, RESIDUALS) for x in (y.astype(q.dtype), log_sum))
    return y, (q, k, v, queries, keys, y, log_sum)


def _attend_backward(rule: Rule, saved: tuple, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, queries, keys, y, log_sum = saved
    grads = backward(q, k, v, queries, keys, rule, log_sum, dot_along(g, y), g)
    return *(d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def dot_along(g: jax.Array, y: jax.Array) -> jax.Array:
    """sum(g * y) over head_dim, in float32, the dimension kept: how far each query's weights can shift together."""
    return jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
