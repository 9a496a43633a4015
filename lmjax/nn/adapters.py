"""Adapters: low-rank matrices beside the frozen kernel of a dense layer.

LoRA adds scale * (x A) B to x W (Hu et al. 2021, arXiv:2106.09685). rsLoRA scales it by alpha /
sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732). DoRA gives each column
of W + scale * A B a trained length (Liu et al. 2024, arXiv:2402.09353). Training never makes A B or
the sum, which are as large as W. Initial values and scales are those of Hugging Face's PEFT.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import at_least, choice, pattern
from lmjax.errors import UserError
from lmjax.nn.module import Params, param, zeros
from lmjax.nn.ops import Sides, along_last, dropout, matmul
from lmjax.nn.quantized import matmuls_in

KINDS = ("lora", "rslora", "dora")
NAME = "adapter"  # of an adapter in its dense layer, and so in the paths of its parameters
NOISE = 7  # folds a layer's key into that of its adapters; its residual branches use 0, 1 and 2


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The `adapter` group of a recipe: adapters that are trained in place of the model's weights.

    The model must be one to start from (train.init_from).
    """

    kind: str = ""  # lora, rslora, dora; "": no adapters, the weights themselves are trained
    rank: int = 8  # columns of A, rows of B
    alpha: float = 16.0  # the product x A B is scaled by alpha / rank; rslora: alpha / sqrt(rank)
    # A regular expression, searched in the paths of the layers' matrices: attention/query,
    # attention/key, attention/value, attention/out, mlp/gate, mlp/up, mlp/down.
    targets: str = "attention/(query|value)$"
    dropout: float = 0.0  # of the adapter's input

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("", *KINDS))
        at_least(1, rank=self.rank)
        pattern("targets", self.targets)
        for key, low in (("alpha", self.alpha > 0), ("dropout", 0 <= self.dropout < 1)):
            if not low:
                raise UserError("more than 0" if key == "alpha" else "0 <= dropout < 1",
                                getattr(self, key), "change it", where=key)

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.kind == "rslora" else self.rank)


NO_ADAPTERS = AdapterConfig()
_KEY: ContextVar[jax.Array | None] = ContextVar("adapter_key", default=None)


@contextlib.contextmanager
def adapter_noise(key: jax.Array | None) -> Iterator[None]:
    """While a layer is traced inside, its adapters drop inputs by this key; None: none is dropped.

    key: the layer's own.
    """
    token = _KEY.set(None if key is None else jax.random.fold_in(key, NOISE))
    try:
        yield
    finally:
        _KEY.reset(token)


class Adapter(nnx.Module):
    """The adapter of one dense layer, or of those of all layers that are stacked in one.

    Its parameters are a [in, rank], b [rank, out] and, of DoRA, magnitude [out], with the layer's
    own dimensions in and out.

    Args:
      kernel: of the dense layer, [layers, in, out] or [in, out].
      num_in: its dimensions in.
      config: kind, rank and scale.
      index: a number that no other adapter of the layer has.
      rngs: of the initial values.
    """

    def __init__(self, kernel: nnx.Param, num_in: int, config: AdapterConfig, index: int,
                 rngs: nnx.Rngs):
        self.config, self.num_in, self.index = config, num_in, index
        axes, shape = tuple(kernel.get_metadata()["axes"]), kernel.shape
        lead = axes.count("layers")
        cut = lead + num_in
        bound = 1 / math.sqrt(math.prod(shape[lead:cut]))

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.a = param(rngs, uniform, (*shape[:cut], config.rank), (*axes[:cut], "rank"))
        self.b = param(rngs, zeros, (*shape[:lead], config.rank, *shape[cut:]),
                       (*axes[:lead], "rank", *axes[cut:]))
        # Of a base that is read later, `initial_magnitudes` gives the lengths.
        self.magnitude = param(rngs, lambda key, shape, dtype: jnp.ones(shape, dtype),
                               (*shape[:lead], *shape[cut:]),
                               (*axes[:lead], *("norm",) * (len(shape) - cut))
                               ) if config.kind == "dora" else None

    def __call__(self, x: jax.Array, y: jax.Array, kernel: jax.Array, sides: Sides) -> jax.Array:
        """The output of the adapted layer, without its bias.

        Args:
          x: the layer's input, [..., *in].
          y: x @ kernel, [..., *out].
          kernel: [*in, *out] in the dtype of x.
          sides: the axis names of its first dimension in and out.
        """
        a, b = (p[...].astype(x.dtype) for p in (self.a, self.b))
        key = _KEY.get()
        key = key if key is None else jax.random.fold_in(key, self.index)
        kept = dropout(x, self.config.dropout, key)
        with matmuls_in("auto"):  # they are small, and 8 bits would lose what they learn
            low = matmul(kept, a, (sides[0], "rank"), self.num_in)
            change = self.config.scale * matmul(low, b, ("rank", sides[1]))
        if self.magnitude is None:
            return y + change
        lengths = jax.lax.stop_gradient(column_lengths(kernel, a, b, self.config.scale))
        share = along_last((self.magnitude[...] / lengths).astype(y.dtype), y.ndim)
        if kept is x:
            return share * (y + change)
        # As in PEFT, what DoRA adds to x W is computed from the dropped input, too.
        return y + (share - 1) * matmul(kept, kernel, sides, self.num_in) + share * change


def column_lengths(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """The length of each column of W + scale * A B, float32 [*out], without making A B.

    The square of column j is |W_j|^2 + 2 scale (A^T W_j) . B_j + scale^2 B_j . (A^T A) B_j.

    Args:
      w: [*in, *out]. a: [*in, rank]. b: [rank, *out].
    """
    w, a, b = (x.astype(jnp.float32) for x in (w, a, b))
    into = tuple(range(a.ndim - 1))
    through = jnp.tensordot(a, w, (into, into))
    within = jnp.tensordot(jnp.tensordot(a, a, (into, into)), b, 1)
    squares = jnp.sum(jnp.square(w), axis=into)
    return jnp.sqrt(squares + jnp.sum((2 * scale * through + scale**2 * within) * b, axis=0))


def merge_adapters(params: Params, config: AdapterConfig) -> Params:
    """The parameters of the same model without adapters: W + scale * A B in place of each W.

    Args:
      params: of a model, float32; every adapted kernel has a leading dimension of layers.
      config: that of the adapters.
    """
    if NAME not in params:
        return {key: merge_adapters(node, config) if isinstance(node, dict) else node
                for key, node in params.items()}
    adapter, plain = params[NAME], {key: x for key, x in params.items() if key != NAME}

    def layer(w: jax.Array, adapter: Params) -> jax.Array:
        a, b = adapter["a"], adapter["b"]
        change = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        merged = w + config.scale * change
        if "magnitude" not in adapter:
            return merged
        lengths = column_lengths(w, a, b, config.scale)
        return merged * along_last(adapter["magnitude"] / lengths, w.ndim)

    return {**plain, "kernel": jax.vmap(layer)(params["kernel"], adapter)}


def initial_magnitudes(params: Params) -> Params:
    """`params` with the magnitudes of DoRA set to the lengths of the kernels' columns."""
    if NAME not in params:
        return {key: initial_magnitudes(node) if isinstance(node, dict) else node
                for key, node in params.items()}
    kernel, adapter = params["kernel"], params[NAME]
    if "magnitude" not in adapter:
        return params
    into = tuple(range(1, 1 + kernel.ndim - adapter["magnitude"].ndim))
    lengths = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=into))
    return {**params, NAME: {**adapter, "magnitude": lengths}}


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path belongs to an adapter."""
    return f"/{NAME}/" in path
