"""The state that decoding keeps from one token to the next: keys, values and positions.

Shape suffixes: B batch, S cache slots or encoder sequence, D embed_dim, G kv heads, K head_dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.models.config import TransformerConfig
from lmjax.nn.attention import KVCache
from lmjax.nn.kv_cache import empty_rows


class Source(NamedTuple):
    """The encoder's output that cross-attention reads: either `states` or `cache` is set."""

    segments: jax.Array  # int32 [B, S]: a decoder token sees the encoder tokens of its own segment
    states: jax.Array | None = None  # the encoder's states [B, S, D]
    # Their keys and values in each layer: arrays [layers, B, G, S, K], or one array per layer.
    cache: KVCache | None = None


class Cache(NamedTuple):
    """The state of cached decoding."""

    # One entry per kind of layer: arrays [layers, B, G, S, K], or one array per layer. First layers
    # without experts have an entry of their own, the first.
    # Local layers have at most as many slots as their window has tokens. Latent attention keeps its
    # rotated keys and its latents, G = 1 (`nn.latent_attention`).
    layers: tuple[KVCache, ...]
    slot: jax.Array  # int32 [B]: the position of each row's next token
    source: Source | None = None  # of an encoder-decoder


def empty_cache(config: TransformerConfig, batch_size: int, slots: int, dtype: Any,
                rings: bool = True, kv_cache: str = "float") -> Cache:
    """A cache with room for `slots` tokens per row.

    rings: local layers keep only as many tokens as their window has.
    kv_cache: a row of `nn.kv_cache.KV_CACHES`.
    """
    kinds, pattern = config.kinds(config.num_layers)
    counts = [(kind, sum(pattern[layer % len(pattern)] == i for layer in range(config.num_layers)))
              for i, kind in enumerate(kinds)]
    if first := config.first_dense:  # all layers are of one kind
        counts = [(kind, n) for kind, total in counts for n in (first, total - first)]
    latent = config.latent
    heads, dims = config.dims.num_kv_heads, (config.dims.head_dim, config.dims.head_dim)
    if latent.kv_rank:
        heads, dims = 1, (latent.rope_dim, latent.kv_rank)
    layers = []
    for kind, count in counts:
        window = config.window(kind) if rings else 0
        shape = (count, batch_size, heads, min(slots, window or slots))
        layers.append(KVCache(*(empty_rows((*shape, dim), kv_cache, dtype) for dim in dims)))
    return Cache(tuple(layers), jnp.zeros((batch_size,), jnp.int32))
