"""The decoder: one class for GPT, Llama, OLMo, Cohere and others, which differ only in settings.

The settings of published models are in `presets`.
Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lmjax.config import choice
from lmjax.errors import UserError
from lmjax.models.cache import Cache
from lmjax.models.config import TransformerConfig
from lmjax.models.parametrization import logit_multiplier
from lmjax.models.transformer import TokenInfo, Trunk, embed, task_head, token_table
from lmjax.nn.kernels.choose import Kernel
from lmjax.nn.module import param, zeros
from lmjax.nn.routing import Routing


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """The dimensions and switches of a decoder: those of `TransformerConfig`."""

    family: str = "decoder"
    logit_divisor: float = 1.0  # divides logits (Granite)
    output_bias: bool = False  # of the logits (GPT-J)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("family", self.family, ("decoder",))
        if self.logit_divisor <= 0:
            raise UserError("more than 0", self.logit_divisor, "raise it", where="logit_divisor")


class Decoder(Trunk):
    """From token ids to hidden states.

    `Model` computes the logits: it multiplies the hidden states by the table of `unembedding`, adds
    its bias if there is one, and applies the config's logit soft-cap.
    """

    def __init__(self, config: DecoderConfig, kernel: Kernel, rngs: nnx.Rngs):
        # The order of creation decides which random key a parameter gets: the embedding's is first.
        self.embedding = token_table(config, rngs)
        self.divisor = config.logit_divisor / logit_multiplier(config)
        super().__init__(config, kernel, rngs, causal=True)
        self.task_head = task_head(config, rngs)
        tied = config.tie_embeddings or self.task_head is not None
        self.head = None if tied else token_table(config, rngs)
        self.head_bias = (param(rngs, zeros, (config.vocab_size,), ("norm",))
                          if config.output_bias and self.task_head is None else None)

    def states(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """Computes the hidden states of a batch.

        Args:
          batch: int32 [B, T] `tokens`, `positions` and `segment_ids`. Optionally `bidirectional`,
            for prefix-LMs: 1 on tokens that every token of their document attends to, earlier
            tokens included; 0 on tokens that only later ones attend to.
          dtype: of the computation.
          key: turns dropout on.
        Returns:
          (normed hidden states [B, T, D] in `dtype`, how experts were chosen in each layer).
        """
        x_BTD = embed(self.config, self.embedding, batch["tokens"], dtype)
        info = TokenInfo(batch["positions"], batch["segment_ids"], batch.get("bidirectional"))
        x_BTD, _, routing = self(x_BTD, info, key=key)
        return x_BTD, routing

    def hidden(self, batch: Mapping[str, jax.Array], dtype: Any,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """`states` divided by `logit_divisor`, or after a task's head: for the unembedding."""
        x_BTD, routing = self.states(batch, dtype, key)
        if self.task_head is not None:
            return self.task_head(x_BTD, key), routing
        return self._scaled(x_BTD), routing

    def step(self, tokens_BT: jax.Array, info: TokenInfo, cache: Cache,
             dtype: Any) -> tuple[jax.Array, Cache]:
        """The hidden states [B, T, D] of the next T tokens of each row, and the new cache."""
        x_BTD = embed(self.config, self.embedding, tokens_BT, dtype)
        x_BTD, layers, _ = self(x_BTD, info, cache=cache.layers)
        return self._scaled(x_BTD), cache._replace(layers=layers)

    def _scaled(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.divisor == 1.0 else x_BTD / self.divisor

    @property
    def unembedding(self) -> tuple[jax.Array, jax.Array | None]:
        """The table (V, D) that scores the vocabulary, and the bias (V,) of the scores, if any."""
        if self.task_head is not None:
            return self.task_head.unembedding
        bias = None if self.head_bias is None else self.head_bias[...]
        return (self.head or self.embedding).table[...], bias
