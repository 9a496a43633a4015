"""Matmul and RMS norm with backward passes that XLA compiles well on every backend.

On a CPU the compiler, left alone, fuses what makes a gradient into a strided, transposed copy for the
weight's matmul, which costs more than the matmul. `barrier` gives such a value an array of its own; on
TPU and GPU, where that fusion is what one wants, it does nothing. docs/speed.md has the figures.
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

from lmjax.nn import quantized
from lmjax.nn.quantized import EightBits, current_matmuls
from lmjax.sharding import current_layout, num_devices, platform

Dims = Any  # the dimension numbers of lax.dot_general
MATMUL = "matmul"  # what remat policies know the results by: they do not see into a custom_vjp


def barrier(x: jax.Array, *on: str) -> jax.Array:
    """x, kept out of its consumers' fusions on a CPU and on the other platforms named."""
    return lax.optimization_barrier(x) if platform() in ("cpu", *on) else x


@jax.custom_vjp
def gradient_barrier(x: jax.Array) -> jax.Array:
    """x, whose gradient has an array of its own on a TPU: fused into the matmul that makes it, what comes next (a
    norm's backward pass, the row sums of attention's) takes longer than alone."""
    return x


gradient_barrier.defvjp(lambda x: (x, None),
                        lambda _, g: (lax.optimization_barrier(g) if platform() == "tpu" else g,))


def dot(a: jax.Array, b: jax.Array, dims: Dims) -> jax.Array:
    """`lax.dot_general` in the dtype of a, accumulated in float32."""
    # XLA's fast bfloat16 matmul on a CPU is the one with float32 results. Elsewhere the hardware
    # accumulates in float32 anyway, and a bfloat16 result halves what a sharded matmul sends.
    result = jnp.float32 if platform() == "cpu" else None
    return lax.dot_general(a, b, dims, preferred_element_type=result).astype(a.dtype)


def dot_rows(a: jax.Array, b: jax.Array, batch_dims: int = 0, *, dtype: Any = None) -> jax.Array:
    """a^T b: [..., F], [..., G] -> [F, G], contracting all dimensions in between, in `dtype` (default: that of a).

    A CPU's matmul kernels contract only the last dimension of their left operand, so there the smaller
    operand goes left and is transposed first: left alone, XLA transposes whichever comes first.
    """
    dtype = dtype or a.dtype
    if platform() != "cpu" or num_devices() > 1:
        rows, batch = tuple(range(batch_dims, a.ndim - 1)), tuple(range(batch_dims))
        return lax.dot_general(a, b, ((rows, rows), (batch, batch)), preferred_element_type=dtype)
    if a.shape[-1] > b.shape[-1]:
        return jnp.swapaxes(dot_rows(b, a, batch_dims, dtype=dtype), -1, -2)
    a, b = (x.reshape(*x.shape[:batch_dims], -1, x.shape[-1]) for x in (a, b))
    left = barrier(jnp.swapaxes(a, -1, -2))
    dims = (((batch_dims + 1,), (batch_dims,)), (tuple(range(batch_dims)),) * 2)
    return lax.dot_general(left, b, dims, preferred_element_type=jnp.float32).astype(dtype)


def matmul(x: jax.Array, w: jax.Array, axes: tuple[str, str], num_in: int = 1) -> jax.Array:
    """x [..., *in] by w [*in, *out] -> [..., *out], where w has `num_in` dimensions in.

    axes: what the first dimension in and the first out are placed by, from which the sharding of w's gradient is known.
    """
    lead, out = x.shape[:x.ndim - num_in], w.shape[num_in:]
    low = current_matmuls()
    if platform() == "tpu":  # whose matmuls take apart and merge dimensions that others would copy
        return checkpoint_name(_matmul(x, w, axes, num_in, low), MATMUL)
    x, w = x.reshape(*lead, -1), w.reshape(math.prod(w.shape[:num_in]), -1)
    if num_devices() == 1:  # else merged dimensions could not keep their separate shardings
        x = x.reshape(-1, x.shape[-1])
    return checkpoint_name(_matmul(x, w, axes, 1, low).reshape(*lead, *out), MATMUL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x: jax.Array, w: jax.Array, axes: tuple[str, str], num_in: int, low: EightBits | None) -> jax.Array:
    dims = ((tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))), ((), ()))
    return quantized.dot(x, w, dims, (low.values, low.values)) if low else dot(x, w, dims)


def _matmul_forward(x: jax.Array, w: jax.Array, axes: tuple[str, str], num_in: int,
                    low: EightBits | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, w, axes, num_in, low), (x, w)


def _matmul_backward(axes: tuple[str, str], num_in: int, low: EightBits | None, saved: tuple[jax.Array, jax.Array],
                     g: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, w), g = saved, barrier(g, "tpu")  # else TPU makes g anew in each of the two matmuls
    rows = tuple(range(x.ndim - num_in))

    def contract(x: jax.Array, g: jax.Array) -> jax.Array:
        if x.ndim == g.ndim == len(rows) + 1:
            return dot_rows(x, g)
        return lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=x.dtype)

    d_w = sum_where_it_lies(contract, x, g, ("batch", "seq"), axes) if len(rows) == 2 else contract(x, g)
    dims = ((tuple(range(len(rows), g.ndim)), tuple(range(num_in, w.ndim))), ((), ()))
    return quantized.dot(g, w, dims, (low.gradients, low.values)) if low else dot(g, w, dims), d_w


_matmul.defvjp(_matmul_forward, _matmul_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32; scale has the rank of x."""
    return gradient_barrier(_rms_norm(x, scale, eps))


@jax.custom_vjp
def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return _rms_forward(x, scale, eps)[0]


def _rms_forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype), (x, scale, inverse)


def _rms_backward(saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, scale, inverse = saved
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    gs = g32 * scale
    along = jnp.sum(gs * x32, axis=-1, keepdims=True) * (inverse**3 / x.shape[-1])
    d_scale = jnp.sum(g32 * x32 * inverse, axis=tuple(range(x.ndim - 1)), keepdims=True)
    return (gs * inverse - x32 * along).astype(x.dtype), d_scale, None


_rms_norm.defvjp(_rms_forward, _rms_backward)


def sum_where_it_lies(contract: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, b: jax.Array,
                      rows: tuple[str, str], sides: tuple[str, str]) -> jax.Array:
    """`contract` of a [B, T, D, ...] and b [B, T, F, ...] over B and T (named by `rows`) to [D, ..., F, ...], laid out
    by D and F, which `sides` names.

    Each device contracts its own rows, and the sum over devices is a reduce-scatter along every mesh axis that a side
    is split over, one after the other. Left alone, TPU's compiler sums all of it everywhere before it takes each
    device's share, at twice the traffic, whenever the devices are more than one ring of the torus.
    """
    layout = current_layout()
    if layout is None:
        return contract(a, b)
    lead, own = [layout.on(name) for name in rows], [layout.on(name) for name in sides]
    over = [axis for on in lead for axis in on]
    if {*own[1]} & {*over} and not {*own[0]} & {*over}:  # narrow pieces of the last dimension would be all-reduced
        total = sum_where_it_lies(contract, b, a, rows, sides[::-1])
        return jnp.moveaxis(total, range(b.ndim - 2), range(2 - b.ndim, 0))
    inner = [tuple(axis for axis in side if axis not in over) for side in own]  # split before the sum as well
    mixed = any(split and split != side for split, side in zip(inner, own, strict=True))
    ways = [layout.ways(name) for name in rows]
    ragged = any(size % n for size, n in zip(a.shape[:2], ways, strict=True))
    if mixed or ragged or not over:  # the pieces would come in another order, or be of different sizes
        return contract(a, b)

    def local(a: jax.Array, b: jax.Array) -> jax.Array:
        total = contract(a, b)
        for dim, side in zip((0, a.ndim - 2), own, strict=True):
            for axis in side:
                if axis in over:
                    total = jax.lax.psum_scatter(total, axis, scatter_dimension=dim, tiled=True)
        rest = tuple(axis for axis in over if axis not in (*own[0], *own[1]))
        return jax.lax.psum(total, rest) if rest else total

    specs = tuple(PartitionSpec(*(on or None for on in (*lead, side))) for side in inner)
    out = PartitionSpec(own[0] or None, *[None] * (a.ndim - 3), own[1] or None)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=out, check_vma=False)(a, b)
