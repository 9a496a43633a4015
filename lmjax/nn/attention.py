"""The attention layer: projections, rotation and key/value caches around `kernels.attend`.

Shape suffixes: B batch, T query sequence, S key sequence or cache slots, H query heads, G key/value heads,
K head_dim, D embed_dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.kernels.choose import KERNELS, attend
from lmjax.nn.layers import Dense
from lmjax.nn.masking import Visibility
from lmjax.nn.module import Initializer
from lmjax.nn.ops import gradient_barrier
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.nn.sequence import scattered
from lmjax.sharding import constrain


class KVCache(NamedTuple):
    """Keys and values [B, G, S, K]: what a matmul over the heads reads as it lies."""

    key: jax.Array
    value: jax.Array


class Fed(NamedTuple):
    """Which tokens a cached step feeds: positions of the first and of the last that stays, int32 [B].

    ring: the cache holds the last S tokens, that of position p in slot p % S; else slot p holds position p.
    """

    first: jax.Array
    last: jax.Array
    ring: bool

    def kv_positions(self, slots: int, num_fed: int) -> jax.Array:
        """The position of every key that `extend` returns, int32 [B, S]; below 0 there is none."""
        B = self.first.shape[0]
        if not self.ring:
            return jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32).reshape(1, -1), (B, slots))
        if num_fed == 1:
            return _ring(self.first, slots)
        fed = self.first[:, None] + jnp.arange(num_fed, dtype=jnp.int32).reshape(1, -1)
        return jnp.concatenate([_ring(self.first - 1, slots), fed], axis=1)

    def extend(self, buffer_BGSK: jax.Array, new_BGTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(what the fed tokens look at, the buffer with those of them in it that stay)."""
        new = new_BGTK.astype(buffer_BGSK.dtype)
        S, T = buffer_BGSK.shape[2], new.shape[2]
        if not self.ring or T == 1:
            written = _write(buffer_BGSK, new, self.first % S if self.ring else self.first)
            return written, written
        # Each token has to see those before it that its successors in the same step push out of the ring.
        from_fed = _ring(self.last, S) - self.first[:, None]
        taken = jnp.take_along_axis(new, jnp.clip(from_fed, 0, T - 1)[:, None, :, None], axis=2)
        kept = jnp.where((from_fed >= 0)[:, None, :, None], taken, buffer_BGSK)
        return jnp.concatenate([buffer_BGSK, new], axis=2), kept


def _ring(last_B: jax.Array, slots: int) -> jax.Array:
    """The newest position up to `last` that each slot can hold, int32 [B, S]."""
    last = last_B[:, None]
    return last - (last - jnp.arange(slots, dtype=jnp.int32).reshape(1, -1)) % slots


def _write(buffer_BGSK: jax.Array, new_BGTK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Puts T new entries of every row at that row's own slot."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
    return put(buffer_BGSK, new_BGTK, slot_B)


class Attention(nnx.Module):
    """Multi-head attention with grouped keys and values (Ainslie et al. 2023, arXiv:2305.13245).

    scale: of the scores. qk_norm: makes the norms over head_dim of queries and keys, or None.
    """

    def __init__(self, dim: int, *, num_heads: int, num_kv_heads: int, head_dim: int, qkv_bias: bool, out_bias: bool,
                 qk_norm: Callable[..., nnx.Module] | None, norm_eps: float, scale: float, softcap: float,
                 init: Initializer, query_init: Initializer, out_init: Initializer, rngs: nnx.Rngs):
        self.scale, self.softcap = scale, softcap
        kv = ("embed", "kv_heads", "head_dim")
        self.query = Dense((dim,), (num_heads, head_dim), ("embed", "heads", "head_dim"), use_bias=qkv_bias,
                           init=query_init, rngs=rngs)
        self.key = Dense((dim,), (num_kv_heads, head_dim), kv, use_bias=qkv_bias, init=init, rngs=rngs)
        self.value = Dense((dim,), (num_kv_heads, head_dim), kv, use_bias=qkv_bias, init=init, rngs=rngs)
        self.out = Dense((num_heads, head_dim), (dim,), ("heads", "head_dim", "embed"), use_bias=out_bias,
                         init=out_init, rngs=rngs)
        self.query_norm = qk_norm(head_dim, eps=norm_eps, rngs=rngs) if qk_norm else None
        self.key_norm = qk_norm(head_dim, eps=norm_eps, rngs=rngs) if qk_norm else None

    def __call__(self, x_BTD: jax.Array, visibility: Visibility, rotation: Rotation | None = None,
                 bias_BHTS: jax.Array | None = None, cache: KVCache | None = None, fed: Fed | None = None, *,
                 kernel: str) -> tuple[jax.Array, KVCache | None]:
        """Attends from x to itself, or to `cache` with x's keys and values added as `fed` says (returned)."""
        seen = self.keys_values(x_BTD, rotation, kernel)
        if cache is not None:
            both = [fed.extend(old, new) for old, new in zip(cache, seen, strict=True)]
            seen, cache = (KVCache(*part) for part in zip(*both, strict=True))
        return self.look(x_BTD, seen, visibility, rotation, bias_BHTS, kernel=kernel), cache

    def keys_values(self, x_BSD: jax.Array, rotation: Rotation | None = None, kernel: str = "xla") -> KVCache:
        """The keys and values of x, placed as `kernel` wants them."""
        k, v = self.key(x_BSD), self.value(x_BSD)
        k = k if self.key_norm is None else self.key_norm(k)
        k = k if rotation is None else apply_rope(k, rotation)
        k, v = (constrain(x, "batch", KERNELS[kernel].keys, "act_kv_heads", None) for x in (k, v))
        return KVCache(checkpoint_name(k, "key").swapaxes(1, 2), checkpoint_name(v, "value").swapaxes(1, 2))

    def look(self, x_BTD: jax.Array, seen: KVCache, visibility: Visibility, rotation: Rotation | None = None,
             bias_BHTS: jax.Array | None = None, *, kernel: str) -> jax.Array:
        """Attends from x to keys and values that are there already."""
        q = self.query(x_BTD)
        q = q if self.query_norm is None else self.query_norm(q)
        q = q if rotation is None else apply_rope(q, rotation)
        q = checkpoint_name(constrain(q, "batch", "seq", "act_heads", None), "query")
        k, v = (x.swapaxes(1, 2) for x in seen)
        y = attend(q, k, v, visibility, scale=self.scale, softcap=self.softcap, bias=bias_BHTS, kernel=kernel)
        y = gradient_barrier(y)
        return checkpoint_name(scattered(self.out(constrain(y, "batch", "seq", "act_heads", None))), "out")
