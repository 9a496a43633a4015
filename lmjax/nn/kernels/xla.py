"""Dense attention: the scores of a layer in memory, and a backward pass that keeps the probabilities.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
R = H / G query heads a key/value head, N = R * T query rows of one, K head_dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.nn.masking import Visibility
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.sharding import num_devices, platform

NEG_INF = -1e30  # finite: a row with no visible key gets even weights, not NaN
HEADS = ((0, 1), (0, 1))  # batch dimensions of the matmuls below: B and G
PIECES, LEAST = 4, 64  # into how many pieces a row's queries are cut on a CPU, and how many of them at least make one


def xla_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *,
                  scale: float, softcap: float, bias: jax.Array | None) -> jax.Array:
    """softmax(q k^T * scale + bias) v with float32 scores [B, H, T, S] in memory."""
    T, mask_BTS = q_BTHK.shape[1], visibility.mask()
    # Keys behind the last query of a piece are hidden from all of it: with four pieces 3/8 of the work is left out.
    # Elsewhere the matmuls want to be large, and a split sequence whole.
    skip = visibility.only_before() and platform() == "cpu" and num_devices() == 1
    size = max(-(-T // PIECES), LEAST) if skip else T
    parts = []
    for at in range(0, T, size):
        end = min(at + size, T)
        seen = end if skip else k_BSGK.shape[1]
        parts.append(_one_piece(q_BTHK[:, at:end], k_BSGK[:, :seen], v_BSGK[:, :seen], mask_BTS[:, at:end, :seen],
                                None if bias is None else bias[:, :, at:end, :seen], scale, softcap))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _one_piece(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, bias: jax.Array | None,
               scale: float, softcap: float) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    # The R query heads of a key/value head become rows of one matmul, which reads its keys once.
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    bias = None if bias is None else bias.reshape(bias.shape[0], G, -1, bias.shape[-1])
    y = _attend(q, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), mask_BTS, bias, scale, softcap)
    y = y.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
    return y * jnp.any(mask_BTS, axis=-1)[:, :, None, None].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q_BGNK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array, bias: jax.Array | None,
            scale: float, softcap: float) -> jax.Array:
    """Attention of N = R * T query rows a key/value head, with the backward pass that flash attention uses
    (Dao et al. 2022, arXiv:2205.14135, appendix B): from the probabilities, not through the softmax's parts.
    bias: [1 or B, G, N, S]."""
    return _attend_forward(q_BGNK, k_BGSK, v_BGSK, mask_BTS, bias, scale, softcap)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array, bias: jax.Array | None,
                    scale: float, softcap: float) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scores = lax.dot_general(q, k, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32) * scale
    slope = None
    if softcap:
        scores = jnp.tanh(scores / softcap)
        slope = 1 - jnp.square(scores)
        scores = softcap * scores
    if bias is not None:
        scores += bias.astype(jnp.float32)
    B, T, S = mask_BTS.shape
    shape = scores.shape
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, shape[1], -1, T, S), NEG_INF).reshape(shape)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = barrier((weights * (1 / jnp.sum(weights, axis=-1, keepdims=True))).astype(q.dtype))
    y = dot(weights, v, (((3,), (2,)), HEADS))
    return y, (q, k, v, bias, weights, y, slope)


def _attend_backward(scale: float, softcap: float, saved: tuple[jax.Array | None, ...],
                     g: jax.Array) -> tuple[jax.Array | None, ...]:
    (q, k, v, bias, weights, y, slope), g = saved, barrier(g)
    along = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = lax.dot_general(g, v, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32)
    d_bias = None
    if bias is not None:
        d_bias = weights * (d_weights - along)
        d_bias = (jnp.sum(d_bias, axis=0, keepdims=True) if bias.shape[0] == 1 else d_bias).astype(bias.dtype)
    d_scores = weights * (d_weights - along) * scale
    d_scores = barrier((d_scores if slope is None else d_scores * slope).astype(q.dtype))
    return (dot(d_scores, k, (((3,), (2,)), HEADS)), dot_rows(d_scores, q, 2), dot_rows(weights, g, 2), None, d_bias)


_attend.defvjp(_attend_forward, _attend_backward)
