"""Dense attention in plain XLA: one layer's scores in memory, probabilities kept for the backward.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
R = H / G query heads per key/value head, N = R * T query rows per key/value head, K head_dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.nn.kv_cache import CacheArray, Int8Rows
from lmjax.nn.masking import AttentionMask
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.sharding import num_devices, platform

NEG_INF = -1e30  # finite: a query that sees no key gets even weights instead of NaN
HEADS = ((0, 1), (0, 1))  # batch dimensions of the matmuls below: B and G
# On a CPU the queries of a row are cut into PIECES pieces, each of at least MIN_QUERIES queries.
PIECES, MIN_QUERIES = 4, 64


class Residuals(NamedTuple):
    """What the forward pass keeps for the backward pass."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    weights: jax.Array  # the probabilities [B, G, N, S], in the dtype of q
    y: jax.Array
    slope: jax.Array | None  # derivative of the soft-cap, float32 [B, G, N, S]
    sunk: jax.Array | None  # the probability of the sink, float32 [B, G, N, 1]


def xla_attention(q_BTHK: jax.Array, k_BSGK: CacheArray, v_BSGK: CacheArray,
                  mask: AttentionMask, *, scale: float, softcap: float,
                  bias: jax.Array | None, sinks: jax.Array | None = None) -> jax.Array:
    """softmax(cap(q k^T * scale) + bias) v, with float32 scores [B, H, T, S] in memory.

    sinks: [H], logits of the softmax's denominator; see `choose.attend`.
    """
    T, mask_BTS = q_BTHK.shape[1], mask.to_dense()
    # A causal mask hides the keys after a piece's last query from the whole piece. With four
    # pieces, 3/8 of the work is skipped. Other platforms prefer large matmuls, and a sequence that
    # is split over devices has to stay in one piece.
    skip = mask.hides_later_keys() and platform() == "cpu" and num_devices() == 1
    size = max(-(-T // PIECES), MIN_QUERIES) if skip else T
    parts = []
    for start in range(0, T, size):
        end = min(start + size, T)
        S = end if skip else k_BSGK.shape[1]
        parts.append(_one_piece(
            q_BTHK[:, start:end], _first(k_BSGK, S), _first(v_BSGK, S), mask_BTS[:, start:end, :S],
            None if bias is None else bias[:, :, start:end, :S], sinks, scale, softcap))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def largest_score(q_BTHK: jax.Array, k_BGSK: jax.Array, mask: AttentionMask,
                  scale: float) -> jax.Array:
    """The largest q k^T * scale of a query and a key that it sees, without soft-cap; float32 []."""
    B, T, H, K = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(B, T, k_BGSK.shape[1], -1, K)
    scores = jnp.einsum("BTGRK,BGSK->BGRTS", q_BTGRK, k_BGSK, preferred_element_type=jnp.float32)
    return scale * jnp.max(jnp.where(mask.to_dense()[:, None, None], scores, NEG_INF))


def sinks_of_rows(sinks_H: jax.Array, groups: int, rows: int) -> jax.Array:
    """The sink of each query row, float32 [G, N, 1], for `rows` queries per head."""
    sinks = sinks_H.astype(jnp.float32).reshape(groups, -1, 1, 1)
    return jnp.broadcast_to(sinks, (*sinks.shape[:2], rows, 1)).reshape(groups, -1, 1)


def _first(x_BSGK: CacheArray, count: int) -> CacheArray:
    """The first keys or values."""
    return jax.tree.map(lambda x: x[:, :count], x_BSGK)


def _one_piece(q_BTHK: jax.Array, k_BSGK: CacheArray, v_BSGK: CacheArray, mask_BTS: jax.Array,
               bias: jax.Array | None, sinks: jax.Array | None, scale: float,
               softcap: float) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    # The R query heads of a key/value head become rows of one matmul, which reads its keys once.
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    bias = None if bias is None else bias.reshape(bias.shape[0], G, -1, bias.shape[-1])
    sinks = None if sinks is None else sinks_of_rows(sinks, G, T)[None]
    k, v = jax.tree.map(lambda x: x.swapaxes(1, 2), (k_BSGK, v_BSGK))
    run = _attend_int8 if isinstance(k, Int8Rows) else _attend
    y = run(q, k, v, mask_BTS, bias, sinks, scale, softcap)
    y = y.reshape(B, G, H // G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
    return y * jnp.any(mask_BTS, axis=-1)[:, :, None, None].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q_BGNK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array,
            bias: jax.Array | None, sinks: jax.Array | None, scale: float,
            softcap: float) -> jax.Array:
    """Attention of N = R * T query rows per key/value head.

    bias is [1 or B, G, N, S], and sinks are [1, G, N, 1].

    The backward pass works from the probabilities, as flash attention does (Dao et al. 2022,
    arXiv:2205.14135, appendix B), instead of differentiating the steps of the softmax.
    """
    return _attend_forward(q_BGNK, k_BGSK, v_BGSK, mask_BTS, bias, sinks, scale, softcap)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array,
                    bias: jax.Array | None, sinks: jax.Array | None, scale: float,
                    softcap: float) -> tuple[jax.Array, Residuals]:
    scores = lax.dot_general(q, k, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32)
    weights, slope, sunk = _probabilities(scores * scale, mask_BTS, bias, sinks, softcap)
    weights = barrier(weights.astype(q.dtype))
    y = dot(weights, v, (((3,), (2,)), HEADS))
    return y, Residuals(q, k, v, bias, weights, y, slope, sunk)


def _attend_int8(q: jax.Array, k: Int8Rows, v: Int8Rows, mask_BTS: jax.Array,
                 bias: jax.Array | None, sinks: jax.Array | None, scale: float,
                 softcap: float) -> jax.Array:
    """`_attend` to integers, whose scales are applied to scores and probabilities."""
    scores = lax.dot_general(q, k.values.astype(q.dtype), (((3,), (3,)), HEADS),
                             preferred_element_type=jnp.float32)
    scores = scores * (k.scales.swapaxes(2, 3) * scale)
    weights, *_ = _probabilities(scores, mask_BTS, bias, sinks, softcap)
    weights = (weights * v.scales.swapaxes(2, 3)).astype(q.dtype)
    return dot(weights, v.values.astype(q.dtype), (((3,), (2,)), HEADS))


def _probabilities(
        scores: jax.Array, mask_BTS: jax.Array, bias: jax.Array | None, sinks: jax.Array | None,
        softcap: float) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """softmax(cap(scores) + bias) over the keys that are seen and the sink.

    Returns:
      The probabilities of the keys, the slope of the cap, and the probability of the sink.
    """
    slope = None
    if softcap:
        scores = jnp.tanh(scores / softcap)
        slope = 1 - jnp.square(scores)
        scores = softcap * scores
    if bias is not None:
        scores += bias.astype(jnp.float32)
    B, T, S = mask_BTS.shape
    shape = scores.shape
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, shape[1], -1, T, S), NEG_INF)
    scores = scores.reshape(shape)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is None:
        weights = jnp.exp(scores - top)
        return weights * (1 / jnp.sum(weights, axis=-1, keepdims=True)), slope, None
    top = jnp.maximum(top, sinks)
    weights, sunk = jnp.exp(scores - top), jnp.exp(sinks - top)
    whole = 1 / (jnp.sum(weights, axis=-1, keepdims=True) + sunk)
    return weights * whole, slope, sunk * whole


def _attend_backward(scale: float, softcap: float, saved: Residuals,
                     g: jax.Array) -> tuple[jax.Array | None, ...]:
    (q, k, v, bias, weights, y, slope, sunk), g = saved, barrier(g)
    g_dot_y = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = lax.dot_general(g, v, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32)
    d_bias = None
    if bias is not None:
        d_bias = weights * (d_weights - g_dot_y)
        d_bias = jnp.sum(d_bias, axis=0, keepdims=True) if bias.shape[0] == 1 else d_bias
        d_bias = d_bias.astype(bias.dtype)
    d_scores = weights * (d_weights - g_dot_y) * scale
    d_scores = barrier((d_scores if slope is None else d_scores * slope).astype(q.dtype))
    d_q = dot(d_scores, k, (((3,), (2,)), HEADS))
    d_sinks = None if sunk is None else -jnp.sum(sunk * g_dot_y, axis=0, keepdims=True)
    return d_q, dot_rows(d_scores, q, 2), dot_rows(weights, g, 2), None, d_bias, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)
