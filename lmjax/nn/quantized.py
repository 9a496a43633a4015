"""Matmuls of 8-bit operands for training, by Qwix.

The matmul of the forward pass, and that of the gradient of a layer's input, quantise both operands.
Each row of one operand and each column of the other is scaled by its own largest magnitude. A
weight's gradient sums over all tokens and is the most sensitive to rounding, so it stays in the
compute dtype (SwitchBack: Wortsman et al. 2023, arXiv:2304.13013).
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.errors import UserError


class EightBits(NamedTuple):
    """The dtypes of one kind of 8-bit matmul."""

    values: Any  # of activations and weights
    gradients: Any  # of gradients of activations


# Values of `train.matmul_dtype` besides "auto". In fp8, gradients get the wider range and the rest
# the higher precision (Micikevicius et al. 2022, arXiv:2209.05433).
MATMUL_DTYPES = {
    "int8": EightBits(jnp.int8, jnp.int8),
    "fp8": EightBits(jnp.float8_e4m3fn, jnp.float8_e5m2),
}
_EIGHT_BITS: ContextVar[EightBits | None] = ContextVar("eight_bits", default=None)


def check_matmul_dtype(matmul_dtype: str, platform: str) -> None:
    """Refuses an 8-bit dtype that is not available on `platform`.

    Args:
      matmul_dtype: "auto" or a name of `MATMUL_DTYPES`.

    Raises:
      UserError: Qwix is not installed; or fp8 on TPU, whose matrix units up to v6e do not take it.
    """
    if matmul_dtype != "auto" and importlib.util.find_spec("qwix") is None:
        raise UserError("the package qwix", "none", "pip install 'lmjax[qwix]', or set auto",
                        where=f"train.matmul_dtype={matmul_dtype}")
    if matmul_dtype == "fp8" and platform == "tpu":
        raise UserError("auto or int8 on TPU, whose matrix units do not take fp8", "fp8",
                        "set int8", where="train.matmul_dtype")


@contextlib.contextmanager
def matmuls_in(matmul_dtype: str) -> Iterator[None]:
    """While tracing inside, `ops.matmul` computes in this dtype.

    Args:
      matmul_dtype: a name of `MATMUL_DTYPES`, or "auto" for the compute dtype.
    """
    token = _EIGHT_BITS.set(MATMUL_DTYPES.get(matmul_dtype))
    try:
        yield
    finally:
        _EIGHT_BITS.reset(token)


def current_matmuls() -> EightBits | None:
    """The dtypes set by the innermost `matmuls_in`; None stands for the compute dtype."""
    return _EIGHT_BITS.get()


def dot(a: jax.Array, b: jax.Array, dims: Any, dtypes: tuple[Any, Any]) -> jax.Array:
    """`lax.dot_general` without batch dimensions, on a and b quantised to the 8-bit `dtypes`.

    The result has the dtype of a.
    """
    import qwix

    def quantized(x: jax.Array, dtype: Any, contracted: tuple[int, ...]) -> Any:
        kept = tuple(axis for axis in range(x.ndim) if axis not in contracted)
        return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=kept)

    left, right = (quantized(*each) for each in zip((a, b), dtypes, dims[0], strict=True))
    return qwix.dot_general(left, right, dims).astype(a.dtype)
