"""The attention layer: projections, rotation and key/value caches around `kernels.choose.attend`.

Shape suffixes: B batch, T query sequence, S key sequence or cache slots, H query heads,
G key/value heads, K head_dim, D embed_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.kernels.choose import KERNELS, Kernel, attend
from lmjax.nn.kernels.xla import largest_score
from lmjax.nn.kv_cache import CacheArray, like
from lmjax.nn.layers import Dense, Norm
from lmjax.nn.masking import AttentionMask
from lmjax.nn.module import Initializer, param, zeros
from lmjax.nn.ops import gradient_barrier
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.nn.recorded import is_wanted, record
from lmjax.nn.sequence import scatter_sequence
from lmjax.sharding import constrain

# What a norm of queries and keys norms together: see `TransformerConfig.qk_norm_over`.
QK_NORMS = ("head", "each_head", "all_heads")


class KVCache(NamedTuple):
    """Keys and values [B, G, S, K]: the layout in which a matmul per head reads them."""

    key: CacheArray
    value: CacheArray


class CacheUpdate(NamedTuple):
    """Which tokens a step adds to a cache of S slots.

    T tokens are fed per row, of consecutive positions. Those after position `last` are padding and
    do not stay in a ring.
    """

    first: jax.Array  # position of a row's first new token, int32 [B]
    last: jax.Array  # position of its last token that is not padding, int32 [B]
    # True: slot p % S holds position p, so the cache keeps the last S tokens. False: slot p does.
    ring: bool

    def kv_positions(self, slots: int, num_new: int) -> jax.Array:
        """The position of every key that `extend` returns, int32 [B, S]; negative: none."""
        B = self.first.shape[0]
        if not self.ring:
            positions = jnp.arange(slots, dtype=jnp.int32).reshape(1, -1)
            return jnp.broadcast_to(positions, (B, slots))
        if num_new == 1:
            return _ring_positions(self.first, slots)
        new = self.first[:, None] + jnp.arange(num_new, dtype=jnp.int32).reshape(1, -1)
        return jnp.concatenate([_ring_positions(self.first - 1, slots), new], axis=1)

    def extend(self, buffer_BGSK: CacheArray, new_BGTK: jax.Array) -> tuple[CacheArray, CacheArray]:
        """Adds the new tokens' keys or values to a buffer.

        Returns:
          What the new tokens attend to, and the new buffer.
        """
        new = like(new_BGTK, buffer_BGSK)
        both = jax.tree.map(self._extend, buffer_BGSK, new)
        return jax.tree.transpose(jax.tree.structure(new), jax.tree.structure((0, 0)), both)

    def _extend(self, buffer_BGSK: jax.Array, new_BGTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`extend` for one array; its last dimension may be any."""
        new = new_BGTK.astype(buffer_BGSK.dtype)
        S, T = buffer_BGSK.shape[2], new.shape[2]
        if not self.ring or T == 1:
            written = _write(buffer_BGSK, new, self.first % S if self.ring else self.first)
            return written, written
        # The first of the new tokens still attend to old ones that the later new tokens push out of
        # the ring, so all of them attend to the old buffer and the new tokens side by side.
        source = _ring_positions(self.last, S) - self.first[:, None]
        taken = jnp.take_along_axis(new, jnp.clip(source, 0, T - 1)[:, None, :, None], axis=2)
        kept = jnp.where((source >= 0)[:, None, :, None], taken, buffer_BGSK)
        return jnp.concatenate([buffer_BGSK, new], axis=2), kept


def _ring_positions(last_B: jax.Array, slots: int) -> jax.Array:
    """The position that each slot of a ring holds after the token at `last`, int32 [B, S]."""
    last = last_B[:, None]
    return last - (last - jnp.arange(slots, dtype=jnp.int32).reshape(1, -1)) % slots


def _write(buffer_BGSK: jax.Array, new_BGTK: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Writes each row's T new entries into the buffer, beginning at that row's own slot."""
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
    return put(buffer_BGSK, new_BGTK, slot_B)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The shape of an attention layer, and how it computes its scores."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool  # whether the projections to queries, keys and values have a bias
    out_bias: bool  # whether the output projection has one
    scale: float  # multiplies the scores
    softcap: float  # of the scores; 0: none
    # Makes the norms of queries and keys, called with the scale's shape and rngs=; None: there are
    # none.
    qk_norm: Callable[..., Norm] | None
    qk_norm_over: str = "head"  # of `QK_NORMS`
    clip: float = 0.0  # queries, keys and values are clipped to [-clip, clip]; 0: they are not
    sinks: bool = False  # whether each head has a learned logit without a value in its softmax


@dataclasses.dataclass(frozen=True)
class AttentionInit:
    """Initializers of an attention layer's matrices."""

    query: Initializer
    key_value: Initializer
    out: Initializer


class Attention(nnx.Module):
    """Attention with grouped keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: AttentionConfig, init: AttentionInit, rngs: nnx.Rngs):
        c = config
        self.scale, self.softcap, self.clip = c.scale, c.softcap, c.clip
        into, heads = (c.embed_dim,), (c.num_heads, c.head_dim)
        kv_heads, kv_axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        self.query = Dense(into, heads, ("embed", "heads", "head_dim"), use_bias=c.qkv_bias,
                           init=init.query, rngs=rngs)
        self.key = Dense(into, kv_heads, kv_axes, use_bias=c.qkv_bias, init=init.key_value,
                         rngs=rngs)
        self.value = Dense(into, kv_heads, kv_axes, use_bias=c.qkv_bias, init=init.key_value,
                           rngs=rngs)
        self.out = Dense(heads, into, ("heads", "head_dim", "embed"), use_bias=c.out_bias,
                         init=init.out, rngs=rngs)
        self.sinks = param(rngs, zeros, (c.num_heads,), ("heads",)) if c.sinks else None
        self.over_all_heads = c.qk_norm_over == "all_heads"

        def norm(num_heads: int) -> Norm | None:
            shapes = {"head": (c.head_dim,), "each_head": (num_heads, c.head_dim),
                      "all_heads": (num_heads * c.head_dim,)}
            return c.qk_norm(*shapes[c.qk_norm_over], rngs=rngs) if c.qk_norm else None

        self.query_norm, self.key_norm = norm(c.num_heads), norm(c.num_kv_heads)

    def __call__(self, x_BTD: jax.Array, mask: AttentionMask, rotation: Rotation | None = None,
                 bias_BHTS: jax.Array | None = None, cache: KVCache | None = None,
                 update: CacheUpdate | None = None, *,
                 kernel: Kernel) -> tuple[jax.Array, KVCache | None]:
        """Self-attention of x, with a cache or without.

        Args:
          cache: older keys and values; those of x are added to it as `update` says.

        Returns:
          [B, T, D], and the new cache if one was given.
        """
        new = self.keys_values(x_BTD, rotation, kernel)
        record(key=new[0].swapaxes(1, 2), value=new[1].swapaxes(1, 2))
        kv = KVCache(*new)
        if cache is not None:
            assert update is not None
            both = [update.extend(old, added) for old, added in zip(cache, new, strict=True)]
            kv, cache = (KVCache(*part) for part in zip(*both, strict=True))
        return self.attend(x_BTD, kv, mask, rotation, bias_BHTS, kernel=kernel), cache

    def keys_values(self, x_BSD: jax.Array, rotation: Rotation | None = None,
                    kernel: Kernel = KERNELS["xla"]) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x, [B, G, S, K], placed on the mesh as `kernel` wants them."""
        k, v = self._clipped(self.key(x_BSD)), self._clipped(self.value(x_BSD))
        k = self._normed(k, self.key_norm)
        k = k if rotation is None else apply_rope(k, rotation)
        k, v = (constrain(x, "batch", kernel.keys, "act_kv_heads", None) for x in (k, v))
        return (checkpoint_name(k, "key").swapaxes(1, 2),
                checkpoint_name(v, "value").swapaxes(1, 2))

    def attend(self, x_BTD: jax.Array, kv: KVCache, mask: AttentionMask,
               rotation: Rotation | None = None, bias_BHTS: jax.Array | None = None, *,
               kernel: Kernel) -> jax.Array:
        """Attention from x to the given keys and values, [B, T, D]."""
        q = self._normed(self._clipped(self.query(x_BTD)), self.query_norm)
        q = q if rotation is None else apply_rope(q, rotation)
        q = checkpoint_name(constrain(q, "batch", "seq", "act_heads", None), "query")
        record(query=q)
        if kernel.name == "xla" and is_wanted("logit") and isinstance(kv.key, jax.Array):
            record(logit=largest_score(q, kv.key, mask, self.scale))
        k, v = jax.tree.map(lambda x: x.swapaxes(1, 2), kv)
        sinks = None if self.sinks is None else self.sinks[...]
        y = attend(q, k, v, mask, scale=self.scale, softcap=self.softcap, bias=bias_BHTS,
                   sinks=sinks, kernel=kernel)
        y = constrain(gradient_barrier(y), "batch", "seq", "act_heads", None)
        return checkpoint_name(scatter_sequence(self.out(y)), "out")

    def _normed(self, x_BTHK: jax.Array, norm: Norm | None) -> jax.Array:
        if norm is None:
            return x_BTHK
        if self.over_all_heads:
            return norm(x_BTHK.reshape(*x_BTHK.shape[:2], -1)).reshape(x_BTHK.shape)
        return norm(x_BTHK)

    def _clipped(self, x_BTHK: jax.Array) -> jax.Array:
        return jnp.clip(x_BTHK, -self.clip, self.clip) if self.clip else x_BTHK
