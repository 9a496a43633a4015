"""Weights stored as small integers with scales, and the matmuls that read them as they are.

A matrix is packed by output: the inputs of each output are cut into groups, and a group is a row of
integers times one float32 scale. In a tree of parameters it is a dict of its integers, under the
name of their format, and its `scales`; `nn.module` makes a `Packed` of it.

Shape suffixes: M rows of activations, F outputs, I inputs, N groups, G inputs per group.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.config import at_least, choice
from lmjax.errors import UserError
from lmjax.nn.kernels import native
from lmjax.nn.recorded import is_in_layer
from lmjax.sharding import num_devices, platform


class Format(NamedTuple):
    """How the integers of a packed matrix are stored and used."""

    bits: int  # of a weight; two of 4 bits share a byte
    # Whether activations are rounded to 8 bits, each token by its own largest magnitude, so that
    # hardware multiplies integers.
    dynamic: bool = False

    @property
    def largest(self) -> int:
        """The largest magnitude of a weight."""
        return 2 ** (self.bits - 1) - 1


FORMATS = {"int8": Format(8), "int8_dynamic": Format(8, dynamic=True), "int4": Format(4)}
SCALES = "scales"
# Up to this many rows, a CPU multiplies what it reads (`kernels.native`). For more rows, a float
# matmul of weights that are unpacked for it takes less time (docs/compression.md).
FEW_ROWS = 32
OFFSET = 8  # is added to a weight of 4 bits, so that its half byte has no sign


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the weights of a model are rounded.

    In training (`config.quantization`) the forward pass rounds them, and the gradient passes as if
    it had not (quantisation-aware training: Jacob et al. 2018, arXiv:1712.05877). `lmjax compress`
    stores them so.
    """

    weights: str = ""  # of the matrices of layers: a row of FORMATS; "": they are not rounded
    # Inputs that share a scale, for int4. int8 has a scale per output.
    group: int = 128
    # The same for the table of tokens and the unembedding, which are read row by row; "": floats,
    # as in directories of compressed-tensors.
    tables: str = "int8"

    def __post_init__(self) -> None:
        choice("quantization.weights", self.weights, ("", *FORMATS))
        choice("quantization.tables", self.tables, ("", "int8"))
        at_least(16, **{"quantization.group": self.group})
        if self.group % 2:
            raise UserError("an even number", self.group, "set 64 or 128",
                            where="quantization.group")


NOT_QUANTIZED = Quantization()
_ROUNDED: ContextVar[Quantization] = ContextVar("rounded", default=NOT_QUANTIZED)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"],
                   meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix [..., *out, I] of integers; it takes the place of a kernel or a table.

    values: int8 [..., *out, I], or uint8 [..., *out, I / 2]: a byte has an input of the first half
      of its group in its low bits, and the same one of the second half in its high bits.
    scales: float32 [..., *out, N].
    """

    values: Any
    scales: Any
    format: str

    def __getitem__(self, index: Any) -> "Packed":
        assert index is Ellipsis, index
        return self

    def astype(self, dtype: Any) -> "Packed":
        """Itself: what reads it takes the dtype of the activations."""
        return self

    def dense(self, dtype: Any) -> jax.Array:
        """The matrix [..., *out, I] in `dtype`."""
        ints = _ints_of_groups(self).astype(jnp.float32)
        return (ints * self.scales[..., None]).reshape(*self.values.shape[:-1], -1).astype(dtype)

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Rows [..., I] of a table in `dtype`. An id out of range gives the nearest row."""
        take = functools.partial(jnp.take, indices=ids, axis=0, mode="clip")
        return Packed(take(self.values), take(self.scales), self.format).dense(dtype)


def as_packed(tree: Any) -> Any:
    """The tree of parameters with a `Packed` for each dict of integers and scales."""
    if not isinstance(tree, Mapping):
        return tree
    name = next((name for name in FORMATS if name in tree), "")
    if name:
        return Packed(tree[name], tree[SCALES], name)
    return {key: as_packed(node) for key, node in tree.items()}


def group_size(inputs: int, format: str, group: int) -> int:
    """How many inputs share a scale: all of them in int8, and else a divisor of `group`.

    A matrix whose inputs have no common divisor of 16 or more with `group` has one group an output.
    """
    if FORMATS[format].bits == 8:
        return inputs
    common = math.gcd(inputs, group)
    return common if common >= 16 and common % 2 == 0 else inputs


def can_pack(inputs: int, format: str) -> bool:
    """Whether a matrix of so many inputs can be packed: two weights of 4 bits share a byte."""
    return FORMATS[format].bits == 8 or inputs % 2 == 0


def pack(w: jax.Array, format: str, group: int = 0, shrink: float | jax.Array = 1.0) -> Packed:
    """Rounds a matrix [..., *out, I] to the nearest integers.

    Args:
      group: inputs that share a scale (see `group_size`); 0: all.
      shrink: [..., *out, N] or a number: share of a group's largest magnitude that is still
        represented; larger weights are cut to it.
    """
    form, inputs = FORMATS[format], w.shape[-1]
    size = group_size(inputs, format, group or inputs)
    groups = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, size)
    largest = jnp.max(jnp.abs(groups), axis=-1) * shrink
    scales = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / form.largest
    ints = jnp.round(groups / scales[..., None])
    return from_ints(jnp.clip(ints, -form.largest, form.largest), scales, format)


def from_ints(ints: jax.Array, scales: jax.Array, format: str) -> Packed:
    """Stores whole numbers [..., *out, N, G] with their scales [..., *out, N]."""
    if FORMATS[format].bits == 8:
        return Packed(ints.astype(jnp.int8).reshape(*ints.shape[:-2], -1), scales, format)
    low, high = jnp.split((ints + OFFSET).astype(jnp.uint8), 2, axis=-1)
    return Packed((low | (high << 4)).reshape(*ints.shape[:-2], -1), scales, format)


def _ints_of_groups(w: Packed) -> jax.Array:
    """The weights as whole numbers [..., *out, N, G]."""
    groups = w.values.reshape(*w.scales.shape, -1)
    if FORMATS[w.format].bits == 8:
        return groups
    halves = [(groups & 15), (groups >> 4)]
    return jnp.concatenate(halves, axis=-1).astype(jnp.int8) - jnp.int8(OFFSET)


def matmul(x: jax.Array, w: Packed, num_in: int = 1) -> jax.Array:
    """x [..., *in] by w [*out, I] -> [..., *out], in the dtype of x.

    Args:
      num_in: the number of dimensions in; w has them merged.
    """
    lead, out = x.shape[:x.ndim - num_in], w.values.shape[:-1]
    rows = math.prod(lead)
    x = x.reshape(*lead, -1)
    form = FORMATS[w.format]
    if platform() == "cpu" and num_devices() == 1 and rows <= FEW_ROWS and native.is_available():
        flat = Packed(w.values.reshape(-1, w.values.shape[-1]),
                      w.scales.reshape(-1, w.scales.shape[-1]), w.format)
        y = _few_rows(x.reshape(rows, -1).astype(jnp.float32), flat)
        return y.reshape(*lead, *out).astype(x.dtype)
    dims = (((x.ndim - 1,), (len(out),)), ((), ()))
    scale = w.scales[..., 0].reshape((1,) * len(lead) + out)
    if form.dynamic:
        ints, step = rounded_rows(x)
        y = lax.dot_general(ints, w.values, dims,
                            preferred_element_type=jnp.int32).astype(jnp.float32)
        return (y * step.reshape(*lead, *(1,) * len(out)) * scale).astype(x.dtype)
    if w.scales.shape[-1] == 1:
        ints = _ints_of_groups(w)[..., 0, :].astype(x.dtype)
        y = lax.dot_general(x, ints, dims, preferred_element_type=jnp.float32)
        return (y * scale).astype(x.dtype)
    y = lax.dot_general(x, w.dense(x.dtype), dims, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


@jax.custom_vjp
def _few_rows(x_MI: jax.Array, w: Packed) -> jax.Array:
    """x by w, float32 [M, F], by `kernels.native`."""
    form = FORMATS[w.format]
    if form.dynamic:  # so that the result does not depend on how many rows there are
        ints, step = rounded_rows(x_MI)
        x_MI = ints.astype(jnp.float32) * step
    return native.multiply(x_MI, w.values, w.scales, form.bits)


_few_rows.defvjp(lambda x, w: (_few_rows(x, w), w),
                 lambda w, g: (g @ w.dense(g.dtype), None))


def rounded_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as int8, and the float32 step of each row [..., 1]."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    step = largest / FORMATS["int8"].largest
    return jnp.round(x / step).astype(jnp.int8), step


@contextlib.contextmanager
def rounded_to(quantization: Quantization) -> Iterator[None]:
    """While tracing inside, `in_training` rounds weights so."""
    token = _ROUNDED.set(quantization)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def in_training(w: jax.Array, num_in: int, lead: int = 0) -> jax.Array:
    """The kernel [*lead, *in, *out] of a layer as the innermost `rounded_to` rounds it.

    Its gradient is that of the kernel as it is (Bengio et al. 2013, arXiv:1308.3432).
    """
    q = _ROUNDED.get()
    if not q.weights or not is_in_layer():
        return w
    by_output = by_outputs(w, num_in, lead)
    if not can_pack(by_output.shape[-1], q.weights):
        return w
    near = pack(by_output, q.weights, q.group).dense(w.dtype)
    return w + lax.stop_gradient(by_inputs(near, w.shape, num_in, lead) - w)


def by_outputs(w: jax.Array, num_in: int, lead: int = 0) -> jax.Array:
    """A kernel [*lead, *in, *out] as [*lead, *out, I]."""
    first, last = lead, lead + num_in
    merged = w.reshape(*w.shape[:first], -1, *w.shape[last:])
    return jnp.moveaxis(merged, first, -1)


def by_inputs(w: jax.Array, shape: tuple[int, ...], num_in: int, lead: int = 0) -> jax.Array:
    """The inverse of `by_outputs`, for a kernel of this shape."""
    return jnp.moveaxis(w, -1, lead).reshape(shape)
