"""From a model config to pure functions over a parameter tree."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.models.decoder import Decoder, DecoderConfig, init_cache
from lmjax.nn.attention import KVCache
from lmjax.nn.kernels import choose_kernel
from lmjax.nn.module import Functional, Params, functional
from lmjax.nn.visibility import Visibility

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity: a key of compiled programs
class Model:
    """A model without its values: what its parameters look like, and what to compute with them."""

    config: DecoderConfig
    functional: Functional
    kernel: str
    kernel_reason: str
    dtype: Any  # of activations and matmuls; parameters are float32

    @property
    def shapes(self) -> Params:
        """Nested dict of `ShapeDtypeStruct`."""
        return self.functional.shapes

    @property
    def axes(self) -> Params:
        """The same tree, a tuple of logical axis names a leaf."""
        return self.functional.axes

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        return self.functional.init(key)

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Last hidden states [B, T, D] and the unembedding matrix [V, D], both in the compute dtype.

        batch: int32 [B, T] `tokens`, `positions`, `segment_ids`, and where all of a document sees a token that comes
        later, `bidirectional`. key: switches dropout on.
        """
        model = self.functional.bind(self._cast(params))
        see = Visibility(batch["positions"], batch["positions"], batch["segment_ids"], batch["segment_ids"],
                         kv_prefix=batch.get("bidirectional"), in_order=True)
        x_BTD, _ = model(batch["tokens"], batch["positions"], see, dtype=self.dtype, key=key)
        return x_BTD, model.unembedding

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """float32 logits [B, T, V], all of them; use a loss of `lmjax.losses` where they need not be held."""
        return self._logits(*self.hidden(params, batch))

    def init_cache(self, batch_size: int, slots: int) -> KVCache:
        """An empty key/value cache for `slots` tokens a row."""
        return init_cache(self.config, batch_size, slots, self.dtype)

    def step(self, params: Params, tokens_BT: jax.Array, cache: KVCache,
             at_B: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """Feeds T more tokens a row, written at each row's own slot; logits [B, V] behind one of them.

        at_B: which of the T, int32 [B]; the last one by default. Slots of tokens behind it are taken back,
        so that rows of different lengths can be fed together, padded on the right.
        """
        model = self.functional.bind(self._cast(params))
        B, T = tokens_BT.shape
        S = cache.key.shape[2]
        at_B = jnp.full((B,), T - 1, jnp.int32) if at_B is None else at_B
        positions = cache.slot[0][:, None] + jnp.arange(T, dtype=jnp.int32).reshape(1, T)
        slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32).reshape(1, S), (B, S))
        # A slot's index is its token's position, so causality alone hides the slots not yet written.
        see = Visibility(positions, slots, jnp.ones_like(positions), jnp.ones_like(slots))
        x_BTD, cache = model(tokens_BT, positions, see, dtype=self.dtype, cache=cache)
        x_B1D = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)
        logits = self._logits(x_B1D, model.unembedding)[:, 0]
        return logits, cache._replace(slot=cache.slot + at_B.reshape(1, B) + 1)

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of one training token: 6 a matmul weight, and 12 a query and visible key (PaLM, arXiv:2204.02311,
        app. B, which counts all keys; here those that causality and the window leave)."""
        c = self.config
        matmul = sum(math.prod(s.shape) for s, a in zip(*self._leaves(), strict=True)
                     if "embed" in a and "vocab" not in a and "positions" not in a)
        matmul += c.vocab_size * c.embed_dim
        span = min(c.sliding_window or seq_len, seq_len)
        visible = span * (1 - span / (2 * seq_len))  # keys of an average query: fewer at the start of the row
        return 6.0 * matmul + 12.0 * c.num_layers * c.dims.num_heads * c.dims.head_dim * visible

    def embedding_parameters(self) -> int:
        """Parameters in token and position tables."""
        return sum(math.prod(s.shape) for s, a in zip(*self._leaves(), strict=True) if {"vocab", "positions"} & set(a))

    def _logits(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def _cast(self, params: Params) -> Params:
        """Matrices in the compute dtype once, before any layer gathers them; norms and biases stay float32."""
        return jax.tree.map(lambda p, axes: p if "norm" in axes else p.astype(self.dtype), params, self.axes)

    def _leaves(self) -> tuple[list[Any], list[Any]]:
        return jax.tree.leaves(self.shapes), jax.tree.leaves(self.axes, is_leaf=lambda x: isinstance(x, tuple))


def build_model(config: DecoderConfig, *, vocab_size: int, platform: str, dtype: Any, seq_len: int = 0) -> Model:
    """The model of `config` for data with `vocab_size` tokens, run on `platform` ("cpu", "gpu", "tpu").

    seq_len: of the rows that it is trained on, where known; attention=auto chooses by it.

    Raises:
      ValueError: the config's vocabulary is smaller than the data's, or no kernel can serve the model.
    """
    if config.vocab_size and config.vocab_size < vocab_size:
        raise ValueError(f"config.model.vocab_size: expected at least the tokenizer's {vocab_size}, got "
                         f"{config.vocab_size}; raise it or set 0 to take the tokenizer's")
    config = dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)
    kernel, reason = choose_kernel(config.attention, platform, softcap=config.attention_softcap,
                                   window=config.sliding_window, head_dim=config.dims.head_dim, seq_len=seq_len,
                                   dtype=dtype)
    return Model(config, functional(lambda rngs: Decoder(config, kernel, rngs)), kernel, reason, jnp.dtype(dtype))
