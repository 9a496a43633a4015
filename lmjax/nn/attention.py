"""The attention layer: projections, rotation and key/value cache around `kernels.attend`.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim, D embed_dim.
"""

from typing import NamedTuple

import jax
from flax import nnx

from lmjax.nn.kernels import KERNELS, attend, with_cache
from lmjax.nn.layers import Dense, RMSNorm
from lmjax.nn.module import Initializer
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.nn.visibility import Visibility
from lmjax.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values [B, S, G, K] seen so far, and the slot that each row writes next, int32 [B]."""

    key: jax.Array
    value: jax.Array
    slot: jax.Array


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

    def __call__(self, x_BTD: jax.Array, visibility: Visibility, rotation: Rotation | None,
                 cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Attends from x to itself, or to `cache` with x's keys and values written into it (returned)."""
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        q = constrain(q, "batch", "seq", "act_heads", None)
        kernel = self.kernel if cache is None else with_cache(self.kernel, cache.key.shape[1])
        k = constrain(k, "batch", KERNELS[kernel].keys, "act_kv_heads", None)
        v = constrain(v, "batch", KERNELS[kernel].keys, "act_kv_heads", None)
        if cache is not None:
            cache = KVCache(_write(cache.key, k, cache.slot), _write(cache.value, v, cache.slot), cache.slot)
            k, v = cache.key, cache.value
        y = attend(q, k, v, visibility, scale=self.scale, softcap=self.softcap, kernel=kernel)
        return self.out(constrain(y, "batch", "seq", "act_heads", None)), cache


def _write(buffer_BSGK: jax.Array, new_BTGK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Puts T new entries of every row at that row's own slot."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))
    return put(buffer_BSGK, new_BTGK.astype(buffer_BSGK.dtype), slot_B)
