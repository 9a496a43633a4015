"""cuDNN's flash attention on NVIDIA GPUs, through JAX.

Shape suffixes: B batch, T query sequence, S key sequence, H query heads, G key/value heads,
K head_dim.
"""

import jax
import jax.numpy as jnp

from lmjax.nn.masking import AttentionMask
from lmjax.nn.sequence import pad_sequences, per_shard


def cudnn_attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: AttentionMask,
                    *, scale: float, softcap: float, bias: None = None) -> jax.Array:
    """softmax(q k^T * scale) v; `softcap` and `bias` are never set (see `choose.KERNELS`).

    The kernel skips keys in the future or beyond the window. Documents and padding reach it as a
    dense mask [B, 1, T, S], the same for all heads.
    """
    length = q_BTHK.shape[1]
    # The backward kernel takes masks of even sizes only.
    q_BTHK, k_BSGK, v_BSGK, mask = pad_sequences(2, q_BTHK, k_BSGK, v_BSGK, mask)
    window = (mask.window - 1, 0) if mask.window else None

    def body(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, _: None) -> jax.Array:
        # cuDNN's result is undefined for a query without keys. So padding counts as one more
        # document, whose result is dropped afterwards.
        same = mask.q_segments[:, None, :, None] == mask.kv_segments[:, None, None, :]
        y = jax.nn.dot_product_attention(
            q, k, v, mask=same, scale=scale, is_causal=mask.causal, local_window_size=window,
            implementation="cudnn")
        return jnp.where(mask.sees_any_key()[:, :, None, None], y, 0)

    return per_shard(body, q_BTHK, k_BSGK, v_BSGK, mask)[:, :length]
