"""The decoder: GPT, Llama, Qwen, Mistral, Gemma and their like from one set of switches (`presets` has the settings).

Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lmjax.config import choice
from lmjax.models.transformer import Cache, TransformerConfig, Trunk, embed, token_table


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """A decoder's dimensions and switches: those of `TransformerConfig`."""

    family: str = "decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("decoder",))


class Decoder(Trunk):
    """Token ids to hidden states; `unembedding` turns those into logits (or a loss that never holds them)."""

    def __init__(self, config: DecoderConfig, kernel: str, rngs: nnx.Rngs):
        self.embedding = token_table(config, rngs)
        super().__init__(config, kernel, rngs, causal=True)
        self.head = None if config.tie_embeddings else token_table(config, rngs)

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """int32 [B, T] `tokens`, `positions`, `segment_ids`, and `bidirectional` if some tokens are seen by all of
        their document -> normed hidden states [B, T, D] in `dtype`, and what the experts did."""
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        x_BTD, _, out = self(x_BTD, batch["positions"], batch["segment_ids"],
                             prefix_BT=batch.get("bidirectional"), key=key)
        return x_BTD, out

    def step(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, cache: Cache,
             last_B: jax.Array, dtype: Any, *, prefix_BT: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Hidden states of T more tokens a row, and the cache with those up to position `last` in it.

        prefix: given, all of these see each other.
        """
        x_BTD = embed(self.config, self.embedding, tokens_BT, dtype)
        x_BTD, layers, _ = self(x_BTD, positions_BT, segments_BT, prefix_BT=prefix_BT, cache=cache.layers,
                                last_B=last_B)
        return x_BTD, cache._replace(layers=layers)

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The (V, D) matrix whose rows score the vocabulary, and the (V,) bias of the scores, if there is one."""
        return (self.head or self.embedding).table[...], None
