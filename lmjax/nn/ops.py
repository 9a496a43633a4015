"""Matmul, RMS norm and dropout, with backward passes that XLA compiles well on every backend.

On a CPU, XLA fuses the operations that compute a gradient into a strided, transposed copy for the
weight's matmul; that copy costs more than the matmul. `barrier` keeps such a value in an array of
its own. On TPU and GPU the fusion is useful, and `barrier` does nothing. docs/speed.md has the
figures.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lmjax.nn import packed, quantized
from lmjax.nn.packed import Packed
from lmjax.nn.quantized import EightBits, current_matmuls
from lmjax.sharding import current_layout, num_devices, platform

Dims = Any  # the dimension numbers of lax.dot_general
Sides = tuple[str | None, str | None]  # axis names of a matrix: of its first dimension in, and out
# The name under which remat policies find results of matmuls: they do not see into a custom_vjp.
MATMUL = "matmul"


def barrier(x: jax.Array, *on: str) -> jax.Array:
    """x, not fused into the operations that read it, on a CPU and on the platforms `on`."""
    return lax.optimization_barrier(x) if platform() in ("cpu", *on) else x


@jax.custom_vjp
def gradient_barrier(x: jax.Array) -> jax.Array:
    """x, whose gradient is kept in an array of its own on a TPU.

    The operations that read the gradient (the backward pass of a norm, the row sums of attention)
    take longer when they are fused into the matmul that computes it.
    """
    return x


gradient_barrier.defvjp(
    lambda x: (x, None),
    lambda _, g: (lax.optimization_barrier(g) if platform() == "tpu" else g,))


def dot(a: jax.Array, b: jax.Array, dims: Dims) -> jax.Array:
    """`lax.dot_general` in the dtype of a, accumulated in float32."""
    # XLA's fast bfloat16 matmul on a CPU is the one with float32 results. Elsewhere the hardware
    # accumulates in float32 anyway, and a bfloat16 result halves what a sharded matmul sends.
    result = jnp.float32 if platform() == "cpu" else None
    return lax.dot_general(a, b, dims, preferred_element_type=result).astype(a.dtype)


def dot_rows(a: jax.Array, b: jax.Array, batch_dims: int = 0, *, dtype: Any = None) -> jax.Array:
    """a^T b: [*batch, ..., F], [*batch, ..., G] -> [*batch, F, G] in `dtype`.

    Args:
      batch_dims: the number of leading batch dimensions; those between are contracted.
      dtype: by default that of a.
    """
    dtype = dtype or a.dtype
    if platform() != "cpu" or num_devices() > 1:
        rows, batch = tuple(range(batch_dims, a.ndim - 1)), tuple(range(batch_dims))
        dims = ((rows, rows), (batch, batch))
        return lax.dot_general(a, b, dims, preferred_element_type=dtype)
    # A CPU's matmul contracts only the last dimension of its left operand, so XLA transposes that
    # operand first. The smaller of the two goes left, to be transposed.
    if a.shape[-1] > b.shape[-1]:
        return jnp.swapaxes(dot_rows(b, a, batch_dims, dtype=dtype), -1, -2)
    a, b = (x.reshape(*x.shape[:batch_dims], -1, x.shape[-1]) for x in (a, b))
    left = barrier(jnp.swapaxes(a, -1, -2))
    dims = (((batch_dims + 1,), (batch_dims,)), (tuple(range(batch_dims)),) * 2)
    return lax.dot_general(left, b, dims, preferred_element_type=jnp.float32).astype(dtype)


def matmul(x: jax.Array, w: jax.Array | Packed, axes: Sides, num_in: int = 1) -> jax.Array:
    """x [..., *in] by w [*in, *out] -> [..., *out], in the dtypes of `quantized.matmuls_in`.

    A packed w is multiplied as it is stored.

    Args:
      axes: the axis names of w's first dimension in and first dimension out; they tell how w's
        gradient is sharded.
      num_in: the number of dimensions in.
    """
    if isinstance(w, Packed):
        return packed.matmul(x, w, num_in)
    lead, out = x.shape[:x.ndim - num_in], w.shape[num_in:]
    low = current_matmuls()
    if platform() == "tpu":  # splits and merges dimensions within a matmul; others would copy
        return checkpoint_name(_matmul(x, w, axes, num_in, low), MATMUL)
    x, w = x.reshape(*lead, -1), w.reshape(math.prod(w.shape[:num_in]), -1)
    if num_devices() == 1:  # on a mesh, merged rows could not keep their separate shardings
        x = x.reshape(-1, x.shape[-1])
    return checkpoint_name(_matmul(x, w, axes, 1, low).reshape(*lead, *out), MATMUL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x: jax.Array, w: jax.Array, axes: Sides, num_in: int,
            low: EightBits | None) -> jax.Array:
    dims = ((tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))), ((), ()))
    return quantized.dot(x, w, dims, (low.values, low.values)) if low else dot(x, w, dims)


def _matmul_forward(x: Any, w: Any, axes: Sides, num_in: int,
                    low: EightBits | None) -> tuple[jax.Array, tuple[Any, Any]]:
    """x and w are `CustomVJPPrimal`s, which tell whether each has a gradient.

    x is saved for the gradient of w, and w for that of x: a frozen w costs no activations.
    """
    saved = x.value if w.perturbed else None, w.value if x.perturbed else None
    return _matmul(x.value, w.value, axes, num_in, low), saved


def _matmul_backward(axes: Sides, num_in: int, low: EightBits | None,
                     saved: tuple[jax.Array | None, jax.Array | None],
                     g: Any) -> tuple[jax.Array | None, jax.Array | None]:
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None
    # Without the barrier, a TPU computes g twice: once for each of the two matmuls.
    (x, w), g = saved, barrier(g, "tpu")
    d_x = d_w = None
    if x is not None:
        d_w = _weight_gradient(x, g, axes, num_in)
    if w is not None:
        outs = tuple(range(g.ndim - w.ndim + num_in, g.ndim))
        dims = ((outs, tuple(range(num_in, w.ndim))), ((), ()))
        d_x = quantized.dot(g, w, dims, (low.gradients, low.values)) if low else dot(g, w, dims)
    return d_x, d_w


def _weight_gradient(x: jax.Array, g: jax.Array, axes: Sides, num_in: int) -> jax.Array:
    rows = tuple(range(x.ndim - num_in))

    def contract(x: jax.Array, g: jax.Array) -> jax.Array:
        if x.ndim == g.ndim == len(rows) + 1:
            return dot_rows(x, g)
        return lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=x.dtype)

    if len(rows) == 2:
        return contract_sharded_rows(contract, x, g, ("batch", "seq"), axes)
    return contract(x, g)


_matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def along_last(v: jax.Array, ndim: int) -> jax.Array:
    """v with leading dimensions of size 1, so that it has `ndim` dimensions."""
    return v.reshape((1,) * (ndim - v.ndim) + v.shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and rescales the rest; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32.

    `scale` has as many dimensions as x.
    """
    return gradient_barrier(_rms_norm(x, scale, eps))


@jax.custom_vjp
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return _rms_forward(x, scale, eps)[0]


def _rms_forward(x: jax.Array, scale: jax.Array,
                 eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_backward(saved: tuple[jax.Array, ...],
                  g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, scale, inverse = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    gs = g32 * scale
    along = jnp.sum(gs * x32, axis=-1, keepdims=True) * (inverse**3 / x.shape[-1])
    rows = tuple(i for i in range(x.ndim - 1) if scale.shape[i] == 1)
    d_scale = jnp.sum(g32 * x32 * inverse, axis=rows, keepdims=True)
    return (gs * inverse - x32 * along).astype(x.dtype), d_scale, None


_rms_norm.defvjp(_rms_forward, _rms_backward)


def contract_sharded_rows(contract: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array,
                          b: jax.Array, rows: tuple[str, str], sides: Sides) -> jax.Array:
    """Contracts the rows B and T of a [B, T, D, ...] and b [B, T, F, ...], in a sharded way.

    Each device contracts its own rows. The sum over devices is then a reduce-scatter along each
    mesh axis that splits D or F, one axis after another. TPU's compiler would do an all-reduce and
    slice its result, with twice the traffic, if the devices are more than one ring of the torus.

    Args:
      contract: computes [D, ..., F, ...] from a and b, or from one device's rows of them.
      rows: the axis names of B and T.
      sides: the axis names of D and F.

    Returns:
      [D, ..., F, ...], sharded by D and F.
    """
    layout = current_layout()
    if layout is None:
        return contract(a, b)
    lead, own = [layout.on(name) for name in rows], [layout.on(name) for name in sides]
    over = [axis for on in lead for axis in on]
    # Scattered along F, the last dimension, the pieces can be too narrow for a reduce-scatter; the
    # compiler would do an all-reduce. So F goes first if only F is scattered.
    if {*own[1]} & {*over} and not {*own[0]} & {*over}:
        total = contract_sharded_rows(contract, b, a, rows, sides[::-1])
        return jnp.moveaxis(total, range(b.ndim - 2), range(2 - b.ndim, 0))
    # The mesh axes that split a side before the sum, too.
    inner = [tuple(axis for axis in side if axis not in over) for side in own]
    mixed = any(split and split != side for split, side in zip(inner, own, strict=True))
    ways = [layout.ways(name) for name in rows]
    ragged = any(size % n for size, n in zip(a.shape[:2], ways, strict=True))
    if mixed or ragged or not over:  # pieces would come in another order, or differ in size
        return contract(a, b)

    def local(a: jax.Array, b: jax.Array) -> jax.Array:
        total = contract(a, b)
        for dim, side in zip((0, a.ndim - 2), own, strict=True):
            for axis in side:
                if axis in over:
                    total = lax.psum_scatter(total, axis, scatter_dimension=dim, tiled=True)
        rest = tuple(axis for axis in over if axis not in (*own[0], *own[1]))
        return lax.psum(total, rest) if rest else total

    specs = tuple(PartitionSpec(*(on or None for on in (*lead, side))) for side in inner)
    out = PartitionSpec(own[0] or None, *[None] * (a.ndim - 3), own[1] or None)
    run = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return run(a, b)
