"""The encoder: one class for BERT, RoBERTa, ALBERT and ModernBERT, which differ in settings.

The settings of published models are in `presets`.
Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice
from lmjax.errors import UserError
from lmjax.models.config import TransformerConfig
from lmjax.models.parametrization import logit_multiplier
from lmjax.models.transformer import TokenInfo, Trunk, embed, task_head, token_table
from lmjax.nn.kernels.choose import Kernel
from lmjax.nn.layers import ACTIVATIONS, MLP_KINDS, NORMS, Dense, Embedding
from lmjax.nn.module import normal, param, zeros
from lmjax.nn.routing import Routing
from lmjax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TransformerConfig):
    """The dimensions and switches of an encoder."""

    family: str = "encoder"
    token_types: int = 0  # kinds of segments, each with an embedding for its tokens; 0: none
    # Width of the embeddings, which a matrix maps to embed_dim (Lan et al. 2019, arXiv:1909.11942).
    table_dim: int = 0  # 0: embed_dim
    shared_layers: bool = False  # all layers have the same parameters (ibid.)
    mlm_head: bool = True  # a matrix, an activation, a norm and a bias before the vocabulary
    head_activation: str = ""  # of the MLM head; "": the MLP's
    pooler: bool = False  # tanh of a matrix times the state of the first token (BERT)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("encoder",))
        choice("head_activation", self.head_activation, ("", *ACTIVATIONS))
        at_least(0, token_types=self.token_types, table_dim=self.table_dim)
        if self.table_dim not in (0, self.embed_dim) and self.parametrization != "standard":
            raise UserError(f"0 with parametrization={self.parametrization}", self.table_dim,
                            "change one of them", where="table_dim")

    @property
    def head_act(self) -> str:
        """The name of the MLM head's activation."""
        return self.head_activation or MLP_KINDS[self.mlp][0]


class Encoder(Trunk):
    """From token ids to hidden states, each of which depends on the whole document."""

    def __init__(self, config: EncoderConfig, kernel: Kernel, rngs: nnx.Rngs):
        c, init, width = config, normal(config.init_std), config.table_dim or config.embed_dim

        def dense(outputs: int, use_bias: bool) -> Dense:
            return Dense((c.embed_dim,), (outputs,), ("embed", "mlp"), use_bias=use_bias,
                         init=init, rngs=rngs)

        self.embedding = token_table(c, rngs, width)
        super().__init__(c, kernel, rngs, causal=False, table_dim=width)
        self.token_types = (Embedding(c.token_types, width, ("positions", "embed"),
                                      init=init, rngs=rngs) if c.token_types else None)
        task = c.head.outputs > 0
        transforms = c.mlm_head and (not task or c.head.kind == "transform")
        self.transform = dense(width, c.use_bias) if transforms else None
        self.transform_norm = (NORMS[c.norm](width, eps=c.norm_eps, rngs=rngs)
                               if transforms else None)
        self.head = None if c.tie_embeddings or task else token_table(c, rngs, width)
        self.head_bias = (param(rngs, zeros, (c.vocab_size,), ("norm",))
                          if c.mlm_head and not task else None)
        self.pooler = dense(c.embed_dim, True) if c.pooler and not task else None
        self.task_head = task_head(c, rngs)
        self.activation = ACTIVATIONS[c.head_act]

    def states(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """Computes the last hidden states of a batch.

        Args:
          batch: int32 [B, T] `tokens`, `positions` and `segment_ids`; optionally `token_types`
            (default: all 0).
          key: turns dropout on.
        Returns:
          (hidden states [B, T, D] in `dtype`, how experts were chosen in each layer).
        """
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        if self.token_types is not None:
            types_BT = batch.get("token_types", jnp.zeros_like(batch["tokens"]))
            x_BTD = x_BTD + self.token_types(types_BT, dtype)
        tokens = TokenInfo(batch["positions"], batch["segment_ids"])
        x_BTD, _, routing = self(x_BTD, tokens, key=key)
        return x_BTD, routing

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """`states` after the MLM head's layers or a task's head: ready for the unembedding."""
        x_BTD, routing = self.states(batch, dtype, key)
        if self.transform is not None and self.transform_norm is not None:
            # Left to itself, the compiler splits the norm's features over `tensor`, and gives wrong
            # gradients where `fsdp` has as many devices.
            x_BTD = constrain(self.transform(x_BTD), "batch", "seq", "act_embed")
            x_BTD = self.transform_norm(self.activation(x_BTD))
        if self.task_head is not None:
            return self.task_head(x_BTD, key), routing
        multiplier = logit_multiplier(self.config)
        return x_BTD if multiplier == 1.0 else x_BTD * multiplier, routing

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """One vector per row, [B, D], computed by BERT's pooler from `states`."""
        assert self.pooler is not None
        return jnp.tanh(self.pooler(x_BTD[:, 0]))

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The table (V, D) that scores the vocabulary, and the bias (V,) of the scores, if any."""
        if self.task_head is not None:
            return self.task_head.unembedding
        c = self.config
        if self.transform is None and getattr(c, "table_dim", 0) not in (0, c.embed_dim):
            raise UserError("an MLM head, which maps states to the width of the table, to score "
                            "tokens", "none", "fine-tune the model for a task, or use its states",
                            where="config.model.mlm_head")
        bias = None if self.head_bias is None else self.head_bias[...]
        return (self.head or self.embedding).table[...], bias
