"""cuDNN's flash attention on NVIDIA GPUs, through JAX.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads, K head_dim.
"""

import jax
import jax.numpy as jnp

from lmjax.nn.masking import Visibility
from lmjax.nn.sequence import padded, per_shard


def cudnn_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visibility: Visibility, *, scale: float,
                    softcap: float, bias: None = None) -> jax.Array:
    """softmax(q k^T * scale) v. The kernel skips what lies in the future or beyond the window; documents and padding
    reach it as a dense mask [B, 1, T, S] in the dtype of q, the same for all heads."""
    length = q_BTHK.shape[1]
    q_BTHK, k_BSGK, v_BSGK, see = padded(2, q_BTHK, k_BSGK, v_BSGK, visibility)  # the backward kernel's masks are even
    window = (see.window - 1, 0) if see.window else None

    def body(q: jax.Array, k: jax.Array, v: jax.Array, see: Visibility, _: None) -> jax.Array:
        # Padding is a document too, until its result is dropped: cuDNN has no answer for a query without keys.
        same = see.q_segments[:, None, :, None] == see.kv_segments[:, None, None, :]
        y = jax.nn.dot_product_attention(q, k, v, mask=same, scale=scale, is_causal=see.causal,
                                         local_window_size=window, implementation="cudnn")
        return jnp.where(see.any_seen()[:, :, None, None], y, 0)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, see)[:, :length]
