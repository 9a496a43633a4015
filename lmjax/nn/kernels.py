"""Attention behind one function, with a table of what each kernel can do.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import dataclasses
from collections.abc import Callable

import jax

from lmjax.nn.kernels_xla import xla_attention
from lmjax.nn.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way of computing attention: where it runs and what it can honour."""

    run: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    dense: bool  # works from a dense mask [B, T, S]
    softcap: bool
    bias: bool
    note: str
    prefix: bool = False  # keys that are seen against causality


KERNELS = {
    "xla": Kernel(xla_attention, ("cpu", "gpu", "tpu"), dense=True, softcap=True, bias=True,
                  note="exact, holds the [T, S] scores", prefix=True),
}


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
           softcap: float = 0.0, bias: jax.Array | None = None, kernel: str) -> jax.Array:
    """softmax(cap(q k^T * scale) + bias) v over the keys that each query sees; one that sees none gets 0.

    cap(x) = softcap * tanh(x / softcap), or x where softcap is 0. H is a multiple of G: query head h reads
    key/value head h // (H / G). bias: [1 or B, H, T, S], added in float32. Returns [B, T, H, K] in the dtype of q.

    Raises:
      ValueError: `kernel` cannot do that.
    """
    _check(kernel, softcap=bool(softcap), bias=bias is not None, prefix=visibility.kv_prefix is not None)
    return KERNELS[kernel].run(q_BTHK, k_BSGK, v_BSGK, visibility, scale=scale, softcap=softcap, bias=bias)


def prepare(visibility: Visibility, kernel: str) -> Visibility:
    """What `kernel` needs of `visibility` that is the same in every layer, made once: call it before the layers."""
    return visibility._replace(made=visibility.mask()) if KERNELS[kernel].dense else visibility


def choose_kernel(name: str, platform: str, *, softcap: float = 0.0, bias: bool = False) -> tuple[str, str]:
    """(kernel, why it was chosen) for a model on `platform`.

    Raises:
      ValueError: `name` asks for a kernel that does not exist or cannot honour the model.
    """
    if name == "auto":
        return "xla", f"auto: on {platform}, {KERNELS['xla'].note}"
    if name not in KERNELS:
        raise ValueError(f"attention: expected one of auto, {', '.join(KERNELS)}, got {name!r}; choose one of them")
    if platform not in KERNELS[name].platforms:
        raise ValueError(f"attention: expected a kernel for platform {platform}, got {name!r}, which cannot; "
                         "use 'auto'")
    _check(name, softcap=bool(softcap), bias=bias)
    return name, f"asked for; {KERNELS[name].note}"


def _check(name: str, **needs: bool) -> None:
    for feature, needed in needs.items():
        if needed and not getattr(KERNELS[name], feature):
            raise ValueError(f"attention: expected a kernel for {feature}, got {name!r}, which cannot; use 'auto'")
