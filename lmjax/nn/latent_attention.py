"""Multi-head latent attention: keys and values of all heads come from one small vector per token.

DeepSeek-V2, arXiv:2405.04434, section 2.1. A token's latent c gives every head's key and value by
matrices of that head. RoPE rotates a separate key, which all heads share. Decoding keeps only the
latent and that rotated key.

Shape suffixes: B batch, T query sequence, S key sequence or cache slots, H heads, D embed_dim,
R kv_rank, N nope_dim, P rope_dim, V value_dim, K = N + P.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.config import at_least
from lmjax.errors import UserError
from lmjax.nn.attention import AttentionInit, CacheUpdate, KVCache
from lmjax.nn.kernels.choose import Kernel, attend
from lmjax.nn.kernels.xla import NEG_INF, largest_score
from lmjax.nn.kv_cache import CacheArray, Int8Rows
from lmjax.nn.layers import Dense, RMSNorm
from lmjax.nn.masking import AttentionMask
from lmjax.nn.ops import gradient_barrier
from lmjax.nn.packed import Packed
from lmjax.nn.positions import Rotation, apply_rope
from lmjax.nn.recorded import is_wanted, record
from lmjax.nn.sequence import scatter_sequence
from lmjax.sharding import constrain

NORM_EPS = 1e-6  # of the norms of latents, whatever the model's other norms have


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Latent attention: the ranks of its latents and the sizes of its heads."""

    kv_rank: int = 0  # of the latent of keys and values; 0: each head has projections of its own
    query_rank: int = 0  # of the latent of queries; 0: queries are projected from the stream
    nope_dim: int = 128  # dimensions of a query or key that RoPE does not rotate
    rope_dim: int = 64  # those that it rotates, after the others; the key's are shared by the heads
    value_dim: int = 128  # of a head's value

    def __post_init__(self) -> None:
        at_least(0, kv_rank=self.kv_rank, query_rank=self.query_rank)
        at_least(1, nope_dim=self.nope_dim, rope_dim=self.rope_dim, value_dim=self.value_dim)
        if self.rope_dim % 2:
            raise UserError("an even number for rope", self.rope_dim, "change it", where="rope_dim")
        if self.query_rank and not self.kv_rank:
            raise UserError("0 without kv_rank", self.query_rank, "set kv_rank, too",
                            where="query_rank")

    @property
    def key_dim(self) -> int:
        """The dimensions of a head's query and key."""
        return self.nope_dim + self.rope_dim


class LatentSizes(NamedTuple):
    """What a latent attention layer takes from the model's config besides `LatentConfig`."""

    embed_dim: int
    num_heads: int
    down_bias: bool  # whether the projections to latents have a bias
    out_bias: bool  # whether the output projection has one
    scale: float  # multiplies the scores
    softcap: float  # of the scores; 0: none


class LatentAttention(nnx.Module):
    """Attention whose keys and values are matrices times a latent.

    Without a cache it computes every head's keys and values, for any attention kernel. With a cache
    it multiplies queries by the keys' matrices instead, so that they meet the latents themselves,
    and multiplies what they see by the values' matrices (arXiv:2405.04434, section 2.1.2).
    """

    def __init__(self, config: LatentConfig, sizes: LatentSizes, init: AttentionInit,
                 rngs: nnx.Rngs):
        c, s = config, sizes
        self.config, self.scale, self.softcap = c, s.scale, s.softcap
        heads = (s.num_heads, c.key_dim)
        up = ("embed", "heads", "head_dim")

        def down(rank: int) -> Dense:
            return Dense((s.embed_dim,), (rank,), ("embed", "latent"), use_bias=s.down_bias,
                         init=init.key_value, rngs=rngs)

        rank = c.query_rank
        self.query_down = down(rank) if rank else None
        self.query_latent_norm = RMSNorm(rank, eps=NORM_EPS, rngs=rngs) if rank else None
        self.query = Dense((rank or s.embed_dim,), heads, up, use_bias=False, init=init.query,
                           rngs=rngs)
        self.key_value_down = down(c.kv_rank + c.rope_dim)
        self.latent_norm = RMSNorm(c.kv_rank, eps=NORM_EPS, rngs=rngs)
        self.key_value = Dense((c.kv_rank,), (s.num_heads, c.nope_dim + c.value_dim), up,
                               use_bias=False, init=init.key_value, rngs=rngs)
        self.out = Dense((s.num_heads, c.value_dim), (s.embed_dim,),
                         ("heads", "head_dim", "embed"), use_bias=s.out_bias, init=init.out,
                         rngs=rngs)

    def __call__(self, x_BTD: jax.Array, mask: AttentionMask, rotation: Rotation | None = None,
                 bias_BHTS: jax.Array | None = None, cache: KVCache | None = None,
                 update: CacheUpdate | None = None, *,
                 kernel: Kernel) -> tuple[jax.Array, KVCache | None]:
        """Self-attention of x, with a cache or without.

        Args:
          rotation: of `rope_dim` dimensions.
          cache: as `key` the rotated shared keys [B, 1, S, P], as `value` the normed latents
            [B, 1, S, R]; those of x are added to it as `update` says.

        Returns:
          [B, T, D], and the new cache if one was given.
        """
        assert rotation is not None and bias_BHTS is None
        latent_BTR, rope_BTP = self._latents(x_BTD, rotation)
        q_BTHK = self._queries(x_BTD, rotation)
        if cache is None:
            y_BTHV = self._expanded(q_BTHK, latent_BTR, rope_BTP, mask, kernel)
        else:
            assert update is not None
            both = [update.extend(old, new[:, None]) for old, new in zip(
                cache, (rope_BTP, latent_BTR), strict=True)]
            seen, cache = (KVCache(*part) for part in zip(*both, strict=True))
            y_BTHV = self._absorbed(q_BTHK, seen, mask, kernel)
        y_BTHV = constrain(gradient_barrier(y_BTHV), "batch", "seq", "act_heads", None)
        return checkpoint_name(scatter_sequence(self.out(y_BTHV)), "out"), cache

    def _queries(self, x_BTD: jax.Array, rotation: Rotation) -> jax.Array:
        """The queries [B, T, H, K], whose last dimensions are rotated."""
        if self.query_down is not None:
            assert self.query_latent_norm is not None
            x_BTD = self.query_latent_norm(self.query_down(x_BTD))
        nope, rope = jnp.split(self.query(x_BTD), [self.config.nope_dim], axis=-1)
        q_BTHK = jnp.concatenate([nope, apply_rope(rope, rotation)], axis=-1)
        q_BTHK = checkpoint_name(constrain(q_BTHK, "batch", "seq", "act_heads", None), "query")
        record(query=q_BTHK)
        return q_BTHK

    def _latents(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """The normed latents [B, T, R] and the rotated keys [B, T, P] that the heads share."""
        latent, rope = jnp.split(self.key_value_down(x_BTD), [self.config.kv_rank], axis=-1)
        return self.latent_norm(latent), apply_rope(rope[:, :, None], rotation)[:, :, 0]

    def _expanded(self, q_BTHK: jax.Array, latent_BTR: jax.Array, rope_BTP: jax.Array,
                  mask: AttentionMask, kernel: Kernel) -> jax.Array:
        """Attention with every head's keys and values, [B, T, H, V]."""
        both = self.key_value(latent_BTR)
        nope, v_BSHV = jnp.split(both, [self.config.nope_dim], axis=-1)
        rope = jnp.broadcast_to(rope_BTP[:, :, None], (*nope.shape[:3], rope_BTP.shape[-1]))
        k_BSHK = jnp.concatenate([nope, rope], axis=-1)
        k_BSHK, v_BSHV = (constrain(x, "batch", kernel.keys, "act_heads", None)
                          for x in (k_BSHK, v_BSHV))
        k_BSHK, v_BSHV = checkpoint_name(k_BSHK, "key"), checkpoint_name(v_BSHV, "value")
        record(key=k_BSHK, value=v_BSHV)
        if kernel.name == "xla" and is_wanted("logit"):
            record(logit=largest_score(q_BTHK, k_BSHK.swapaxes(1, 2), mask, self.scale))
        return attend(q_BTHK, k_BSHK, v_BSHV, mask, scale=self.scale, softcap=self.softcap,
                      kernel=kernel)

    def _absorbed(self, q_BTHK: jax.Array, seen: KVCache, mask: AttentionMask,
                  kernel: Kernel) -> jax.Array:
        """Attention from queries in the space of the latents to the latents, [B, T, H, V]."""
        nope, rope = jnp.split(q_BTHK, [self.config.nope_dim], axis=-1)
        key_RHN, value_RHV = jnp.split(self._up(q_BTHK.dtype), [self.config.nope_dim], axis=-1)
        q_BTHR = jnp.einsum("BTHN,RHN->BTHR", nope, key_RHN)
        if kernel.dense and not self.softcap:
            y_BTHR = _attend_latents(q_BTHR, rope, seen, mask, self.scale)
        else:
            dense = [(x.dense(nope.dtype) if isinstance(x, Int8Rows) else x).swapaxes(1, 2)
                     for x in seen]
            y_BTHR = attend(jnp.concatenate([rope, q_BTHR], axis=-1),
                            jnp.concatenate(dense, axis=-1), dense[1], mask, scale=self.scale,
                            softcap=self.softcap, kernel=kernel)
        return jnp.einsum("BTHR,RHV->BTHV", y_BTHR, value_RHV)

    def _up(self, dtype: jnp.dtype) -> jax.Array:
        """The matrices [R, H, N + V] from latents to keys and values, with adapters if any."""
        kernel = self.key_value.kernel[...]
        if not isinstance(kernel, Packed) and self.key_value.adapter is None:
            return kernel.astype(dtype)
        return self.key_value(jnp.eye(self.config.kv_rank, dtype=dtype)[None])[0]


def _attend_latents(q_BTHR: jax.Array, rope_BTHP: jax.Array, seen: KVCache, mask: AttentionMask,
                    scale: float) -> jax.Array:
    """softmax((q latent^T + rope key^T) * scale) latent, with dense float32 scores: [B, T, H, R].

    The two parts are read where they lie: joining them would copy the cache.
    """
    scores = (_scores(q_BTHR, seen.value) + _scores(rope_BTHP, seen.key)) * scale
    weights = jax.nn.softmax(jnp.where(mask.to_dense()[:, None], scores, NEG_INF), axis=-1)
    latents = seen.value
    if isinstance(latents, Int8Rows):
        weights, latents = weights * latents.scales[:, :, None, :, 0], latents.values
    return jnp.einsum("BHTS,BSR->BTHR", weights.astype(q_BTHR.dtype),
                      latents[:, 0].astype(q_BTHR.dtype))


def _scores(q_BTHK: jax.Array, rows_B1SK: CacheArray) -> jax.Array:
    """q k^T of all heads' queries and the rows that they share, float32 [B, H, T, S]."""
    if isinstance(rows_B1SK, Int8Rows):
        scales_B11S = rows_B1SK.scales[:, :, None, :, 0]
        return _scores(q_BTHK, rows_B1SK.values.astype(q_BTHK.dtype)) * scales_B11S
    return jnp.einsum("BTHK,BSK->BHTS", q_BTHK, rows_B1SK[:, 0].astype(q_BTHK.dtype),
                      preferred_element_type=jnp.float32)
