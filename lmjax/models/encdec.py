"""The encoder-decoder: the original Transformer and T5 from one set of switches (`presets` has the settings).

Shape suffixes: B batch, T decoder sequence, S encoder sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.models.transformer import Cache, Source, TransformerConfig, Trunk, embed, token_table
from lmjax.nn.layers import Embedding
from lmjax.nn.module import param, zeros
from lmjax.nn.pipeline import split_key


@dataclasses.dataclass(frozen=True)
class EncDecConfig(TransformerConfig):
    """`TransformerConfig`, and what only encoder-decoders have.

    num_layers: of the decoder. num_encoder_layers: 0 takes num_layers. scale_output: hidden states are multiplied by
    1 / sqrt(embed_dim) before a tied unembedding (T5 v1.0). output_bias: of the logits (Marian). One table embeds the
    tokens of both halves.
    """

    family: str = "encdec"
    num_encoder_layers: int = 0
    scale_output: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("encdec",))
        at_least(0, num_encoder_layers=self.num_encoder_layers)


class EncDec(nnx.Module):
    """An encoder over `encoder_tokens`, and a decoder over `tokens` that looks at the encoder's states."""

    def __init__(self, config: EncDecConfig, kernel: str, rngs: nnx.Rngs):
        c = self.config = config
        self.embedding: Embedding = token_table(c, rngs)
        self.encoder = Trunk(c, kernel, rngs, causal=False, num_layers=c.num_encoder_layers)
        self.decoder = Trunk(c, kernel, rngs, causal=True, cross=True)
        self.head = None if c.tie_embeddings else token_table(c, rngs)
        self.head_bias = param(rngs, zeros, (c.vocab_size,), ("norm",)) if c.output_bias else None

    def states(self, batch: Mapping[str, jax.Array], dtype: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """The encoder's states [B, S, D] in `dtype` of int32 [B, S] `encoder_tokens`, `encoder_positions` and
        `encoder_segment_ids`, and what its experts did."""
        x_BSD = embed(self.config, self.embedding, batch["encoder_tokens"], dtype)
        x_BSD, _, out = self.encoder(x_BSD, batch["encoder_positions"], batch["encoder_segment_ids"], key=key)
        return x_BSD, out

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """The decoder's states [B, T, D] of int32 [B, T] `tokens`, `positions`, `segment_ids` and what `states` reads;
        and what the experts of both halves did.

        A decoder token sees the encoder tokens that have its segment id.
        """
        keys = (None, None) if key is None else split_key(key, 2)
        states, encoder_out = self.states(batch, dtype, keys[0])
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        x_BTD, _, out = self.decoder(x_BTD, batch["positions"], batch["segment_ids"], key=keys[1],
                                     source=Source(batch["encoder_segment_ids"], states))
        return self._scaled(x_BTD), jax.tree.map(lambda *layers: jnp.concatenate(layers), encoder_out, out)

    def source(self, batch: Mapping[str, jax.Array], dtype: Any) -> Source:
        """What decoding needs of the encoder's row: its keys and values in every layer, computed once."""
        states, _ = self.states(batch, dtype)
        cache = self.decoder.layers.map(lambda block: block.cross_attention.keys_values(states))
        return Source((batch["encoder_segment_ids"] > 0).astype(jnp.int32), cache=cache)

    def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, cache: Cache,
             last_B: jax.Array, dtype: Any) -> tuple[jax.Array, Cache]:
        """Hidden states of T more decoder tokens a row, and the cache with those up to position `last` in it."""
        x_BTD = embed(self.config, self.embedding, tokens_BT, dtype)
        x_BTD, layers, _ = self.decoder(x_BTD, positions_BT, segments_BT, cache=cache.layers, last_B=last_B,
                                        source=cache.source)
        return self._scaled(x_BTD), cache._replace(layers=layers)

    def _scaled(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD * self.config.embed_dim ** -0.5 if self.config.scale_output else x_BTD

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The (V, D) matrix whose rows score the vocabulary, and the (V,) bias of the scores, if there is one."""
        return (self.head or self.embedding).table[...], None if self.head_bias is None else self.head_bias[...]
