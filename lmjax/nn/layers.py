"""Dense layers, embeddings, norms and the MLP.

Shape suffixes: B batch, T sequence, D embed_dim, F mlp_dim, V vocab_size.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.adapters import Adapter
from lmjax.nn.module import Initializer, normal, ones, param, zeros
from lmjax.nn.ops import along_last, barrier, matmul, rms_norm
from lmjax.nn.packed import Packed, in_training
from lmjax.nn.recorded import record
from lmjax.sharding import constrain

CLAMP = 7.0  # limit of the inputs of gpt-oss's gated unit
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "silu_clamped": lambda x: (x := jnp.minimum(x, CLAMP)) * jax.nn.sigmoid(1.702 * x),
}
# Gating activation -> what becomes of the other matrix's output, if it is not left as it is.
OTHER_SIDE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu_clamped": lambda x: jnp.clip(x, -CLAMP, CLAMP) + 1}
# name -> (activation, whether a second matrix gates it). The gated kinds are the GLU variants of
# Shazeer 2020, arXiv:2002.05202.
MLP_KINDS = {
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swiglu": ("silu", True),
    "geglu": ("gelu_tanh", True),
    "geglu_erf": ("gelu", True),
    "reglu": ("relu", True),
    "swiglu_clamped": ("silu_clamped", True),
}


class Dense(nnx.Module):
    """`y = x @ kernel + bias`, contracting the last `len(in_shape)` dimensions of x.

    The kernel has shape (*in_shape, *out_shape), is stored in float32 and used in the dtype of x.
    A `Packed` may take its place.
    """

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...],
                 axes: tuple[str | None, ...], *, use_bias: bool, init: Initializer,
                 rngs: nnx.Rngs):
        self.num_in = len(in_shape)
        # Where dimensions are merged for the matmul, the first of them decides the sharding.
        self.sides = (axes[0], axes[len(in_shape)])
        self.kernel = param(rngs, init, (*in_shape, *out_shape), axes)
        bias_axes = ("norm",) * len(out_shape)
        self.bias = param(rngs, zeros, out_shape, bias_axes) if use_bias else None
        self.adapter: Adapter | None = None  # `models.adapters` gives it one
        self.recorded_as = ""  # a name: `nn.recorded` is given x^T x under it

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.recorded_as:
            rows = x.reshape(-1, math.prod(x.shape[x.ndim - self.num_in:])).astype(jnp.float32)
            record(**{self.recorded_as: rows.T @ rows})
        kernel = self.kernel[...]
        if not isinstance(kernel, Packed):
            kernel = in_training(kernel, self.num_in).astype(x.dtype)
        y = matmul(x, kernel, self.sides, self.num_in)
        y = y if self.adapter is None else self.adapter(x, y, kernel, self.sides)
        return y if self.bias is None else y + along_last(self.bias[...].astype(x.dtype), y.ndim)


class Embedding(nnx.Module):
    """Rows of a (num, D) float32 table, or of a `Packed` one."""

    def __init__(self, num: int, dim: int, axes: tuple[str, str], *, init: Initializer,
                 rngs: nnx.Rngs):
        self.table = param(rngs, init, (num, dim), axes)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """ids int32 [...] -> rows [..., D] in `dtype`. An id out of range gives the nearest row."""
        table = self.table[...]
        if isinstance(table, Packed):
            return table.rows(ids, dtype)
        return _rows(len(table), table.astype(dtype), ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(num: int, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` of a table of `num` rows; the gradient of each row is summed in float32.

    A bfloat16 sum stops growing once it is 256 times the addend, which frequent tokens would reach.
    """
    return jnp.take(table, ids, axis=0, mode="clip")


def _rows_backward(num: int, ids: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    total = jnp.zeros((num, g.shape[-1]), jnp.float32)
    total = total.at[ids].add(g.astype(jnp.float32), mode="clip")
    return total.astype(g.dtype), None


_rows.defvjp(lambda num, table, ids: (_rows(num, table, ids), ids), _rows_backward)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last dimension, in float32.

    Zhang and Sennrich 2019, arXiv:1910.07467. `shape` is that of the scale: the last dimensions of
    x, of which only the last one is normed.
    """

    def __init__(self, *shape: int, eps: float, rngs: nnx.Rngs, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.scale = param(rngs, zeros if offset else ones, shape, ("norm",) * len(shape))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, along_last(self.scale[...] + self.offset, x.ndim), self.eps)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last dimension, in float32.

    Ba et al. 2016, arXiv:1607.06450. `shape` is that of the scale, as in `RMSNorm`.
    """

    def __init__(self, *shape: int, eps: float, rngs: nnx.Rngs, use_scale: bool = True,
                 use_bias: bool = True):
        self.eps, axes = eps, ("norm",) * len(shape)
        self.scale = param(rngs, ones, shape, axes) if use_scale else None
        self.bias = param(rngs, zeros, shape, axes) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = x32 * inverse
        y = y if self.scale is None else y * along_last(self.scale[...], x.ndim)
        y = y if self.bias is None else y + along_last(self.bias[...], x.ndim)
        return y.astype(x.dtype)


Norm = RMSNorm | LayerNorm
NORMS: dict[str, Callable[..., Norm]] = {
    "rmsnorm": RMSNorm,
    # Gemma's norm: the parameter, which is also what weight decay sees, is scale - 1.
    "rmsnorm_1p": functools.partial(RMSNorm, offset=1.0),
    "layernorm": LayerNorm,
    "layernorm_no_bias": functools.partial(LayerNorm, use_bias=False),
    "layernorm_plain": functools.partial(LayerNorm, use_scale=False, use_bias=False),
}


def other_side(activation: str, up: jax.Array) -> jax.Array:
    """What the activated gate is multiplied by: the other matrix's output, for some changed."""
    return OTHER_SIDE[activation](up) if activation in OTHER_SIDE else up


class MLP(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for the gated kinds of `MLP_KINDS`."""

    def __init__(self, dim: int, hidden: int, *, kind: str, use_bias: bool, init: Initializer,
                 out_init: Initializer, rngs: nnx.Rngs):
        self.activation, gated = MLP_KINDS[kind]

        def into() -> Dense:
            return Dense((dim,), (hidden,), ("embed", "mlp"), use_bias=use_bias, init=init,
                         rngs=rngs)

        self.gate = into() if gated else None
        self.up = into()
        self.down = Dense((hidden,), (dim,), ("mlp", "embed"), use_bias=use_bias, init=out_init,
                          rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        h_BTF = checkpoint_name(self.up(x_BTD), "up")
        if self.gate is None:
            h_BTF = act(h_BTF)
        else:
            h_BTF = act(checkpoint_name(self.gate(x_BTD), "gate")) * other_side(
                self.activation, h_BTF)
        return self.down(barrier(constrain(h_BTF, "batch", "seq", "act_mlp"), "tpu"))


def residual_init(std: float, num_layers: int) -> Initializer:
    """The initializer of matrices that write to the residual stream, as in GPT-2.

    Every layer writes twice and the variances add up, so `std` is divided by sqrt(2 * num_layers).
    """
    return normal(std / math.sqrt(2 * num_layers))
