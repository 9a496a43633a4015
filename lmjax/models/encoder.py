"""The encoder: BERT, RoBERTa and ModernBERT from one set of switches (`presets` has the settings).

Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.models.transformer import TransformerConfig, Trunk, embed, token_table
from lmjax.nn.layers import ACTIVATIONS, MLP_KINDS, NORMS, Dense, Embedding
from lmjax.nn.module import normal, param, zeros


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """`TransformerConfig`, and what only encoders have.

    token_types: kinds of segments that a token may belong to, each with an embedding; 0: none. mlm_head: what comes
    between hidden states and the vocabulary: a matrix, the MLP's activation, a norm, and a bias for each token.
    pooler: tanh of a matrix, over the first token's state (BERT).
    """

    family: str = "encoder"
    token_types: int = 0
    mlm_head: bool = True
    pooler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("encoder",))
        at_least(0, token_types=self.token_types)


class Encoder(Trunk):
    """Token ids to hidden states that have seen the whole row."""

    def __init__(self, config: EncoderConfig, kernel: str, rngs: nnx.Rngs):
        c, init, square = config, normal(config.init_std), ((config.embed_dim,), (config.embed_dim,), ("embed", "mlp"))
        self.embedding = token_table(c, rngs)
        super().__init__(c, kernel, rngs, causal=False)
        self.token_types = (Embedding(c.token_types, c.embed_dim, ("positions", "embed"), init=init, rngs=rngs)
                            if c.token_types else None)
        self.transform = Dense(*square, use_bias=c.use_bias, init=init, rngs=rngs) if c.mlm_head else None
        self.transform_norm = NORMS[c.norm](c.embed_dim, eps=c.norm_eps, rngs=rngs) if c.mlm_head else None
        self.head = None if c.tie_embeddings else token_table(c, rngs)
        self.head_bias = param(rngs, zeros, (c.vocab_size,), ("norm",)) if c.mlm_head else None
        self.pooler = Dense(*square, use_bias=True, init=init, rngs=rngs) if c.pooler else None

    def states(self, batch: Mapping[str, jax.Array], dtype: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """int32 [B, T] `tokens`, `positions`, `segment_ids` and, if there, `token_types` (0 otherwise) -> last hidden
        states [B, T, D] in `dtype`, and what the experts did."""
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        if self.token_types is not None:
            types_BT = batch.get("token_types", jnp.zeros_like(batch["tokens"]))
            x_BTD = x_BTD + self.token_types(types_BT, dtype)
        x_BTD, _, out = self(x_BTD, batch["positions"], batch["segment_ids"], key=key)
        return x_BTD, out

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """`states`, made ready for the unembedding."""
        x_BTD, out = self.states(batch, dtype, key)
        if self.transform is not None:
            act = ACTIVATIONS[MLP_KINDS[self.config.mlp][0]]
            x_BTD = self.transform_norm(act(self.transform(x_BTD)))
        return x_BTD, out

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """What BERT sums a row up by: [B, D] from its `states`."""
        return jnp.tanh(self.pooler(x_BTD[:, 0]))

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The (V, D) matrix whose rows score the vocabulary, and the (V,) bias of the scores."""
        return (self.head or self.embedding).table[...], None if self.head_bias is None else self.head_bias[...]
