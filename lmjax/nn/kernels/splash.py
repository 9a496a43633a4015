"""Splash attention on TPU: JAX's Pallas kernel, with its tile sizes as data.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.nn.masking import Visibility
from lmjax.nn.sequence import RESIDUALS, axes_of, in_reading_order, padded, per_shard, pieces, ways
from lmjax.sharding import current_layout, device_kind, platform

LANES = 128  # a tile's sides are multiples of the chip's vector width
PARTIAL = 4  # up to so many tiles of keys, dq comes from the kernel of dk and dv: a partial sum of each tile


class Tiles(NamedTuple):
    """Queries and keys a tile, and how many of its keys are worked on at a time: forward, and both backward kernels."""

    queries: int
    keys: int
    compute: int
    dq_queries: int
    dq_keys: int
    dkv_queries: int
    dkv_keys: int
    dkv_compute: int


TILES = {  # by `device_kind`; a larger tile reads the keys less often, and has to fit in the chip's VMEM
    "TPU v4": Tiles(512, 512, 512, 512, 512, 512, 512, 512),
    "TPU v5 lite": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
    "TPU v5": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
    "TPU v6 lite": Tiles(1024, 1024, 512, 1024, 1024, 1024, 1024, 512),
}
DEFAULT = Tiles(512, 512, 512, 512, 512, 512, 512, 512)


def splash_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
                     softcap: float, bias: None = None) -> jax.Array:
    """softmax(cap(q k^T * scale)) v. The queries' sequence may be split over the mesh, the keys are gathered.

    On a CPU the kernel is interpreted, for tests.
    """
    length = q_BTHK.shape[1]
    q_BTHK, k_BSGK, v_BSGK, see = padded(LANES * ways("seq"), q_BTHK, k_BSGK, v_BSGK, visibility)
    (T, H), S, spread = q_BTHK.shape[1:3], k_BSGK.shape[1], see.causal and see.index is not None
    kernel = make_kernel(T, S, H // ways("act_heads"), see.causal, see.window, softcap,
                         fit(TILES.get(device_kind(), DEFAULT), T // ways("seq") // (1 + spread), S), ways("seq"),
                         spread, platform() == "cpu")
    spec = None
    if (layout := current_layout()) is not None:
        spec = kernel.manual_sharding_spec(NamedSharding(layout.mesh, PartitionSpec(None, axes_of("seq") or None)))

    def body(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, kernel: Any) -> jax.Array:
        if spread:
            k, v, segments = (in_reading_order(x, ways("seq")) for x in (k, v, see.kv_segments))
            see = see._replace(kv_segments=segments)
        # To the kernel padding is a document too: its values have to be 0, since it sees nothing else.
        v = jnp.where((see.kv_segments > 0)[:, :, None, None], v, 0)
        named = (("query", q * jnp.asarray(scale, q.dtype)), ("key", k), ("value", v))
        q, k, v = (checkpoint_name(x.swapaxes(1, 2), name) for name, x in named)  # as the backward pass reads them
        y = jax.vmap(kernel)(q, k, v, splash.SegmentIds(see.q_segments, see.kv_segments)).swapaxes(1, 2)
        # A query sees itself, if it is in the keys; else what the kernel makes of no keys at all is not 0.
        return y if see.in_order else jnp.where(see.any_seen()[:, :, None, None], y, 0)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, see, extra=kernel, extra_spec=spec)[:, :length]


def fit(tiles: Tiles, T: int, S: int) -> Tiles:
    """`tiles` cut down to sizes that divide T queries and S keys, both multiples of `LANES`."""
    def divisor(size: int, of: int) -> int:
        return next(n for n in range(min(size, of), 0, -LANES) if of % n == 0)

    sizes = {name: divisor(size, T if name.endswith("queries") else S) for name, size in tiles._asdict().items()}
    return Tiles(**sizes | {"compute": divisor(tiles.compute, sizes["keys"]),
                            "dkv_compute": divisor(tiles.dkv_compute, sizes["dkv_keys"])})


@functools.lru_cache(maxsize=64)
def make_kernel(T: int, S: int, heads: int, causal: bool, window: int, softcap: float, tiles: Tiles, query_shards: int,
                spread: bool, interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel of one rule by index. The tables of the tiles to visit are made here, once for all layers.

    spread: the queries lie as `shards.balanced` has them, the keys in reading order."""
    back = window - 1 if window else None
    mask = (masks.LocalMask((T, S), (back, 0 if causal else back), 0) if window else
            masks.CausalMask((T, S)) if causal else masks.FullMask((T, S)))
    if spread:
        mask.q_sequence = mask.q_sequence.reshape(2 * query_shards, -1)[pieces(query_shards)].reshape(-1)
    fused = S // tiles.dkv_keys <= PARTIAL
    dq = {} if fused else dict(block_q_dq=tiles.dq_queries, block_kv_dq=tiles.dq_keys)
    sizes = splash.BlockSizes(
        block_q=tiles.queries, block_kv=tiles.keys, block_kv_compute=tiles.compute, **dq,
        block_q_dkv=tiles.dkv_queries, block_kv_dkv=tiles.dkv_keys, block_kv_dkv_compute=tiles.dkv_compute,
        use_fused_bwd_kernel=fused)
    with jax.ensure_compile_time_eval():  # constants, also where the first call is being traced
        return splash.make_splash_mha(masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1,
                                      q_seq_shards=query_shards, attn_logits_soft_cap=softcap or None,
                                      residual_checkpoint_name=RESIDUALS, interpret=interpret)
