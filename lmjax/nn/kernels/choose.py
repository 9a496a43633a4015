"""Attention behind one function, with a table of what each kernel can do.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.nn.kernels.chunked import chunked_attention
from lmjax.nn.kernels.cudnn import cudnn_attention
from lmjax.nn.kernels.ring import ring_attention
from lmjax.nn.kernels.splash import LANES, splash_attention
from lmjax.nn.kernels.xla import xla_attention
from lmjax.nn.masking import Visibility
from lmjax.nn.sequence import ways

FEATURES = {  # what a model or a call may need, in words
    "segments": "several documents or padding in a row",
    "gqa": "fewer key/value heads than query heads",
    "cross": "queries and keys of different lengths",
    "window": "a sliding window",
    "two_sided_window": "a sliding window without causality",
    "softcap": "a soft-cap on the scores",
    "bias": "an additive bias",
    "prefix": "tokens that are seen against causality",
    "cache": "causality or a window by position, as with a key/value cache",
    "context": "a sequence split over the mesh",
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way of computing attention: where it runs and what it can honour.

    can: names of `FEATURES`. head_dim: divides the head_dims that it takes, none over max_head_dim (0: any).
    dtypes: of queries, keys and values (empty: any). dense: reads `Visibility.mask`, which `prepare` makes once.
    """

    run: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    can: frozenset[str]
    note: str
    head_dim: int = 1
    max_head_dim: int = 0
    dtypes: tuple[str, ...] = ()
    dense: bool = False
    balanced: int = 0  # tokens that pieces of a sequence spread by `shards.balanced` are multiples of; 0: it cannot
    keys: str = "kv_seq"  # the axis name of the keys' sequence, which says whether devices share or split it


ALL = frozenset(FEATURES)
KERNELS = {
    "xla": Kernel(xla_attention, ("cpu", "gpu", "tpu"), ALL, "exact, holds the [T, S] scores", dense=True),
    "chunked": Kernel(chunked_attention, ("cpu", "gpu", "tpu"), ALL - {"bias", "prefix"},
                      "exact, in blocks; memory grows with T, not with T * S"),
    "ring": Kernel(ring_attention, ("cpu", "gpu", "tpu"), ALL - {"bias", "prefix", "cache"},
                   "chunked, with keys and values passed round the context axis", keys="seq", balanced=1),
    "splash": Kernel(splash_attention, ("tpu",), ALL - {"bias", "prefix", "cache"},
                     "Pallas kernel that visits only the tiles that can be seen", head_dim=8, balanced=LANES),
    # Without causality cuDNN has no window; by index it cannot tell where a shard of a sequence begins.
    "cudnn": Kernel(cudnn_attention, ("gpu",), ALL - {"bias", "prefix", "cache", "softcap", "two_sided_window",
                                                   "context"},
                    "cuDNN flash attention, documents as a dense mask", head_dim=8, max_head_dim=128,
                    dtypes=("bfloat16", "float16")),
}
FAST = {"tpu": "splash", "gpu": "cudnn"}  # what auto takes where it can
LONG = 1024  # from this many keys on the chunked kernel is clearly faster than the dense one: docs/attention.md


def attend(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
           softcap: float = 0.0, bias: jax.Array | None = None, kernel: str) -> jax.Array:
    """softmax(cap(q k^T * scale) + bias) v over the keys that each query sees; one that sees none gets 0.

    cap(x) = softcap * tanh(x / softcap), or x where softcap is 0. H is a multiple of G: query head h reads
    key/value head h // (H / G). bias: [1 or B, H, T, S], added in float32. Returns [B, T, H, K] in the dtype of q.

    Raises:
      ValueError: `kernel` cannot do that.
    """
    see, (T, H, K), (S, G) = visibility, q_BTHK.shape[1:], k_BSGK.shape[1:3]
    needs = {"gqa": H != G, "cross": T != S, "context": ways("seq") > 1, "softcap": bool(softcap),
             "bias": bias is not None, "prefix": see.kv_prefix is not None, "window": see.window > 0,
             "two_sided_window": see.window > 0 and not see.causal,
             "cache": (see.causal or see.window > 0) and not see.in_order}
    _check(kernel, needs, K, q_BTHK.dtype)
    return KERNELS[kernel].run(q_BTHK, k_BSGK, v_BSGK, visibility, scale=scale, softcap=softcap, bias=bias)


def prepare(visibility: Visibility, kernel: str) -> Visibility:
    """What `kernel` needs of `visibility` that is the same in every layer, made once: call it before the layers."""
    return visibility._replace(made=visibility.mask()) if KERNELS[kernel].dense else visibility


def spreads(kernel: str, T: int, *, causal: bool, capacity: float = 0.0) -> bool:
    """Whether rows of T tokens are laid out by `shards.balanced`: where a sequence is split, and can be, and the later
    tokens have more to see. capacity: of experts, whose slots go by the order of tokens."""
    multiple = KERNELS[kernel].balanced * 2 * ways("seq")
    return causal and not capacity and multiple > 0 and ways("seq") > 1 and T % multiple == 0


def with_cache(kernel: str, T: int, S: int) -> str:
    """What runs instead of `kernel` when T queries attend to a cache of S slots: itself, if it can.

    For one query the scores are a row, so the dense kernel holds no more than the others and reads keys as they lie.
    """
    return "xla" if T == 1 else kernel if "cache" in KERNELS[kernel].can else _by_size(S)


def choose_kernel(name: str, platform: str, *, softcap: float = 0.0, bias: bool = False, window: int = 0,
                  causal: bool = True, cross: bool = False, context: bool = False, prefix: bool = False,
                  head_dim: int = 0, seq_len: int = 0, dtype: Any = None) -> tuple[str, str]:
    """(kernel, why it was chosen) for a model on `platform`; zeros and None: not known.

    Raises:
      ValueError: `name` asks for a kernel that does not exist or cannot honour the model.
    """
    needs = {"segments": True, "softcap": bool(softcap), "bias": bias, "window": window > 0, "cross": cross,
             "context": context, "prefix": prefix, "two_sided_window": window > 0 and not causal}
    if name != "auto":
        if name not in KERNELS:
            raise ValueError(f"attention: expected one of auto, {', '.join(KERNELS)}, got {name!r}; choose one of them")
        _check(name, needs, head_dim, dtype, platform)
        return name, _reason("asked for", name)
    fast, why = FAST.get(platform), ""
    if fast is not None:
        lacking = _lacking(fast, needs, head_dim, dtype, platform)
        if not lacking:
            return fast, _reason(f"auto: on {platform}", fast)
        why = f", where {fast} has no {lacking}"
    name = "xla" if bias or prefix else _by_size(seq_len)
    rows = f", rows of {seq_len}" if seq_len else ""
    return name, _reason(f"auto: on {platform}{why}{rows}", name)


def _by_size(S: int) -> str:
    return "chunked" if S >= LONG else "xla"


def _reason(start: str, name: str) -> str:
    cached = "" if "cache" in KERNELS[name].can else "; with a key/value cache xla or, if it is long, chunked"
    return f"{start}, {KERNELS[name].note}{cached}"


def _lacking(name: str, needs: dict[str, bool], head_dim: int, dtype: Any, platform: str | None = None) -> str:
    """The first thing that the kernel does not have, in words; empty if there is none."""
    kernel = KERNELS[name]
    if platform is not None and platform not in kernel.platforms:
        return f"platform {platform} (only {', '.join(kernel.platforms)})"
    for feature, needed in needs.items():
        if needed and feature not in kernel.can:
            return f"{feature} ({FEATURES[feature]})"
    if head_dim % kernel.head_dim or (kernel.max_head_dim and head_dim > kernel.max_head_dim):
        most = f" up to {kernel.max_head_dim}" if kernel.max_head_dim else ""
        return f"head_dim {head_dim} (multiples of {kernel.head_dim}{most})"
    if dtype is not None and kernel.dtypes and jnp.dtype(dtype).name not in kernel.dtypes:
        return f"dtype {jnp.dtype(dtype).name} ({' or '.join(kernel.dtypes)})"
    return ""


def _check(name: str, needs: dict[str, bool], head_dim: int, dtype: Any, platform: str | None = None) -> None:
    lacking = _lacking(name, needs, head_dim, dtype, platform)
    if lacking:
        raise ValueError(f"attention: expected a kernel for {lacking}, got {name!r}, which cannot; use 'auto'")
