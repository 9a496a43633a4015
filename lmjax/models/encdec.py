"""The encoder-decoder: one class for the original Transformer and T5, told apart by switches.

The settings of published models are in `presets`.
Shape suffixes: B batch, T decoder sequence, S encoder sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.errors import UserError
from lmjax.models.cache import Cache, Source
from lmjax.models.config import TransformerConfig
from lmjax.models.parametrization import logit_multiplier
from lmjax.models.transformer import TokenInfo, Trunk, embed, task_head, token_table
from lmjax.nn.attention import KVCache
from lmjax.nn.kernels.choose import Kernel
from lmjax.nn.kv_cache import CacheArray, like
from lmjax.nn.module import param, zeros
from lmjax.nn.pipeline import split_key
from lmjax.nn.routing import Routing


@dataclasses.dataclass(frozen=True)
class EncDecConfig(TransformerConfig):
    """The dimensions and switches of an encoder-decoder; `num_layers` is the decoder's."""

    family: str = "encdec"
    num_encoder_layers: int = 0  # 0: as many as num_layers
    scale_output: bool = False  # divides the last states by sqrt(embed_dim) (T5 v1.0)
    output_bias: bool = False  # of the logits (Marian)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("encdec",))
        at_least(0, num_encoder_layers=self.num_encoder_layers)
        if self.parallel_residual != "none":
            raise UserError("none, since layers also attend to the encoder",
                            self.parallel_residual, "change it", where="parallel_residual")


class EncDec(nnx.Module):
    """An encoder reads `encoder_tokens`; a decoder predicts `tokens` and attends to the encoder.

    One table embeds the tokens of both.
    """

    def __init__(self, config: EncDecConfig, kernel: Kernel, rngs: nnx.Rngs):
        c = self.config = config
        self.embedding = token_table(c, rngs)
        self.encoder = Trunk(c, kernel, rngs, causal=False, num_layers=c.num_encoder_layers)
        self.decoder = Trunk(c, kernel, rngs, causal=True, cross=True)
        task = c.head.outputs > 0
        self.head = None if c.tie_embeddings or task else token_table(c, rngs)
        self.head_bias = (param(rngs, zeros, (c.vocab_size,), ("norm",))
                          if c.output_bias and not task else None)
        self.task_head = task_head(c, rngs)

    def states(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """Computes the encoder's states.

        Args:
          batch: int32 [B, S] `encoder_tokens`, `encoder_positions` and `encoder_segment_ids`.
          key: turns dropout on.
        Returns:
          (states [B, S, D] in `dtype`, how the encoder's experts were chosen in each layer).
        """
        x_BSD = embed(self.config, self.embedding, batch["encoder_tokens"], dtype)
        tokens = TokenInfo(batch["encoder_positions"], batch["encoder_segment_ids"])
        x_BSD, _, routing = self.encoder(x_BSD, tokens, key=key)
        return x_BSD, routing

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """Computes the decoder's hidden states.

        Args:
          batch: the arrays of `states`, and int32 [B, T] `tokens`, `positions` and `segment_ids`.
            A decoder token sees the encoder tokens that have its segment id.
          key: turns dropout on.
        Returns:
          (hidden states [B, T, D] in `dtype`, how experts were chosen in each layer: first the
          encoder's layers, then the decoder's).
        """
        keys = (None, None) if key is None else split_key(key, 2)
        states, encoder_routing = self.states(batch, dtype, keys[0])
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        tokens = TokenInfo(batch["positions"], batch["segment_ids"])
        x_BTD, _, routing = self.decoder(x_BTD, tokens, key=keys[1],
                                         source=Source(batch["encoder_segment_ids"], states))
        routings = jax.tree.map(lambda *layers: jnp.concatenate(layers), encoder_routing, routing)
        if self.task_head is not None:
            return self.task_head(x_BTD, keys[1]), routings
        return self._scaled(x_BTD), routings

    def source(self, batch: Mapping[str, jax.Array], dtype: Any, cache: CacheArray) -> Source:
        """Runs the encoder and computes its keys and values for every decoder layer, once.

        They are kept in the form of `cache`.
        """
        states, _ = self.states(batch, dtype)

        def keys_values(block: Any) -> KVCache:
            found = block.cross_attention.keys_values(states)
            return KVCache(*(like(x, cache) for x in found))

        kept = self.decoder.layers.map(keys_values)
        return Source((batch["encoder_segment_ids"] > 0).astype(jnp.int32), cache=kept)

    def step(self, tokens_BT: jax.Array, info: TokenInfo, cache: Cache,
             dtype: Any) -> tuple[jax.Array, Cache]:
        """The hidden states [B, T, D] of the next T tokens of each row, and the new cache."""
        x_BTD = embed(self.config, self.embedding, tokens_BT, dtype)
        x_BTD, layers, _ = self.decoder(x_BTD, info, cache=cache.layers, source=cache.source)
        return self._scaled(x_BTD), cache._replace(layers=layers)

    def _scaled(self, x_BTD: jax.Array) -> jax.Array:
        scale = self.config.embed_dim ** -0.5 if self.config.scale_output else 1.0
        scale *= logit_multiplier(self.config)
        return x_BTD if scale == 1.0 else x_BTD * scale

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The table (V, D) that scores the vocabulary, and the bias (V,) of the scores, if any."""
        if self.task_head is not None:
            return self.task_head.unembedding
        bias = None if self.head_bias is None else self.head_bias[...]
        return (self.head or self.embedding).table[...], bias
