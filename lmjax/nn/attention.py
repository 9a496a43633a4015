"""Attention behind one function, with a table of what each kernel can do.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
R = H / G query heads a key/value head, K head_dim, D embed_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.nn.layers import Dense, RMSNorm
from lmjax.nn.module import Initializer
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.sharding import constrain

NEG_INF = -1e30  # finite: a row with no visible key gives zeros below, not NaN


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
    q = q_BTHK.reshape(B, T, G, H // G, K) * jnp.asarray(scale, q_BTHK.dtype)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q, k_BSGK, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = mask_BTS[:, None, None, :, :]
    scores = jnp.where(mask, scores, NEG_INF)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.maximum(total, 1e-30)).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v_BSGK).reshape(B, T, H, K)


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
    for ok, what in ((platform in kernel.platforms, f"platform {platform}"), (kernel.softcap or not softcap, "softcap")):
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
