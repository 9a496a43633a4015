"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Hugging Face's Llama."""

import jax
import jax.numpy as jnp

# cos and sin, each float32 [B, T, head_dim / 2]
Rotation = tuple[jax.Array, jax.Array]


def rope_rotation(positions_BT: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Angles positions * theta^(-2i / head_dim), computed once for all layers."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies.reshape(1, 1, -1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + head_dim/2}) of every head, in float32."""
    cos, sin = (r[:, :, None, :] for r in rotation)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
