"""A model of any family: parameters, logits, cached decoding."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.models.decoder import Decoder, DecoderConfig
from lmjax.models.encdec import EncDec, EncDecConfig
from lmjax.models.encoder import Encoder, EncoderConfig
from lmjax.models.transformer import Cache, empty_cache
from lmjax.nn.kernels.choose import choose_kernel
from lmjax.nn.module import Functional, Params, functional
from lmjax.nn.moe import Routing
from lmjax.nn.stack import Apart, is_apart
from lmjax.sharding import platform
from lmjax.tree import named_leaves

Batch = Mapping[str, jax.Array]
ModelConfig = DecoderConfig | EncoderConfig | EncDecConfig  # told apart by `family`
FAMILIES = {DecoderConfig: Decoder, EncoderConfig: Encoder, EncDecConfig: EncDec}


class Hidden(NamedTuple):
    """What logits are made of: states [B, T, D], the unembedding [V, D], both in the compute dtype, and a float32 bias
    [V] or None. routing: what the experts did, if there are any, stacked by layer."""

    x_BTD: jax.Array
    table_VD: jax.Array
    bias_V: jax.Array | None
    routing: Routing | None


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity: a key of compiled programs
class Model:
    """A model without its values: what its parameters look like, and what to compute with them."""

    config: ModelConfig
    functional: Functional
    kernel: str
    kernel_reason: str
    dtype: Any  # of activations and matmuls; parameters are float32
    prefix_lm: bool = False  # whether the tokens of a prompt see each other, those behind too

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

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Hidden:
        """What the logits of every position are made of.

        batch: int32 [B, T] `tokens`, `positions`, `segment_ids`, and whatever else the family reads. key: switches
        dropout on.
        """
        model = self.functional.bind(self._cast(params))
        x_BTD, routing = model.hidden(batch, self.dtype, key)
        return Hidden(x_BTD, *model.unembedding, routing)

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """float32 logits [B, T, V], all of them; use a loss of `lmjax.training.losses` where they need not be held."""
        return self._logits(*self.hidden(params, batch)[:3])

    def encode(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Last hidden states [B, T, D] of the rows read (an encoder-decoder's: of the encoder), before any head; and
        the pooler's output [B, D], if there is one."""
        model = self.functional.bind(self._cast(params))
        x_BTD, _ = model.hidden(batch, self.dtype) if self.config.family == "decoder" else (
            model.states(batch, self.dtype))
        return x_BTD, model.pooled(x_BTD) if getattr(self.config, "pooler", False) else None

    def init_cache(self, batch_size: int, slots: int, *, params: Params | None = None, batch: Batch | None = None,
                   rings: bool = True) -> Cache:
        """An empty key/value cache for `slots` tokens a row.

        rings: whether local layers keep no more than their window; tokens can only be taken back if they keep all.
        params, batch: what an encoder-decoder makes its encoder's keys and values of: int32 [B, S] `encoder_tokens`,
        `encoder_positions` and `encoder_segment_ids` (0: padding).

        Raises:
          ValueError: the model is an encoder, or there is nothing to encode.
        """
        if self.config.family == "encoder":
            raise ValueError("model.family: expected a decoder or encdec to generate with, got an encoder; use encode")
        cache = empty_cache(self.config, batch_size, slots, self.dtype, rings)
        if self.config.family == "decoder":
            return cache
        if params is None or batch is None:
            raise ValueError("init_cache: expected params and a batch of encoder tokens for an encoder-decoder, got "
                             "none; pass both")
        return cache._replace(source=self.functional.bind(self._cast(params)).source(batch, self.dtype))

    def step(self, params: Params, tokens_BT: jax.Array, cache: Cache,
             at_B: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Feeds T more tokens a row, each row's from its own position on; logits [B, V] behind one of them.

        at_B: which of the T, int32 [B]; the last one by default. Tokens behind it are taken back, so that rows of
        different lengths can be fed together, padded on the right. Several at once are a prompt: to a prefix-LM the
        part of a document that is seen in both directions.
        """
        model = self.functional.bind(self._cast(params))
        B, T = tokens_BT.shape
        at_B = jnp.full((B,), T - 1, jnp.int32) if at_B is None else at_B
        positions = cache.slot[:, None] + jnp.arange(T, dtype=jnp.int32).reshape(1, T)
        last_B = cache.slot + at_B
        stay = (positions <= last_B[:, None]).astype(jnp.int32)  # the others are padding: no expert has room for them
        prompt = {"prefix_BT": stay} if self.prefix_lm and T > 1 else {}
        x_BTD, cache = model.step(tokens_BT, positions, stay, cache, last_B, self.dtype, **prompt)
        x_B1D = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)
        return self._logits(x_B1D, *model.unembedding)[:, 0], cache._replace(slot=last_B + 1)

    def extend(self, params: Params, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds T more tokens a row, like `step`; logits [B, T, V] behind all of them."""
        model = self.functional.bind(self._cast(params))
        T = tokens_BT.shape[1]
        positions = cache.slot[:, None] + jnp.arange(T, dtype=jnp.int32).reshape(1, T)
        last_B = cache.slot + T - 1
        x_BTD, cache = model.step(tokens_BT, positions, jnp.ones_like(positions), cache, last_B, self.dtype)
        return self._logits(x_BTD, *model.unembedding), cache._replace(slot=last_B + 1)

    def flops_per_token(self, seq_len: int, encoder_len: int = 0) -> float:
        """Model FLOPs of one training token: 6 a matmul weight, and 12 a query and visible key (PaLM, arXiv:2204.02311,
        app. B, which counts all keys; here those that causality and the window leave). Of experts, those that compute a
        token count. An encoder-decoder's token is the decoder's, with its share of an encoder row of `encoder_len`
        (0: as long as the decoder's)."""
        c = self.config
        both = c.family == "encdec"
        share = (encoder_len or seq_len) / seq_len
        total = float(c.vocab_size * c.embed_dim)
        for (name, leaf), axes in zip(named_leaves(self.shapes), self._leaves()[1], strict=True):
            table = {"vocab", "positions"} & set(axes)
            if {"embed", "expert_embed"} & set(axes) and not table and not name.startswith("pooler/"):
                computed = c.moe.per_token / c.moe.experts if "experts" in axes and "mlp" in axes else 1.0
                of_source = both and ("encoder/" in name or "cross_attention/key" in name or
                                      "cross_attention/value" in name)
                total += math.prod(leaf.shape) * computed * (share if of_source else 1.0)
        pairs = self._visible(c.num_layers, seq_len, causal=c.family != "encoder")
        if both:
            encoder = self._visible(c.num_encoder_layers or c.num_layers, int(share * seq_len), causal=False)
            pairs += share * (c.num_layers * seq_len + encoder)
        return 6.0 * total + 12.0 * c.dims.num_heads * c.dims.head_dim * pairs

    def flops_per_row(self, fields: Mapping[str, int]) -> float:
        """Model FLOPs of training on one row, whose arrays have the lengths `fields`."""
        length = fields["tokens"]
        return length * self.flops_per_token(length, fields.get("encoder_tokens", 0))

    def _visible(self, num_layers: int, seq_len: int, causal: bool) -> float:
        """Keys that an average query sees, over all layers: fewer at the ends of the row."""
        kinds, pattern = self.config.kinds(num_layers)
        total = 0.0
        for i in range(num_layers):
            span = min(self.config.window(kinds[pattern[i % len(pattern)]]) or seq_len, seq_len)
            back = span * (1 - span / (2 * seq_len))
            total += back if causal else 2 * back
        return total

    def embedding_parameters(self) -> int:
        """Parameters in token and position tables."""
        return sum(math.prod(s.shape) for s, a in zip(*self._leaves(), strict=True) if {"vocab", "positions"} & set(a))

    def _logits(self, x_BTD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None) -> jax.Array:
        logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
        logits = logits if bias_V is None else logits + bias_V.reshape(1, 1, -1)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def for_decoding(self, params: Params) -> Params:
        """The parameters as a loop over tokens reads them fastest: in the compute dtype, on a CPU `Apart`. What takes
        parameters takes these, too."""
        params = self._cast(params)
        if platform() != "cpu":
            return params
        return jax.tree.map(lambda p, axes: Apart(p) if axes[0] == "layers" else p, params, self.axes)

    def _cast(self, params: Params) -> Params:
        """Matrices in the compute dtype once, before any layer gathers them; norms and biases stay float32."""
        return jax.tree.map(lambda p, axes: p if "norm" in axes or is_apart(p) else p.astype(self.dtype), params,
                            self.axes, is_leaf=is_apart)

    def _leaves(self) -> tuple[list[Any], list[Any]]:
        return jax.tree.leaves(self.shapes), jax.tree.leaves(self.axes, is_leaf=lambda x: isinstance(x, tuple))


def build_model(config: ModelConfig, *, vocab_size: int, platform: str, dtype: Any, seq_len: int = 0,
                context: bool = False, prefix_lm: bool = False) -> Model:
    """The model of `config` for data with `vocab_size` tokens, run on `platform` ("cpu", "gpu", "tpu").

    seq_len: of the rows that it is trained on, where known; attention=auto chooses by it. context: whether rows are
    split over devices. prefix_lm: see `Model`.

    Raises:
      ValueError: the config's vocabulary is smaller than the data's, or no kernel can serve the model.
    """
    if config.vocab_size and config.vocab_size < vocab_size:
        raise ValueError(f"config.model.vocab_size: expected at least the tokenizer's {vocab_size}, got "
                         f"{config.vocab_size}; raise it or set 0 to take the tokenizer's")
    config = dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)
    kernel, reason = choose_kernel(config.attention, platform, softcap=config.attention_softcap,
                                   bias=config.positions == "relative", window=config.sliding_window,
                                   causal=config.family == "decoder", cross=config.family == "encdec", context=context,
                                   prefix=prefix_lm, head_dim=config.dims.head_dim, seq_len=seq_len, dtype=dtype)
    build = FAMILIES[type(config)]
    return Model(config, functional(lambda rngs: build(config, kernel, rngs)), kernel, reason, jnp.dtype(dtype),
                 prefix_lm)
