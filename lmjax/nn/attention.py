"""Attention behind one function, with a table of what each kernel can do.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
R = H / G query heads a key/value head, K head_dim, D embed_dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lmjax.nn.layers import Dense, RMSNorm
from lmjax.nn.module import Initializer
from lmjax.nn.ops import barrier, dot, dot_rows
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.sharding import constrain

NEG_INF = -1e30  # finite: a row with no visible key gets even weights, not NaN


class Visibility(NamedTuple):
    """Who may look at whom: same segment, not later (if causal), nearer than the window (if any).

    positions and segments: int32 [B, T] for queries and [B, S] for keys; segment 0 sees nothing.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array
    causal: bool = True
    window: int = 0  # tokens back that are visible, itself included; 0: all

    def mask(self) -> jax.Array:
        """bool [B, T, S], True where the query may attend to the key."""
        q, k = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        sees = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (self.kv_segments[:, None, :] > 0)
        if self.causal:
            sees &= k <= q
        if self.window:
            sees &= q - k < self.window
            if not self.causal:
                sees &= k - q < self.window
        return sees


class KVCache(NamedTuple):
    """Keys and values [B, S, G, K] seen so far, and the slot that each row writes next, int32 [B]."""

    key: jax.Array
    value: jax.Array
    slot: jax.Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way of computing attention: where it runs and what it can honour."""

    run: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    softcap: bool
    note: str


def xla_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, *,
                  scale: float, softcap: float) -> jax.Array:
    """softmax(q k^T * scale) v with float32 scores [B, H, T, S] in memory; queries that see nothing get 0."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    # The R query heads of a key/value head become rows of one matmul, which reads its keys once.
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    y = _attend(q, k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2), mask_BTS, scale, softcap)
    y = y.reshape(B, G, H // G, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
    return y * jnp.any(mask_BTS, axis=-1)[:, :, None, None].astype(y.dtype)


HEADS = ((0, 1), (0, 1))  # batch dimensions of the matmuls below: B and G


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BGNK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array, scale: float,
            softcap: float) -> jax.Array:
    """Attention of N = R * T query rows a key/value head, with the backward pass that flash attention uses
    (Dao et al. 2022, arXiv:2205.14135, appendix B): from the probabilities, not through the softmax's parts."""
    return _attend_forward(q_BGNK, k_BGSK, v_BGSK, mask_BTS, scale, softcap)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask_BTS: jax.Array, scale: float,
                    softcap: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = lax.dot_general(q, k, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32) * scale
    slope = None
    if softcap:
        scores = jnp.tanh(scores / softcap)
        slope = 1 - jnp.square(scores)
        scores = softcap * scores
    B, T, S = mask_BTS.shape
    shape = scores.shape
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(B, shape[1], -1, T, S), NEG_INF).reshape(shape)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = barrier((weights * (1 / jnp.sum(weights, axis=-1, keepdims=True))).astype(q.dtype))
    y = dot(weights, v, (((3,), (2,)), HEADS))
    return y, (q, k, v, mask_BTS, weights, y, slope)


def _attend_backward(scale: float, softcap: float, saved: tuple[jax.Array, ...],
                     g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    (q, k, v, _, weights, y, slope), g = saved, barrier(g)
    along = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    d_weights = lax.dot_general(g, v, (((3,), (3,)), HEADS), preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - along) * scale
    d_scores = barrier((d_scores if slope is None else d_scores * slope).astype(q.dtype))
    return dot(d_scores, k, (((3,), (2,)), HEADS)), dot_rows(d_scores, q, 2), dot_rows(weights, g, 2), None


_attend.defvjp(_attend_forward, _attend_backward)


KERNELS = {
    "xla": Kernel(xla_attention, ("cpu", "gpu", "tpu"), softcap=True, note="exact, holds the [T, S] scores"),
}


def choose_kernel(name: str, platform: str, *, softcap: float) -> tuple[str, str]:
    """(kernel, why it was chosen) for a model on `platform`.

    Raises:
      ValueError: `name` asks for a kernel that does not exist or cannot honour the model.
    """
    if name == "auto":
        return "xla", f"auto: on {platform}, {KERNELS['xla'].note}"
    if name not in KERNELS:
        raise ValueError(f"attention: expected one of auto, {', '.join(KERNELS)}, got {name!r}; choose one of them")
    kernel = KERNELS[name]
    needs = ((platform in kernel.platforms, f"platform {platform}"), (kernel.softcap or not softcap, "softcap"))
    for ok, what in needs:
        if not ok:
            raise ValueError(f"attention: expected a kernel for {what}, got {name!r}, which cannot; use 'auto'")
    return name, f"asked for; {kernel.note}"


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, dim: int, *, num_heads: int, num_kv_heads: int, head_dim: int, use_bias: bool,
                 qk_norm: bool, norm_eps: float, softcap: float, kernel: str, init: Initializer,
                 out_init: Initializer, rngs: nnx.Rngs):
        self.scale, self.softcap, self.kernel = head_dim ** -0.5, softcap, kernel
        kv = ("embed", "kv_heads", "head_dim")
        self.query = Dense((dim,), (num_heads, head_dim), ("embed", "heads", "head_dim"), use_bias=use_bias,
                           init=init, rngs=rngs)
        self.key = Dense((dim,), (num_kv_heads, head_dim), kv, use_bias=use_bias, init=init, rngs=rngs)
        self.value = Dense((dim,), (num_kv_heads, head_dim), kv, use_bias=use_bias, init=init, rngs=rngs)
        self.out = Dense((num_heads, head_dim), (dim,), ("heads", "head_dim", "embed"), use_bias=use_bias,
                         init=out_init, rngs=rngs)
        self.query_norm = RMSNorm(head_dim, eps=norm_eps, rngs=rngs) if qk_norm else None
        self.key_norm = RMSNorm(head_dim, eps=norm_eps, rngs=rngs) if qk_norm else None

    def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array, rotation: Rotation | None,
                 cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Attends from x to itself, or to `cache` with x's keys and values written into it (returned)."""
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        q = constrain(q, "batch", "seq", "act_heads", None)
        k = constrain(k, "batch", "kv_seq", "act_kv_heads", None)
        v = constrain(v, "batch", "kv_seq", "act_kv_heads", None)
        if cache is not None:
            cache = KVCache(_write(cache.key, k, cache.slot), _write(cache.value, v, cache.slot), cache.slot)
            k, v = cache.key, cache.value
        y = KERNELS[self.kernel].run(q, k, v, mask_BTS, scale=self.scale, softcap=self.softcap)
        return self.out(constrain(y, "batch", "seq", "act_heads", None)), cache


def _write(buffer_BSGK: jax.Array, new_BTGK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Puts T new entries of every row at that row's own slot."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))
    return put(buffer_BSGK, new_BTGK.astype(buffer_BSGK.dtype), slot_B)
