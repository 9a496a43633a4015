"""cuDNN's flash attention on NVIDIA GPUs, through JAX.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import jax
import jax.numpy as jnp

from lmjax.nn.shards import per_shard
from lmjax.nn.visibility import Visibility


def cudnn_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
                    softcap: float, bias: None = None) -> jax.Array:
    """softmax(q k^T * scale) v. The kernel skips what lies in the future or beyond the window; documents and padding
    reach it as a dense mask [B, 1, T, S] in the dtype of q, the same for all heads."""
    see = visibility
    window = (see.window - 1, 0) if see.window else None

    def body(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, _: None) -> jax.Array:
        same = (see.q_segments[:, :, None] == see.kv_segments[:, None, :]) & (see.kv_segments[:, None, :] > 0)
        y = jax.nn.dot_product_attention(q, k, v, mask=same[:, None], scale=scale, is_causal=see.causal,
                                         local_window_size=window, implementation="cudnn")
        return jnp.where(jnp.any(same, axis=-1)[:, :, None, None], y, 0)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, see)
