"""The stack of blocks that every architecture has, and the token table.

Shape suffixes: B batch, T sequence, S key sequence or cache slots, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.models.block import Block, LayerOut, PerLayer, Shared
from lmjax.models.cache import Source
from lmjax.models.config import TransformerConfig, is_local, is_rotated
from lmjax.models.heads import Head
from lmjax.models.parametrization import embedding_multiplier
from lmjax.nn.attention import CacheUpdate, KVCache
from lmjax.nn.kernels.choose import Kernel, kernel_for_cache, prepare, uses_balanced_rows
from lmjax.nn.layers import NORMS, Dense, Embedding, Norm
from lmjax.nn.masking import AttentionMask
from lmjax.nn.module import normal
from lmjax.nn.ops import dropout
from lmjax.nn.pipeline import per_part, split_key
from lmjax.nn.positions import (
    SINUSOIDS,
    Rotation,
    relative_buckets,
    rope_rotation,
    sinusoids,
)
from lmjax.nn.recorded import add_stack
from lmjax.nn.routing import MoEConfig, Routing
from lmjax.nn.sequence import balance_sequence, gather_sequence, scatter_sequence
from lmjax.nn.stack import Stack, Unstacked, is_unstacked
from lmjax.sharding import constrain


class TokenInfo(NamedTuple):
    """What the layers know of the tokens besides their embeddings: int32 [B, T], but for `last`."""

    positions: jax.Array  # they restart in every document
    segments: jax.Array  # tokens of one document have one number; 0: padding
    prefix: jax.Array | None = None  # 1: all tokens of the document see this one, earlier ones too
    last: jax.Array | None = None  # int32 [B]: tokens up to this position enter the cache
    order: jax.Array | None = None  # places in reading order, where tokens lie in another order


class Trunk(nnx.Module):
    """Blocks over embedded tokens, with the position tables and the norms around them.

    causal: tokens do not see later tokens. cross: the layers attend to an encoder, too.
    num_layers: 0 takes the config's.
    table_dim: width of the embeddings, where a matrix maps them to embed_dim; 0: embed_dim.
    """

    def __init__(self, config: TransformerConfig, kernel: Kernel, rngs: nnx.Rngs, *, causal: bool,
                 cross: bool = False, num_layers: int = 0, table_dim: int = 0):
        c, norm, num_layers = config, NORMS[config.norm], num_layers or config.num_layers
        self.config, self.kernel, self.causal = c, kernel, causal
        self.noisy = c.dropout > 0  # whether a layer needs a key of its own
        self.kinds, pattern = c.kinds(num_layers)

        def table(rows: int, dim: int, axis: str) -> Embedding:
            return Embedding(rows, dim, ("positions", axis), init=normal(c.init_std), rngs=rngs)

        def new_norm(width: int = 0) -> Norm:
            return norm(width or c.embed_dim, eps=c.norm_eps, rngs=rngs)

        width = table_dim or c.embed_dim
        self.positions = (table(c.max_positions + c.position_offset, width, "embed")
                          if c.positions == "learned" else None)
        first, plain = c.first_dense, dataclasses.replace(c, moe=MoEConfig())

        def stack(c: TransformerConfig, count: int) -> Stack:
            return Stack(lambda r: Block(c, r, num_layers=num_layers, cross=cross), count,
                         scan=c.scan_layers, remat=c.remat, rngs=rngs, pattern=pattern,
                         one_set=getattr(c, "shared_layers", False))

        # First layers without experts have other parameters than the rest, so they do not stack.
        self.dense_layers = stack(plain, first) if first else None
        self.layers = stack(c, num_layers - first)
        self.norm = new_norm() if c.norm_position != "post" else None
        self.embedding_norm = new_norm(width) if c.embedding_norm == "own" else None
        self.widening = (Dense((width,), (c.embed_dim,), (None, "embed"), use_bias=c.use_bias,
                               init=normal(c.init_std), rngs=rngs)
                         if width != c.embed_dim else None)
        self.relative_bias = (table(c.relative_buckets, c.num_heads, "heads")
                              if c.positions == "relative" else None)

    def __call__(self, x_BTD: jax.Array, tokens: TokenInfo, *,
                 cache: Sequence[KVCache] | None = None, source: Source | None = None,
                 key: jax.Array | None = None,
                 ) -> tuple[jax.Array, tuple[KVCache, ...], Routing | None]:
        """Runs embedded tokens [B, T, D] through all layers.

        Args:
          cache: one per stack and kind of layer; the tokens enter it and attend to it.
          key: turns dropout on. In a pipeline: [M] keys, one per microbatch.
        Returns:
          (normed hidden states [B, T, D], the new cache if one was given, how experts were chosen
          in each layer).
        """
        c = self.config
        stacks = [s for s in (self.dense_layers, self.layers) if s is not None]
        num_layers = sum(stack.num_layers for stack in stacks)
        x_BTD = self._with_positions(x_BTD, tokens.positions)
        keys = None
        if key is not None and self.noisy:
            keys = split_key(key, num_layers + 1)
            if c.dropout:
                x_BTD = per_part(lambda x, key: dropout(x, c.dropout, key), x_BTD, keys[0])
            keys = keys[1:]
        x_BTD = x_BTD if self.widening is None else self.widening(x_BTD)
        # Placed before the sequence is scattered: otherwise the compiler gathers the table.
        x_BTD = constrain(x_BTD, "batch", "seq", "act_embed")
        # The layers may get the tokens in another order: `order` tells attention their places.
        balance = cache is None and tokens.prefix is None and uses_balanced_rows(
            self.kernel, x_BTD.shape[1], causal=self.causal, capacity=c.moe.capacity)
        if balance:
            x_BTD, tokens = balance_sequence(x_BTD), _balanced(tokens)
        x_BTD = scatter_sequence(x_BTD)
        first = jnp.arange(num_layers) == 0 if c.embedding_norm == "first" else None
        per_layer = PerLayer(keys, first, None if source is None else source.cache)
        caches = cache or (None,) * len(self.kinds) * len(stacks)
        shared = [self._shared(kind, tokens, part and _slots(part), source)
                  for kind, part in zip(self.kinds, caches[-len(self.kinds):], strict=True)]
        x_BTD, new, (routing, recorded) = _run(stacks, x_BTD, per_layer, caches, shared)
        add_stack(recorded)
        x_BTD = balance_sequence(x_BTD, back=True) if balance else x_BTD
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return gather_sequence(x_BTD), tuple(new), routing

    def _with_positions(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Adds position embeddings and applies the embedding norm, where the config has them."""
        c = self.config
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT + c.position_offset, x_BTD.dtype)
        if c.positions in SINUSOIDS:
            made_BTD = sinusoids(positions_BT + c.position_offset, c.embed_dim, c.positions)
            x_BTD = x_BTD + made_BTD.astype(x_BTD.dtype)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _shared(self, kind: str, tokens: TokenInfo, slots: int | None,
                source: Source | None) -> Shared:
        """Computes the arguments that all layers of a kind share.

        slots: of each row in their cache; None without a cache.
        """
        T, window = tokens.positions.shape[1], self.config.window(kind)
        kernel, update = self.kernel, None
        kv_positions, kv_segments, prefix = tokens.positions, tokens.segments, tokens.prefix
        if slots is not None:
            assert tokens.last is not None
            kernel = kernel_for_cache(kernel, T, slots)
            update = CacheUpdate(tokens.positions[:, 0], tokens.last, ring=slots == window)
            kv_positions = update.kv_positions(slots, T)
            # Causality hides empty slots; in a ring, empty slots have negative positions.
            kv_segments = (kv_positions >= 0).astype(jnp.int32)
            if prefix is not None:
                prefix = (kv_positions <= tokens.last[:, None]).astype(jnp.int32)
        mask = AttentionMask(tokens.positions, kv_positions, tokens.segments, kv_segments,
                             causal=self.causal, window=window, in_order=slots is None,
                             kv_prefix=prefix, reading_index=tokens.order)
        source_mask = None if source is None else prepare(AttentionMask(
            tokens.positions, jnp.zeros_like(source.segments), tokens.segments, source.segments,
            causal=False), kernel)
        return Shared(kernel, tokens.segments > 0, prepare(mask, kernel),
                      self._rotation(kind, tokens.positions),
                      self._bias(tokens.positions, kv_positions), update,
                      source and source.states, source_mask)

    def _rotation(self, kind: str, positions_BT: jax.Array) -> Rotation | None:
        c = self.config
        if c.positions != "rope" or not is_rotated(kind):
            return None
        if is_local(kind) and c.local_rope_theta:
            return rope_rotation(positions_BT, c.rotary_dim, c.local_rope_theta)
        return rope_rotation(positions_BT, c.rotary_dim, c.rope_theta, c.rope_scaling)

    def _bias(self, positions_BT: jax.Array, kv_positions_BS: jax.Array) -> jax.Array | None:
        """float32 [B, H, T, S], added to the attention scores."""
        if self.relative_bias is None:
            return None
        buckets_BTS = relative_buckets(
            positions_BT, kv_positions_BS, bidirectional=not self.causal,
            buckets=self.config.relative_buckets, distance=self.config.relative_distance)
        return jnp.moveaxis(self.relative_bias(buckets_BTS, jnp.float32), -1, 1)


def _run(stacks: Sequence[Stack], x_BTD: jax.Array, per_layer: PerLayer, caches: Sequence[Any],
         shared: Sequence[Shared]) -> tuple[jax.Array, Sequence[Any], LayerOut]:
    """Runs x through one stack after another, each with its share of the layers' arguments.

    Returns:
      As a stack; the routing is the last one's, what is recorded is of all layers.
    """
    if len(stacks) == 1:
        return stacks[0](x_BTD, per_layer, caches, shared)
    new: list[Any] = []
    recorded: dict[str, list[Any]] = {}
    first = 0
    for i, stack in enumerate(stacks):
        end = first + stack.num_layers
        own = jax.tree.map(lambda a: a[first:end], per_layer)  # noqa: B023 - called at once
        x_BTD, cache, out = stack(x_BTD, own, caches[i * len(shared):][:len(shared)], shared)
        new, first = [*new, *cache], end
        for name, array in out.recorded.items():
            recorded.setdefault(name, []).append(array)
    joined: dict[str, Any] = {
        name: Unstacked(x for array in arrays for x in array) if is_unstacked(arrays[0])
        else jnp.concatenate(arrays) for name, arrays in recorded.items()}
    return x_BTD, tuple(new), LayerOut(out.routing, joined)


def _balanced(tokens: TokenInfo) -> TokenInfo:
    """The tokens in the order of `balance_sequence`; `order` holds their places before it."""
    B, T = tokens.positions.shape
    places_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return TokenInfo(balance_sequence(tokens.positions), balance_sequence(tokens.segments),
                     order=balance_sequence(places_BT))


def _slots(cache: KVCache) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]


def task_head(config: TransformerConfig, rngs: nnx.Rngs) -> Head | None:
    """The head of a task; None for a model that scores its vocabulary."""
    if not config.head.outputs:
        return None
    return Head(config.head, config.embed_dim, init_std=config.init_std, rngs=rngs)


def token_table(config: TransformerConfig, rngs: nnx.Rngs, width: int = 0) -> Embedding:
    """The table (V, D) of token embeddings, or of the unembedding; D is `width` or embed_dim."""
    return Embedding(config.vocab_size, width or config.embed_dim, ("vocab", "embed"),
                     init=normal(config.embedding_std or config.init_std), rngs=rngs)


def embed(config: TransformerConfig, table: Embedding, tokens_BT: jax.Array,
          dtype: Any) -> jax.Array:
    """The embeddings [B, T, D] of token ids, in `dtype`, scaled if the config says so."""
    x_BTD = table(tokens_BT, dtype)
    multiplier = config.embedding_multiplier * embedding_multiplier(config)
    if multiplier != 1.0:
        x_BTD = x_BTD * multiplier
    if not config.scale_embeddings:
        return x_BTD
    return x_BTD * jnp.asarray(config.embed_dim ** 0.5, dtype)  # the factor is rounded, as Gemma's
