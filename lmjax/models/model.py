"""A model of any architecture as pure functions of its parameters.

Shape suffixes: B batch, T sequence, D embed_dim, V vocab_size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import choice
from lmjax.errors import UserError
from lmjax.models.adapters import adapted
from lmjax.models.cache import Cache, empty_cache
from lmjax.models.decoder import Decoder, DecoderConfig
from lmjax.models.encdec import EncDec, EncDecConfig
from lmjax.models.encoder import Encoder, EncoderConfig
from lmjax.models.packing import packed_functional, unpack_params
from lmjax.models.parametrization import scale_initial
from lmjax.models.transformer import TokenInfo
from lmjax.nn.adapters import NO_ADAPTERS, AdapterConfig, is_adapter
from lmjax.nn.kernels.choose import Kernel, Needs, choose_kernel
from lmjax.nn.kv_cache import KV_CACHES
from lmjax.nn.module import Functional, Params, functional, normal, param
from lmjax.nn.packed import NOT_QUANTIZED, Packed, Quantization
from lmjax.nn.packed import matmul as packed_matmul
from lmjax.nn.routing import Routing
from lmjax.nn.stack import Unstacked, is_unstacked
from lmjax.sharding import platform

Batch = Mapping[str, jax.Array]
ModelConfig = DecoderConfig | EncoderConfig | EncDecConfig  # `family` tells them apart
FAMILY_MODULES = {DecoderConfig: Decoder, EncoderConfig: Encoder, EncDecConfig: EncDec}


PROJECTION = "projection"  # the path of a model's projection, if it has one


def is_of_base(path: str) -> bool:
    """Whether a parameter beside adapters is one of the model that they are for.

    Adapters, a task's head and a projection for a teacher are not.
    """
    return not (is_adapter(path) or path.startswith("task_head/") or path == PROJECTION)


class Hidden(NamedTuple):
    """The arrays that logits are computed from."""

    x_BTD: jax.Array  # hidden states in the compute dtype
    table_VD: jax.Array  # the unembedding in the compute dtype
    bias_V: jax.Array | None  # float32
    routing: Routing | None  # how experts were chosen, stacked by layer


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a key of compiled programs
class Model:
    """A model without parameters: their shapes and axes, and the functions that take them."""

    config: ModelConfig
    functional: Functional
    kernel: Kernel  # of attention
    kernel_reason: str  # why it was chosen, in words
    dtype: Any  # of activations and matmuls; parameters are float32
    prefix_lm: bool = False  # the tokens of a prompt see each other, later ones included
    adapter: AdapterConfig = NO_ADAPTERS
    # The width to which a trained matrix, `PROJECTION`, maps its states for comparison with those
    # of a teacher; 0: there is none.
    projected_dim: int = 0
    quantization: Quantization = NOT_QUANTIZED  # how its parameters are packed
    kv_cache: str = "float"  # how decoding keeps keys and values: a row of KV_CACHES

    @functools.cached_property
    def plain(self) -> "Model":
        """The same model without adapters and without a projection."""
        return self._with(NO_ADAPTERS, 0)

    def with_adapters(self, adapter: AdapterConfig) -> "Model":
        """The same model with these adapters in place of its own, if it has any."""
        return self._with(adapter, self.projected_dim)

    def with_projection(self, dim: int) -> "Model":
        """The same model with a projection of its states to `dim` dimensions; 0: with none."""
        return self._with(self.adapter, dim)

    def with_quantization(self, quantization: Quantization) -> "Model":
        """The same model with its matrices packed as integers; NOT_QUANTIZED: with none packed.

        Raises:
          UserError: the model has adapters, or a matrix cannot be packed so.
        """
        dense = self._with(NO_ADAPTERS, 0) if self.quantization.weights else self
        if not quantization.weights:
            return dense
        if dense.adapter.kind:
            raise UserError("a model without adapters", "one with adapters", "merge them first: "
                            "lmjax.load(DIR).merge().save(NEW)", where="quantization")
        shapes, axes = packed_functional(dense.functional, quantization)
        made = dataclasses.replace(dense.functional, shapes=shapes, axes=axes)
        return dataclasses.replace(dense, functional=made, quantization=quantization)

    def with_kv_cache(self, kv_cache: str) -> "Model":
        """The same model, whose decoding keeps keys and values so: always the same object.

        Raises:
          UserError: `kv_cache` is not in KV_CACHES.
        """
        choice("kv_cache", kv_cache, KV_CACHES)
        return self if kv_cache == self.kv_cache else _with_kv_cache(self, kv_cache)

    def dense(self, params: Params) -> tuple["Model", Params]:
        """The same model and its parameters with nothing packed."""
        if not self.quantization.weights:
            return self, params
        plain = self.with_quantization(NOT_QUANTIZED)
        return plain, unpack_params(plain.functional, params, self.quantization)

    def _with(self, adapter: AdapterConfig, dim: int) -> "Model":
        packed = self.quantization.weights
        if (adapter, dim) == (self.adapter, self.projected_dim) and not packed:
            return self

        def build(rngs: nnx.Rngs) -> nnx.Module:
            module = _module(self.config, self.kernel, rngs)
            module = adapted(module, adapter, rngs) if adapter.kind else module
            if dim:
                width = self.config.embed_dim
                made = param(rngs, normal(width**-0.5), (width, dim), ("embed", "mlp"))
                setattr(module, PROJECTION, made)
            return module

        return dataclasses.replace(self, functional=functional(build), adapter=adapter,
                                   projected_dim=dim, quantization=NOT_QUANTIZED)

    @property
    def shapes(self) -> Params:
        """The parameters as a nested dict of `ShapeDtypeStruct`."""
        return self.functional.shapes

    @property
    def axes(self) -> Params:
        """The same nested dict, with a tuple of logical axis names per parameter."""
        return self.functional.axes

    def init(self, key: jax.Array) -> Params:
        """New float32 parameters."""
        return scale_initial(self.config, self.functional.init(key), self.axes)

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Hidden:
        """The hidden states of every position, and what turns them into logits.

        Args:
          batch: int32 [B, T] `tokens`, `positions`, `segment_ids`, and the architecture's other
            inputs (see `hidden` in `decoder`, `encoder` and `encdec`).
          key: turns dropout on.
        """
        model = self.functional.bind(self.cast(params))
        x_BTD, routing = model.hidden(batch, self.dtype, key)
        table_VD, bias_V = model.unembedding
        if isinstance(table_VD, Packed):  # for many positions at once, a float matrix is faster
            table_VD = table_VD.dense(self.dtype)
        return Hidden(x_BTD, table_VD, bias_V, routing)

    def logits(self, params: Params, batch: Batch) -> jax.Array:
        """The float32 logits [B, T, V]; the losses of `nn.losses` need not hold them all."""
        return self.logits_of(self.hidden(params, batch))

    def logits_of(self, hidden: Hidden) -> jax.Array:
        """The float32 logits [B, T, V] of what `hidden` gave."""
        return self._logits(hidden.x_BTD, hidden.table_VD, hidden.bias_V)

    def unembed(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """The float32 logits [B, T, V] of hidden states, for some of the positions of `hidden`."""
        return self._logits(x_BTD, *self.functional.bind(self.cast(params)).unembedding)

    def encode(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """The last hidden states before any head, and the pooler's output if there is a pooler.

        Returns:
          ([B, T, D], [B, D] or None); the states of an encoder-decoder are its encoder's.
        """
        x_BTD, _ = self.states(params, batch)
        if (not isinstance(self.config, EncoderConfig) or not self.config.pooler
                or self.config.head.outputs):
            return x_BTD, None
        return x_BTD, self.functional.bind(self.cast(params)).pooled(x_BTD)

    def states(self, params: Params, batch: Batch,
               key: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """The last hidden states before any head; of an encoder-decoder, its encoder's.

        Args:
          key: turns dropout on.

        Returns:
          ([B, T, D], how experts were chosen).
        """
        return self.functional.bind(self.cast(params)).states(batch, self.dtype, key)

    def init_cache(self, batch_size: int, slots: int, *, params: Params | None = None,
                   batch: Batch | None = None, rings: bool = True) -> Cache:
        """An empty key/value cache with room for `slots` tokens per row.

        Args:
          params, batch: needed by an encoder-decoder, whose cache holds the encoder's keys and
            values; the batch has int32 [B, S] `encoder_tokens`, `encoder_positions` and
            `encoder_segment_ids` (0: padding).
          rings: local layers keep only the tokens of their window. Without rings, tokens can be
            taken back by moving `slot`.
        Raises:
          UserError: the model is an encoder, or an encoder-decoder without params and batch.
        """
        if self.config.family == "encoder":
            raise UserError("a decoder or encdec to generate with", "an encoder", "use encode",
                            where="model.family")
        cache = empty_cache(self.config, batch_size, slots, self.dtype, rings, self.kv_cache)
        if self.config.family == "decoder":
            return cache
        if params is None or batch is None:
            raise UserError("params and a batch of encoder tokens for an encoder-decoder", "none",
                            "pass both", where="init_cache")
        model = self.functional.bind(self.cast(params))
        return cache._replace(source=model.source(batch, self.dtype, cache.layers[0].key))

    def step(self, params: Params, tokens_BT: jax.Array, cache: Cache,
             at_B: jax.Array | None = None) -> tuple[jax.Array, Cache]:
        """Feeds T more tokens of each row and returns the logits [B, V] after one of them.

        Several tokens at once are a prompt: in a prefix-LM they see each other.

        Args:
          at_B: int32 [B], the index (of T) of that token; default: the last. Later tokens are
            padding and never enter the cache, so rows of different lengths can be fed together.
        """
        model, T = self.functional.bind(self.cast(params)), tokens_BT.shape[1]
        at_B = jnp.full(tokens_BT.shape[:1], T - 1, jnp.int32) if at_B is None else at_B
        x_BTD, cache = self._feed(model, tokens_BT, cache, at_B, prompt=self.prefix_lm and T > 1)
        x_B1D = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)
        return self._logits(x_B1D, *model.unembedding)[:, 0], cache

    def extend(self, params: Params, tokens_BT: jax.Array,
               cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds T more tokens of each row and returns the logits [B, T, V] after all of them."""
        model = self.functional.bind(self.cast(params))
        x_BTD, cache = self._feed(model, tokens_BT, cache, None, prompt=False)
        return self._logits(x_BTD, *model.unembedding), cache

    def _feed(self, model: Any, tokens_BT: jax.Array, cache: Cache, at_B: jax.Array | None,
              prompt: bool) -> tuple[jax.Array, Cache]:
        """The hidden states of T more tokens, and the cache with those up to index `at_B`.

        None: nothing is padding.
        """
        T = tokens_BT.shape[1]
        positions_BT = cache.slot[:, None] + jnp.arange(T, dtype=jnp.int32).reshape(1, T)
        if at_B is None:
            last_B, real_BT = cache.slot + T - 1, jnp.ones_like(positions_BT)
        else:
            last_B = cache.slot + at_B
            real_BT = (positions_BT <= last_B[:, None]).astype(jnp.int32)  # no expert takes padding
        info = TokenInfo(positions_BT, real_BT, prefix=real_BT if prompt else None, last=last_B)
        x_BTD, cache = model.step(tokens_BT, info, cache, self.dtype)
        return x_BTD, cache._replace(slot=last_B + 1)

    def _logits(self, x_BTD: jax.Array, table_VD: jax.Array | Packed,
                bias_V: jax.Array | None) -> jax.Array:
        if isinstance(table_VD, Packed):
            logits = packed_matmul(x_BTD, table_VD).astype(jnp.float32)
        else:
            logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD,
                                preferred_element_type=jnp.float32)
        logits = logits if bias_V is None else logits + bias_V.reshape(1, 1, -1)
        cap = self.config.output_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def for_decoding(self, params: Params) -> Params:
        """The parameters in the form that a loop over tokens reads fastest.

        That is the compute dtype, and on a CPU one array per layer (`Unstacked`). All methods that
        take parameters take this form, too.
        """
        params = self.cast(params)
        if platform() != "cpu":
            return params
        return jax.tree.map(lambda p, axes: Unstacked(p) if axes[0] == "layers" else p, params,
                            self.axes)

    def cast(self, params: Params) -> Params:
        """Casts matrices once, before any layer gathers them.

        Norms, biases and what is packed stay as they are.
        """
        def cast(p: Any, axes: tuple[str, ...]) -> Any:
            kept = "norm" in axes or is_unstacked(p) or jnp.issubdtype(p.dtype, jnp.integer)
            return p if kept else p.astype(self.dtype)

        return jax.tree.map(cast, params, self.axes, is_leaf=is_unstacked)


# One object per kind, since compiled programs are found by the model that they are of.
@functools.lru_cache(maxsize=32)
def _with_kv_cache(model: Model, kv_cache: str) -> Model:
    return dataclasses.replace(model, kv_cache=kv_cache)


def build_model(config: ModelConfig, *, vocab_size: int, platform: str, dtype: Any,
                seq_len: int = 0, context: bool = False, prefix_lm: bool = False,
                kernel: Kernel | None = None) -> Model:
    """Makes the model of a config.

    Args:
      vocab_size: of the data's tokens.
      platform: where the model runs: "cpu", "gpu" or "tpu".
      dtype: of activations and matmuls.
      seq_len: tokens per training row, by which attention=auto chooses; 0: unknown.
      context: rows are split over devices.
      prefix_lm: see `Model`.
      kernel: of attention, in place of the one that `config.attention` names.
    Raises:
      UserError: the config's vocabulary is smaller than the data's, or no attention kernel can
        serve the model.
    """
    if config.vocab_size and config.vocab_size < vocab_size:
        raise UserError(f"at least {vocab_size}, the tokenizer's ids and the objective's new ones",
                        config.vocab_size, "raise it, set 0 to take as many, or lower "
                        "data.objective.sentinels", where="config.model.vocab_size")
    config = dataclasses.replace(config, vocab_size=config.vocab_size or vocab_size)
    if kernel is None:
        kernel, reason = choose_kernel(config.attention, Needs(
            platform, softcap=config.attention_softcap, bias=config.positions == "relative",
            window=config.sliding_window, causal=config.family == "decoder",
            cross=config.family == "encdec", context=context, prefix=prefix_lm,
            sinks=config.attention_sinks,
            head_dim=config.dims.head_dim, seq_len=seq_len, dtype=dtype))
    else:
        reason = kernel.note
    return Model(config, functional(lambda rngs: _module(config, kernel, rngs)), kernel, reason,
                 jnp.dtype(dtype), prefix_lm)


def _module(config: ModelConfig, kernel: Kernel, rngs: nnx.Rngs) -> nnx.Module:
    return FAMILY_MODULES[type(config)](config, kernel, rngs)
