"""The residual block of every architecture: attention, cross-attention and MLP with their norms.

Shape suffixes: B batch, T sequence, D embed_dim.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.models.config import TransformerConfig
from lmjax.models.parametrization import attention_multiplier, residual_multiplier
from lmjax.nn.adapters import adapter_noise
from lmjax.nn.attention import Attention, AttentionConfig, AttentionInit, CacheUpdate, KVCache
from lmjax.nn.kernels.choose import Kernel
from lmjax.nn.latent_attention import LatentAttention, LatentSizes
from lmjax.nn.layers import MLP, NORMS, Norm, residual_init
from lmjax.nn.masking import AttentionMask
from lmjax.nn.module import normal
from lmjax.nn.moe import MoE
from lmjax.nn.ops import dropout
from lmjax.nn.positions import Rotation
from lmjax.nn.recorded import Recorded, in_layer, record
from lmjax.nn.routing import Routing
from lmjax.nn.sequence import gather_sequence, scatter_sequence, stream_axis
from lmjax.sharding import constrain

Branch = Callable[[jax.Array], tuple[jax.Array, Any]]


class Shared(NamedTuple):
    """The arguments that all layers of one kind have in common."""

    kernel: Kernel  # of attention
    real: jax.Array  # bool [B, T]: which tokens are not padding
    mask: AttentionMask  # which tokens see which
    rotation: Rotation | None
    bias: jax.Array | None  # added to the attention scores
    update: CacheUpdate | None  # how the tokens enter the cache
    source: jax.Array | None  # an encoder's states
    source_mask: AttentionMask | None  # which tokens see which encoder tokens


class PerLayer(NamedTuple):
    """The arguments that differ from layer to layer."""

    key: jax.Array | None  # of dropout
    # bool, or None unless embedding_norm=first: the attention norm of the first layer also norms
    # the residual stream.
    first: jax.Array | None
    source: KVCache | None  # keys and values of an encoder's states


class LayerOut(NamedTuple):
    """What a layer tells besides its outputs; of a stack, with a leading dimension of layers."""

    routing: Routing | None  # how experts were chosen
    recorded: Recorded


class Block(nnx.Module):
    """One layer: residual branches, each with its norms and dropout.

    num_layers: the depth of the stack, which scales the initial output projections.
    cross: whether the layer attends to an encoder.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, *, num_layers: int, cross: bool):
        c, norm = config, NORMS[config.norm]
        init, out_init = normal(c.init_std), residual_init(c.init_std, num_layers)
        self.config = c
        self.multiplier = c.residual_multiplier * residual_multiplier(c, num_layers)

        def new_norm() -> Norm:
            return norm(c.embed_dim, eps=c.norm_eps, rngs=rngs)

        before, after = c.norm_position != "after", c.norm_position in ("both", "after")
        self.attention_norm = new_norm() if before else None
        self.attention = _attention(c, num_layers, rngs)
        self.mlp_norm = new_norm() if before and c.parallel_residual != "one_norm" else None
        mlp: dict[str, Any] = dict(kind=c.mlp, init=init, out_init=out_init, rngs=rngs)
        self.mlp = (MoE(c.embed_dim, c.mlp_dim, c.moe, **mlp) if c.moe.experts else
                    MLP(c.embed_dim, c.mlp_dim, use_bias=c.use_bias or c.mlp_bias, **mlp))
        self.attention_post_norm = new_norm() if after else None
        self.mlp_post_norm = new_norm() if after else None
        self.cross_norm = new_norm() if cross and before else None
        self.cross_attention = _attention(c, num_layers, rngs) if cross else None
        self.cross_post_norm = new_norm() if after and cross else None

    def __call__(self, x_BTD: jax.Array, layer: PerLayer, cache: KVCache | None,
                 shared: Shared) -> tuple[jax.Array, KVCache | None, LayerOut]:
        """Adds all branches to the residual stream x [B, T, D].

        Returns:
          (the new x, the cache with the keys and values of x, what else there is to tell).
        """
        s, keys = shared, iter((None,) * 3)
        if layer.key is not None:
            keys = iter(jax.random.split(layer.key, 2 if self.cross_attention is None else 3))

        def attention(y: jax.Array) -> tuple[jax.Array, KVCache | None]:
            y, new = self.attention(y, s.mask, s.rotation, s.bias, cache, s.update,
                                    kernel=s.kernel)
            record(attention=y)
            return y, new

        def cross(y: jax.Array) -> tuple[jax.Array, None]:
            attention, mask, seen = self.cross_attention, s.source_mask, layer.source
            assert attention is not None and mask is not None
            if seen is None:
                assert s.source is not None
                seen = KVCache(*attention.keys_values(s.source, kernel=s.kernel))
            return attention.attend(y, seen, mask, kernel=s.kernel), None

        def mlp(y: jax.Array) -> tuple[jax.Array, Routing | None]:
            routing = None
            if isinstance(self.mlp, MoE):
                y, routing = self.mlp(y, s.real)
            else:
                y = self.mlp(y)
            record(mlp=y)
            return scatter_sequence(y), routing

        with adapter_noise(layer.key), in_layer() as recorded:
            record(entry=x_BTD)
            if self.config.parallel_residual != "none":
                x, cache, routing = self._add_both(x_BTD, attention, mlp, keys)
            else:
                x, cache = self._add(x_BTD, attention, self.attention_norm,
                                     self.attention_post_norm, next(keys), layer.first)
                if self.cross_attention is not None:
                    x, _ = self._add(x, cross, self.cross_norm, self.cross_post_norm, next(keys))
                x, routing = self._add(x, mlp, self.mlp_norm, self.mlp_post_norm, next(keys))
            x = constrain(x, "batch", stream_axis(x), "act_embed")
            record(state=x)
        return x, cache, LayerOut(routing, recorded)

    def _add(self, x: jax.Array, branch: Branch,
             norm: Norm | None, post_norm: Norm | None, key: jax.Array | None,
             norms_stream: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """(x + branch(x) with its norms and dropout, the branch's second result).

        norms_stream: bool; where true, the normed x replaces x in the sum.
        """
        if self.config.norm_position == "post":
            assert norm is not None
            y, out = branch(gather_sequence(x))
            return norm(x + self._branch(y, key)), out
        y = x if norm is None else norm(x)
        if norms_stream is not None:
            x = jnp.where(norms_stream, y, x)
        y, out = branch(gather_sequence(y))
        y = y if post_norm is None else post_norm(y)
        return x + self._branch(y, key), out

    def _add_both(self, x: jax.Array, attention: Branch, mlp: Branch,
                  keys: Iterator[jax.Array | None]) -> tuple[jax.Array, Any, Any]:
        """(x + attention(x) + mlp(x) with norms and dropout, the branches' second results)."""
        assert self.attention_norm is not None
        y = gather_sequence(self.attention_norm(x))
        z = y if self.mlp_norm is None else gather_sequence(self.mlp_norm(x))
        (y, cache), (z, routing) = attention(y), mlp(z)
        return x + self._branch(y, next(keys)) + self._branch(z, next(keys)), cache, routing

    def _branch(self, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """A branch's output as it is added to the residual stream."""
        y, multiplier = dropout(y, self.config.dropout, key), self.multiplier
        return y if multiplier == 1.0 else y * multiplier


def _attention(c: TransformerConfig, num_layers: int, rngs: nnx.Rngs) -> Any:
    """An attention layer with the config's dimensions and initial weights."""
    dims = c.dims
    scale = (c.query_scalar or dims.head_dim) ** -0.5
    # If scores are not divided by sqrt(head_dim) (T5 divides by 1), initial queries are scaled to
    # give scores of the usual size.
    query_init = normal(c.init_std * dims.head_dim ** -0.5 / scale)
    init = AttentionInit(query_init, normal(c.init_std), residual_init(c.init_std, num_layers))
    if c.latent.kv_rank:
        sizes = LatentSizes(c.embed_dim, dims.num_heads, down_bias=c.qkv_bias, out_bias=c.out_bias,
                            scale=scale * c.rope_scaling.score_factor, softcap=c.attention_softcap)
        return LatentAttention(c.latent, sizes, init, rngs)
    # Most models with LayerNorm norm their queries and keys with RMSNorm.
    auto = c.norm if c.norm.startswith("rms") else "rmsnorm"
    qk_norm = NORMS[auto if c.qk_norm_kind == "auto" else c.qk_norm_kind]
    config = AttentionConfig(
        c.embed_dim, dims.num_heads, dims.num_kv_heads, dims.head_dim,
        qkv_bias=c.use_bias or c.qkv_bias, out_bias=c.use_bias or c.out_bias,
        scale=scale * attention_multiplier(c),
        softcap=c.attention_softcap,
        qk_norm=functools.partial(qk_norm, eps=c.norm_eps) if c.qk_norm else None,
        qk_norm_over=c.qk_norm_over, clip=c.qkv_clip, sinks=c.attention_sinks)
    return Attention(config, init, rngs)
