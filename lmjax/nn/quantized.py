"""Training matmuls of 8-bit operands, by Qwix.

What goes forward and what comes back through a layer is quantised, each row of one operand and each column of the
other by its own greatest magnitude. A weight's gradient, which sums over all tokens, stays in the compute dtype: its
rounding is what training notices (SwitchBack: Wortsman et al. 2023, arXiv:2304.13013).
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class EightBits(NamedTuple):
    """The dtypes of activations and weights, and of gradients."""

    values: Any
    gradients: Any


# fp8: range for gradients, precision for the rest (Micikevicius et al. 2022, arXiv:2209.05433).
MATMUL_DTYPES = {"int8": EightBits(jnp.int8, jnp.int8), "fp8": EightBits(jnp.float8_e4m3fn, jnp.float8_e5m2)}
_KIND: ContextVar[EightBits | None] = ContextVar("eight_bits", default=None)


def check_matmul_dtype(kind: str, platform: str) -> None:
    """Refuses a `kind`, "auto" or one of `MATMUL_DTYPES`, that cannot be had or gains nothing.

    Raises:
      ValueError: Qwix is missing, or a TPU, whose matrix units up to v6e take no fp8, is to do fp8.
    """
    if kind != "auto" and importlib.util.find_spec("qwix") is None:
        raise ValueError(f"train.matmul_dtype={kind}: expected the package qwix, got none; pip install 'lmjax[qwix]', "
                         "or set auto")
    if kind == "fp8" and platform == "tpu":
        raise ValueError("train.matmul_dtype: expected auto or int8 on TPU, whose matrix units do not take fp8, got "
                         "fp8; set int8")


@contextlib.contextmanager
def matmuls_in(kind: str) -> Iterator[None]:
    """While tracing inside, `ops.matmul` is done in `kind`: one of `MATMUL_DTYPES`, or "auto" for the compute dtype."""
    token = _KIND.set(MATMUL_DTYPES.get(kind))
    try:
        yield
    finally:
        _KIND.reset(token)


def current_matmuls() -> EightBits | None:
    """What is being traced for; None: the compute dtype."""
    return _KIND.get()


def dot(a: jax.Array, b: jax.Array, dims: Any, dtypes: tuple[Any, Any]) -> jax.Array:
    """`lax.dot_general` of a and b without batch dimensions, in 8-bit `dtypes`, with the result in the dtype of a."""
    import qwix

    def scaled(x: jax.Array, dtype: Any, contracted: tuple[int, ...]) -> Any:
        kept = tuple(axis for axis in range(x.ndim) if axis not in contracted)
        return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=kept)

    left, right = (scaled(*each) for each in zip((a, b), dtypes, dims[0], strict=True))
    return qwix.dot_general(left, right, dims).astype(a.dtype)
