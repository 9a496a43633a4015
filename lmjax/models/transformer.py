"""What all families are made of: one config, one residual block, and a stack of blocks that knows its positions.

Shape suffixes: B batch, T sequence, S key sequence or cache slots, D embed_dim, H heads, G kv heads, K head_dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.nn.attention import Attention, Fed, KVCache
from lmjax.nn.kernels.choose import prepare, spreads, with_cache
from lmjax.nn.layers import MLP, MLP_KINDS, NORMS, Embedding, dropout, residual_init
from lmjax.nn.masking import Visibility
from lmjax.nn.module import normal
from lmjax.nn.moe import MoE, MoEConfig, Routing
from lmjax.nn.pipeline import per_part, split_key
from lmjax.nn.positions import RopeScaling, Rotation, relative_buckets, rope_rotation, sinusoids
from lmjax.nn.sequence import balanced, scattered, stream, whole
from lmjax.nn.stack import Stack, remat_policy
from lmjax.sharding import constrain

POSITIONS = ("rope", "learned", "sinusoidal", "relative", "none")
LAYER_KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Dimensions and switches that every family has.

    vocab_size: 0 takes the tokenizer's. num_kv_heads: 0 takes num_heads. head_dim: 0 takes embed_dim / num_heads.
    max_positions, position_offset: the learned table has their sum of rows; position p is row p + offset (RoBERTa).
    positions: rope, learned, sinusoidal, relative (T5's buckets, of which there are relative_buckets up to
    relative_distance) or none. local_rope_theta: of local layers, never scaled; 0 takes rope_theta and its scaling.
    norm: rmsnorm, rmsnorm_1p (Gemma's 1 + scale), layernorm, layernorm_no_bias. norm_position: pre (before a branch),
    post (after the sum), both (before and after a branch). embedding_norm: none, own, or first: the first layer's
    attention norm, whose output goes on as the residual stream (ModernBERT). scale_embeddings: by sqrt(embed_dim).
    mlp: gelu (exact), gelu_tanh, relu, silu; gated: swiglu, geglu (tanh), geglu_erf, reglu. use_bias: in all matrices;
    qkv_bias: of queries, keys and values. query_scalar: scores are divided by its root; 0 takes head_dim.
    sliding_window: tokens that each can look back on, itself included (without causality: as many ahead); 0 is all.
    layer_pattern: of "global" and "local" layers, repeated over the layers; only local ones have the window; empty:
    all of them. attention_softcap, logit_softcap: cap * tanh(x / cap); 0 is off. attention: kernel name, or auto.
    remat: what the backward pass computes again (none, dots, full), or what it finds saved, such as kernel+out (see
    `stack.remat_policy`). dropout: after the embeddings and each residual
    branch. moe: experts in the place of the MLP. embedding_std: of the token table; 0 takes init_std.
    """

    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 3072
    vocab_size: int = 0
    max_positions: int = 1024
    position_offset: int = 0
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    local_rope_theta: float = 0.0
    relative_buckets: int = 32
    relative_distance: int = 128
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_position: str = "pre"
    embedding_norm: str = "none"
    scale_embeddings: bool = False
    mlp: str = "swiglu"
    use_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    query_scalar: float = 0.0
    sliding_window: int = 0
    layer_pattern: tuple[str, ...] = ()
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tie_embeddings: bool = False
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    dropout: float = 0.0
    init_std: float = 0.02
    embedding_std: float = 0.0
    attention: str = "auto"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        for key, options in (("positions", POSITIONS), ("norm", NORMS), ("mlp", MLP_KINDS),
                             ("norm_position", ("pre", "post", "both")), ("embedding_norm", ("none", "own", "first"))):
            choice(key, getattr(self, key), options)
        remat_policy(self.remat)
        for kind in self.layer_pattern:
            choice("layer_pattern", kind, LAYER_KINDS)
        at_least(1, num_layers=self.num_layers, embed_dim=self.embed_dim, num_heads=self.num_heads,
                 mlp_dim=self.mlp_dim, max_positions=self.max_positions)
        at_least(4, relative_buckets=self.relative_buckets, relative_distance=self.relative_distance)
        at_least(0, **{key: getattr(self, key) for key in (
            "num_kv_heads", "head_dim", "vocab_size", "sliding_window", "attention_softcap", "logit_softcap", "dropout",
            "position_offset", "local_rope_theta", "query_scalar", "embedding_std", "norm_eps", "init_std")})
        at_least(1, rope_theta=self.rope_theta)
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}; "
                             "change one of them or set head_dim")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got "
                             f"{self.num_kv_heads}; change one of them")
        if self.positions == "rope" and self.dims.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rope, got {self.dims.head_dim}; change it")
        if self.moe.experts and self.use_bias:
            raise ValueError("use_bias: expected false with moe.experts, got true; switch one of them off")
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected less than 1, got {self.dropout}; lower it")
        if "local" in self.layer_pattern and not self.sliding_window:
            raise ValueError("sliding_window: expected at least 1 for the local layers of layer_pattern, got 0; set it")
        if self.sliding_window and self.layer_pattern and "local" not in self.layer_pattern:
            raise ValueError(f"layer_pattern: expected a local layer for sliding_window={self.sliding_window}, got "
                             "none; add one or set sliding_window=0")
        if self.embedding_norm == "first" and self.norm_position == "post":
            raise ValueError("embedding_norm: expected none or own with norm_position=post, got first; change one")

    @property
    def dims(self) -> "Dims":
        """The head dimensions with their zeros resolved."""
        return Dims(self.num_heads, self.num_kv_heads or self.num_heads,
                    self.head_dim or self.embed_dim // self.num_heads)

    def kinds(self, num_layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(the kinds of layers that there are, what layer i is of them by i modulo the length)."""
        pattern = self.layer_pattern[:num_layers] or (("local",) if self.sliding_window else ("global",))
        kinds = tuple(dict.fromkeys(pattern))
        return kinds, tuple(map(kinds.index, pattern))

    def window(self, kind: str) -> int:
        """The window of a kind of layer; 0: none."""
        return self.sliding_window if kind == "local" else 0


class Dims(NamedTuple):
    """Resolved head dimensions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Source(NamedTuple):
    """What a decoder looks at beside itself: an encoder's states [B, S, D], or their keys and values in each layer."""

    segments: jax.Array
    states: jax.Array | None = None
    cache: KVCache | None = None  # [layers, B, G, S, K], or `Apart`


class Shared(NamedTuple):
    """What all layers of a kind are called with. real: which tokens are not padding."""

    kernel: str
    real: jax.Array
    visibility: Visibility
    rotation: Rotation | None
    bias: jax.Array | None
    fed: Fed | None
    source: jax.Array | None
    source_visibility: Visibility | None


class PerLayer(NamedTuple):
    """A layer's share of what differs from layer to layer."""

    key: jax.Array | None  # dropout
    first: jax.Array | None  # whether this is the first layer
    source: KVCache | None


class Block(nnx.Module):
    """Residual branches, each with its norm: attention, cross-attention if there is an encoder, and the MLP."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, num_layers: int, cross: bool):
        c, dims, norm = config, config.dims, NORMS[config.norm]
        init, out_init = normal(c.init_std), residual_init(c.init_std, num_layers)
        self.config = c
        scale = (c.query_scalar or dims.head_dim) ** -0.5

        def attention() -> Attention:
            # Where scores are not divided by sqrt(head_dim), smaller queries start them at the same size (T5).
            query_init = normal(c.init_std * dims.head_dim ** -0.5 / scale)
            return Attention(
                c.embed_dim, num_heads=dims.num_heads, num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim,
                qkv_bias=c.use_bias or c.qkv_bias, out_bias=c.use_bias, norm_eps=c.norm_eps, scale=scale,
                qk_norm=NORMS[c.norm if c.norm.startswith("rms") else "rmsnorm"] if c.qk_norm else None,
                softcap=c.attention_softcap, init=init, query_init=query_init, out_init=out_init,
                rngs=rngs)

        def new_norm(wanted: bool = True) -> nnx.Module | None:
            return norm(c.embed_dim, eps=c.norm_eps, rngs=rngs) if wanted else None

        both = c.norm_position == "both"
        self.attention_norm = new_norm()
        self.attention = attention()
        self.mlp_norm = new_norm()
        mlp = dict(kind=c.mlp, init=init, out_init=out_init, rngs=rngs)
        self.mlp = (MoE(c.embed_dim, c.mlp_dim, c.moe, **mlp) if c.moe.experts else
                    MLP(c.embed_dim, c.mlp_dim, use_bias=c.use_bias, **mlp))
        self.attention_post_norm, self.mlp_post_norm = new_norm(both), new_norm(both)
        self.cross_norm, self.cross_attention = (new_norm(), attention()) if cross else (None, None)
        self.cross_post_norm = new_norm(both and cross)

    def __call__(self, x_BTD: jax.Array, layer: PerLayer, cache: KVCache | None,
                 shared: Shared) -> tuple[jax.Array, KVCache | None, Routing | None]:
        """x [B, T, D] -> x, the cache with x's tokens in it, and what the experts did."""
        s, keys = shared, iter((None,) * 3)
        if layer.key is not None:
            keys = iter(jax.random.split(layer.key, 2 if self.cross_attention is None else 3))

        def attention(y: jax.Array) -> tuple[jax.Array, KVCache | None]:
            return self.attention(y, s.visibility, s.rotation, s.bias, cache, s.fed, kernel=s.kernel)

        def cross(y: jax.Array) -> tuple[jax.Array, None]:
            seen = layer.source or self.cross_attention.keys_values(s.source, kernel=s.kernel)
            return self.cross_attention.look(y, seen, s.source_visibility, kernel=s.kernel), None

        def mlp(y: jax.Array) -> tuple[jax.Array, Routing | None]:
            y, out = self.mlp(y, s.real) if self.config.moe.experts else (self.mlp(y), None)
            return scattered(y), out

        x, cache = self._add(x_BTD, attention, self.attention_norm, self.attention_post_norm, next(keys), layer.first)
        if self.cross_attention is not None:
            x, _ = self._add(x, cross, self.cross_norm, self.cross_post_norm, next(keys))
        x, out = self._add(x, mlp, self.mlp_norm, self.mlp_post_norm, next(keys))
        return constrain(x, "batch", stream(x), "act_embed"), cache, out

    def _add(self, x: jax.Array, branch: Callable[[jax.Array], tuple[jax.Array, Any]], norm: nnx.Module,
             post_norm: nnx.Module | None, key: jax.Array | None,
             normed_stream: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """x + branch(x), with its norms and dropout."""
        if self.config.norm_position == "post":
            y, out = branch(whole(x))
            return norm(x + dropout(y, self.config.dropout, key)), out
        y = norm(x)
        if normed_stream is not None:
            x = jnp.where(normed_stream, y, x)
        y, out = branch(whole(y))
        y = y if post_norm is None else post_norm(y)
        return x + dropout(y, self.config.dropout, key), out


class Trunk(nnx.Module):
    """Blocks over embedded tokens, with the position tables and the norms around them.

    causal: whether tokens see only those before them. cross: whether they look at an encoder, too.
    """

    def __init__(self, config: TransformerConfig, kernel: str, rngs: nnx.Rngs, *, causal: bool, cross: bool = False,
                 num_layers: int = 0):
        c, init = config, normal(config.init_std)
        num_layers = num_layers or c.num_layers
        norm = NORMS[c.norm]
        self.config, self.kernel, self.causal = c, kernel, causal
        self.kinds, pattern = c.kinds(num_layers)
        self.positions = (Embedding(c.max_positions + c.position_offset, c.embed_dim, ("positions", "embed"), init=init,
                                    rngs=rngs) if c.positions == "learned" else None)
        self.layers = Stack(lambda r: Block(c, r, num_layers=num_layers, cross=cross), num_layers,
                            scan=c.scan_layers, remat=c.remat, rngs=rngs, kinds=pattern)
        self.norm = norm(c.embed_dim, eps=c.norm_eps, rngs=rngs) if c.norm_position != "post" else None
        self.embedding_norm = norm(c.embed_dim, eps=c.norm_eps, rngs=rngs) if c.embedding_norm == "own" else None
        self.relative_bias = (Embedding(c.relative_buckets, c.num_heads, ("positions", "heads"), init=init, rngs=rngs)
                              if c.positions == "relative" else None)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, *,
                 prefix_BT: jax.Array | None = None, cache: Sequence[KVCache] | None = None,
                 last_B: jax.Array | None = None, source: Source | None = None,
                 key: jax.Array | None = None) -> tuple[jax.Array, Sequence[KVCache] | None, Routing | None]:
        """Embedded tokens [B, T, D] -> normed hidden states, the caches if given, and what the experts did, by layer.

        positions restart in every document; segments say which tokens belong together (0: none); prefix is 1 on tokens
        that all of their document sees, also what comes before them. cache: one a kind of
        layer, into which tokens up to position `last` are written. key: switches dropout on; [M] keys: those of the
        parts of a batch in a pipeline.
        """
        c, num_layers = self.config, self.layers.num_layers
        x_BTD = self._enter(x_BTD, positions_BT)
        keys = None
        if key is not None and c.dropout:
            keys = split_key(key, num_layers + 1)
            x_BTD, keys = per_part(lambda x, key: dropout(x, c.dropout, key), x_BTD, keys[0]), keys[1:]
        x_BTD = constrain(x_BTD, "batch", "seq", "act_embed")  # before it is scattered: else the table is gathered
        T, index_BT = x_BTD.shape[1], None
        spread = cache is None and prefix_BT is None and spreads(self.kernel, T, causal=self.causal,
                                                                 capacity=c.moe.capacity)
        if spread:  # all that follows goes token by token, or asks where they stand
            at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], positions_BT.shape)
            x_BTD, positions_BT, segments_BT, index_BT = map(balanced, (x_BTD, positions_BT, segments_BT, at_BT))
        x_BTD = scattered(x_BTD)
        first = jnp.arange(num_layers) == 0 if c.embedding_norm == "first" else None
        per_layer = PerLayer(keys, first, None if source is None else source.cache)
        shared = [self._shared(kind, positions_BT, segments_BT, prefix_BT, cache and _slots(cache[i]), last_B,
                               source, index_BT) for i, kind in enumerate(self.kinds)]
        x_BTD, new, out = self.layers(x_BTD, per_layer, cache or (None,) * len(self.kinds), shared)
        x_BTD = balanced(x_BTD, back=True) if spread else x_BTD
        return whole(x_BTD if self.norm is None else self.norm(x_BTD)), cache and new, out

    def _enter(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        c = self.config
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT + c.position_offset, x_BTD.dtype)
        if c.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, c.embed_dim).astype(x_BTD.dtype)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _shared(self, kind: str, positions_BT: jax.Array, segments_BT: jax.Array, prefix_BT: jax.Array | None,
                slots: int | None, last_B: jax.Array | None, source: Source | None,
                index_BT: jax.Array | None) -> Shared:
        c, fed, kv_positions, kv_segments = self.config, None, positions_BT, segments_BT
        kernel = self.kernel
        if slots is not None:
            kernel = with_cache(kernel, positions_BT.shape[1], slots)
            fed = Fed(positions_BT[:, 0], last_B, ring=slots == c.window(kind))
            kv_positions = fed.kv_positions(slots, positions_BT.shape[1])
            # Slots not yet written are hidden by causality, a ring's by their positions.
            kv_segments = (kv_positions >= 0).astype(jnp.int32)
            if prefix_BT is not None:
                prefix_BT = (kv_positions <= last_B[:, None]).astype(jnp.int32)
        see = Visibility(positions_BT, kv_positions, segments_BT, kv_segments, causal=self.causal,
                         window=c.window(kind), in_order=slots is None, kv_prefix=prefix_BT, index=index_BT)
        rotation = bias = source_see = None
        if c.positions == "rope":
            local = kind == "local" and c.local_rope_theta
            rotation = (rope_rotation(positions_BT, c.dims.head_dim, c.local_rope_theta) if local else
                        rope_rotation(positions_BT, c.dims.head_dim, c.rope_theta, c.rope_scaling))
        if self.relative_bias is not None:
            buckets = relative_buckets(positions_BT, kv_positions, bidirectional=not self.causal,
                                       buckets=c.relative_buckets, distance=c.relative_distance)
            bias = jnp.moveaxis(self.relative_bias(buckets, jnp.float32), -1, 1)
        if source is not None:
            source_see = prepare(Visibility(positions_BT, jnp.zeros_like(source.segments), segments_BT, source.segments,
                                            causal=False), kernel)
        return Shared(kernel, segments_BT > 0, prepare(see, kernel), rotation, bias, fed, source and source.states,
                      source_see)


def _slots(cache: KVCache) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]


class Cache(NamedTuple):
    """What decoding remembers.

    layers: one a kind of layer, [layers of it, B, G, S, K] or as many `Apart`; local layers hold no more than their
    window. slot: the position of each row's next token, int32 [B]. source: an encoder's keys and values, if there is
    one.
    """

    layers: tuple[KVCache, ...]
    slot: jax.Array
    source: Source | None = None


def empty_cache(config: TransformerConfig, batch_size: int, slots: int, dtype: Any, rings: bool = True) -> Cache:
    """Room for `slots` tokens a row; with rings local layers have no more than their window."""
    c = config
    kinds, pattern = c.kinds(c.num_layers)
    layers = []
    for i, kind in enumerate(kinds):
        count = sum(pattern[j % len(pattern)] == i for j in range(c.num_layers))
        slots_here = min(slots, rings and c.window(kind) or slots)
        shape = (count, batch_size, c.dims.num_kv_heads, slots_here, c.dims.head_dim)
        layers.append(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return Cache(tuple(layers), jnp.zeros((batch_size,), jnp.int32))


def token_table(config: TransformerConfig, rngs: nnx.Rngs) -> Embedding:
    """The (V, D) table of token embeddings or of the unembedding."""
    c = config
    return Embedding(c.vocab_size, c.embed_dim, ("vocab", "embed"), init=normal(c.embedding_std or c.init_std),
                     rngs=rngs)


def embed(config: TransformerConfig, table: Embedding, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """[B, T, D] in `dtype`, times sqrt(D), itself rounded to `dtype`, if the config says so."""
    x_BTD = table(tokens_BT, dtype)
    return x_BTD * jnp.asarray(config.embed_dim ** 0.5, dtype) if config.scale_embeddings else x_BTD
