"""The decoder: GPT-2 style and modern style from one set of switches.

Shape suffixes: B batch, T sequence, S cache slots, D embed_dim, V vocab_size, G kv heads, K head_dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.nn.attention import Attention, KVCache
from lmjax.nn.kernels import prepare, with_cache
from lmjax.nn.layers import MLP, MLP_KINDS, NORMS, Embedding, dropout, residual_init
from lmjax.nn.module import normal
from lmjax.nn.positions import Rotation, rope_rotation
from lmjax.nn.stack import REMAT, Stack
from lmjax.nn.visibility import Visibility
from lmjax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's dimensions and switches.

    vocab_size: 0 takes the tokenizer's. num_kv_heads: 0 takes num_heads. head_dim: 0 takes
    embed_dim / num_heads. max_positions: rows of the learned position table (unused with rope).
    mlp: gelu, gelu_tanh, relu, swiglu or geglu. sliding_window: tokens that each can look back on, itself
    included; 0 is all. attention_softcap, logit_softcap: cap * tanh(x / cap); 0 is off. attention: kernel
    name, or auto. remat: what the backward pass computes again (none, dots, full). dropout: after the
    embeddings and each residual branch.
    """

    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 3072
    vocab_size: int = 0
    max_positions: int = 1024
    positions: str = "rope"
    rope_theta: float = 10_000.0
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: str = "swiglu"
    use_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tie_embeddings: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: str = "auto"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self) -> None:
        choice("positions", self.positions, ("rope", "learned", "none"))
        choice("norm", self.norm, NORMS)
        choice("mlp", self.mlp, MLP_KINDS)
        choice("remat", self.remat, REMAT)
        at_least(1, num_layers=self.num_layers, embed_dim=self.embed_dim, num_heads=self.num_heads,
                 mlp_dim=self.mlp_dim, max_positions=self.max_positions)
        at_least(0, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, vocab_size=self.vocab_size,
                 sliding_window=self.sliding_window, attention_softcap=self.attention_softcap,
                 logit_softcap=self.logit_softcap, dropout=self.dropout)
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim={self.embed_dim}, got {self.num_heads}; "
                             "change one of them or set head_dim")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={self.num_heads}, got "
                             f"{self.num_kv_heads}; change one of them")
        if self.positions == "rope" and self.dims.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rope, got {self.dims.head_dim}; change it")
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected less than 1, got {self.dropout}; lower it")

    @property
    def dims(self) -> "Dims":
        """The head dimensions with their zeros resolved."""
        return Dims(self.num_heads, self.num_kv_heads or self.num_heads,
                    self.head_dim or self.embed_dim // self.num_heads)


class Dims(NamedTuple):
    """Resolved head dimensions."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, kernel: str, rngs: nnx.Rngs):
        c, dims, norm = config, config.dims, NORMS[config.norm]
        init, out_init = normal(c.init_std), residual_init(c.init_std, c.num_layers)
        self.dropout = c.dropout
        self.attention_norm = norm(c.embed_dim, eps=c.norm_eps, rngs=rngs)
        self.attention = Attention(
            c.embed_dim, num_heads=dims.num_heads, num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim,
            use_bias=c.use_bias, qk_norm=c.qk_norm, norm_eps=c.norm_eps, softcap=c.attention_softcap, kernel=kernel,
            init=init, out_init=out_init, rngs=rngs)
        self.mlp_norm = norm(c.embed_dim, eps=c.norm_eps, rngs=rngs)
        self.mlp = MLP(c.embed_dim, c.mlp_dim, kind=c.mlp, use_bias=c.use_bias, init=init, out_init=out_init, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, layer: tuple[jax.Array | None, KVCache | None], visibility: Visibility,
                 rotation: Rotation | None) -> tuple[jax.Array, KVCache | None]:
        key, cache = layer
        keys = (None, None) if key is None else jax.random.split(key)
        y, cache = self.attention(self.attention_norm(x_BTD), visibility, rotation, cache)
        x_BTD = x_BTD + dropout(y, self.dropout, keys[0])
        x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, keys[1])
        return constrain(x_BTD, "batch", "seq", "act_embed"), cache


class Decoder(nnx.Module):
    """Token ids to hidden states; `unembedding` turns those into logits (or a loss that never holds them)."""

    def __init__(self, config: DecoderConfig, kernel: str, rngs: nnx.Rngs):
        c, init = config, normal(config.init_std)
        self.config, self.kernel = config, kernel
        self.embedding = Embedding(c.vocab_size, c.embed_dim, ("vocab", "embed"), init=init, rngs=rngs)
        self.positions = (Embedding(c.max_positions, c.embed_dim, ("positions", "embed"), init=init, rngs=rngs)
                          if c.positions == "learned" else None)
        self.layers = Stack(lambda r: Block(c, kernel, r), c.num_layers, scan=c.scan_layers, remat=c.remat, rngs=rngs)
        self.norm = NORMS[c.norm](c.embed_dim, eps=c.norm_eps, rngs=rngs)
        self.head = (None if c.tie_embeddings else
                     Embedding(c.vocab_size, c.embed_dim, ("vocab", "embed"), init=init, rngs=rngs))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, visibility: Visibility, *, dtype: Any,
                 cache: KVCache | None = None, key: jax.Array | None = None) -> tuple[jax.Array, KVCache | None]:
        """int32 tokens -> normed hidden states [B, T, D] in `dtype`, and the cache (stacked by layer) if one is given.

        positions restart in every document; `visibility` says who sees whom; `key` switches dropout on.
        """
        c = self.config
        x_BTD = self.embedding(tokens_BT, dtype)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions_BT, dtype)
        keys = None
        if key is not None and c.dropout:
            first, *rest = jax.random.split(key, c.num_layers + 1)
            x_BTD, keys = dropout(x_BTD, c.dropout, first), jax.numpy.stack(rest)
        x_BTD = constrain(x_BTD, "batch", "seq", "act_embed")
        rotation = rope_rotation(positions_BT, c.dims.head_dim, c.rope_theta) if c.positions == "rope" else None
        kernel = self.kernel if cache is None else with_cache(self.kernel, cache.key.shape[2])
        visibility = prepare(visibility._replace(window=c.sliding_window), kernel)
        x_BTD, cache = self.layers(x_BTD, (keys, cache), visibility, rotation)
        return self.norm(x_BTD), cache

    @property
    def unembedding(self) -> jax.Array:
        """The (V, D) matrix whose rows score the vocabulary."""
        return (self.head or self.embedding).table[...]


def init_cache(config: DecoderConfig, batch_size: int, slots: int, dtype: Any) -> KVCache:
    """Empty keys and values [layers, B, S, G, K] for `slots` positions a row."""
    shape = (config.num_layers, batch_size, slots, config.dims.num_kv_heads, config.dims.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
                   jnp.zeros((config.num_layers, batch_size), jnp.int32))
