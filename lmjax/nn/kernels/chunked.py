"""Attention in blocks of queries and keys: exact, in memory that grows with T and not with T * S.

Flash attention (Dao et al. 2022, arXiv:2205.14135) in plain XLA, for platforms and models that no
hand-written kernel serves. The forward pass keeps a running maximum and a running sum per query.
The backward pass computes the probabilities again, block by block. Blocks of keys that no query of
a block can see are skipped.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
R = H / G query heads per key/value head, K head_dim; t queries per block, s keys per block,
N = R * t query rows per block and key/value head, I blocks of queries, J blocks of keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.kernels.xla import sinks_of_rows
from lmjax.nn.masking import AttentionMask
from lmjax.nn.ops import dot_rows
from lmjax.nn.sequence import KERNEL_RESIDUALS, heads_spec, per_shard

QUERIES = 256  # queries per block
SCORES = 256 * 512  # scores per block and head: a block with fewer queries has more keys
HIDDEN = -1e30  # the score of a key that the query does not see
# The running maximum starts above HIDDEN, so that exp(HIDDEN - maximum) is always 0.
LOWEST = -5e29
HEADS = ((0, 1), (0, 1))  # batch dimensions of the matmuls below: B and G
FAR = 2**30  # beyond every position and segment


class Scoring(NamedTuple):
    """How scores are computed and masked; the same for all blocks."""

    causal: bool
    window: int
    scale: float
    softcap: float


class Tokens(NamedTuple):
    """Positions and segments of the tokens of every block, int32 [I or J, B, t or s]."""

    positions: jax.Array
    segments: jax.Array


class OutputGrad(NamedTuple):
    """What the backward pass needs about the output, per block of queries, with head_dim last."""

    g: jax.Array  # the output's gradient [I, B, G, N, K]
    log_sum: jax.Array  # `forward`'s log-sums over all keys, float32 [I, B, G, N, 1]
    g_dot_y: jax.Array  # `grad_dot_output`, float32 [I, B, G, N, 1]


def chunked_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask,
                      *, scale: float, softcap: float, bias: None = None,
                      sinks: jax.Array | None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v, block by block; `bias` is never set (see `choose.KERNELS`).

    sinks: [H], logits of the softmax's denominator; see `choose.attend`.
    """
    scoring = Scoring(mask.causal, mask.window, scale, softcap)

    def body(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask,
             sinks: jax.Array | None) -> jax.Array:
        blocks = split(q, k, v, mask)
        return join(_attend(*blocks, sinks_of_blocks(sinks, blocks), scoring), q.shape)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, mask.by_index(), extra=sinks,
                     extra_spec=heads_spec(sinks))


def split(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array,
          mask: AttentionMask) -> tuple[jax.Array, jax.Array, jax.Array, Tokens, Tokens]:
    """Cuts queries and keys into blocks; the last ones are padded with segment 0.

    Returns:
      q [I, B, G, N, K], k and v [J, B, G, s, K], and the tokens of queries and keys.
    """
    (B, T, H, K), (S, G) = q_BTHK.shape, k_BSGK.shape[1:3]
    t = min(QUERIES, T)
    s = min(SCORES // t, S)
    q = _blocks(q_BTHK, t).reshape(-1, B, t, G, H // G, K)
    q = q.transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, G, H // G * t, K)
    k, v = (_blocks(x, s).swapaxes(2, 3) for x in (k_BSGK, v_BSGK))
    queries = Tokens(_blocks(mask.q_positions, t), _blocks(mask.q_segments, t))
    return q, k, v, queries, Tokens(_blocks(mask.kv_positions, s), _blocks(mask.kv_segments, s))


def join(y_IBGNK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Puts the output's blocks together to `shape`, [B, T, H, K]; the inverse of `split` for q."""
    (B, T, H, K), (blocks, _, G, N, _) = shape, y_IBGNK.shape
    t = N // (H // G)
    y = y_IBGNK.reshape(blocks, B, G, H // G, t, K).transpose(1, 0, 4, 2, 3, 5)
    return y.reshape(B, blocks * t, H, K)[:, :T]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [blocks, B, size, ...]; the last block is padded with zeros."""
    B, T = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)


def visible_blocks(queries: Tokens, keys: Tokens,
                   scoring: Scoring) -> tuple[jax.Array, jax.Array]:
    """The range of key blocks that each query block visits: the first, and one past the last.

    A block of keys is skipped if the least and greatest positions and segments of both blocks show
    that no query of any row can see any of its keys.

    Returns:
      Two arrays int32 [I].
    """

    def bounds(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = jnp.min(jnp.where(real, x, FAR), axis=-1)
        return least, jnp.max(jnp.where(real, x, -FAR), axis=-1)

    def all_bounds(tokens: Tokens, axis: int) -> list[jax.Array]:
        real = tokens.segments > 0
        return [jnp.expand_dims(x, axis) for field in tokens for x in bounds(field, real)]

    q_first, q_last, q_low, q_high = all_bounds(queries, 1)  # positions, segments: [I, 1, B]
    k_first, k_last, k_low, k_high = all_bounds(keys, 0)  # [1, J, B]
    live = (q_low <= k_high) & (k_low <= q_high)
    if scoring.causal:
        live &= k_first <= q_last
    if scoring.window:
        live &= q_first - k_last < scoring.window
        if not scoring.causal:
            live &= k_first - q_last < scoring.window
    live = jnp.any(live, axis=-1)
    J = live.shape[1]
    first = jnp.argmax(live, axis=1)
    end = jnp.where(jnp.any(live, axis=1), J - jnp.argmax(live[:, ::-1], axis=1), first)
    return first.astype(jnp.int32), end.astype(jnp.int32)


def _scores(q_BGNK: jax.Array, k_BGsK: jax.Array, queries: Tokens, keys: Tokens,
            scoring: Scoring) -> tuple[jax.Array, jax.Array | None]:
    """float32 scores [B, G, N, s], `HIDDEN` where masked, and the soft-cap's slope at each."""
    scores = lax.dot_general(q_BGNK, k_BGsK, (((3,), (3,)), HEADS),
                             preferred_element_type=jnp.float32) * scoring.scale
    slope = None
    if scoring.softcap:
        scores = jnp.tanh(scores / scoring.softcap)
        slope = 1 - jnp.square(scores)
        scores = scoring.softcap * scores
    mask = AttentionMask(queries.positions, keys.positions, queries.segments, keys.segments,
                         scoring.causal, scoring.window).to_dense()
    B, t, s = mask.shape
    shape = scores.shape
    scores = jnp.where(mask[:, None, None], scores.reshape(B, shape[1], -1, t, s), HIDDEN)
    return scores.reshape(shape), slope


def forward(q_IBGNK: jax.Array, k_JBGsK: jax.Array, v_JBGsK: jax.Array, queries: Tokens,
            keys: Tokens, scoring: Scoring) -> tuple[jax.Array, jax.Array]:
    """The forward pass over all blocks.

    Returns:
      y, float32 [I, B, G, N, K], 0 for a query that sees no key; and the logarithm of the sum of
      exp(score) over its keys, float32 [I, B, G, N, 1].
    """

    def one_query_block(_: None, block: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q, queries, first, end = block

        def one_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, y = carry
            k, v, tokens = jax.tree.map(lambda x: x[j], (k_JBGsK, v_JBGsK, keys))
            scores, _ = _scores(q, k, queries, tokens, scoring)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, old = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            part = lax.dot_general(weights.astype(v.dtype), v, (((3,), (2,)), HEADS),
                                   preferred_element_type=jnp.float32)
            total = total * old + jnp.sum(weights, axis=-1, keepdims=True)
            return new_top, total, y * old + part

        column = (*q.shape[:-1], 1)
        start = jnp.full(column, LOWEST), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32)
        top, total, y = lax.fori_loop(first, end, one_key_block, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, (y / total, top + jnp.log(total))

    ranges = visible_blocks(queries, keys, scoring)
    return lax.scan(one_query_block, None, (q_IBGNK, queries, *ranges))[1]


def backward(q_IBGNK: jax.Array, k_JBGsK: jax.Array, v_JBGsK: jax.Array, queries: Tokens,
             keys: Tokens, scoring: Scoring,
             output: OutputGrad) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The backward pass over all blocks: float32 gradients of q, k and v in their shapes."""

    def one_query_block(carry: Any, block: tuple) -> tuple[Any, jax.Array]:
        q, (g, log_sum, g_dot_y), queries, first, end = block

        def one_key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            k, v, tokens = jax.tree.map(lambda x: x[j], (k_JBGsK, v_JBGsK, keys))
            scores, slope = _scores(q, k, queries, tokens, scoring)
            weights = jnp.exp(scores - log_sum)
            d_weights = lax.dot_general(g, v, (((3,), (3,)), HEADS),
                                        preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - g_dot_y) * scoring.scale
            d_scores = (d_scores if slope is None else d_scores * slope).astype(q.dtype)
            dq += lax.dot_general(d_scores, k, (((3,), (2,)), HEADS),
                                  preferred_element_type=jnp.float32)
            dk = dk.at[j].add(dot_rows(d_scores, q, 2, dtype=jnp.float32))
            dv = dv.at[j].add(dot_rows(weights.astype(g.dtype), g, 2, dtype=jnp.float32))
            return dq, dk, dv

        start = jnp.zeros(q.shape, jnp.float32), *carry
        dq, dk, dv = lax.fori_loop(first, end, one_key_block, start)
        return (dk, dv), dq

    start = jnp.zeros(k_JBGsK.shape, jnp.float32), jnp.zeros(v_JBGsK.shape, jnp.float32)
    blocks = q_IBGNK, output, queries, *visible_blocks(queries, keys, scoring)
    (dk, dv), dq = lax.scan(one_query_block, start, blocks)
    return dq, dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens,
            sinks: jax.Array | None, scoring: Scoring) -> jax.Array:
    return with_sinks(*forward(q, k, v, queries, keys, scoring), sinks)[0].astype(q.dtype)


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens,
                    sinks: jax.Array | None, scoring: Scoring) -> tuple[jax.Array, tuple]:
    y, log_sum = with_sinks(*forward(q, k, v, queries, keys, scoring), sinks)
    y, log_sum = (checkpoint_name(x, KERNEL_RESIDUALS) for x in (y.astype(q.dtype), log_sum))
    return y, (q, k, v, queries, keys, sinks, y, log_sum)


def _attend_backward(scoring: Scoring, saved: tuple, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, queries, keys, sinks, y, log_sum = saved
    output = OutputGrad(g, log_sum, grad_dot_output(g, y))
    grads = backward(q, k, v, queries, keys, scoring, output)
    d_qkv = (d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))
    return *d_qkv, None, None, grad_of_sinks(sinks, output)


_attend.defvjp(_attend_forward, _attend_backward)


def grad_dot_output(g: jax.Array, y: jax.Array) -> jax.Array:
    """sum(g * y) over head_dim, in float32, with that dimension kept.

    The softmax's backward pass subtracts it from the gradient of each of a query's weights.
    """
    return jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)


# Sinks: the row of a sink in the softmax adds to the denominator and has no value. So they follow
# from the log-sums of the other rows, and whatever computes these needs not know them.


def sinks_of_blocks(sinks_H: jax.Array | None, blocks: tuple) -> jax.Array | None:
    """The sink of each query row of a block of `split`, float32 [G, N, 1]; None without sinks."""
    if sinks_H is None:
        return None
    G, N = blocks[0].shape[2:4]
    return sinks_of_rows(sinks_H, G, N * G // sinks_H.shape[0])


def with_sinks(y: jax.Array, log_sum: jax.Array,
               sinks_GN1: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output and log-sums of `forward` with the sinks in the softmax's denominator."""
    if sinks_GN1 is None:
        return y, log_sum
    total = jnp.logaddexp(log_sum, sinks_GN1[None, None])
    return y * jnp.exp(log_sum - total), total


def grad_of_sinks(sinks_GN1: jax.Array | None, output: OutputGrad) -> jax.Array | None:
    """The gradient of each row's sink, float32 [G, N, 1].

    A sink of probability p takes p * y from the output: its gradient is -p * sum(g * y).
    """
    if sinks_GN1 is None:
        return None
    p = jnp.exp(sinks_GN1[None, None] - output.log_sum)
    return -jnp.sum(p * output.g_dot_y, axis=(0, 1))
