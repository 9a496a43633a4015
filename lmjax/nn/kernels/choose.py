"""The table of attention kernels: what each can do, which one `auto` takes, and the call to it.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
K head_dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp

from lmjax.errors import UserError
from lmjax.nn.kernels.chunked import chunked_attention
from lmjax.nn.kernels.cudnn import cudnn_attention
from lmjax.nn.kernels.ring import ring_attention
from lmjax.nn.kernels.splash import LANES, splash_attention
from lmjax.nn.kernels.xla import xla_attention
from lmjax.nn.kv_cache import CacheArray, Int8Rows
from lmjax.nn.masking import AttentionMask
from lmjax.nn.sequence import num_shards

FEATURES = {  # what a model or a call may need from a kernel, in words
    "segments": "several documents or padding in a row",
    "softcap": "a soft-cap on the scores",
    "bias": "an additive bias",
    "window": "a sliding window",
    "cross": "queries and keys of different lengths",
    "context": "a sequence split over the mesh",
    "prefix": "tokens that are seen against causality",
    "two_sided_window": "a sliding window without causality",
    "gqa": "fewer key/value heads than query heads",
    "cache": "causality or a window by position, as with a key/value cache",
    "sinks": "a learned sink per head",
}
ALL = frozenset(FEATURES)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a model or one call needs from a kernel. Zero, None and "" stand for "not known"."""

    platform: str = ""  # "cpu", "gpu" or "tpu"
    softcap: float = 0.0  # of the scores; 0: none
    bias: bool = False  # whether a bias is added to the scores
    window: int = 0  # of the sliding window; 0: none
    causal: bool = True
    cross: bool = False  # whether queries and keys may have different lengths
    context: bool = False  # whether the sequence is split over devices
    prefix: bool = False  # whether some keys are visible to earlier queries
    gqa: bool = False  # whether there are fewer key/value heads than query heads
    sinks: bool = False  # whether each head has a sink
    cache: bool = False  # whether tokens are told apart by position, not by index
    head_dim: int = 0
    seq_len: int = 0  # of the rows; `auto` chooses by it
    dtype: Any = None  # of queries, keys and values

    @property
    def features(self) -> list[str]:
        """The names of `FEATURES` that are needed, in the order of that table."""
        needed = {
            "segments": True, "softcap": bool(self.softcap), "bias": self.bias,
            "window": self.window > 0, "cross": self.cross, "context": self.context,
            "prefix": self.prefix, "two_sided_window": self.window > 0 and not self.causal,
            "gqa": self.gqa, "cache": self.cache, "sinks": self.sinks}
        return [name for name in FEATURES if needed[name]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute attention: the function, where it runs and what it supports."""

    name: str  # as `model.attention` gives it
    # run(q, k, v, mask, scale=, softcap=, bias=) -> [B, T, H, K]; see `attend`. A kernel that can
    # do sinks gets sinks=, too, where there are any.
    run: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    can: frozenset[str]  # names of `FEATURES`
    note: str  # one phrase for the log
    head_dim_multiple: int = 1  # head_dim is a multiple of this
    max_head_dim: int = 0  # the largest head_dim; 0: any
    dtypes: tuple[str, ...] = ()  # of queries, keys and values; empty: any
    dense: bool = False  # whether it reads the dense mask, which `prepare` computes once
    # Pieces of `balance_sequence` must be multiples of this many tokens. 0: the kernel does not
    # support balanced rows.
    balance_multiple: int = 0
    keys: str = "kv_seq"  # axis name of the keys' sequence: "seq" where devices split the keys

    def lacks(self, needs: Needs) -> str:
        """The first of `needs` that this kernel cannot meet, in words; "" if it meets all."""
        if needs.platform and needs.platform not in self.platforms:
            return f"platform {needs.platform} (only {', '.join(self.platforms)})"
        for feature in needs.features:
            if feature not in self.can:
                return f"{feature} ({FEATURES[feature]})"
        too_large = self.max_head_dim and needs.head_dim > self.max_head_dim
        if needs.head_dim % self.head_dim_multiple or too_large:
            most = f" up to {self.max_head_dim}" if self.max_head_dim else ""
            return f"head_dim {needs.head_dim} (multiples of {self.head_dim_multiple}{most})"
        if needs.dtype is not None and self.dtypes:
            dtype = jnp.dtype(needs.dtype).name
            if dtype not in self.dtypes:
                return f"dtype {dtype} ({' or '.join(self.dtypes)})"
        return ""

    def check(self, needs: Needs) -> None:
        """Raises a `UserError` if this kernel cannot meet `needs`."""
        if lacking := self.lacks(needs):
            raise UserError(f"a kernel for {lacking}", f"{self.name!r}, which cannot", "use 'auto'",
                            where="attention")


KERNELS = {kernel.name: kernel for kernel in (
    Kernel("xla", xla_attention, ("cpu", "gpu", "tpu"), ALL,
           "exact, holds the [T, S] scores", dense=True),
    Kernel("chunked", chunked_attention, ("cpu", "gpu", "tpu"), ALL - {"bias", "prefix"},
           "exact, in blocks; memory grows with T, not with T * S"),
    Kernel("ring", ring_attention, ("cpu", "gpu", "tpu"), ALL - {"bias", "prefix", "cache"},
           "chunked, with keys and values passed round the context axis",
           keys="seq", balance_multiple=1),
    Kernel("splash", splash_attention, ("tpu",), ALL - {"bias", "prefix", "cache"},
           "Pallas kernel that visits only the tiles that can be seen",
           head_dim_multiple=8, balance_multiple=LANES),
    # cuDNN has no window without causality. It masks by index, so it cannot tell where a shard of
    # a sequence begins.
    Kernel("cudnn", cudnn_attention, ("gpu",),
           ALL - {"bias", "prefix", "cache", "softcap", "two_sided_window", "context", "sinks"},
           "cuDNN flash attention, documents as a dense mask",
           head_dim_multiple=8, max_head_dim=128, dtypes=("bfloat16", "float16")),
)}
FAST = {"tpu": "splash", "gpu": "cudnn"}  # what `auto` takes on a platform, if it meets the needs
# From this many keys on, the chunked kernel is clearly faster than the dense one: docs/attention.md
LONG = 1024


class Scores(TypedDict, total=False):
    """How scores become weights; see `attend`."""

    scale: Required[float]
    softcap: float  # 0: none
    bias: jax.Array | None
    sinks: jax.Array | None


def attend(q_BTHK: jax.Array, k_BSGK: CacheArray, v_BSGK: CacheArray, mask: AttentionMask, *,
           kernel: Kernel, **scores: Unpack[Scores]) -> jax.Array:
    """Attention: softmax(cap(q k^T * scale) + bias) v over the keys that each query sees.

    cap(x) = softcap * tanh(x / softcap), or x where softcap is 0. H is a multiple of G: query head
    h reads key/value head h // (H / G). Values may have another size than keys; the smaller are
    then filled up with zeros, but for the dense kernel, which takes them as they are.

    Args:
      bias: [1 or B, H, T, S], added to the scores in float32.
      sinks: [H], one more logit per head in the softmax, whose probability multiplies no value
        (gpt-oss; Xiao et al. 2023, arXiv:2309.17453, section 3.3, with a key of zeros).

    Returns:
      [B, T, H, K of the values] in the dtype of q; 0 for a query that sees no key.

    Raises:
      UserError: `kernel` does not support this call.
    """
    (T, H, K), (S, G, V) = q_BTHK.shape[1:], (*k_BSGK.shape[1:3], v_BSGK.shape[-1])
    softcap, bias = scores.get("softcap", 0.0), scores.get("bias")
    also = {} if scores.get("sinks") is None else {"sinks": scores["sinks"]}
    kernel.check(Needs(
        softcap=softcap, bias=bias is not None, window=mask.window, causal=mask.causal,
        cross=T != S, context=num_shards("seq") > 1, prefix=mask.kv_prefix is not None,
        gqa=H != G, cache=(mask.causal or mask.window > 0) and not mask.in_order,
        sinks=bool(also), head_dim=max(K, V), dtype=q_BTHK.dtype))
    if not kernel.dense:  # the others multiply floats
        k_BSGK, v_BSGK = (x.dense(q_BTHK.dtype) if isinstance(x, Int8Rows) else x
                          for x in (k_BSGK, v_BSGK))
        if K != V:
            q_BTHK, k_BSGK, v_BSGK = (
                jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(K, V) - x.shape[-1])))
                for x in (q_BTHK, k_BSGK, v_BSGK))
    y = kernel.run(q_BTHK, k_BSGK, v_BSGK, mask, scale=scores["scale"], softcap=softcap,
                   bias=bias, **also)
    return y if y.shape[-1] == V else y[..., :V]


def prepare(mask: AttentionMask, kernel: Kernel) -> AttentionMask:
    """Computes once, before the layers, what `kernel` needs of the mask in every layer."""
    return mask._replace(dense=mask.to_dense()) if kernel.dense else mask


def uses_balanced_rows(kernel: Kernel, T: int, *, causal: bool, capacity: float = 0.0) -> bool:
    """Whether rows of T tokens are laid out by `sequence.balance_sequence`.

    They are where a causal sequence is split over devices and the kernel supports it: in reading
    order, the devices with later tokens would have more keys to attend to.

    Args:
      capacity: of the experts, if there are any. With one, tokens take the experts' slots in the
        order in which they lie, so they stay in reading order.
    """
    multiple = kernel.balance_multiple * 2 * num_shards("seq")
    return causal and not capacity and multiple > 0 and num_shards("seq") > 1 and T % multiple == 0


def kernel_for_cache(kernel: Kernel, T: int, S: int) -> Kernel:
    """The kernel for T queries over a cache of S slots: `kernel`, if it supports caches.

    For a single query the scores are one row, so the dense kernel needs no more memory than the
    others, and it reads the keys as they lie.
    """
    if T == 1:
        return KERNELS["xla"]
    return kernel if "cache" in kernel.can else _by_length(S)


def choose_kernel(name: str, needs: Needs) -> tuple[Kernel, str]:
    """The kernel for a model, and why it was chosen.

    Args:
      name: "auto", or a name of `KERNELS`.
      needs: of the model; its platform is known.

    Raises:
      UserError: `name` is unknown, or that kernel does not support the model.
    """
    if name != "auto":
        if name not in KERNELS:
            raise UserError(f"one of auto, {', '.join(KERNELS)}", repr(name), "choose one of them",
                            where="attention")
        KERNELS[name].check(needs)
        return KERNELS[name], _reason("asked for", KERNELS[name])
    fast, lacking = FAST.get(needs.platform), ""
    if fast is not None:
        lacking = KERNELS[fast].lacks(needs)
        if not lacking:
            return KERNELS[fast], _reason(f"auto: on {needs.platform}", KERNELS[fast])
    only_dense = needs.bias or needs.prefix
    kernel = KERNELS["xla"] if only_dense else _by_length(needs.seq_len)
    why = f", where {fast} has no {lacking}" if lacking else ""
    rows = f", rows of {needs.seq_len}" if needs.seq_len else ""
    return kernel, _reason(f"auto: on {needs.platform}{why}{rows}", kernel)


def _by_length(S: int) -> Kernel:
    return KERNELS["chunked" if S >= LONG else "xla"]


def _reason(start: str, kernel: Kernel) -> str:
    no_cache = "; with a key/value cache xla or, if it is long, chunked"
    return f"{start}, {kernel.note}{'' if 'cache' in kernel.can else no_cache}"
