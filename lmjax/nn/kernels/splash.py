"""Splash attention on TPU: JAX's Pallas kernel, with its tile sizes in a table.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
K head_dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.nn.masking import AttentionMask
from lmjax.nn.sequence import (
    KERNEL_RESIDUALS,
    balanced_pieces,
    heads_spec,
    in_reading_order,
    mesh_axes,
    num_shards,
    pad_sequences,
    per_shard,
)
from lmjax.sharding import current_layout, device_kind, platform

LANES = 128  # the sides of a tile are multiples of the chip's vector width
# Up to this many tiles of keys, one fused backward kernel computes dq along with dk and dv. It
# stores a partial sum of dq per tile of keys.
MAX_FUSED_TILES = 4


class Tiles(NamedTuple):
    """Tile sizes in tokens: of the forward kernel, and of the backward kernels for dq and dk/dv."""

    queries: int
    keys: int
    compute: int  # keys that are worked on at a time, within a tile
    dq_queries: int
    dq_keys: int
    dkv_queries: int
    dkv_keys: int
    dkv_compute: int


# By `device_kind`. Larger tiles read the keys less often, but have to fit in the chip's VMEM.
TILES = {
    "TPU v4": Tiles(512, 512, 512, 512, 512, 512, 512, 512),
    "TPU v5 lite": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
    "TPU v5": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
    "TPU v6 lite": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
}
DEFAULT_TILES = Tiles(512, 512, 512, 512, 512, 512, 512, 512)


class IndexMask(NamedTuple):
    """The part of the mask that depends on indices alone; it decides which tiles are visited."""

    T: int
    S: int
    causal: bool
    window: int  # 0: none
    query_shards: int  # devices over which the queries are split
    balanced: bool  # whether queries lie as `sequence.balance_sequence` puts them; keys never do


def splash_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask,
                     *, scale: float, softcap: float, bias: None = None,
                     sinks: jax.Array | None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v; `bias` is never set (see `choose.KERNELS`).

    The queries' sequence may be split over the mesh; every device gathers all keys. On a CPU the
    kernel is interpreted, for tests.
    """
    length, shards = q_BTHK.shape[1], num_shards("seq")
    q_BTHK, k_BSGK, v_BSGK, mask = pad_sequences(LANES * shards, q_BTHK, k_BSGK, v_BSGK, mask)
    (T, H), S = q_BTHK.shape[1:3], k_BSGK.shape[1]
    balanced = mask.causal and mask.reading_index is not None
    tiles = fit(TILES.get(device_kind(), DEFAULT_TILES), T // shards // (1 + balanced), S)
    kernel = make_kernel(IndexMask(T, S, mask.causal, mask.window, shards, balanced),
                         H // num_shards("act_heads"), softcap, tiles, platform() == "cpu")
    spec = None
    if (layout := current_layout()) is not None:
        queries = PartitionSpec(None, mesh_axes("seq") or None)
        spec = kernel.manual_sharding_spec(NamedSharding(layout.mesh, queries))

    def body(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask,
             extra: Any) -> jax.Array:
        kernel, sinks = extra
        if balanced:
            k, v, segments = (in_reading_order(x, shards) for x in (k, v, mask.kv_segments))
            mask = mask._replace(kv_segments=segments)
        # To the kernel, padding is one more document. Queries of padding see its values, which have
        # to be 0 for a result of 0.
        v = jnp.where((mask.kv_segments > 0)[:, :, None, None], v, 0)
        named = (("query", q * jnp.asarray(scale, q.dtype)), ("key", k), ("value", v))
        # Remat policies save these in the layout in which the backward pass reads them.
        q, k, v = (checkpoint_name(x.swapaxes(1, 2), name) for name, x in named)
        segment_ids = splash.SegmentIds(mask.q_segments, mask.kv_segments)
        run = kernel if sinks is None else functools.partial(kernel, sinks=sinks)
        y = jax.vmap(run)(q, k, v, segment_ids).swapaxes(1, 2)
        # If rows are in order, a query sees at least itself. Otherwise it may see no key, and the
        # kernel's result for it is not 0.
        return y if mask.in_order else jnp.where(mask.sees_any_key()[:, :, None, None], y, 0)

    y = per_shard(body, q_BTHK, k_BSGK, v_BSGK, mask, extra=(kernel, sinks),
                  extra_spec=(spec, heads_spec(sinks)))
    return y[:, :length]


def fit(tiles: Tiles, T: int, S: int) -> Tiles:
    """Reduces `tiles` to sizes that divide T queries and S keys, both multiples of `LANES`."""

    def divisor(size: int, of: int) -> int:
        return next(n for n in range(min(size, of), 0, -LANES) if of % n == 0)

    sizes = {name: divisor(size, T if name.endswith("queries") else S)
             for name, size in tiles._asdict().items()}
    sizes["compute"] = divisor(tiles.compute, sizes["keys"])
    sizes["dkv_compute"] = divisor(tiles.dkv_compute, sizes["dkv_keys"])
    return Tiles(**sizes)


@functools.lru_cache(maxsize=64)
def make_kernel(index_mask: IndexMask, heads: int, softcap: float, tiles: Tiles,
                interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel for one mask, with its tables of tiles to visit; all layers share it."""
    T, S, causal, window, shards, balanced = index_mask
    mask: Any
    if window:
        mask = masks.LocalMask((T, S), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    if balanced:
        pieces = mask.q_sequence.reshape(2 * shards, -1)[balanced_pieces(shards)]
        mask.q_sequence = pieces.reshape(-1)
    fused = S // tiles.dkv_keys <= MAX_FUSED_TILES
    dq: dict[str, Any] = {}
    if not fused:
        dq = dict(block_q_dq=tiles.dq_queries, block_kv_dq=tiles.dq_keys)
    sizes = splash.BlockSizes(
        block_q=tiles.queries, block_kv=tiles.keys, block_kv_compute=tiles.compute, **dq,
        block_q_dkv=tiles.dkv_queries, block_kv_dkv=tiles.dkv_keys,
        block_kv_dkv_compute=tiles.dkv_compute, use_fused_bwd_kernel=fused)
    with jax.ensure_compile_time_eval():  # the tables are constants, even if the caller is traced
        return splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
            q_seq_shards=shards, attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name=KERNEL_RESIDUALS, interpret=interpret)
